"""model.py and demo/shapes.py against oracles: written-out formulas, torchvision. CPU, offline, under a minute."""
import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vision_transformer import VisionTransformer

import demo.shapes as shapes
import model
from conftest import error, randomise, refusal, same
from model import (ATTENTION, CHUNK, KNOWN, OPERATORS, Architecture, Hedgehog, InputError, Known, ViT, elu_plus_one, find_images,
                   linear_attention, linearize, load_pair, load_vit, save_vit, softmax_attention, softmax_reference)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TINY = Architecture(width=64, depth=2, heads=1, hidden=96, patch=4, grid=(3, 3))
names = {"ids": lambda value: getattr(value, "__name__", str(value).removeprefix("torch."))}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """TINY is a known architecture, so that files without our header are recognised by their shapes."""
    monkeypatch.setitem(KNOWN, "tiny", Known(TINY, "tiny", "mit"))


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clustered(N, D=64, heads=2, clusters=8):
    """q, k, v (1, H, N, D) in float64 around few centres, so that outputs differ between queries, unlike for noise."""
    random = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(3, heads, clusters, D, generator=random, dtype=torch.float64)
    query, key = torch.randint(clusters, (2, N), generator=random)
    noise = 0.5 * torch.randn(3, 1, heads, N, D, generator=random, dtype=torch.float64)
    return [centres[i, :, c].unsqueeze(0) + noise[i] for i, c in enumerate((query, key, key))]


def varying(x, v):
    """x less the mean of V: what attention adds to an average. Errors hide behind the mean, so they are measured here."""
    return x.double() - v.double().mean(-2, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Attention operators

def written_out(q, k, v, phi):
    """Linear attention as its definition has it, with the N x N map."""
    weights = phi(q) @ phi(k).transpose(-2, -1)
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("phi", [elu_plus_one, torch.relu], **names)
def test_linear_equals_its_written_out_form(phi):
    q, k, v = clustered(50)                                             # with 64 features ReLU always has an active one
    assert error(linear_attention(q, k, v, phi), written_out(q, k, v, phi)) <= 1e-10


@pytest.mark.parametrize("queries, keys", [(5, 5), (CHUNK - 1, CHUNK + 1), (CHUNK, CHUNK), (2 * CHUNK + 7, 3 * CHUNK), (3, 2 * CHUNK + 1)])
def test_chunks_of_tokens_change_nothing(queries, keys):
    inputs = [seeded(2, 2, n, 8, seed=i).requires_grad_() for i, n in enumerate((queries, keys, keys))]
    pull = seeded(2, 2, queries, 8, seed=3)
    results = [[out, *torch.autograd.grad(out, inputs, pull)] for out in
               (linear_attention(*inputs), written_out(*inputs, elu_plus_one))]
    for found, truth in zip(*results):
        assert error(found, truth) <= 1e-10


@pytest.mark.parametrize("chunk", (1, 7, 50, 64))
def test_the_length_of_a_chunk_is_without_meaning(monkeypatch, chunk):
    q, k, v = clustered(50)
    whole = linear_attention(q, k, v)
    monkeypatch.setattr(model, "CHUNK", chunk)
    assert error(linear_attention(q, k, v), whole) <= 1e-12


def test_elu_plus_one_is_one_plus_elu():
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    assert torch.allclose(elu_plus_one(x), 1 + F.elu(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), **names)
def test_the_slope_of_elu_plus_one_is_that_of_elu(dtype):
    x = torch.tensor([-200, -30, -1, -1e-3, 1e-3, 1, 30, 200], dtype=dtype, requires_grad=True)
    found, truth = (torch.autograd.grad(y, x, torch.full_like(x, 3))[0] for y in (elu_plus_one(x), F.elu(x)))
    assert torch.allclose(found, truth, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_elu_plus_one_can_be_differentiated_twice():
    x = seeded(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(elu_plus_one, x) and torch.autograd.gradgradcheck(elu_plus_one, x)


def test_hedgehog_equals_its_written_out_form():
    q, k, v = clustered(50)
    block = randomise(model.Attention(replace(TINY, width=128, heads=2), "hedgehog").double())     # two different maps
    x = torch.einsum("hij,bhnj->bhni", block.map_q.weight, q)
    y = torch.einsum("hij,bhnj->bhni", block.map_k.weight, k)
    weights = sum((s * x).softmax(-1) @ (s * y).softmax(-1).transpose(-2, -1) for s in (1, -1))
    want = weights / weights.sum(-1, keepdim=True) @ v
    assert error(block.attend(q, k, v, (5, 10)), torch.cat([want[:, 0], want[:, 1]], dim=-1)) <= 1e-10


def test_softmax_equals_its_written_out_form():
    q, k, v = clustered(50)
    assert error(softmax_attention(q, k, v), softmax_reference(q, k, v)) <= 1e-10


@pytest.mark.parametrize("name", ATTENTION)
def test_gradcheck(name):
    q, k, v = (x.requires_grad_() for x in clustered(6, D=5, clusters=3))
    assert torch.autograd.gradcheck(ATTENTION[name], (q, k, v))


@pytest.mark.parametrize("N", (197, 785, 4096, 65_536))                 # 785: where float16's textbook form breaks
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float32, 2e-6)], **names)
def test_half_precision_is_as_good_as_rounding_the_exact_result(dtype, limit, N):
    q, k, v = (x.to(dtype) for x in clustered(N, heads=1))
    truth = linear_attention(q.double(), k.double(), v.double())
    out, part = linear_attention(q, k, v), varying(truth, v)
    assert out.dtype == dtype
    assert out.isfinite().all() and (out.std(-2) > 0).all()             # overflow may also show as zeros, the same for all
    found, rounding = error(varying(out, v), part), error(varying(truth.to(dtype), v), part)
    assert found <= limit
    if dtype != torch.float32:                                          # there the sums' own rounding is as large
        assert found <= 2 * rounding                                    # 2: the result is rounded, and so was its input


