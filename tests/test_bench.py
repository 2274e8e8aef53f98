"""bench.py counts, measures and marks what it says: FLOPs, bytes, turns, no silent gaps."""
import csv
import itertools
import runpy
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import bench
import model
from model import Architecture, InputError

TINY = Architecture(128, 2, 2, 256, patch=14, grid=(2, 2), layerscale=True, position="dinov2")
CPU = ("cpu", torch.float32)
FAST = ("--quick", "--heads", "2", "--points")
equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def tiny_and_in_a_hurry(monkeypatch):
    """A model small enough to time in a test, under the names of the real ones; few repeats."""
    for name in bench.MODELS.values():
        monkeypatch.setitem(model.KNOWN, name, TINY)
    for part, (points, *_, base) in list(bench.PARTS.items()):
        monkeypatch.setitem(bench.PARTS, part, (points, 0, 0, base))


class Mine(model.Operator):
    """A user's operator, with a parameter, that looks at the grid and not at the queries."""
    grids = []

    def __init__(self, arch):
        super().__init__(arch)
        self.scale = torch.nn.Parameter(torch.ones(arch.heads, 1, arch.width // arch.heads))

    def forward(self, q, k, v, grid):
        self.grids.append((grid, v.shape[-2]))
        return v.mean(-2, keepdim=True).expand_as(v) * self.scale


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


def inputs(tokens, dtype=torch.float64):
    torch.manual_seed(tokens)
    return bench.projected(2, 3, tokens, "cpu", dtype)


@pytest.mark.parametrize("tokens", (64, 128, 320))
def test_nystromformer_equals_its_dense_form(tokens):
    """The N x N map written out, landmarks by a loop."""
    q, k, v = inputs(tokens)
    few = lambda x: torch.stack([s.mean(-2) for s in x.tensor_split(64, dim=-2)], dim=-2)
    soft = lambda a, b: torch.softmax(a @ b.mT / bench.HEAD_DIM ** 0.5, dim=-1)
    a = soft(few(q), few(k))
    inverse, one, norm = a.mT.clone(), torch.eye(64, dtype=a.dtype), torch.linalg.matrix_norm
    for m, z in zip(a.flatten(0, 1), inverse.flatten(0, 1)):
        z /= norm(m, 1) * norm(m, torch.inf)
        for _ in range(6):
            z.copy_(z @ (13 * one - m @ z @ (15 * one - m @ z @ (7 * one - m @ z))) / 4)
    equal(bench.nystrom_attention(q, k, v), soft(q, few(k)) @ inverse @ soft(few(q), k) @ v)


def test_landmarks_and_blocks_of_one_or_all_tokens_are_softmax():
    """softmax pinv(softmax) softmax = softmax where the inverse has converged: peaked attention."""
    q, k, v = inputs(64)
    peaked = 24 * F.normalize(q, dim=-1)
    found = bench.nystrom_attention(peaked, peaked, v)
    truth = model.softmax_reference(peaked, peaked, v)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    for block, dtype in itertools.product((1, 64), (torch.float64, torch.bfloat16)):
        found = bench.monarch_attention(q.to(dtype), k.to(dtype), v.to(dtype), block)
        truth = model.softmax_reference(q.to(dtype), k.to(dtype), v.to(dtype))
        assert (found - truth).abs().max() <= max(1e-10, 4 * torch.finfo(dtype).eps)
    assert bench.monarch_attention(1e4 * q, k, v).isfinite().all()      # blocks without any weight
    assert [bench.squarest(n) for n in (7, 192)] == [(1, 7), (12, 16)]


@pytest.mark.parametrize("tokens, block, steps", ((64, None, 1), (128, None, 2), (192, 48, 3)))
def test_monarch_is_its_map_by_pairs_of_blocks(tokens, block, steps):
    """A[lj, ki] = left[j, l, k] right[k, j, i], each factor the best for the other; by loops."""
    q, k, v = inputs(tokens)
    b, scores = block or 8, q @ k.mT / 8                # 8 = sqrt(D); 8 x 8 or 8 x 16 tokens
    n, parts = tokens // b, scores.unflatten(-1, (-1, b)).unflatten(-3, (-1, b))    # l, j, k, i
    left = torch.eye(n, dtype=q.dtype).expand(2, 3, b, n, n)                        # j, l, k
    for _ in range(steps):
        pulled = torch.einsum("zhjlk,zhljki->zhkji", left, parts)
        right = (pulled / left.sum(-2).mT.unsqueeze(-1)).softmax(-1)
        worth = torch.einsum("zhkji,zhljki->zhjlk", right, parts)
        left = (worth - (right * right.log()).sum(-1).mT.unsqueeze(-2)).softmax(-1)
        dense = torch.einsum("zhjlk,zhkji->zhljki", left, right).flatten(4).flatten(2, 3)
    equal(dense.sum(-1), torch.ones_like(dense[..., 0]))
    equal(bench.monarch_attention(q, k, v, block, steps), dense @ v)


def test_operators_keep_the_shape_and_inputs_have_the_network_s_strides():
    q, k, v = inputs(128, torch.float32)
    built = bench.operators(3, (8, 16), *CPU)
    assert built.keys() == model.ATTENTION.keys() | bench.OTHERS.keys()
    for name, operator in built.items():
        assert name == "copy" or operator(q, k, v, (8, 16)).shape == v.shape, name
    attention = model.Attention(Architecture(3 * bench.HEAD_DIM, 1, 3, 8, 14, (2, 2)), "linear")
    for ours, real in zip((q, k, v), attention.project(torch.randn(2, 128, 3 * bench.HEAD_DIM))):
        assert ours.shape == real.shape and ours.stride() == real.stride()
    equal(bench.OTHERS["products"](*inputs(50)), (lambda q, k, v: (q @ k.mT) @ v)(*inputs(50)))
    assert sum(x.nbytes for x in bench.OTHERS["copy"](q, k, v)) == 2 * v.nbytes


def flops(name, tokens, backward=False):
    operator = bench.operators(3, (1, tokens), *CPU)[name]
    make = lambda: bench.projected(2, 3, tokens, *CPU)
    call = lambda: bench.forward_or_both(operator, *make(), (1, tokens), backward)()
    return bench.count_flops(call)


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("tokens", (256, 4096, 65536))
def test_flops_are_exactly_linear_or_quadratic(tokens, backward):
    """A product costs 2 operations for each multiplication; its backward is two more products."""
    once, D = 2 * 2 * 3 * tokens * bench.HEAD_DIM, bench.HEAD_DIM
    for name, normaliser in (("linear", once), ("relu", once), ("products", 0)):
        assert flops(name, tokens, backward) == (2 * once * D + normaliser) * (1 + 2 * backward)
    assert flops("softmax_reference", tokens, backward) == 2 * once * tokens * (1 + 2 * backward)
    assert flops("hedgehog", tokens) == 6 * once * D + 2 * once     # two maps, all twice as wide
    fixed = 2 * 2 * 3 * 64 ** 3 * (1 + 6 * 4 + 1)       # landmarks' map, inverse, product with v
    assert flops("nystromformer", tokens) == 4 * once * 64 + fixed
    b, n = bench.squarest(tokens)                       # monarch: 2 steps, the output; N^1.5
    assert flops("monarch", tokens) == once * (5 * b + 4 * n)
    big = flops("softmax_reference", 2 ** 20)           # without memory: maps of 26 terabytes
    assert big == 2 * 2 * 2 * 3 * 2 ** 40 * bench.HEAD_DIM


def test_peak_memory_is_exact():
    make = lambda: torch.empty(1_000_000)
    for call, peak in ((lambda: [make(), make()], 8), (lambda: [len(make()), len(make())], 4)):
        assert bench.peak_memory(call, "cpu") == pytest.approx(peak, abs=0.01)


def test_written_out_softmax_holds_its_maps_and_linear_does_not():
    q, k, v = inputs(1000, torch.float32)
    peak = {name: bench.peak_memory(partial(operator, q, k, v, (25, 40)), "cpu")
            for name, operator in bench.operators(3, (25, 40), *CPU).items()
            if name in model.ATTENTION}
    assert peak["softmax_reference"] >= 2 * 2 * 3 * 1000 ** 2 * 4 / 1e6
    assert max(peak["linear"], peak["softmax"]) <= 10 * v.nbytes / 1e6


def test_calls_take_turns_and_medians_are_of_them(monkeypatch):
    order = []                              # took: the first, which only tells how often, then five
    took = {"a": iter([100, 1, 2, 3, 4, 50]), "b": iter([100, 10, 10, 10, 10, 10])}

    def timed(call, device, loops=1):
        call()
        return next(took[order[-1]])

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "peak_memory", lambda call, device: 7)
    rows = bench.measure({n: partial(order.append, n) for n in took}, {}, "cpu", seconds=0)
    assert order == ["a", "a", "b", "b"] * 6            # warm-up and first, then untimed and timed
    assert rows["a"] == dict(status="ok", peak_mb=7, median_ms=3, low_ms=2, high_ms=4, repeats=5)
    assert rows["b"]["median_ms"] == rows["b"]["low_ms"] == rows["b"]["high_ms"] == 10


def test_time_is_in_milliseconds_per_call():
    assert 20 <= bench.timed(lambda: bench.time.sleep(0.02), "cpu", loops=2) < 40


def test_a_slow_call_is_the_last_of_its_curve_which_ends_alone(monkeypatch, tmp_path):
    """In a run: the later points of that operator, pass and number of heads, and no others."""
    monkeypatch.setattr(bench, "SLOW", 0.01)
    calls, ended = {"slow": lambda: bench.time.sleep(0.03), "fast": lambda: None}, {}
    first, second = (bench.measure(calls, ended, "cpu", seconds=0.01) for _ in range(2))
    slow = first["slow"]
    assert slow["status"] == "ok" and slow["repeats"] == 1 and slow["median_ms"] >= 30
    assert second["slow"] == {"status": ended["slow"]} and "ended" in ended["slow"]
    assert second["fast"]["status"] == "ok" and second["fast"]["repeats"] >= 5
    monkeypatch.setattr(bench, "SLOW", 0)
    rows = table(tmp_path, "attention", *FAST, "64", "128")
    assert all((row["status"] == "ok") == (row["tokens"] == 64) for row in rows)    # both passes
    assert all("ended" in row["status"] for row in rows if row["tokens"] == 128)


def test_a_point_whose_maps_do_not_fit_is_skipped_and_marked(monkeypatch, tmp_path):
    four_mb = lambda file, pattern, otherwise: 4000 if file == "meminfo" else otherwise
    monkeypatch.setattr(bench, "linux", four_mb)
    rows = table(tmp_path, "attention", *FAST, "64", "1024")
    written = {row["tokens"]: row for row in rows
               if row["name"] == "softmax_reference" and row["pass"] == "forward"}
    assert written[64]["status"] == "ok" and written[64]["median_ms"] > 0
    row = written[1024]
    assert row["status"].startswith("skipped") and "GB" in row["status"]
    assert row["median_ms"] == row["peak_mb"] == "" and row["gflops"] > 0
    assert all(row["status"] == "ok" for row in rows if row["name"] != "softmax_reference")


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(
    "DefaultCPUAllocator: can't allocate memory"), RuntimeError("shape")))
