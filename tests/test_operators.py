"""Attention operators against their definitions, in float64 and in half precision."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model
from conftest import TINY, error, randomise, seeded
from model import ATTENTION, elu_plus_one, linear_attention, linear_plain, linear_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TWO = replace(TINY, width=128, heads=2)                 # heads of 64
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def clustered(N):
    """q, k, v (1, 2, N, 64), float64, around few centres: outputs differ, unlike those of noise."""
    random = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    centres, noise = 1.5 * normal(3, 1, 2, 8, 64), 0.5 * normal(3, 1, 2, N, 64)
    query, key = torch.randint(8, (2, N), generator=random)
    return [centres[i][:, :, c] + noise[i] for i, c in enumerate((query, key, key))]


def hedgehog_weights(q, k, own):
    q, k = q @ own.map_q.mT, k @ own.map_k.mT
    return q.softmax(-1) @ k.softmax(-1).mT + (-q).softmax(-1) @ (-k).softmax(-1).mT


WEIGHTS = {                     # a number for each query and key, given the operator's module, too
    "softmax": lambda q, k, own: (q @ k.mT / 8).exp(),                  # 8: the root of D
    "linear": lambda q, k, own: elu_plus_one(q) @ elu_plus_one(k).mT,
    "hedgehog": hedgehog_weights}
WEIGHTS |= {"softmax_reference": WEIGHTS["softmax"], "linear_conv": WEIGHTS["linear"]}


@pytest.mark.parametrize("images, prefix, grid, near, share", [     # learned on 4 x 4
    (2, 0, (4, 5), 1, 1), (1, 5, (7, 3), 1, 1), (2, 1, (1, 9), 1, 1), (1, 1, (8, 9), 1, 0.5),
    (2, 4, (12, 12), 2, 1), (1, 0, (17, 14), 2, 0.75)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_operators_equal_their_definitions(name, images, prefix, grid, near, share):
    arch, N = replace(TWO, aligned=4), prefix + grid[0] * grid[1]
    operator = randomise(ATTENTION[name](arch)).double()
    q, k, v = seeded(3, images, 2, N, 64, dtype=torch.float64)
    weights = WEIGHTS[name](q, k, operator)
    want = weights / weights.sum(-1, keepdim=True) @ v
    if name == "linear_conv":
        image = v[:, :, prefix:].mT.reshape(images, 128, *grid)         # channels: head, then D
        local = sum(part * F.conv2d(image, operator.conv.weight, padding="same", dilation=n,
                                    groups=128)
                    for n, part in ((near, share), (near + 1, 1 - share)))
        want = want + F.pad(local.view(images, 2, 64, -1).mT, (0, 0, prefix, 0))
    for mode in torch.no_grad, torch.enable_grad:       # other layouts in memory
        with mode():
            assert torch.allclose(operator(q, k, v, grid), want, rtol=1e-10, atol=1e-12)
    for dtype in torch.bfloat16, torch.float16:
        half = operator.to(dtype)(q.to(dtype), k.to(dtype), v.to(dtype), grid)
        assert half.dtype == dtype and error(half, want) <= 2e-2


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_are_differences_of_outputs(name):
    operator = randomise(ATTENTION[name](replace(TINY, width=16, heads=2, aligned=1))).double()
    inputs = seeded(3, 1, 2, 7, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(operator, grid=(2, 3)), [*inputs])


def test_a_kernel_takes_the_place_of_the_plain_form_for_its_own_phi_alone(monkeypatch):
    kernel = SimpleNamespace(usable=lambda *args: True, linear_attention=lambda q, k, v: "kernel")
    q, k, v = seeded(3, 2, 2, 50, 16, dtype=torch.float64)
    monkeypatch.setattr(model, "linear_triton", kernel)
    assert linear_attention(q, k, v) == "kernel"
    want = linear_reference(q, k, v, torch.exp)
    assert torch.allclose(linear_attention(q, k, v, phi=torch.exp), want, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(model, "linear_triton", None)   # no Triton
    assert torch.equal(linear_attention(q, k, v), linear_plain(q, k, v))


@every_dtype
def test_elu_plus_one_keeps_its_precision_below_minus_6_where_adding_1_leaves_nothing(dtype):
    x = torch.linspace(-29, 29, 1000).to(dtype)
    truth = torch.where(x > 0, 1 + x.double(), x.double().exp())
    inside = truth >= torch.finfo(dtype).tiny           # float16 ends at 6e-5
    assert torch.allclose(elu_plus_one(x).double()[inside], truth[inside],
                          rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("stretch", (1, 30))
@pytest.mark.parametrize("dtype, limit", [*zip(DTYPES, (2e-2, 5e-3, 2e-6))], ids=str)
def test_4097_tokens_cost_a_few_roundings_also_under_autocast(dtype, limit, stretch):
    q, k, v = (x.to(dtype) for x in clustered(4097))
    overflows = elu_plus_one(stretch * k).sum(-2).isinf().any()         # a plain sum over keys
    assert overflows == (dtype == torch.float16 and stretch == 30)
    pull, results = seeded(*v.shape).to(dtype), []
    for wide in (dtype, torch.float64):
        leaves = [x.to(wide, copy=True).requires_grad_() for x in (q, stretch * k, v)]
        with torch.autocast("cpu", torch.bfloat16):     # its own dtypes count
            out = linear_attention(*leaves)
        assert out.dtype == wide and (out.std(-2) > 0).all()    # overflow may show as zeros, alike
        gradients = torch.autograd.grad(out, leaves, pull.to(wide))
        out = out.double() - v.double().mean(-2, keepdim=True)          # behind it errors hide
        results.append([out, *gradients])
    for found, truth in zip(*results):
        assert error(found, truth) <= limit


@every_dtype
@pytest.mark.parametrize("below", (-20, -6e4), ids=str)
def test_very_negative_keys_attend_to_the_mean_and_gradients_stay_finite(below, dtype):
    """phi(-20) = 2e-9, which an eps would drown; further below every feature would be 0."""
    q, _, v = (x.to(dtype) for x in clustered(100))
    mean, low = v.double().mean(-2, keepdim=True), torch.full_like(q, below)
    for query in (q, low):
        leaves = [x.clone().requires_grad_() for x in (query, low, v)]
        out = linear_attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, seeded(*v.shape).to(dtype))
        assert all(x.isfinite().all() for x in (out, *gradients))
        assert (out - mean).abs().max() <= 8 * torch.finfo(dtype).eps * v.abs().max() + 1e-6


def test_gradients_of_linear_conv_are_right_in_bfloat16_on_a_larger_grid():
    """oneDNN has a wrong one, of a dilated depthwise convolution, channels last (torch 2.14)."""
    arch, found = replace(TINY, width=384, heads=6, aligned=16), []
    operator, inputs = randomise(ATTENTION["linear_conv"](arch)), seeded(3, 4, 6, 1024, 64)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = inputs.to(dtype)
        out = operator.to(dtype)(q, k, v.requires_grad_(), (32, 32))
        found.append(torch.autograd.grad((out * q).sum(), (operator.conv.weight, v)))
    assert all(error(*both) <= 2e-2 for both in zip(*found))