@pytest.mark.parametrize("dtype", DTYPES[:2], **names)
def test_half_precision_gradients(dtype):
    inputs = [x.to(dtype).requires_grad_() for x in clustered(4096)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    pull = seeded(*inputs[0].shape).to(dtype)                           # gradient of some loss
    found = torch.autograd.grad(linear_attention(*inputs), inputs, pull)
    truth = torch.autograd.grad(linear_attention(*exact), exact, pull.double())
    for a, b in zip(found, truth):                                      # four roundings on the way: phi, 1 / total, a
        assert error(a, b) <= 4 * torch.finfo(dtype).eps / 2            # product, the result; each by half an eps at most


def test_float16_survives_what_the_textbook_form_does_not():
    q, k, v = clustered(4096)
    q, k, v = q.half(), (30 * k).half(), v.half()
    assert elu_plus_one(k).sum(-2).isinf().any()                        # the textbook's sum: this test sees an overflow
    out, truth = linear_attention(q, k, v), linear_attention(q.double(), k.double(), v.double())
    assert error(varying(out, v), varying(truth, v)) <= 5e-3


def test_autocast_does_not_change_the_dtypes_inside():
    q, k, v = (x.float() for x in clustered(4096))
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_attention(q, k, v)                              # float32 in, so its products stay float32
    assert torch.equal(inside, linear_attention(q, k, v))


def test_under_autocast_a_linear_vit_loses_no_more_than_a_softmax_vit():
    images, lost = seeded(2, 3, 64, 64, dtype=torch.float32), {}
    for attention in ("softmax", "linear"):
        vit = randomise(ViT(TINY, attention))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = vit(images)
        lost[attention] = error(tokens, vit(images))
    assert lost["linear"] <= 2 * lost["softmax"] < 0.1


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES, **names)
def test_constant_values_give_that_constant(name, dtype):
    q, k, v = (x.to(dtype) for x in clustered(1000))
    out = ATTENTION[name](q, k, torch.full_like(v, 0.7))
    assert torch.allclose(out.float(), torch.tensor(0.7), rtol=4 * torch.finfo(dtype).eps)   # a rounding a step


@pytest.mark.parametrize("dtype", DTYPES, **names)
def test_very_negative_queries_still_attend(dtype):
    q, k, v = (x.to(dtype) for x in clustered(1000))                    # phi(-20) = 2e-9, which an eps would drown
    out = linear_attention(torch.full_like(q, -20), k, torch.full_like(v, 0.7))
    assert torch.allclose(out.float(), torch.tensor(0.7), rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ("linear", "relu"))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), **names)
@pytest.mark.parametrize("below", [(1e4, 0), (0, 1e4), (1e4, 1e4)], ids=("queries", "keys", "both"))
def test_without_an_active_feature_nothing_is_nan(name, dtype, below):
    q, k, v = (x.to(dtype).requires_grad_() for x in clustered(20))
    out = ATTENTION[name](q - below[0], k - below[1], v)
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v))
    assert name == "linear" or (out == 0).all()