def test_out_of_memory_ends_a_curve_and_not_the_run_another_error_both(error):
    def big():
        raise error
    ended, calls = {}, {"big": big, "small": lambda: None}
    if "memory" not in str(error):
        with pytest.raises(RuntimeError, match="shape"):
            bench.measure(calls, ended, "cpu", 0)
    else:
        for _ in range(2):
            rows = bench.measure(calls, ended, "cpu", seconds=0)
            assert rows["big"] == {"status": "out of memory"} and rows["small"]["status"] == "ok"


def consistent(rows):
    """Units and ratios of a CSV agree with one another, to the five digits that it holds."""
    close = partial(pytest.approx, rel=2e-4)
    for row in rows:
        assert row["status"] == "ok" and row["repeats"] >= 1 and row["peak_mb"] > 0
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["torch"] and row["torchvision"] and "threads" in row["device"]
        assert (row["mode"], row["dtype"], row["head_dim"]) == ("eager", "float32", 64)
        assert row["command"].startswith(f"python bench.py {row['part']}")
        if row["gflops"] != "":
            assert row["gflops_per_s"] == close(row["gflops"] / row["median_ms"] * 1e3)
        keys = ["heads", "batch", "tokens", "pass"]
        if row["part"] != "attention":
            assert row["images_per_s"] == close(row["batch"] / row["median_ms"] * 1e3)
            keys = ["model", "heads", "batch", "pixels", "tokens"]
        base, = (other for other in rows if other["name"] == row["ratio_to"]
                 and all(other[key] == row[key] for key in keys))
        assert row["ratio"] == close(row["median_ms"] / base["median_ms"])


