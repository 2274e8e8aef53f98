"""bench.py counts, measures and marks what it says: FLOPs, bytes, turns, no silent gaps."""
import csv
import itertools
from functools import partial
from unittest.mock import Mock

import pytest
import torch

import bench
import model
from model import Architecture

TINY = Architecture(128, 2, 2, 256, patch=14, grid=(2, 2), layerscale=True, position="dinov2")
CPU = ("cpu", torch.float32)


@pytest.fixture(autouse=True)
def tiny_and_in_a_hurry(monkeypatch):
    """A model small enough to time in a test, under the names of the real ones; few repeats. Rows
    without the GPU's kernel, of which the command has to tell."""
    for name in bench.MODELS.values():
        monkeypatch.setitem(model.KNOWN, name, TINY)
    monkeypatch.setattr(bench, "SECONDS", {False: 0, True: 0})
    monkeypatch.setattr(bench.Stopped, "left", "")
    monkeypatch.setenv("ADALA_KERNEL", "plain")


def read(path):
    """The rows of a CSV, numbers as numbers."""
    number = lambda text: float(text) if text.replace(".", "").replace("e-", "").isdigit() else text
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == list(bench.COLUMNS)
        return [{key: number(value) for key, value in row.items()} for row in reader]


def table(out, part, *words):
    """Runs a part -> the rows of its CSV."""
    bench.main([part, "--dtype", "float32", *words, "--out", str(out)])
    path, = out.glob("*.csv")
    return read(path)


def flops(name, tokens):
    operator = bench.operators([name], 3, (1, tokens), *CPU)[name]
    return bench.count_flops(lambda: operator(*bench.projected(2, 3, tokens, *CPU), (1, tokens)))


def test_flops_are_exactly_linear_or_quadratic():
    """A product costs 2 operations for each multiplication."""
    for tokens in (256, 2 ** 20):                       # without memory: maps of 26 terabytes
        once = 2 * 2 * 3 * tokens * bench.HEAD_DIM
        assert flops("linear", tokens) == (2 * bench.HEAD_DIM + 1) * once
        assert flops("hedgehog", tokens) == (6 * bench.HEAD_DIM + 2) * once     # 2 D features
        assert flops("softmax_reference", tokens) == 2 * once * tokens


def test_peak_memory_is_exact():
    make = lambda: torch.empty(1_000_000)
    for call, peak in ((lambda: [make(), make()], 8), (lambda: [len(make()), len(make())], 4)):
        assert bench.peak_memory(call, "cpu") == pytest.approx(peak, abs=0.01)


def test_calls_take_turns_and_medians_are_of_them(monkeypatch):
    order, a, b = [], ("a", "eager"), ("b", "eager")    # the first time only tells how often
    took = {a: iter([100, 1, 2, 3, 4, 50]), b: iter([100, 10, 10, 10, 10, 10])}

    def timed(call, device, loops=1):
        call()
        return next(took[order[-1]])

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "peak_memory", lambda call, device: 7)
    rows = bench.measure({key: partial(order.append, key) for key in took}, {}, "cpu", seconds=0)
    assert order == [a, a, b, b] * 6                    # warm-up and first, then untimed and timed
    assert rows[a] == dict(status="ok", peak_mb=7, median_ms=3, low_ms=2, high_ms=4, repeats=5)
    assert rows[b]["median_ms"] == rows[b]["low_ms"] == rows[b]["high_ms"] == 10


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")))
def test_out_of_memory_ends_a_curve_and_not_the_run(error):
    big, small, ended = Mock(side_effect=error), ("small", "eager"), {}
    for _ in range(2):
        rows = bench.measure({("big", "eager"): big, small: lambda: None}, ended, "cpu", 0)
        assert rows["big", "eager"] == {"status": "out of memory"} and big.call_count == 1
        assert rows[small]["status"] == "ok"
    big.side_effect = RuntimeError("shape")             # another error ends the run
    with pytest.raises(RuntimeError, match="shape"):
        bench.measure({("big", "eager"): big}, {}, "cpu", 0)