@pytest.mark.parametrize("name", ATTENTION)
def test_the_order_of_keys_is_without_meaning(name):
    q, k, v = clustered(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert error(ATTENTION[name](q, k[..., order, :], v[..., order, :]), ATTENTION[name](q, k, v)) <= 1e-12


def flops(operator, N):
    with FlopCounterMode(display=False) as counter:
        operator(*(torch.zeros(2, 3, N, 64) for _ in "qkv"))
    return counter.get_total_flops()


def test_linear_costs_double_for_double_the_tokens_and_softmax_four_times():
    assert flops(linear_attention, 512) == 2 * flops(linear_attention, 256) > 0
    assert flops(softmax_reference, 512) == 4 * flops(softmax_reference, 256) > 0      # the counter does see the map


def check_compiled(eager, module, *inputs):
    """Compiled without a break in the graph, it has the outputs and gradients of `eager`."""
    torch._dynamo.reset()
    results = []
    for call in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()])])
    for a, b in zip(*results):                                          # float32 sums, where decomposed in another order
        assert error(b, a) <= 1e-5


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_compile(name):
    block = model.Attention(replace(TINY, heads=2), name)
    maps = nn.ModuleList(child for child in block.children() if isinstance(child, Hedgehog))
    q, k, v = (x.float() for x in clustered(17, D=32))
    check_compiled(lambda q, k, v: block.attend(q, k, v, (4, 4)), maps, q, k, v)


@pytest.mark.parametrize("attention", ("softmax", "linear", "hedgehog"))
def test_vit_compiles(attention):
    vit = randomise(ViT(TINY, attention))
    check_compiled(vit, vit, seeded(2, 3, 16, 20, dtype=torch.float32))   # not its native size: with resized positions


# ---------------------------------------------------------------------------------------------------------------------
# The network against others' implementations

def from_torchvision(tensors):
    """torchvision's names -> timm's."""
    pairs = (("encoder.layers.encoder_layer_", "blocks."), ("ln_1", "norm1"), ("ln_2", "norm2"), ("mlp.0", "mlp.fc1"),
             ("mlp.3", "mlp.fc2"), ("self_attention.in_proj_", "attn.qkv."), ("self_attention.out_proj", "attn.proj"),
             ("encoder.pos_embedding", "pos_embed"), ("encoder.ln", "norm"), ("conv_proj", "patch_embed.proj"),
             ("class_token", "cls_token"))
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = tensor
    return {name: tensor for name, tensor in renamed.items() if not name.startswith("heads.")}


@pytest.mark.parametrize("width, heads, patch, side", [(128, 2, 16, 4), (192, 3, 8, 7), (96, 3, 4, 6), (80, 5, 14, 3)])
def test_whole_vit_equals_torchvision(width, heads, patch, side):
    other = randomise(VisionTransformer(side * patch, patch, 3, heads, width, 2 * width))
    with torch.no_grad():                                               # tokens as small as in trained ViTs: eps counts
        for p in (other.class_token, other.encoder.pos_embedding, *other.conv_proj.parameters()):
            p.mul_(0.03)
    vit = ViT(Architecture(width, 3, heads, 2 * width, patch, (side, side)))
    vit.load_state_dict(from_torchvision(other.state_dict()))
    images = seeded(2, 3, side * patch, side * patch, dtype=torch.float32)
    with torch.no_grad():
        tokens = torch.cat([other.class_token.expand(2, -1, -1), other._process_input(images)], dim=1)
        assert error(vit(images), other.encoder(tokens)) <= 1e-5


def test_normalize_gives_the_pixels_the_weights_expect():
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = ViT(replace(TINY, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))).normalize(images)
    for channel, (mean, std) in enumerate([(0.1, 1), (0.2, 2), (0.3, 4)]):
        assert torch.allclose(found[:, channel], (images[:, channel].float() / 255 - mean) / std, atol=1e-6)