def test_part_attention(tmp_path, capsys, monkeypatch):
    """A user's operator is measured like the others."""
    monkeypatch.setitem(model.ATTENTION, "mine", Mine)
    Mine.grids.clear()
    rows = table(tmp_path, "attention", *FAST, "64", "1024")
    consistent(rows)
    wanted = set(itertools.product([*model.ATTENTION, *bench.OTHERS], (64, 1024),
                                   ("forward", "forward+backward")))
    wanted -= {("copy", tokens, "forward+backward") for tokens in (64, 1024)}
    assert {(row["name"], row["tokens"], row["pass"]) for row in rows} == wanted
    assert set(Mine.grids) == {((8, 8), 64), ((32, 32), 1024)}
    wide = {"linear": 64.5, "relu": 64.5, "products": 64}               # 0.5: the normaliser
    for row in rows:
        N = row["tokens"]
        assert (row["heads"], row["batch"]) == (2, 1)
        assert row["resident_mb"] == pytest.approx(3 * 2 * N * 64 * 4 / 1e6, rel=1e-3)
        assert bool(row["backend"]) == (row["name"] == "softmax")
        if width := (wide | dict.fromkeys(("softmax", "softmax_reference"), N)).get(row["name"]):
            passes = 3 if "back" in row["pass"] else 1
            assert row["gflops"] == pytest.approx(1e-9 * 4 * 2 * N * 64 * width * passes, rel=1e-4)
    assert "wrote" in capsys.readouterr().out


