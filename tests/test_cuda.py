"""What only a GPU can show: ADALA_GPU=1 python -m pytest -q tests/test_cuda.py

All other tests run on the CPU, also where there is a GPU, which does not repeat a run bit for bit.
"""
import json
import math
import os
import signal
from contextlib import contextmanager
from itertools import product

import pytest
import torch

import align_attention
import align_features
import bench
import finetune
import model
from conftest import BRIEF, brief, call, error, log_of, moved, randomise, report_of, seeded
from conftest import student_of
from model import ATTENTION, Architecture, ViT, linear_reference, linearize

pytestmark = pytest.mark.skipif("ADALA_GPU" not in os.environ, reason="needs a GPU: ADALA_GPU=1")
ONE_HEAD = Architecture(64, 1, 1, 64, patch=4, grid=(32, 32), registers=1)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)      # as device_and_dtype


@contextmanager
def on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


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
def test_sums_over_many_tokens_stay_in_range(dtype):
    q, k, v = (seeded(1, 2, 16384, 64, seed=i).to("cuda", dtype) for i in range(3))
    want = linear_reference(*(x[:, :, :64].double() for x in (q, k, v)))
    assert torch.isfinite(model.linear_attention(q, k, v)).all()
    assert error(model.linear_attention(*(x[:, :, :64] for x in (q, k, v))), want) <= LIMIT[dtype]


def test_stages_run_by_default_and_end_where_the_cpu_ends(files, tmp_path):
    """Compiled, in bfloat16, beside an eager float32 run of the CPU on the same draws."""
    for name in ("linear", "linear_conv"):
        out = tmp_path / name
        for stage, folder, flags in (
                (align_attention, "one", ["--attention", name, "--steps", 20]),
                (align_features, "two", ["--student", out / "one/student.safetensors"])):
            brief(stage, files, out / folder, *flags, "--dtype", "auto")
            assert report_of(out / folder)["arguments"]["compile"]
            with on_cpu():
                brief(stage, files, out / f"{folder}-cpu", *flags)
            gpu, cpu = ([row["loss"] for row in log_of(out / f"{folder}{end}")]
                        for end in ("", "-cpu"))
            assert gpu == pytest.approx(cpu, rel=0.05)
        aligned = ["--align", 1, "--teacher", files / "teacher.safetensors"]
        for task, flags in product(("classify", "segment"), ([], ["--freeze"], aligned)):
            run = out / f"{task}{flags[:1]}"
            call(finetune, "--task", task, "--data", files / task, *BRIEF, "--dtype", "auto",
                 "--weights", out / "two/student.safetensors", *flags, "--out", run)
            row, = json.loads((run / "metrics.json").read_text())
            assert row["device"] == "cuda" and 0 <= row["score"] <= 100 and row["peak_mb"] > 0
            assert math.isfinite(log_of(run)[-1]["loss"])


def test_float32_equals_the_cpu(files, tmp_path):
    """Stage 1 and 2, eager: the same photos, crops and steps on both."""
    for stage in (align_attention, align_features):
        out = tmp_path / stage.__name__
        brief(stage, files, out / "gpu", "--no-compile")
        with on_cpu():
            brief(stage, files, out / "cpu")
        gpu, cpu = (student_of(out / device).state_dict() for device in ("gpu", "cpu"))
        for name in gpu:
            assert error(gpu[name], cpu[name]) <= 1e-3, name


def test_float16_scales_its_losses(files, tmp_path):
    """The scaler's first steps may overflow; afterwards all that is trained moves."""
    teacher = model.load_vit(files / "teacher.safetensors")
    for stage, trained in ((align_attention, "attn"), (align_features, "")):
        out = tmp_path / stage.__name__
        brief(stage, files, out, "--dtype", "float16", "--steps", 20)
        changed = moved(linearize(teacher, "linear").state_dict(), student_of(out).state_dict())
        assert {name for name in changed if trained in name} >= {
            f"blocks.{i}.attn.{part}.weight" for i in range(2) for part in ("qkv", "proj")}


def test_a_stopped_run_goes_on(files, tmp_path, monkeypatch):
    """Stage 1 and 2, stopped after step 2 of 4: all of the state, on the GPU, is taken up again."""
    for stage in (align_attention, align_features):
        flags = ["--steps", 4, "--no-compile", "--dtype", "float32"]
        out, done = tmp_path / stage.__name__, model.Progress.done
        brief(stage, files, out / "whole", *flags)

        def stopping(progress, *args, **row):
            done(progress, *args, **row)
            if progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(model.Stopped):
            patch.setattr(model.Progress, "done", stopping)
            brief(stage, files, out / "stopped", *flags)
        assert "goes on from step" in brief(stage, files, out / "stopped", *flags)
        one, other = (student_of(out / end).state_dict() for end in ("whole", "stopped"))
        for name in one:
            assert error(other[name], one[name]) <= 1e-5, name


def test_vits_of_every_operator_run_in_half_precision():
    for name in ATTENTION:
        vit = linearize(ViT(ONE_HEAD), name).cuda().eval()
        images = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8, device="cuda")
        with torch.no_grad():
            want = vit(vit.normalize(images))
            for dtype in (torch.bfloat16, torch.float16):
                with model.autocast("cuda", dtype):
                    assert error(vit(vit.normalize(images)).cpu(), want.cpu()) <= 0.02, name


@pytest.mark.parametrize("part", bench.PARTS)
def test_bench_measures_time_and_memory(part, tmp_path):
    points = dict(attention=[256], model=[56], train=[56])[part]
    more = ["--models", "vits14"] if part == "model" else []
    call(bench, part, "--quick", "--mode", "eager", "--points", *points, *more, "--out", tmp_path)
    path, = tmp_path.glob("*.csv")
    rows = [*bench.csv.DictReader(path.open())]
    assert rows and all(row["status"] == "ok" and float(row["median_ms"]) > 0 for row in rows)
    assert all(float(row["peak_mb"]) > 0 for row in rows)
    assert all(row["device"].startswith(torch.cuda.get_device_name()) for row in rows)