def cubic(n_in, n_out, scale, antialias):
    """Bicubic interpolation along one axis (Keys 1981) as a matrix, written out for PyTorch's two kinds.

    Plain: a = -0.75, edges repeated. Antialias: a = -0.5, the kernel widened where it shrinks, cut off at the edges.
    """
    a, wide = (-0.5, max(1, 1 / scale)) if antialias else (-0.75, 1)
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        x = (i + 0.5) / scale - 0.5                                     # where output i lies among the inputs
        for j in range(math.floor(x - 2 * wide), math.ceil(x + 2 * wide) + 1):
            t = abs(x - j) / wide
            w = ((a + 2) * t - (a + 3)) * t * t + 1 if t <= 1 else ((t - 5) * t + 8) * t * a - 4 * a if t < 2 else 0
            if not antialias or 0 <= j < n_in:
                matrix[i, min(max(j, 0), n_in - 1)] += w
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("grid", [(16, 16), (18, 28), (50, 37), (1, 3)])
@pytest.mark.parametrize("rule", ("dinov2", "timm"))
def test_positions_follow_the_published_formula(rule, grid):
    vit = randomise(ViT(replace(TINY, grid=(37, 37), position=rule, depth=0)))
    table = vit.pos_embed[0, 1:].view(37, 37, 64).double()
    offset = 0.1 if rule == "dinov2" else 0                             # DINOv2: in the scale, not only in the size
    down, across = (cubic(37, n, (n + offset) / 37, antialias=rule == "timm") for n in grid)
    want = torch.einsum("ir,js,rsc->ijc", down, across, table)
    cls, found = vit.positions(grid)
    assert torch.equal(cls, vit.pos_embed[:, :1])
    assert error(found, want.reshape(1, -1, 64)) <= 1e-5                # float32 coordinates


@pytest.mark.parametrize("rule", ("dinov2", "timm"))
def test_the_native_grid_keeps_its_positions(rule):
    vit = randomise(ViT(replace(TINY, grid=(5, 7), position=rule)))
    cls, table = vit.positions((5, 7))
    assert torch.equal(torch.cat([cls, table], dim=1), vit.pos_embed)


def test_the_two_position_rules_differ():
    vits = [randomise(ViT(replace(TINY, grid=(16, 16), position=rule))) for rule in ("dinov2", "timm")]
    assert error(vits[0].positions((10, 12))[1], vits[1].positions((10, 12))[1]) > 0.01


@pytest.mark.parametrize("rule", ("dinov2", "timm"))
def test_positions_have_one_row_a_patch_at_any_grid(rule):
    vit = ViT(replace(TINY, width=2, grid=(37, 37), position=rule, depth=0))
    for n in range(1, 100):                                             # a scale could round to one row too few
        assert vit.positions((n, 100 - n))[1].shape == (1, n * (100 - n), 2)


def test_the_grid_is_rows_then_columns():
    vit = randomise(ViT(replace(TINY, depth=0)))
    images = torch.zeros(1, 3, 8, 20)
    images[:, :, 4:, 16:] = 1                                           # the last patch of the second row of five
    bright = vit.patch_embed(images) - vit.patch_embed(torch.zeros_like(images))
    assert bright.norm(dim=-1).nonzero().tolist() == [[0, 9]]
    assert vit.grid(8, 20) == (2, 5)


@pytest.mark.parametrize("height, width", [(13, 12), (12, 13), (3, 12), (0, 12)])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(height, width):
    assert f"{height} x {width}" in refusal(ViT(TINY), torch.zeros(1, 3, height, width))


def test_tokens_are_cls_then_registers_then_patches():
    vit = randomise(ViT(replace(TINY, registers=4)))
    tokens, grid = vit.embed(torch.zeros(2, 3, 12, 12))
    assert torch.equal(tokens[:, :1], (vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1))
    assert torch.equal(tokens[:, 1:5], vit.reg_token.expand(2, -1, -1))                # without a position
    assert torch.allclose(tokens[:, 5:], vit.patch_embed.proj.bias + vit.pos_embed[:, 1:])
    assert grid == (3, 3) and vit.arch.prefix == 5


def test_unknown_attention_is_refused():
    assert "'mamba'" in refusal(ViT, TINY, "mamba")


# ---------------------------------------------------------------------------------------------------------------------
# linearize

@pytest.mark.parametrize("attention", ("linear", "relu", "hedgehog"))
def test_linearize_copies_every_weight_and_swaps_the_operator(attention):
    teacher = randomise(ViT(replace(TINY, layerscale=True, registers=2)))
    student = linearize(teacher, attention)
    assert student.attention == attention and all(block.attn.attention == attention for block in student.blocks)
    assert teacher.attention == "softmax" and all(block.attn.attention == "softmax" for block in teacher.blocks)
    own = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(own[name], tensor) and own[name].data_ptr() != tensor.data_ptr()
    assert all(".map_" in name for name in own.keys() - teacher.state_dict().keys())
    images = seeded(1, 3, 12, 12, dtype=torch.float32)
    assert error(student(images), teacher(images)) > 0.01