def test_part_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(model.ATTENTION, "mine", Mine)
    rows = table(tmp_path, "model", "--quick", "--points", "30", "55", "--operators",
                 "softmax_reference", "softmax", "linear", "mine")
    consistent(rows)
    assert {(row["name"], row["pixels"], row["tokens"]) for row in rows} == {
        (name, *point) for name in ("softmax_reference", "softmax", "linear", "mine")
        for point in ((28, 5), (56, 17))}
    for row in rows:
        N, C = row["tokens"], TINY.width
        size = sum(p.nbytes for p in model.ViT(TINY, row["name"]).parameters())
        assert row["resident_mb"] == pytest.approx((size + 12 * row["pixels"] ** 2) / 1e6, rel=1e-3)
        linears = 2 * N * C * (4 * C + 2 * TINY.hidden) * TINY.depth + 2 * (N - 1) * C * 3 * 14 ** 2
        maps = 4 * N * C * {"linear": 64.5, "mine": 0}.get(row["name"], N) * TINY.depth
        assert row["gflops"] == pytest.approx(1e-9 * (linears + maps), rel=1e-4)
    said = capsys.readouterr().out
    for name in ("softmax_reference", "linear", "mine"):
        assert said.count(f"vits14 1 {name} is as fast as softmax from") == 1
    assert "softmax is as" not in said.replace("vits14 1 softmax_reference is", "")
    rows = table(tmp_path / "alone", "model", "--quick", "--points", "28", "--operators", "mine")
    assert [(row["name"], row["ratio"]) for row in rows] == [("mine", "")]
    usual = {row["name"] for row in table(tmp_path / "usual", "model", "--quick", "--points", "28")}
    assert usual == {"softmax_reference", "softmax", "linear", "linear_conv"}


