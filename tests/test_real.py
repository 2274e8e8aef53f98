"""On a real ViT-S/14 (see `shared` in conftest.py): the official DINOv2 modules' tokens, and how the operators behave."""
import pytest
import torch
from safetensors.torch import load_file

from conftest import error
from model import ATTENTION, linear_attention, load_vit, softmax_attention


@pytest.fixture(scope="module")
def vit(shared):
    return load_vit(shared / "weights/vits14_saliency.safetensors").requires_grad_(False)


@pytest.fixture(scope="module")
def golden(shared):
    """What the official modules gave in float32, stored as float16."""
    return load_file(shared / "golden/vits14_official_tokens.safetensors")


@pytest.fixture(scope="module")
def qkv(vit, golden):
    """q, k, v (1, H, N, D) of each block on a real photo, 18 x 28 patches."""
    x, grid = vit.embed(vit.normalize(golden["wide252x392.pixels"]))
    found = []
    for block in vit.blocks:
        found.append(block.attn.project(block.norm1(x)))
        x = block(x, grid)
    return found


@pytest.mark.parametrize("name", ("square224", "wide252x392", "native518"))
def test_tokens_equal_the_official_ones(vit, golden, name):
    tokens = vit(vit.normalize(golden[f"{name}.pixels"]))
    assert error(tokens, golden[f"{name}.tokens"]) <= 1e-3              # float16, as stored, has 2e-4 itself


def test_blocks_equal_the_official_ones(vit, golden):
    x, grid = vit.embed(vit.normalize(golden["square224.pixels"]))
    for i, block in enumerate(vit.blocks[:6]):
        x = block(x, grid)
        if f"square224.block{i}" in golden:
            assert error(x, golden[f"square224.block{i}"]) <= 1e-3, f"block {i}"
    assert {"square224.block0", "square224.block5"} <= golden.keys()


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_half_precision_at_real_queries_keys_and_values(qkv, dtype, limit):
    for i, tensors in enumerate(qkv):
        q, k, v = (x.to(dtype) for x in tensors)
        truth = linear_attention(q.double(), k.double(), v.double())
        mean = v.double().mean(-2, keepdim=True)                        # errors are counted against what varies
        out = linear_attention(q, k, v)
        assert out.isfinite().all() and (out.std(-2) > 0).all()
        assert error(out.double() - mean, truth - mean) <= limit, f"block {i}"


@pytest.mark.parametrize("name", ("linear", "relu"))
def test_swapping_the_operator_alone_keeps_almost_nothing(qkv, name):
    """Why stage 1 exists: what softmax adds to the mean of V is lost, 1 being the error of that mean itself."""
    lost = []
    for q, k, v in qkv:
        truth, mean = softmax_attention(q, k, v), v.mean(-2, keepdim=True)
        lost.append(error(ATTENTION[name](q, k, v) - mean, truth - mean))
    assert sum(x > 0.8 for x in lost) > len(lost) / 2, lost
