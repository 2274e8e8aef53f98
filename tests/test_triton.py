"""The GPU kernel of linear attention on a CPU: Triton's interpreter, and compiling without a GPU.

The interpreter has to be chosen before Triton is imported. So the first test starts a pytest of its
own with TRITON_INTERPRET=1, which runs the functions of this file whose names begin "interpreted".
"""
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from conftest import error, seeded
from model import elu_plus_one, linear_plain, linear_reference

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")
import triton.language as tl

from support import linear_triton
from support.linear_triton import linear_attention


def test_the_kernel_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-o", "python_functions=interpreted_*", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                         text=True)
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip(f"Triton {triton.__version__}'s interpreter does not run with this numpy")
    assert run.returncode == 0, run.stdout


@triton.jit
def product(a, b):
    """The interpreter cannot multiply bfloat16: rounded operands are multiplied in float32."""
    return tl.dot(a.to(tl.float32), b.to(a.dtype).to(tl.float32), input_precision="ieee")


if "TRITON_INTERPRET" in os.environ:
    linear_triton.product = product


def projected(B, H, N, D, shift=0, dtype=torch.float32):
    """What the projection gives Attention.project, biases of q and k shifted: (B,N,3,H,D)."""
    qkv = seeded(B, N, 3, H, D, seed=N)
    qkv[:, :, :2] += shift
    return qkv.to(dtype)


def split(qkv):
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)                         # each (B,H,N,D)


def out_and_gradients(function, qkv):
    leaf = qkv.clone().requires_grad_()
    out = function(*split(leaf))
    gradient, = torch.autograd.grad(out, leaf, seeded(*out.shape, seed=1).to(out.dtype))
    return [out.detach(), *gradient.unbind(2)]


@pytest.mark.parametrize("shift", (0, -4, -12))
@pytest.mark.parametrize("shape, dtype, limit", (
    ((2, 1, 1, 64), torch.float32, 1e-5), ((1, 2, 65, 16), torch.float32, 1e-5),
    ((1, 1, 257, 32), torch.float32, 1e-5), ((1, 1, 1370, 64), torch.float32, 1e-5),
    ((1, 1, 257, 32), torch.float16, 2e-3), ((1, 1, 257, 32), torch.bfloat16, 2e-2)), ids=str)
def interpreted_output_and_gradients_equal_the_float64_definition(shape, dtype, limit, shift):
    qkv = projected(*shape, shift, dtype)
    truth = out_and_gradients(linear_reference, qkv.double())
    least = truth[3].norm() if shape[2] == 1 else 0     # one token: dq and dk are 0, beside dv
    for found, true in zip(out_and_gradients(linear_attention, qkv), truth):
        assert (found.double() - true).norm() <= limit * true.norm().clamp(min=least)


def interpreted_bits_repeat_heads_join_by_a_view_and_strides_and_parts_do_not_matter(monkeypatch):
    q, k, v = split(projected(2, 2, 257, 16))
    out, plain = linear_attention(q, k, v), linear_plain(q, k, v)
    assert torch.equal(out, linear_attention(q, k, v))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    assert error(linear_attention(q.contiguous(), k.contiguous(), v), plain) <= 1e-5    # rotary
    monkeypatch.setattr(linear_triton, "PROGRAMS", 1)                   # no head in parts
    assert error(linear_attention(q, k, v), plain) <= 1e-5


@pytest.mark.parametrize("phi, equal", (
    (elu_plus_one, True), (lambda x: x.clamp(-4, 0).exp() + x.relu(), False),
    (lambda x: x.clamp(max=0).exp() + 1.01 * x.relu(), False)))
def interpreted_another_phi_is_seen_and_said(capsys, phi, equal):
    plain = partial(linear_plain, phi=phi)
    assert linear_triton.agrees(plain, torch.float32, "cpu", {}) == equal
    assert ("runs without its GPU kernel" in capsys.readouterr().out) != equal


def test_what_the_kernel_does_not_take_is_not_usable(monkeypatch):
    monkeypatch.setattr(linear_triton, "agrees", lambda *_: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    q = torch.ones(1, 2, 5, 32, dtype=torch.bfloat16)
    assert linear_triton.usable(q, linear_plain, q, q)
    for v in (q.repeat(1, 1, 1, 2), q.half()):
        assert not linear_triton.usable(q, linear_plain, q, v)
    for other in (q.double(), q.repeat(1, 1, 1, 4), q[:, :, :, :24]):
        assert not linear_triton.usable(other, linear_plain, other, other)
    monkeypatch.setenv("ADALA_KERNEL", "plain")
    assert not linear_triton.usable(q, linear_plain, q, q)


@pytest.mark.parametrize("element, dtype", (("bf16", torch.bfloat16), ("fp32", torch.float32)))
def test_all_kernels_compile_for_an_h100(element, dtype):
    """Without a GPU. Shared memory is within the 99 KB of the smallest GPU that has bfloat16."""
    sizes = dict(D=64, BLOCK=linear_triton.BLOCK[dtype])
    known = dict(H="i32", N="i32", row="i32", D="constexpr", BLOCK="constexpr")
    known |= dict(state="*fp32", dstate="*fp32", parts="*fp32")
    for name in ("sum_keys", "read_queries", "sum_queries", "read_keys"):
        kernel = getattr(linear_triton, name)
        types = {arg: known.get(arg, f"*{element}") for arg in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, types, sizes)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options=dict(num_warps=8))
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 99 * 1024