def consistent(rows):
    """Units and ratios of a CSV agree with one another, to the five digits that it holds."""
    close = partial(pytest.approx, rel=2e-4)
    for row in rows:
        assert row["status"] == "ok" and row["repeats"] >= 1 and row["peak_mb"] > 0
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["torch"] and row["torchvision"] and "threads" in row["device"]
        assert (row["dtype"], row["head_dim"]) == ("float32", 64)
        assert row["command"].startswith(f"ADALA_KERNEL=plain python bench.py {row['part']}")
        if row["part"] == "model":
            assert row["images_per_s"] == close(row["batch"] / row["median_ms"] * 1e3)
        same = "mode", "heads", "batch", "tokens"
        base, = (other for other in rows if other["name"] == row["ratio_to"] == "softmax"
                 and all(other[key] == row[key] for key in same))
        assert row["ratio"] == close(row["median_ms"] / base["median_ms"])


def test_part_attention_times_the_operators_that_are_named(tmp_path):
    rows = table(tmp_path, "attention", "--quick", "--points", "64", "--operators", "linear")
    assert [row["name"] for row in rows] == ["linear"]


def test_part_model(tmp_path):
    names = "softmax_reference", "softmax", "linear", "linear_conv"
    rows = table(tmp_path, "model", "--quick", "--batch-size", "1", "2", "--points", "27", "55",
                 "--operators", *names)
    consistent(rows)
    assert {(row["name"], row["batch"], row["pixels"], row["tokens"]) for row in rows} == {
        (name, n, *point) for name in names for n in (1, 2) for point in ((28, 5), (56, 17))}
    for row in rows:
        N, C = row["tokens"], TINY.width
        linears = 2 * N * C * (4 * C + 2 * TINY.hidden) * TINY.depth + 2 * (N - 1) * C * 3 * 14 ** 2
        maps = 4 * N * C * (64.5 if "linear" in row["name"] else N) * TINY.depth
        if row["name"] == "linear_conv":                # at twice the fewest pixels it runs twice
            maps += 2 * (N - 1) * C * 5 ** 2 * TINY.depth * row["pixels"] // 28
        assert row["gflops"] == pytest.approx(1e-9 * row["batch"] * (linears + maps), rel=1e-4)


@pytest.mark.parametrize("part, points, tokens, usual", (
    ("attention", ("64", "320"), (64, 320), {*model.ATTENTION}),
    ("model", ("28",), (5,), {"softmax_reference", "softmax", "linear", "linear_conv"})))
def test_modes_stand_in_one_table_with_ratios_in_the_same_mode(
        part, points, tokens, usual, tmp_path, monkeypatch):
    """Compiled with a backend that needs no compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = table(tmp_path, part, "--quick", "--mode", "eager", "compiled", "--points", *points)
    consistent(rows)
    found = {(row["mode"], row["name"], row["tokens"]) for row in rows}
    wanted = {*itertools.product(bench.MODES, usual, tokens)}
    if part == "attention":             # of 320 tokens a grid of 17 x 17, where it runs twice
        costs = {(row["name"], row["tokens"]): row["gflops"] for row in rows}
        near, far = (costs["linear_conv", n] - costs["linear", n] for n in tokens)
        assert far / near == pytest.approx(2 * 17 ** 2 / 8 ** 2, rel=1e-2)
    # Compiled, written-out softmax would become "softmax".
    assert found == {row for row in wanted if row[:2] != ("compiled", "softmax_reference")}


def test_what_was_measured_survives_an_interruption_and_the_next_run(tmp_path, monkeypatch):
    point = {("linear", "eager"): {"status": "ok"}}
    monkeypatch.setattr(bench, "measure", Mock(side_effect=[point, KeyboardInterrupt]))
    mine = tmp_path / "bench-cpu-attention-float32-quick.csv"
    mine.write_bytes(b"mine")
    with pytest.raises(KeyboardInterrupt):
        bench.main(["attention", "--dtype", "float32", "--quick", "--out", str(tmp_path)])
    path = tmp_path / "bench-cpu-attention-float32-quick-1.csv"
    assert [row["tokens"] for row in read(path)] == [256] and str(path) in bench.Stopped.left
    assert mine.read_bytes() == b"mine"