def test_hedgehog_maps_start_at_identity():
    student = linearize(randomise(ViT(TINY)), "hedgehog")
    x = seeded(2, 1, 5, 64, dtype=torch.float32)
    for block in student.blocks:
        for features in (block.attn.map_q, block.attn.map_k):
            assert torch.allclose(features(x), torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1))


# ---------------------------------------------------------------------------------------------------------------------
# Weight files

@pytest.mark.parametrize("attention", OPERATORS)
def test_save_and_load_are_bit_exact(tmp_path, attention):
    arch = replace(TINY, heads=4, grid=(2, 5), registers=3, cls_position=False, layerscale=True, eps=1e-5, mean=(0.5,) * 3)
    vit = randomise(ViT(arch, attention))
    save_vit(vit, tmp_path / "a.safetensors", head=nn.Linear(64, 3), note="of this run")
    again = load_vit(tmp_path / "a.safetensors")
    assert same(vit, again) and again.arch == arch and again.attention == attention
    assert again.facts == {"note": "of this run"} and not again.training
    images = seeded(1, 3, 12, 20, dtype=torch.float32)
    assert torch.equal(again(images), vit(images))


def test_the_header_is_readable_without_this_project(tmp_path):
    save_vit(ViT(TINY, "relu"), tmp_path / "a.safetensors", epochs=3)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        header = json.loads(file.metadata()["adala"])
    assert (header["architecture"]["width"], header["attention"], header["epochs"]) == (64, "relu", 3)


def test_a_head_is_saved_beside_the_backbone(tmp_path):
    head = nn.Linear(64, 3)
    save_vit(ViT(TINY), tmp_path / "a.safetensors", head=head)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["head.weight"], head.weight)


@pytest.mark.parametrize("wrap", (None, "model", "teacher"))
def test_pth_files_load(tmp_path, wrap):
    vit = randomise(ViT(TINY))
    torch.save({wrap: vit.state_dict(), "epoch": 3} if wrap else vit.state_dict(), tmp_path / "a.pth")
    assert same(load_vit(tmp_path / "a.pth"), vit)


def test_float16_files_load_as_float32(tmp_path):
    vit = randomise(ViT(TINY)).half()
    save_file(vit.state_dict(), tmp_path / "a.safetensors")
    again = load_vit(tmp_path / "a.safetensors")
    assert all(p.dtype == torch.float32 for p in again.parameters()) and same(again, vit.float())


def test_tensors_of_other_tasks_are_skipped_and_named(tmp_path, capsys):
    vit = randomise(ViT(TINY))
    extra = {"head.weight": torch.ones(3, 64), "head.bias": torch.ones(3), "mask_token": torch.ones(1, 64)}
    torch.save(vit.state_dict() | extra, tmp_path / "a.pth")
    assert same(load_vit(tmp_path / "a.pth"), vit)
    printed = capsys.readouterr().out
    assert all(name in printed for name in extra)


@pytest.mark.parametrize("attention", ("linear", "hedgehog"))
def test_load_vit_can_swap_the_operator(tmp_path, attention):
    save_vit(randomise(ViT(TINY)), tmp_path / "a.safetensors", note=1)
    vit = load_vit(tmp_path / "a.safetensors", attention=attention)
    assert vit.attention == attention and vit.facts == {"note": 1}


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize("word, change, name", [
    ("missing", lambda t: without(t, "blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias"),
    ("missing", lambda t: without(t, "norm.bias"), "norm.bias"),
    ("unexpected", lambda t: t | {"blocks.0.attn.extra": torch.ones(1)}, "blocks.0.attn.extra"),
    ("mis-shaped", lambda t: t | {"blocks.1.mlp.fc2.weight": torch.ones(96, 64)}, "blocks.1.mlp.fc2.weight (96, 64)"),
    ("mis-shaped", lambda t: t | {"cls_token": torch.ones(1, 2, 64)}, "cls_token (1, 2, 64)"),
])
@pytest.mark.parametrize("ours", (True, False), ids=("ours", "foreign"))
def test_a_tensor_that_does_not_fit_is_named(tmp_path, word, change, name, ours):
    save_vit(ViT(TINY), tmp_path / "whole.safetensors")
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(tmp_path / "whole.safetensors")), tmp_path / "a.safetensors", metadata if ours else None)
    message = refusal(load_vit, tmp_path / "a.safetensors")
    assert f"{word}: {name}" in message and str(tmp_path / "a.safetensors") in message


