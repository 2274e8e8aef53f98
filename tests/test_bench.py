"""bench.py counts, measures and marks what it says: FLOPs, bytes, turns, no silent gaps."""
import csv
import itertools
import runpy
import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch

import bench
import model
from model import Architecture, InputError

TINY = Architecture(128, 2, 2, 256, patch=14, grid=(2, 2), layerscale=True, position="dinov2")
CPU = ("cpu", torch.float32)
FAST = ("--quick", "--heads", "2", "--points")


@pytest.fixture(autouse=True)
def tiny_and_in_a_hurry(monkeypatch):
    """A model small enough to time in a test, under the names of the real ones; few repeats."""
    for name in bench.MODELS.values():
        monkeypatch.setitem(model.KNOWN, name, TINY)
    for part, (points, *_, base) in list(bench.PARTS.items()):
        monkeypatch.setitem(bench.PARTS, part, (points, 0, 0, base))
    monkeypatch.setattr(bench.Stopped, "left", "")


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


def test_inputs_have_the_network_s_strides():
    attention = model.Attention(Architecture(3 * bench.HEAD_DIM, 1, 3, 8, 14, (2, 2)), "linear")
    real = attention.project(torch.randn(2, 128, 3 * bench.HEAD_DIM))
    for ours, theirs in zip(bench.projected(2, 3, 128, *CPU), real):
        assert ours.shape == theirs.shape and ours.stride() == theirs.stride()


def flops(name, tokens, backward=False):
    operator = bench.operators(3, (1, tokens), *CPU)[name]
    make = lambda: bench.projected(2, 3, tokens, *CPU)
    call = lambda: bench.forward_or_both(operator, *make(), (1, tokens), backward)()
    return bench.count_flops(call)


@pytest.mark.parametrize("backward", (False, True))
def test_flops_are_exactly_linear_or_quadratic(backward):
    """A product costs 2 operations for each multiplication; its backward is two more products."""
    for tokens in (256, 65536):
        once, D = 2 * 2 * 3 * tokens * bench.HEAD_DIM, bench.HEAD_DIM
        for name, normaliser in (("linear", once), (bench.PLAIN, once), ("products", 0)):
            assert flops(name, tokens, backward) == (2 * once * D + normaliser) * (1 + 2 * backward)
        written_out = flops("softmax_reference", tokens, backward)
        assert written_out == 2 * once * tokens * (1 + 2 * backward)
    big = flops("softmax_reference", 2 ** 20)           # without memory: maps of 26 terabytes
    assert big == 2 * 2 * 2 * 3 * 2 ** 40 * bench.HEAD_DIM


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


def test_a_slow_call_is_the_last_of_its_curve_which_ends_alone(monkeypatch):
    slow, fast, ended = ("slow", "eager"), ("fast", "eager"), {}
    monkeypatch.setattr(bench, "SLOW", 0.01)
    calls = {slow: lambda: bench.time.sleep(0.03), fast: lambda: None}
    first, second = (bench.measure(calls, ended, "cpu", seconds=0.01) for _ in range(2))
    assert first[slow]["status"] == "ok" and first[slow]["repeats"] == 1
    assert second[slow] == {"status": ended[slow]} and "ended" in ended[slow]
    assert second[fast]["status"] == "ok" and second[fast]["repeats"] >= 5


def test_a_point_whose_maps_do_not_fit_is_skipped_and_marked(monkeypatch):
    monkeypatch.setattr(bench, "linux", lambda *_: 4000)                # 4 MB are free
    calls = {(name, "eager"): lambda: None for name in ("softmax_reference", "linear")}
    written, linear = bench.measure(calls, {}, "cpu", 0, maps=3_000_000).values()
    assert written.keys() == {"status"} and written["status"].startswith("skipped: maps of")
    assert linear["status"] == "ok"


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")))
def test_out_of_memory_ends_a_curve_and_not_the_run(error):
    big, small, ended = Mock(side_effect=error), ("small", "eager"), {}
    for _ in range(2):
        rows = bench.measure({("big", "eager"): big, small: lambda: None}, ended, "cpu", 0)
        assert rows["big", "eager"] == {"status": "out of memory"} and big.call_count == 1
        assert rows[small]["status"] == "ok"


def test_another_error_ends_the_run():
    with pytest.raises(RuntimeError, match="shape"):
        bench.measure({("big", "eager"): Mock(side_effect=RuntimeError("shape"))}, {}, "cpu", 0)


def consistent(rows):
    """Units and ratios of a CSV agree with one another, to the five digits that it holds."""
    close = partial(pytest.approx, rel=2e-4)
    for row in rows:
        assert row["status"] == "ok" and row["repeats"] >= 1 and row["peak_mb"] > 0
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["torch"] and row["torchvision"] and "threads" in row["device"]
        assert (row["mode"], row["dtype"], row["head_dim"]) == ("eager", "float32", 64)
        assert row["command"].startswith(f"python bench.py {row['part']}")
        assert row["gflops_per_s"] == close(row["gflops"] / row["median_ms"] * 1e3)
        if row["part"] == "model":
            assert row["images_per_s"] == close(row["batch"] / row["median_ms"] * 1e3)
        base, = (other for other in rows if other["name"] == row["ratio_to"]
                 and all(other[key] == row[key] for key in ("heads", "batch", "tokens", "pass")))
        assert row["ratio"] == close(row["median_ms"] / base["median_ms"])


