"""The GPU kernel of linear attention on a CPU: Triton's interpreter, and compiling without a GPU.

The interpreter has to be chosen before Triton is imported. So this file is also a script, which
the tests run once: with TRITON_INTERPRET=1 it prints what the kernel computes, as JSON.
"""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import model

pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")
import triton
import triton.language as tl

from support import linear_triton

SHAPES = {"N = 1": (2, 1, 1, 64), "N = 65": (1, 2, 65, 16), "N = 257": (1, 1, 257, 32),
          "N = 1370": (1, 1, 1370, 64)}                                 # (B,H,N,D)
LIMIT = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@triton.jit
def product(a, b):
    """The interpreter cannot multiply bfloat16: rounded operands are multiplied in float32."""
    return tl.dot(a.to(tl.float32), b.to(a.dtype).to(tl.float32), input_precision="ieee")


def projected(shape, shift, dtype):
    """What the projection gives Attention.project, biases of q and k shifted: (B,N,3,H,D)."""
    B, H, N, D = shape
    qkv = torch.randn(B, N, 3, H, D, generator=torch.Generator().manual_seed(N))
    qkv[:, :, :2] += shift
    return qkv.to(dtype)


def out_and_gradients(function, qkv):
    leaf = qkv.clone().requires_grad_()
    out = function(*leaf.permute(2, 0, 3, 1, 4).unbind(0))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradient, = torch.autograd.grad((out * weight).sum(), leaf)
    return [out.detach(), *gradient.unbind(2)]


def errors(function, shape, shift, dtype):
    """Relative errors of out, dq, dk, dv. One token: dq and dk are 0, so they count beside dv."""
    qkv = projected(shape, shift, dtype)
    truth = out_and_gradients(model.linear_reference, qkv.double())
    floor = truth[3].norm() if shape[2] == 1 else 0
    return [((a.double() - b).norm() / b.norm().clamp(min=floor)).item()
            for a, b in zip(out_and_gradients(function, qkv), truth)]


def script():
    linear_triton.product, attention = product, linear_triton.linear_attention
    cases = [(name, torch.float32) for name in SHAPES]
    cases += [("N = 257", torch.float16), ("N = 257", torch.bfloat16)]
    found = {f"{name}, {shift}, {str(dtype)[6:]}": errors(attention, SHAPES[name], shift, dtype)
             for name, dtype in cases for shift in (0, -4, -12)}
    q, k, v = projected((2, 2, 257, 16), 0, torch.float32).permute(2, 0, 3, 1, 4).unbind(0)
    out, plain = attention(q, k, v), model.linear_plain(q, k, v)
    found["same bits"] = torch.equal(out, attention(q, k, v))
    found["joined"] = out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    turned = attention(q.contiguous(), k.contiguous(), v)               # rotary positions
    found["other strides"] = (turned - plain).abs().max().item()
    linear_triton.PROGRAMS = 1                                          # no head in parts
    found["one part"] = (attention(q, k, v) - plain).abs().max().item()
    qkv = projected((1, 2, 65, 16), 0, torch.float32)
    ours, truth = (out_and_gradients(lambda q, k, v: function(q, k, v).add_(v), qkv)
                   for function in (attention, model.linear_plain))     # as linear_conv adds
    found["added to in place"] = max((a - b).abs().max().item() for a, b in zip(ours, truth))
    for name, phi in dict(same=model.elu_plus_one, floor=lambda x: x.clamp(-4, 0).exp() + x.relu(),
                          slope=lambda x: x.clamp(max=0).exp() + 1.01 * x.relu()).items():
        plain = partial(model.linear_plain, phi=phi)
        found[f"phi {name}"] = linear_triton.agrees(plain, torch.float32, "cpu", {})
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    run = subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"},
                         capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip(f"Triton {triton.__version__}'s interpreter does not run with this numpy")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]) | {"said": run.stdout}


def test_output_and_gradients_equal_the_float64_definition(found):
    cases = {key: value for key, value in found.items() if key.startswith("N = ")}
    assert len(cases) == 18
    for key, parts in cases.items():
        assert max(parts) <= LIMIT[key.split(", ")[-1]], (key, parts)


def test_the_same_inputs_give_the_same_bits_and_heads_are_joined_by_a_view(found):
    assert found["same bits"] and found["joined"]


def test_other_strides_and_unsplit_heads_give_the_same(found):
    assert found["other strides"] <= 1e-5 and found["one part"] <= 1e-5


def test_the_output_may_be_added_to_in_place(found):
    """The backward pass must not need the output: linear_conv changes it."""
    assert found["added to in place"] <= 1e-5


def test_another_phi_is_seen_and_said(found):
    assert [found[f"phi {name}"] for name in ("same", "floor", "slope")] == [True, False, False]
    assert found["said"].count("runs without its GPU kernel") == 2


def test_what_the_kernel_does_not_take_is_not_usable(monkeypatch):
    monkeypatch.setattr(linear_triton, "agrees", lambda *_: True)
    gpu = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    usable = lambda q, k, v: linear_triton.usable(q, model.linear_plain, k, v)
    q = gpu(1, 2, 5, 32)
    assert usable(q, q, q)
    assert not usable(q, q, gpu(1, 2, 5, 64)) and not usable(q, q, q.half())
    for other in (gpu(1, 2, 5, 32, dtype=torch.float64), gpu(1, 2, 5, 48), gpu(1, 2, 5, 128)):
        assert not usable(other, other, other)
    monkeypatch.setenv("ADALA_KERNEL", "plain")
    assert not usable(q, q, q)


@pytest.mark.parametrize("element, block", (("bf16", 64), ("fp32", 32)))
def test_all_kernels_compile_for_an_h100(element, block):
    """Without a GPU. Shared memory is within the 99 KB of the smallest GPU that has bfloat16."""
    assert block == linear_triton.BLOCK[dict(bf16=torch.bfloat16, fp32=torch.float32)[element]]
    sizes = dict(D=64, BLOCK=block)
    for name in ("sum_keys", "read_queries", "sum_queries", "read_keys"):
        kernel, types = getattr(linear_triton, name), {}
        for arg in kernel.arg_names:
            types[arg] = "constexpr" if arg in sizes else "i32" if arg in ("H", "N", "row") else \
                "*fp32" if arg in ("state", "dstate", "parts") else f"*{element}"
        source = triton.compiler.ASTSource(kernel, types, sizes)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options=dict(num_warps=8))
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 99 * 1024


if __name__ == "__main__":
    script()