@pytest.mark.parametrize("suffix", ("safetensors", "pth", "pt"))
@pytest.mark.parametrize("content", (b"", b"no weights, only text\n", b".\n", bytes(range(256)) * 9), ids=range(4))
def test_a_junk_file_is_refused(tmp_path, suffix, content):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    assert f"a.{suffix}" in refusal(load_vit, tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ("safetensors", "pth"))
def test_a_cut_file_is_refused(tmp_path, suffix):
    path, vit = tmp_path / f"a.{suffix}", ViT(TINY)
    save_vit(vit, path) if suffix == "safetensors" else torch.save(vit.state_dict(), path)
    whole = path.read_bytes()
    for part in (0.0001, 0.01, 0.5, 0.9, 0.9999):
        path.write_bytes(whole[:int(part * len(whole))])
        assert str(path) in refusal(load_vit, path)


@pytest.mark.parametrize("content, word", [
    ({"model": {"epoch": 3}}, "no dictionary of tensors"),
    ([torch.ones(1)], "no dictionary of tensors"),
    ({0: torch.ones(1)}, "a.pth"),                                      # an optimizer's state
    (nn.Linear(2, 2), "cannot be read"),                                # a pickled object is never run
    ({"layer1.0.conv1.weight": torch.ones(64, 3, 7, 7), "fc.bias": torch.ones(9)}, "no Vision Transformer"),
    ({"patch_embed.proj.weight": torch.ones(64, 48), "pos_embed": torch.ones(1, 10, 64),      # a Vision Transformer, of
      "blocks.0.mlp.fc1.weight": torch.ones(96, 64), "norm.weight": torch.ones(64)}, "a.pth"),      # another kind
], ids=("number", "list", "numbered", "object", "resnet", "flat"))
def test_a_file_without_a_vit_is_refused(tmp_path, content, word):
    torch.save(content, tmp_path / "a.pth")
    assert word in refusal(load_vit, tmp_path / "a.pth")


@pytest.mark.parametrize("change, word", [(dict(width=128), "width, 128"), (dict(depth=3), "blocks.2"), (dict(grid=(2, 5)), "pos_embed")], ids=str)
def test_an_unknown_architecture_is_refused_without_our_header(tmp_path, change, word):
    save_file(ViT(replace(TINY, **change)).state_dict(), tmp_path / "a.safetensors")
    message = refusal(load_vit, tmp_path / "a.safetensors")
    assert word in message and str(tmp_path / "a.safetensors") in message


def test_a_header_of_another_version_is_refused(tmp_path):
    header = {"architecture": {"width": 64, "depths": 2}, "attention": "linear"}
    save_file(ViT(TINY).state_dict(), tmp_path / "a.safetensors", {"adala": json.dumps(header)})
    assert "a.safetensors" in refusal(load_vit, tmp_path / "a.safetensors")


def test_an_unknown_name_is_refused_with_the_known_ones():
    message = refusal(load_vit, "vit_gigantic")
    assert "vit_gigantic" in message and "`python model.py` lists" in message
    assert "demo" in refusal(load_vit, "demo")                          # known, but without published weights


