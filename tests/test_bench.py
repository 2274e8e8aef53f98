"""bench.py counts, measures and marks what it says it does: exact FLOPs and bytes, calls in turns, no silent gap in a curve."""
import csv
import itertools
from functools import partial, partialmethod

import pytest
import torch
from PIL import Image

import bench
import model
from model import Architecture, InputError, Known

TINY = Architecture(width=128, depth=2, heads=2, hidden=256, patch=14, grid=(2, 2), layerscale=True, position="dinov2")
PRODUCTS = ("linear", "relu", "products")     # operators whose products are those of linear attention alone


@pytest.fixture
def tiny(monkeypatch):
    """A model that is small enough to time in a test, under the name of the real one."""
    monkeypatch.setitem(model.KNOWN, "tiny", Known(TINY, "tiny", "mit"))
    for name in list(bench.MODELS):
        monkeypatch.setitem(bench.MODELS, name, "tiny")


def table(tmp_path, *words):
    """Runs a part -> the rows of its CSV, numbers as numbers."""
    bench.main([*words, "--out", str(tmp_path)])
    path, = tmp_path.glob("*.csv")
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == list(bench.COLUMNS)
        rows = list(reader)
    number = lambda text: float(text) if text and text.replace(".", "").replace("e-", "").replace("e+", "").isdigit() else text
    return [{key: number(value) for key, value in row.items()} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Operators

def heads(tokens, batch=2, heads=3, dtype=torch.float64):
    torch.manual_seed(tokens)
    return bench.projected(batch, heads, tokens, "cpu", dtype)


def test_strides_are_those_of_the_network():
    arch = Architecture(3 * bench.HEAD_DIM, 1, 3, 8, 14, (2, 2))
    attention = model.Attention(arch, "linear")
    for ours, real in zip(heads(11, dtype=torch.float32), attention.project(torch.randn(2, 11, arch.width))):
        assert ours.shape == real.shape and ours.stride() == real.stride()


@pytest.mark.parametrize("tokens", (64, 128, 320))
def test_nystromformer_equals_its_dense_form(tokens):
    """The N x N map written out, landmarks by a loop."""
    q, k, v = heads(tokens)
    few = lambda x: torch.stack([segment.mean(-2) for segment in x.tensor_split(64, dim=-2)], dim=-2)
    soft = lambda a, b: torch.softmax(a @ b.transpose(-2, -1) / bench.HEAD_DIM ** 0.5, dim=-1)
    a = soft(few(q), few(k))
    inverse, one = a.transpose(-2, -1).clone(), torch.eye(64, dtype=a.dtype)
    for matrix, z in zip(a.flatten(0, 1), inverse.flatten(0, 1)):
        z /= torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(matrix, torch.inf)
        for _ in range(6):
            z.copy_(z @ (13 * one - matrix @ z @ (15 * one - matrix @ z @ (7 * one - matrix @ z))) / 4)
    dense = soft(q, few(k)) @ inverse @ soft(few(q), k)                  # (B,H,N,N)
    torch.testing.assert_close(bench.nystrom_attention(q, k, v), dense @ v, rtol=1e-10, atol=1e-12)


def test_nystromformer_with_a_landmark_for_each_token_is_softmax():
    """softmax pinv(softmax) softmax = softmax, where the inverse has converged: peaked attention."""
    q, _, v = heads(64)
    q = 24 * torch.nn.functional.normalize(q, dim=-1)
    torch.testing.assert_close(bench.nystrom_attention(q, q, v), model.softmax_reference(q, q, v), rtol=1e-6, atol=1e-6)


def test_products_are_linear_attention_without_map_and_normaliser():
    q, k, v = heads(50)
    torch.testing.assert_close(bench.products(q, k, v), (q @ k.mT) @ v, rtol=1e-10, atol=1e-10)
    assert sum(x.nbytes for x in bench.copy(q, k, v)) == 2 * v.nbytes


def test_every_operator_keeps_the_shape():
    q, k, v = heads(128, dtype=torch.float32)
    for name, operator in bench.operators(3, "cpu", torch.float32).items():
        if name != "copy":
            assert operator(q, k, v).shape == v.shape, name


# ---------------------------------------------------------------------------------------------------------------------
# What is counted

def flops(name, tokens, backward=False):
    operator = bench.operators(3, "cpu", torch.float32)[name]
    return bench.count_flops(lambda: bench.forward_or_both(operator, *bench.projected(2, 3, tokens, "cpu", torch.float32), backward))


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("tokens", (256, 4096, 65536))
def test_flops_are_exactly_linear_or_quadratic(tokens, backward):
    """A product costs 2 operations for each multiplication; the backward of a product is two more."""
    once, D = 2 * 2 * 3 * tokens * bench.HEAD_DIM, bench.HEAD_DIM
    for name in PRODUCTS:
        assert flops(name, tokens, backward) == 2 * once * D * (1 + 2 * backward)
    assert flops("softmax_reference", tokens, backward) == 2 * once * tokens * (1 + 2 * backward)
    assert flops("hedgehog", tokens) == 6 * once * D                    # two maps, and products twice as wide
    fixed = 2 * 2 * 3 * 64 ** 3 * (1 + 6 * 4 + 1)                       # landmarks' map, its inverse, their product with v
    assert flops("nystromformer", tokens) == 4 * once * 64 + fixed


def test_counting_needs_no_memory():
    assert flops("softmax_reference", 2 ** 20) == 2 * 2 * 2 * 3 * 2 ** 40 * bench.HEAD_DIM       # maps of 26 terabytes


def test_peak_memory_is_exact():
    def both():
        a = torch.empty(1_000_000)
        b = torch.empty(1_000_000)
        return len(a) + len(b)

    def in_turn():
        a = torch.empty(1_000_000)
        del a
        b = torch.empty(1_000_000)
        return len(b)

    assert bench.peak_memory(both, "cpu") == pytest.approx(8, abs=0.01)
    assert bench.peak_memory(in_turn, "cpu") == pytest.approx(4, abs=0.01)


def test_written_out_softmax_holds_its_maps_and_linear_does_not():
    q, k, v = heads(1000, dtype=torch.float32)
    peak = {name: bench.peak_memory(partial(operator, q, k, v), "cpu") for name, operator in model.ATTENTION.items()}
    assert peak["softmax_reference"] >= 2 * 2 * 3 * 1000 ** 2 * 4 / 1e6
    assert max(peak["linear"], peak["softmax"]) <= 10 * v.nbytes / 1e6


# ---------------------------------------------------------------------------------------------------------------------
# How it is timed

def test_calls_take_turns_and_medians_are_of_them(monkeypatch):
    order = []
    took = {"a": iter([100, 1, 2, 3, 4, 50]), "b": iter([100, 10, 10, 10, 10, 10])}             # the first, then repeats

    def timed(call, device, loops=1):
        call()
        return next(took[order[-1]])

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "peak_memory", lambda call, device: 7)
    rows = bench.measure({name: partial(order.append, name) for name in took}, {}, "cpu", seconds=0)
    assert order == ["a", "a", "b", "b"] * 6                            # a warm-up and the first, then turns, each after one untimed
    assert rows["a"] == dict(status="ok", peak_mb=7, median_ms=3, low_ms=2, high_ms=4, repeats=5)
    assert rows["b"]["median_ms"] == rows["b"]["low_ms"] == rows["b"]["high_ms"] == 10


