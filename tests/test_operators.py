"""Attention operators of model.py against their definitions, in float64 and in half precision."""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY, error, randomise, refusal, same, seeded, varying
from model import (ATTENTION, ViT, elu_plus_one, linear_attention, linear_reference, linearize,
                   load_vit, save_vit, softmax_reference)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TWO = replace(TINY, width=128, heads=2)                 # heads of 64
POSITIVE = ("linear", "relu", "relu2", "hedgehog")      # a feature map, and no more
REFERENCE = {"softmax": softmax_reference, "linear": linear_reference}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_name = pytest.mark.parametrize("name", ATTENTION)
every_mean = pytest.mark.parametrize("name", [name for name in ATTENTION if name != "linear_conv"])


def clustered(N, D=64, heads=2, clusters=8):
    """q, k, v (1, H, N, D) in float64 around few centres: outputs differ, unlike those of noise."""
    random = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=random, dtype=torch.float64)
    centres = 1.5 * normal(3, heads, clusters, D)
    query, key = torch.randint(clusters, (2, N), generator=random)
    noise = 0.5 * normal(3, 1, heads, N, D)
    return [centres[i, :, c].unsqueeze(0) + noise[i] for i, c in enumerate((query, key, key))]


def rounding(dtype, N):
    """A rounding a step of the result's dtype, and of the sum over N tokens, float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return 4 * torch.finfo(dtype).eps + N ** 0.5 * torch.finfo(wide).eps


WEIGHTS = {                     # name -> (B, H, queries, keys), the operator's module given
    "softmax": lambda q, k, _: (q @ k.mT / math.sqrt(q.shape[-1])).exp(),
    "linear": lambda q, k, _: (1 + F.elu(q)) @ (1 + F.elu(k)).mT,
    "relu": lambda q, k, _: q.clamp(min=1e-6) @ k.clamp(min=1e-6).mT,
    "relu2": lambda q, k, _: (F.relu(q) ** 2 + 1e-4) @ (F.relu(k) ** 2 + 1e-4).mT,
    "hedgehog": lambda q, k, own: sum((s * q @ own.map_q.mT).softmax(-1)
                                      @ (s * k @ own.map_k.mT).softmax(-1).mT for s in (1, -1)),
}
WEIGHTS["softmax_reference"] = WEIGHTS["softmax"]


@pytest.mark.parametrize("queries, keys", [(5, 5), (50, 50), (64, 129), (3, 300), (1, 1)])
@every_mean
def test_operators_and_their_gradients_are_the_definitions(name, queries, keys):
    operator = randomise(ATTENTION[name](TWO)).double()
    inputs = [seeded(2, 2, n, 64, seed=i, dtype=torch.float64).requires_grad_()
              for i, n in enumerate((queries, keys, keys))]
    weights = WEIGHTS[name](*inputs[:2], operator)
    out = weights / weights.sum(-1, keepdim=True) @ inputs[2]
    pull = seeded(2, 2, queries, 64, seed=3, dtype=torch.float64)
    truth = [out, *torch.autograd.grad(out, inputs, pull)]
    for form in filter(None, (partial(operator, grid=(1, keys)), REFERENCE.get(name))):
        out = form(*inputs)
        for found, want in zip([out, *torch.autograd.grad(out, inputs, pull)], truth):
            assert torch.allclose(found, want, rtol=1e-10, atol=1e-12)


@every_dtype
def test_elu_plus_one_and_its_slope(dtype):
    """To a rounding or two, also below -6, where adding 1 leaves nothing; constant below -30."""
    x = torch.linspace(-29, 29, 1001).to(dtype).requires_grad_()
    y, low = elu_plus_one(x), torch.tensor([-31, -200, -6e4], dtype=dtype, requires_grad=True)
    slope, = torch.autograd.grad(y, x, torch.full_like(x, 3))
    exact = x.detach().double()
    truth = torch.where(exact > 0, 1 + exact, exact.exp())
    inside = truth >= torch.finfo(dtype).tiny           # float16 ends at 6e-5
    for found, want in ((y, truth), (slope, 3 * truth.clamp(max=1))):
        assert found.dtype == dtype and torch.allclose(found.double()[inside], want[inside],
                                                       rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(elu_plus_one(low), elu_plus_one(torch.full_like(low, -30)))
    assert torch.autograd.grad(elu_plus_one(low).sum(), low)[0].abs().max() <= 1e-12
    if dtype == torch.float64:
        assert torch.allclose(y, 1 + F.elu(x), rtol=0, atol=1e-14)
        x = seeded(4, 5, dtype=dtype).requires_grad_()
        assert torch.autograd.gradgradcheck(elu_plus_one, x)


@pytest.mark.parametrize("N, stretch", [(197, 1), (785, 1), (4096, 1), (4096, 30), (65_536, 1)])
@pytest.mark.parametrize("dtype, limit", [*zip(DTYPES, (2e-2, 5e-3, 2e-6))], ids=str)
def test_half_precision_is_as_good_as_rounding_the_exact_result(dtype, limit, N, stretch):
    q, k, v = clustered(N, heads=1)                     # stretched: float16's textbook form breaks
    q, k, v = q.to(dtype), (stretch * k).to(dtype), v.to(dtype)
    assert stretch == 1 or dtype != torch.float16 or elu_plus_one(k).sum(-2).isinf().any()
    truth = linear_attention(q.double(), k.double(), v.double())
    out, part = linear_attention(q, k, v), varying(truth, v)
    assert out.dtype == dtype and out.isfinite().all()
    assert (out.std(-2) > 0).all()                      # overflow may also show as zeros, all alike
    found, rounded = error(varying(out, v), part), error(varying(truth.to(dtype), v), part)
    assert found <= limit                               # below, 2: result and input are rounded;
    assert dtype == torch.float32 or found <= 2 * rounded               # in float32 sums are, too


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_half_precision_gradients(dtype):
    inputs, gradients = [x.to(dtype) for x in clustered(4096)], []
    for leaves in (inputs, [x.double() for x in inputs]):
        leaves = [x.requires_grad_() for x in leaves]
        pull = seeded(*inputs[0].shape).to(dtype).to(leaves[0].dtype)
        gradients.append(torch.autograd.grad(linear_attention(*leaves), leaves, pull))
    for found, truth in zip(*gradients):                # four roundings, each by half an eps
        assert error(found, truth) <= 4 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("attention", POSITIVE)
def test_under_autocast_a_linear_vit_loses_no_more_than_a_softmax_vit(attention):
    q, k, v = (x.float() for x in clustered(4096))
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_attention(q, k, v)
    assert torch.equal(inside, linear_attention(q, k, v))
    images, lost = seeded(2, 3, 64, 64), {}
    for name in ("softmax", attention):
        vit = randomise(ViT(TINY, name))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = vit(images)
        lost[name] = error(tokens, vit(images))
    assert lost[attention] <= 2 * lost["softmax"] < 0.1


@every_dtype
@every_mean
def test_constants_stay_and_the_order_of_keys_is_without_meaning(name, dtype):
    q, k, v = (x.to(dtype) for x in clustered(1000))
    attend = partial(randomise(ATTENTION[name](TWO)).to(dtype), grid=(1, 1))
    out = attend(q, k, torch.full_like(v, 0.7))
    assert out.dtype == dtype and (out.double() - 0.7).abs().max() <= rounding(dtype, 1000)
    found = attend(q, k.flip(-2), v.flip(-2))
    assert error(found, attend(q, k, v)) <= rounding(dtype, 1000)


@every_dtype
@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("below", (-20, -60, -1000, -6e4), ids=str)
def test_very_negative_queries_and_keys_attend_to_the_mean(name, below, dtype):
    """phi(-20) = 2e-9, which an eps would drown; further below every feature would be 0."""
    attend = ATTENTION[name](TWO).to(dtype)
    for sides in ("qk", "q", "k"):
        q, k, v = (x.to(dtype) for x in clustered(100))
        q, k = (torch.full_like(x, below) if s in sides else x for s, x in (("q", q), ("k", k)))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, (10, 10))
        gradients = torch.autograd.grad(out, leaves, seeded(*v.shape).to(dtype))
        assert out.isfinite().all() and all(g.isfinite().all() for g in gradients), sides
        if "k" in sides:                                # keys alike: the mean of V
            mean = v.double().mean(-2, keepdim=True)
            assert (out.double() - mean).abs().max() <= rounding(dtype, 100) * v.abs().max()
        constant = attend(q, k, torch.full_like(v, 0.7), (10, 10)).double()
        assert (constant - 0.7).abs().max() <= rounding(dtype, 100), sides


@every_name
def test_linear_costs_double_for_double_the_tokens_and_softmax_four_times(name):
    costs = []
    for N in (256, 512):
        with FlopCounterMode(display=False) as counter:
            ATTENTION[name](TWO)(*torch.ones(3, 2, 2, N, 64), (N // 16, 16))
        costs.append(counter.get_total_flops())
    if name != "softmax":                               # fused: not counted on the CPU
        assert costs[1] == (4 if name == "softmax_reference" else 2) * costs[0] > 0


@every_name
def test_operators_and_vits_compile(name):
    """Without a break in the graph, outputs and gradients of eager; positions are resized."""
    qkv, vit = [x.float() for x in clustered(17)], randomise(ViT(TINY, name))
    for module, inputs, more in ((ATTENTION[name](TWO), qkv, [(4, 4)]),
                                 (vit, [seeded(2, 3, 16, 20)], [])):
        torch._dynamo.reset()
        results = []
        for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out, wanted = call(*leaves, *more), [*leaves, *module.parameters()]
            results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
        for a, b in zip(*results):                      # float32 sums, decomposed in another order
            assert error(b, a) <= 1e-5


@every_dtype
@pytest.mark.parametrize("grid", [(4, 4), (7, 3), (1, 9)], ids=str)
@pytest.mark.parametrize("prefix", (0, 1, 5))
def test_linear_conv_is_linear_plus_a_convolution_on_the_patches(grid, prefix, dtype):
    """Bit for bit linear at its start; CLS and registers bypass what it learns to add."""
    operator, N = ATTENTION["linear_conv"](TWO).to(dtype), prefix + grid[0] * grid[1]
    q, k, v = seeded(3, 2, 2, N, 64).to(dtype)
    assert torch.equal(operator(q, k, v, grid), linear_attention(q, k, v))
    added = lambda v: (randomise(operator)(q, k, v, grid) - linear_attention(q, k, v)).double()
    if dtype == torch.float64:
        image = v[:, :, prefix:].mT.reshape(2, 128, *grid)              # channels: head, then D
        want = F.conv2d(image, randomise(operator).conv.weight, padding=2, groups=128)
        want = F.pad(want.view(2, 2, 64, -1).mT, (0, 0, prefix, 0))
        assert error(added(v), want) <= 1e-10
        for token in range(N):                          # a patch reaches neighbours within 2
            moved = torch.zeros_like(v)
            moved[:, :, token] = 1
            reached = added(moved)[0, 0].abs().sum(-1) > 1e-9
            row, column = divmod(token - prefix, grid[1])
            near = {prefix + r * grid[1] + c for r in range(grid[0]) for c in range(grid[1])
                    if token >= prefix and abs(r - row) <= 2 and abs(c - column) <= 2}
            assert set(reached.nonzero().flatten().tolist()) == near
    assert not added(v)[:, :, :prefix].any() and added(v)[:, :, prefix:].any()


def test_an_operator_with_parameters_needs_a_class_and_a_line(monkeypatch, tmp_path, mine):
    teacher, images = randomise(ViT(replace(TINY, heads=2, registers=2))), seeded(2, 3, 8, 20)
    student = linearize(teacher, "mine")
    for block in student.blocks:                        # own parameters start as the class says
        assert block.attn.operator.conv.bias.all() and block.attn.operator.conv.weight.std() > 0.1
        assert len(list(block.attn.operator.parameters())) == 2
    for block in linearize(teacher, "hedgehog").blocks:
        for maps in (block.attn.operator.map_q, block.attn.operator.map_k):
            assert torch.equal(maps, torch.eye(32).expand(2, 32, 32))
    assert error(student(images), linearize(teacher)(images)) > 0.01
    assert same(linearize(randomise(student), "mine"), student)         # what it learnt stays
    assert same(linearize(linearize(teacher, "mine")), teacher)
    save_vit(student, tmp_path / "a.safetensors")
    again = load_vit(tmp_path / "a.safetensors")
    assert same(again, student) and torch.equal(again(images), student(images))
    monkeypatch.delitem(ATTENTION, "mine")
    assert "attention 'mine' is unknown" in refusal(load_vit, tmp_path / "a.safetensors")
    q = torch.tensor([1000., -1000]).repeat(1, 1, 3, 32)                # no feature in common
    assert ATTENTION["hedgehog"](TINY)(q, -q, q, (1, 3)).isfinite().all()