def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource", reason="a limit on file sizes stands in for a full disk: not on Windows")
    path = tmp_path / "a.safetensors"
    save_vit(randomise(ViT(TINY)), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))           # writing stops after half the file
    try:
        message = refusal(save_vit, ViT(TINY), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in message
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_others_may_read_a_saved_file_like_any_other(tmp_path):
    save_vit(ViT(TINY), tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---------------------------------------------------------------------------------------------------------------------
# Teacher and student

@pytest.fixture
def pair(tmp_path):
    """A teacher's file and the file of its student, in two folders, as stage 1 writes it."""
    teacher, student = tmp_path / "here/teachers/t.safetensors", tmp_path / "here/students/s.safetensors"
    save_vit(randomise(ViT(TINY)), teacher)
    _, vit, origin = load_pair(str(teacher))
    save_vit(vit, student, teacher=origin)
    return teacher, student


def test_a_softmax_file_is_its_own_teacher(pair):
    teacher, student, origin = load_pair(str(pair[0]), attention="relu")
    assert (teacher.attention, student.attention) == ("softmax", "relu")
    assert same(teacher, student) and origin == {"file": str(pair[0]), "sha256": model.sha256(pair[0])}


def test_the_teacher_is_inherited_and_named(pair, capsys):
    teacher, student, origin = load_pair(str(pair[1]))
    assert same(teacher, load_vit(pair[0])) and student.attention == "linear"
    assert str(pair[0]) in capsys.readouterr().out and origin["sha256"] == model.sha256(pair[0])


def test_the_teacher_is_found_after_both_moved(pair, tmp_path, monkeypatch):
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there/students")
    assert same(load_pair("s.safetensors")[0], load_vit(tmp_path / "there/teachers/t.safetensors"))


def test_paths_relative_to_the_working_folder_are_recorded_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_vit(randomise(ViT(TINY)), "t.safetensors")
    _, vit, origin = load_pair("t.safetensors")
    save_vit(vit, "runs/one/s.safetensors", teacher=origin)
    monkeypatch.chdir(tmp_path / "runs")
    assert load_vit("one/s.safetensors").facts["teacher"]["file"] == "../../t.safetensors"
    assert load_pair("one/s.safetensors")[0].attention == "softmax"


def test_a_changed_teacher_is_refused(pair):
    save_vit(randomise(ViT(TINY), seed=1), pair[0])
    assert "t.safetensors has changed" in refusal(load_pair, str(pair[1]))


def test_a_teacher_that_is_gone_is_named(pair):
    pair[0].unlink()
    assert "t.safetensors" in refusal(load_pair, str(pair[1]))


def test_a_linear_vit_cannot_teach(pair):
    assert "s.safetensors cannot teach" in refusal(load_pair, str(pair[1]), teacher=str(pair[1]))


def test_a_student_keeps_its_operator(pair):
    assert load_pair(str(pair[1]), attention="linear")[1].attention == "linear"
    assert "--attention relu" in refusal(load_pair, str(pair[1]), attention="relu")


def test_a_teacher_of_another_architecture_is_refused(pair, tmp_path):
    save_vit(ViT(replace(TINY, depth=1)), tmp_path / "other.safetensors")
    assert "differ in architecture" in refusal(load_pair, str(pair[1]), teacher=str(tmp_path / "other.safetensors"))


def test_a_student_of_unknown_origin_needs_a_teacher(tmp_path):
    save_vit(ViT(TINY, "linear"), tmp_path / "s.safetensors")
    assert "--teacher" in refusal(load_pair, str(tmp_path / "s.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Photos

def photo(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1])).save(path)
    return path


def test_images_are_found_at_any_depth_but_not_among_masks(tmp_path):
    want = [photo(tmp_path / name) for name in ("a/b/c/deep.png", "a/z.JPG", "b.jpeg", "c.webp", "maskings/d.bmp")]
    photo(tmp_path / "masks/b.png"), photo(tmp_path / "a/masks/b/z.png")
    (tmp_path / "notes.txt").write_text("no photo")
    assert find_images(tmp_path) == sorted(want)


def test_a_folder_below_one_called_masks_can_be_given(tmp_path):
    path = photo(tmp_path / "masks/a.png")
    assert find_images(tmp_path / "masks") == [path]


@pytest.mark.parametrize("suffix", ("jpg", "png", "webp", "bmp", "tif", "ppm"))
@pytest.mark.parametrize("part", (0, 0.01, 0.5, 0.99))
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")                 # Pillow says that beside raising
def test_a_cut_image_is_refused_and_named(tmp_path, suffix, part):
    photo(tmp_path / "good.png")
    bad = photo(tmp_path / f"bad.{suffix}")
    bad.write_bytes(bad.read_bytes()[:int(part * bad.stat().st_size)])
    assert str(bad) in refusal(find_images, tmp_path)


def test_junk_named_like_an_image_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
    assert "a.jpg is not a readable image" in refusal(find_images, tmp_path)
    assert "a.jpg is not a readable image" in refusal(model.read_image, tmp_path / "a.jpg")


def test_folders_without_images_are_refused(tmp_path):
    assert str(tmp_path) in refusal(find_images, tmp_path)
    assert "nowhere: no such folder" in refusal(find_images, tmp_path / "nowhere")


def test_every_tenth_image_is_held_out(tmp_path):
    every = [photo(tmp_path / f"{i:02}.png", (2, 2)) for i in range(25)]
    train, held_out = model.unlabelled([str(tmp_path)])
    assert held_out == every[::10] and sorted(train + held_out) == every


def test_a_given_split_is_kept(tmp_path):
    train, val = ([photo(tmp_path / part / name, (2, 2)) for name in ("x/a.png", "y/b.png")] for part in ("train", "val"))
    assert model.unlabelled([str(tmp_path)]) == (train, val)


def test_at_most_256_images_are_held_out(tmp_path, monkeypatch):
    for n in (2560, 2700, 2815, 2816, 100_000):
        monkeypatch.setattr(model, "find_images", lambda folder: list(range(n)))
        train, held_out = model.unlabelled([str(tmp_path)])
        assert sorted(train + held_out) == list(range(n)) and 128 <= len(held_out) <= 256


def test_a_single_image_is_not_enough(tmp_path):
    photo(tmp_path / "a.png")
    assert str(tmp_path) in refusal(model.unlabelled, [str(tmp_path)])


@pytest.mark.parametrize("suffix, mode", [("jpg", "RGB"), ("jpg", "L"), ("jpg", "CMYK"), ("JPEG", "RGB"), ("png", "RGB"), ("png", "L"),
                                          ("png", "P"), ("png", "RGBA"), ("webp", "RGB")])
@pytest.mark.parametrize("turn", (None, 3, 6))                          # EXIF's word for: upside down, a quarter turn
@pytest.mark.parametrize("decoder", (True, False))
def test_photos_are_read_upright_in_rgb(tmp_path, monkeypatch, suffix, mode, turn, decoder):
    if not decoder:                                                     # as with a torchvision that has dropped its own
        monkeypatch.setattr(model, "decode_image", None)
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    smooth = Image.merge("RGB", [Image.linear_gradient("L").resize((40, 30)).rotate(90 * i) for i in range(3)])
    smooth.convert(mode).save(tmp_path / f"a.{suffix}", exif=exif)
    image = model.read_image(tmp_path / f"a.{suffix}")
    assert image.dtype == torch.uint8 and image.shape == ((3, 40, 30) if turn == 6 else (3, 30, 40))
    with Image.open(tmp_path / f"a.{suffix}") as file:
        want = torch.tensor(list(file.convert("RGB").getdata()), dtype=torch.int).view(30, 40, 3).permute(2, 0, 1)
    want = {None: want, 3: want.rot90(2, (1, 2)), 6: want.rot90(-1, (1, 2))}[turn]
    assert (image.as_subclass(torch.Tensor).int() - want).abs().max() <= (2 if suffix in ("jpg", "JPEG") else 0)


def test_a_script_ends_with_one_line_instead_of_a_traceback():
    def main():
        raise InputError("--data nowhere: no such folder")
    with pytest.raises(SystemExit, match="--data nowhere: no such folder"):
        model.run(main)


# ---------------------------------------------------------------------------------------------------------------------
# demo/shapes.py

def test_shapes_depend_on_the_seed_alone():
    first = shapes.draw(20, seed=3)
    torch.rand(1)                                                       # the global generator must not matter
    assert all(torch.equal(a, b) for a, b in zip(first, shapes.draw(20, seed=3)))
    assert not torch.equal(first[0], shapes.draw(20, seed=4)[0])


def test_masks_hold_the_label_and_background():
    images, labels, masks = shapes.draw(200, seed=0)
    assert images.shape == (200, 3, 64, 64) and images.dtype == masks.dtype == torch.uint8
    for label, mask in zip(labels, masks):
        assert mask.unique().tolist() == [0, 1 + label]
    assert labels.bincount(minlength=4).min() > 200 / 4 / 2             # no label can be had by guessing


def test_only_the_target_has_the_colour_of_the_ring(monkeypatch):
    monkeypatch.setattr(shapes.torch, "randn", lambda *shape, generator: torch.zeros(shape))   # paint without noise
    images, _, masks = shapes.draw(50, seed=0)
    palette = (shapes.COLOURS * 255).round()
    cells = lambda x: x.unflatten(-1, (4, 16)).unflatten(-3, (4, 16)).transpose(-3, -2).flatten(-4, -3)
    painted = (cells(images.float()).unsqueeze(1) == palette.view(6, 3, 1, 1, 1)).all(2)   # (n, 6 colours, 16 cells, 16, 16)
    middles = painted[..., 7:9, 7:9].any(-1).any(-1)
    targets = cells(masks).sum((-2, -1)) > 0
    for has, middle, target in zip(painted.sum((-2, -1)) > 9, middles, targets):   # (6 colours, 16 cells) twice, (16 cells)
        assert has.sum() == 6 and has.any(1).sum() == 5                 # six things, two of them of one colour:
        pair = has[has.sum(1) == 2][0]
        assert target.sum() == 1 and pair[target].all()                 # the target, and the ring, alone in having a hole
        assert torch.equal(has.any(0) & ~middle.any(0), pair & ~target)