def test_time_is_in_milliseconds_per_call():
    assert 20 <= bench.timed(lambda: bench.time.sleep(0.02), "cpu", loops=2) < 40


def test_a_slow_call_is_the_last_of_its_curve(monkeypatch):
    monkeypatch.setattr(bench, "SLOW", 0.01)
    calls, ended = {"slow": lambda: bench.time.sleep(0.03), "fast": lambda: None}, {}
    first, second = (bench.measure(calls, ended, "cpu", seconds=0.01) for _ in range(2))
    assert first["slow"]["status"] == "ok" and first["slow"]["repeats"] == 1 and first["slow"]["median_ms"] >= 30
    assert second["slow"] == {"status": ended["slow"]} and "ended" in ended["slow"]
    assert second["fast"]["status"] == "ok" and second["fast"]["repeats"] >= 5


def test_a_point_whose_maps_do_not_fit_is_skipped_and_marked(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "linux", lambda file, pattern, otherwise: 4000 if file == "meminfo" else otherwise)      # 4 MB
    rows = table(tmp_path, "attention", "--quick", "--heads", "2", "--points", "64", "1024", "2048")
    written = {row["tokens"]: row for row in rows if row["name"] == "softmax_reference" and row["pass"] == "forward"}
    assert written[64]["status"] == "ok" and written[64]["median_ms"] > 0
    for tokens in (1024, 2048):
        assert written[tokens]["status"].startswith("skipped") and "GB" in written[tokens]["status"]
        assert written[tokens]["median_ms"] == written[tokens]["peak_mb"] == "" and written[tokens]["gflops"] > 0
    assert all(row["status"] == "ok" for row in rows if row["name"] != "softmax_reference")


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")))
def test_out_of_memory_ends_a_curve_and_not_the_run(error):
    def big():
        raise error
    ended = {}
    for _ in range(2):
        rows = bench.measure({"big": big, "small": lambda: None}, ended, "cpu", seconds=0)
        assert rows["big"] == {"status": "out of memory"} and rows["small"]["status"] == "ok"


