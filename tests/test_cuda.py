"""What only a GPU can show: ADALA_GPU=1 python -m pytest -q tests/test_cuda.py

All other tests run on the CPU, also where there is a GPU, which does not repeat a run bit for bit.
"""
import csv
import json
import math
import os

import pytest
import torch

import align_attention
import align_features
import bench
import finetune
import model
from conftest import BRIEF, brief, call, error, log_of, randomise, report_of, seeded
from model import ATTENTION, Architecture, linear_plain, linear_reference, linear_triton

pytestmark = pytest.mark.skipif("ADALA_GPU" not in os.environ, reason="needs a GPU: ADALA_GPU=1")
ONE_HEAD = Architecture(64, 1, 1, 64, patch=4, grid=(32, 32), registers=1, aligned=12)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)      # as device_and_dtype


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", ATTENTION)
def test_operators_equal_their_cpu_definition(name, dtype):
    """Outputs and gradients, in bfloat16 compiled, too, against float64 on the CPU."""
    inputs = [seeded(2, 1, 1026, 64, seed=i) for i in range(3)]
    operator, results = randomise(ATTENTION[name](ONE_HEAD)).to(dtype), []
    for kind, device, compiled in ((torch.float64, "cpu", False), (dtype, "cuda", False),
                                   (dtype, "cuda", True))[:3 if dtype == torch.bfloat16 else 2]:
        module = torch.compile(operator.to(device, kind), fullgraph=True, disable=not compiled)
        leaves = [x.to(dtype).to(device, kind).requires_grad_() for x in inputs]
        out, wanted = module(*leaves, (32, 32)), [*leaves, *operator.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for found in results[1:]:
        out, *gradients = [error(part.cpu(), truth) for truth, part in zip(results[0], found)]
        assert out <= LIMIT[dtype] and max(gradients) <= 10 * LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
def test_the_kernel_is_used_and_equals_its_definition(dtype):
    """Output and gradients of views of one projection, several heads and parts; the same bits."""
    assert linear_triton.agrees(linear_plain, dtype)
    for B, H, N, shift in ((2, 3, 1370, 0), (1, 2, 257, -4), (3, 1, 65, -12)):
        qkv = seeded(B, N, 3, H, 64)
        qkv[:, :, :2] += shift
        results = []
        for function, x in ((linear_reference, qkv.to(dtype).double()), *2 * [
                (linear_triton.linear_attention, qkv.to("cuda", dtype))]):
            x = x.requires_grad_() if x.is_leaf else x
            out = function(*x.permute(2, 0, 3, 1, 4).unbind(0))
            results.append([out, *torch.autograd.grad(out.square().sum(), x)])
        for truth, found, again in zip(*results):
            assert error(found.cpu(), truth) <= 2 * LIMIT[dtype] and torch.equal(found, again)


@pytest.mark.parametrize("compiled", (False, True))
def test_a_changed_phi_is_not_lost(compiled, monkeypatch, capsys):
    """The body of elu_plus_one as a reader may change it: the plain form computes it."""
    monkeypatch.setattr(linear_triton.agrees, "__defaults__", ("cuda", {}))
    monkeypatch.setattr(model.elu_plus_one, "__code__", (lambda x: x.relu() + 0.1).__code__)
    q, k, v = (seeded(1, 2, 65, 64, seed=i) for i in range(3))
    attention = torch.compile(model.linear_attention, fullgraph=True, disable=not compiled)
    found = attention(q.cuda(), k.cuda(), v.cuda()).cpu()
    assert error(found, linear_reference(q, k, v)) <= 1e-5
    assert capsys.readouterr().out.count("runs without its GPU kernel") == 1


@pytest.mark.parametrize("name", ("linear", "linear_conv"))
def test_stages_run_by_default_and_end_where_the_cpu_ends(files, tmp_path, name):
    """Compiled, in bfloat16, beside an eager float32 run of the CPU on the same draws."""
    student = tmp_path / "one/student.safetensors"
    for stage, folder, flags in ((align_attention, "one", ["--attention", name, "--steps", 20]),
                                 (align_features, "two", ["--student", student])):
        brief(stage, files, tmp_path / folder, *flags, "--dtype", "auto")
        assert report_of(tmp_path / folder)["arguments"]["compile"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            brief(stage, files, tmp_path / f"{folder}-cpu", *flags)
        gpu, cpu = ([row["loss"] for row in log_of(tmp_path / f"{folder}{end}") if "loss" in row]
                    for end in ("", "-cpu"))
        assert gpu == pytest.approx(cpu, rel=0.05)
    for task in ("classify", "segment"):
        call(finetune, "--task", task, "--data", files / task, *BRIEF, "--dtype", "auto",
             "--weights", tmp_path / "two/student.safetensors", "--out", tmp_path / task)
        row, = json.loads((tmp_path / task / "metrics.json").read_text())
        assert 0 <= row["score"] <= 100
        assert all(math.isfinite(row.get("loss", 0)) for row in log_of(tmp_path / task))


@pytest.mark.parametrize("part", bench.PARTS)
def test_bench_measures_time_and_memory_in_every_mode(part, tmp_path):
    points, more = {"attention": (256, ["--heads", 2]), "model": (56, ["--models", "vits14"])}[part]
    call(bench, part, "--quick", "--points", points, *more, "--out", tmp_path)
    path, = tmp_path.glob("*.csv")
    rows = [*csv.DictReader(path.open())]
    assert {row["mode"] for row in rows} == set(bench.MODES)
    assert all(row["status"] == "ok" and float(row["median_ms"]) > 0 for row in rows)
    assert all(float(row["peak_mb"]) > 0 for row in rows)
    assert all(row["device"].startswith(torch.cuda.get_device_name()) for row in rows)