def test_part_attention(tmp_path):
    rows = table(tmp_path, "attention", *FAST, "64", "320")
    consistent(rows)
    wanted = set(itertools.product([*model.ATTENTION, *bench.OTHERS], (64, 320),
                                   ("forward", "forward+backward")))
    wanted -= {("copy", tokens, "forward+backward") for tokens in (64, 320)}
    assert {(row["name"], row["tokens"], row["pass"]) for row in rows} == wanted
    for row in rows:
        assert row["resident_mb"] == pytest.approx(3 * 2 * row["tokens"] * 64 * 4 / 1e6, rel=1e-3)
        assert bool(row["backend"]) == (row["name"] == "softmax")


def test_part_model(tmp_path, capsys):
    names = "softmax_reference", "softmax", "linear"
    rows = table(tmp_path, "model", "--quick", "--points", "30", "55", "--operators", *names)
    consistent(rows)
    assert {(row["name"], row["pixels"], row["tokens"]) for row in rows} == {
        (name, *point) for name in names for point in ((28, 5), (56, 17))}
    for row in rows:
        N, C = row["tokens"], TINY.width
        size = sum(p.nbytes for p in model.ViT(TINY, row["name"]).parameters())
        assert row["resident_mb"] == pytest.approx((size + 12 * row["pixels"] ** 2) / 1e6, rel=1e-3)
        linears = 2 * N * C * (4 * C + 2 * TINY.hidden) * TINY.depth + 2 * (N - 1) * C * 3 * 14 ** 2
        maps = 4 * N * C * {"linear": 64.5}.get(row["name"], N) * TINY.depth
        assert row["gflops"] == pytest.approx(1e-9 * (linears + maps), rel=1e-4)
    said = capsys.readouterr().out
    for name in set(names) - {"softmax"}:
        assert said.count(f"vits14 1 eager {name} is as fast as softmax from") == 1
    assert "eager softmax is as" not in said


@pytest.mark.parametrize("words", (("attention", "--points", "64"), ("model", "--points", "28")))
def test_modes_stand_in_one_table_with_ratios_in_the_same_mode(words, tmp_path, monkeypatch):
    """Compiled with a backend that needs no compiler. Graphs are test_cuda.py's."""
    compiled, real = [], torch.nn.Module.compile

    def once(module, **more):
        compiled.extend(getattr(part, "function", None) for part in module.modules())
        real(module, backend="aot_eager", **more)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", once)
    rows = table(tmp_path, *words, "--quick", "--mode", "eager", "compiled")
    of = {mode: {row["name"] for row in rows if row["mode"] == mode} for mode in bench.MODES}
    assert of["eager"] - of["compiled"] == {"softmax_reference"} and "linear" in of["compiled"]
    for row in rows:
        base, = (other for other in rows if other["name"] == row["ratio_to"]
                 and all(other[key] == row[key] for key in ("mode", "heads", "pass")))
        assert row["ratio"] == pytest.approx(row["median_ms"] / base["median_ms"], rel=2e-4)
    assert model.softmax_reference not in compiled      # it would become the fused kernel
    assert model.linear_attention in compiled


def test_a_graph_is_recorded_by_the_first_call(monkeypatch):
    graphed = Mock(side_effect=lambda function, example: function)
    monkeypatch.setattr(bench, "graphed", graphed)
    call = bench.once_graphed(lambda x: 2 * x, 21)
    assert not graphed.called and call() == call() == 42 and graphed.call_count == 1


def test_plain_rows_have_the_plain_form():
    vit = bench.vit_of(model.ViT(TINY), bench.PLAIN, torch.bfloat16)
    assert {block.attn.operator.function for block in vit.blocks} == {model.linear_plain}
    assert vit.attention == "linear" and vit.norm.weight.dtype == torch.bfloat16


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
    real, points = bench.measure, []

    def interrupted(*args):
        points.append(1)
        if len(points) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, "attention", *FAST, "64", "128")
    path, = tmp_path.glob("*.csv")
    assert {row["tokens"] for row in read(path)} == {64} and str(path) in bench.Stopped.left


def test_crossover():
    """Half way, log-log; for good; from the first point on; never."""
    for ratios, pixels in (({100: 2, 400: 0.5}, 200), ({100: 0.9, 200: 1.1, 400: 1}, 400),
                           ({100: 1, 200: 0.5}, 100), ({100: 0.5, 200: 1.1}, None), ({}, None)):
        curve = [{"pixels": pixels, "ratio": ratio} for pixels, ratio in ratios.items()]
        assert bench.crossover(curve) == pixels


def test_nothing_is_ever_replaced_and_the_picture(tmp_path, monkeypatch):
    (tmp_path / "bench-cpu-model-float32-quick-1.csv").write_bytes(b"mine")
    for _ in range(2):
        bench.main(["model", "--dtype", "float32", "--quick", "--points", "28", "42", "--operators",
                    "softmax", "linear", "--out", str(tmp_path)])
    tables = [tmp_path / f"bench-cpu-model-float32-quick{tail}.csv" for tail in ("", "-2")]
    assert all(map(read, tables)) and len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "bench-cpu-model-float32-quick-1.csv").read_bytes() == b"mine"
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    pytest.importorskip("matplotlib", reason="results/bench_picture.py needs matplotlib")
    script = runpy.run_path(str(bench.Path(bench.__file__).parent / "results/bench_picture.py"))
    script["main"](tmp_path / "a.png", *tables)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, says", (
    (("attention", "--points", "0"), "--points"), (("model", "--batch-size", "-1"), "--batch-size"),
    (("attention", "--heads", "0"), "--heads"), (("model", "--mode", "graph"), "needs a GPU")))
def test_bad_flags_are_refused(words, says, tmp_path):
    with pytest.raises(InputError, match=says):
        table(tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not be written"):
        table(tmp_path / "file/below", "attention", *FAST, "64")