def test_another_error_is_not_swallowed():
    with pytest.raises(RuntimeError, match="shape"):
        bench.measure({"wrong": lambda: torch.empty(2).view(3)}, {}, "cpu", 0)


# ---------------------------------------------------------------------------------------------------------------------
# The parts

def consistent(rows):
    """Units and ratios of a CSV agree with one another, to the five digits that it holds."""
    close = partial(pytest.approx, rel=2e-4)
    for row in rows:
        assert row["status"] == "ok" and 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["repeats"] >= 1
        assert row["torch"] and row["torchvision"] and "threads" in row["device"] and row["mode"] == "eager" and row["dtype"] == "float32"
        assert row["command"].startswith(f"python bench.py {row['part']}") and row["peak_mb"] >= 0
        if row["gflops"] != "":
            assert row["gflops_per_s"] == close(row["gflops"] / row["median_ms"] * 1e3)
        if row["part"] != "attention":
            assert row["images_per_s"] == close(row["batch"] / row["median_ms"] * 1e3)
        same = {key: row[key] for key in ("model", "heads", "batch", "pixels", "tokens") if row["part"] != "attention"} or {
            key: row[key] for key in ("heads", "batch", "tokens", "pass")}
        base, = (other for other in rows if other["name"] == row["ratio_to"] and same.items() <= other.items())
        assert row["ratio"] == close(row["median_ms"] / base["median_ms"])


def test_part_attention(tmp_path, capsys):
    rows = table(tmp_path, "attention", "--quick", "--heads", "2", "--points", "64", "1024")
    consistent(rows)
    assert {(row["name"], row["tokens"], row["pass"]) for row in rows} == set(itertools.product(
        bench.operators(2, "cpu", torch.float32), (64, 1024), ("forward", "forward+backward"))) - {
        ("copy", tokens, "forward+backward") for tokens in (64, 1024)}
    for row in rows:
        assert (row["heads"], row["head_dim"], row["batch"]) == (2, 64, 1)
        assert row["resident_mb"] == pytest.approx(3 * 2 * row["tokens"] * 64 * 4 / 1e6, rel=1e-3)
        assert bool(row["backend"]) == (row["name"] == "softmax")
        want = {"softmax": row["tokens"], "softmax_reference": row["tokens"], "linear": 64, "relu": 64, "products": 64}.get(row["name"])
        if want:
            assert row["gflops"] == pytest.approx(1e-9 * 4 * 2 * row["tokens"] * 64 * want * (3 if "back" in row["pass"] else 1), rel=1e-4)
    said = capsys.readouterr().out
    assert said.count("from 64 to 1024 tokens linear costs") == 2 and said.count("moving q, k, v and out once") == 1 and "wrote" in said


def test_part_model(tiny, tmp_path, capsys):
    rows = table(tmp_path, "model", "--quick", "--points", "30", "55")
    consistent(rows)
    assert {(row["name"], row["pixels"], row["tokens"]) for row in rows} == {
        (name, pixels, tokens) for name in ("softmax_reference", "softmax", "linear") for pixels, tokens in ((28, 5), (56, 17))}
    vit = model.ViT(TINY)
    for row in rows:
        assert row["resident_mb"] == pytest.approx((sum(p.nbytes for p in vit.parameters()) + 3 * 4 * row["pixels"] ** 2) / 1e6, rel=1e-3)
        N, C = row["tokens"], TINY.width
        linears = 2 * N * C * (4 * C + 2 * TINY.hidden) * TINY.depth + 2 * (N - 1) * C * 3 * 14 ** 2
        maps = 4 * N * C * (64 if row["name"] == "linear" else N) * TINY.depth
        assert row["gflops"] == pytest.approx(1e-9 * (linears + maps), rel=1e-4)
    assert "linear is as fast as fused softmax" in capsys.readouterr().out