def test_part_model_in_half_precision_has_the_paper_s_softmax_too(tmp_path):
    rows = table(tmp_path, "model", "--quick", "--points", "28", "--dtype", "bfloat16")
    size = {row["name"]: row["resident_mb"] for row in rows}
    assert size["softmax_reference, float32"] > 1.9 * size["softmax_reference"] and len(size) == 5
    assert next(tmp_path.glob("*.csv")).name == "bench-cpu-model-bfloat16-eager-quick.csv"
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_part_train(tmp_path, monkeypatch):
    seen, real = [], bench.linearize

    def linearize(vit, name):
        seen.append((vit, real(vit, name)))
        return seen[-1][1]

    monkeypatch.setattr(bench, "linearize", linearize)
    rows = table(tmp_path, "train", "--quick", "--points", "28")
    consistent(rows)
    assert [row["name"] for row in rows] == ["teacher forward", *(
        f"stage {i}, {name}" for name in ("linear", "linear_conv") for i in (1, 2))]
    for (teacher, one), (_, two), conv in ((*seen[:2], False), (*seen[2:], True)):
        old = teacher.state_dict()
        changed = lambda student: {name for name, a in student.named_parameters()
                                   if not torch.equal(a, old.get(name, torch.zeros(())))}
        convs = {f"blocks.{i}.attn.operator.conv.weight" for i in range(2)} if conv else set()
        qkv_and_proj = {name for name in old if "qkv" in name or "attn.proj" in name}
        assert changed(one) == convs | qkv_and_proj
        assert len(changed(two)) > 0.9 * len(list(two.parameters())) and rows[0]["ratio"] == 1
        assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("words", (("attention", "--points", "64"), ("model", "--points", "28"),
                                   ("train", "--points", "28")), ids=str)
def test_compiled(words, tmp_path, monkeypatch):
    """The default of a GPU, with a backend that needs no compiler."""
    key = lambda row: (row["name"], row["tokens"], row["pass"])
    compiled, real = [], torch.nn.Module.compile

    def once(module, **more):
        compiled.extend(getattr(part, "function", None) for part in module.modules())
        real(module, backend="aot_eager", **more)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", once)
    eager = {key(row): row["gflops"] for row in table(tmp_path / "eager", *words, "--quick")}
    for row in table(tmp_path, *words, "--quick", "--mode", "compiled"):
        assert row["status"] == "ok" and row["ratio"] > 0 and row["gflops"] == eager[key(row)]
        assert row["mode"] == ("eager" if row["name"] == "softmax_reference" else "compiled")
    assert model.softmax_reference not in compiled      # it would become the fused kernel
    assert (model.linear_attention in compiled) == (words[0] != "train")
    assert (tmp_path / f"bench-cpu-{words[0]}-float32-compiled-quick.csv").exists()


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
    assert {row["tokens"] for row in read(*tmp_path.glob("*.csv"))} == {64}


def test_crossover():
    """Half way, log-log; for good; from the first point on; never."""
    for ratios, pixels in (({100: 2, 400: 0.5}, 200), ({100: 0.9, 200: 1.1, 400: 1}, 400),
                           ({100: 1, 200: 0.5}, 100), ({100: 0.5, 200: 1.1}, None), ({}, None)):
        curve = [{"pixels": pixels, "ratio": ratio} for pixels, ratio in ratios.items()]
        assert bench.crossover(curve) == pixels


def test_nothing_is_ever_replaced_and_the_picture(tmp_path, monkeypatch):
    stem = "bench-cpu-attention-float32-eager-quick"
    (tmp_path / f"{stem}-1.csv").write_bytes(b"mine")
    for _ in range(3):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        bench.main(["attention", "--dtype", "float32", *FAST, "64", "128", "--out", str(tmp_path)])
        assert all(path.read_bytes() == content for path, content in before.items())
    tables = [tmp_path / f"{stem}{tail}.csv" for tail in ("", "-2", "-3")]
    assert all(map(read, tables)) and len(list(tmp_path.iterdir())) == 4
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    pytest.importorskip("matplotlib", reason="results/bench_picture.py needs matplotlib")
    script = runpy.run_path(str(bench.Path(bench.__file__).parent / "results/bench_picture.py"))
    script["main"](tmp_path / "a.png", *tables)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, says", (
    (("attention", "--points", "0"), "--points"), (("model", "--batch-size", "-1"), "--batch-size"),
    (("attention", "--heads", "0"), "--heads"), (("attention", "--points", "100"), "multiples")))
def test_bad_flags_are_refused(words, says, tmp_path):
    with pytest.raises(InputError, match=says):
        table(tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_help_says_every_default_and_an_output_that_cannot_be_written_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        bench.parse(["--help"])
    flags = capsys.readouterr().out.split("\n  --")[1:]
    assert len(flags) == 9 and all("(default:" in flag for flag in flags)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not be written"):
        table(tmp_path / "file/below", "attention", *FAST, "64")