def test_part_train(tiny, tmp_path, monkeypatch):
    seen = {}
    real = bench.linearize
    monkeypatch.setattr(bench, "linearize", lambda vit: seen.setdefault(len(seen), (vit, real(vit)))[1])
    rows = table(tmp_path, "train", "--quick", "--points", "28")
    consistent(rows)
    assert [row["name"] for row in rows] == ["teacher forward", "stage 1", "stage 2"] and rows[0]["ratio"] == 1
    (teacher, one), (_, two) = seen.values()
    changed = lambda student: {name for (name, a), b in zip(student.named_parameters(), teacher.parameters()) if not torch.equal(a, b)}
    assert changed(one) == {name for name, _ in teacher.named_parameters() if "qkv" in name}     # stage 1's weights and no others
    assert len(changed(two)) > 0.9 * len(list(two.parameters()))
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("words", (("attention", "--points", "64"), ("model", "--points", "28"), ("train", "--points", "28")), ids=str)
def test_compiled(words, tiny, tmp_path, monkeypatch):
    """The default of a GPU, with a backend that needs no compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    eager = {(row["name"], row["tokens"], row["pass"]): row["gflops"] for row in table(tmp_path / "eager", *words, "--quick")}
    rows = table(tmp_path, *words, "--quick", "--mode", "compiled")
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:                          # compiled, the written-out form would become the fused kernel and lose its maps
        assert row["mode"] == ("eager" if row["name"] == "softmax_reference" else "compiled")
        assert row["ratio"] > 0 and row["gflops"] == eager[row["name"], row["tokens"], row["pass"]]
    assert list(tmp_path.glob(f"bench-cpu-{words[0]}-compiled-quick.csv"))


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
    real, points = bench.measure, []

    def interrupted(*args):
        points.append(1)
        if len(points) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["attention", "--quick", "--points", "64", "128", "--out", str(tmp_path)])
    with open(tmp_path / "bench-cpu-attention-eager-quick.csv") as file:
        assert {row["tokens"] for row in csv.DictReader(file)} == {"64"}


def curve(**gains):
    """Rows of a model whose linear form is `gain` times as fast as softmax, which needs pixels^2 ms."""
    return [dict(name=name, pixels=int(pixels[1:]), images_per_s=1e6 / int(pixels[1:]) ** 2 * (gain if name == "linear" else 1))
            for pixels, gain in gains.items() for name in ("softmax", "linear")]


def test_crossover():
    assert bench.crossover(curve(p100=0.5, p400=2.0)) == 200            # half way on a logarithmic axis
    assert bench.crossover(curve(p100=1.1, p200=0.9, p400=1.0)) == 400  # for good
    assert bench.crossover(curve(p100=1.0, p200=2.0)) == 100
    assert bench.crossover(curve(p100=2.0, p200=0.9)) is None
    assert bench.crossover([row for row in curve(p100=0.5, p400=2.0) if row["pixels"] == 100 or row["name"] == "linear"]) is None


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture of bench.py needs matplotlib")
    table(tmp_path, "attention", "--quick", "--points", "64", "128")
    with Image.open(tmp_path / "bench-cpu-attention-eager-quick.png") as image:
        assert min(image.size) > 200


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.sys.modules, "matplotlib", None)
    table(tmp_path, "attention", "--quick", "--points", "64", "128")
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("words, says", ((("attention", "--points", "0"), "--points"), (("model", "--batch", "-1"), "--batch"),
                                         (("attention", "--heads", "0"), "--heads"), (("attention", "--points", "100"), "multiples")), ids=str)
def test_bad_flags_are_refused(words, says, tmp_path):
    with pytest.raises(InputError, match=says):
        bench.main([*words, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not be written"):
        bench.main(["attention", "--quick", "--points", "64", "--out", str(tmp_path / "file/below")])
