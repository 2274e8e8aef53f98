"""Efficiency curves: what linear attention costs and what it saves (paper: Fig. 3 and the throughput table).

    python bench.py attention           # the operators alone, 256 to 65,536 tokens: time, FLOPs, peak memory
    python bench.py model               # whole ViTs, 224 to 2,048 pixels: images/s, peak memory, the crossover
    python bench.py train               # one step of stages 1 and 2, in forward passes of their teacher

Random weights, synthetic tensors. --quick takes a minute. Each part prints a table, writes bench-DEVICE-PART-MODE.csv
to --out after every point, and draws the curves beside it if matplotlib is installed. What is compared takes turns, each
call timed after an untimed one of its own: other load and the caches then affect all alike. Times are medians with
quartiles after a warm-up. Memory is measured: what a call holds at its peak on top of weights and inputs. Written-out
softmax is never compiled: the compiler would recognise it and put the fused kernel in its place. On a CPU with Linux
set what results/bench.sh sets, or the times are those of page faults.
"""
import argparse
import csv
import math
import os
import platform
import re
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn as nn
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from align_attention import alignment_step, block_alignment, trained_parameters
from align_features import LOSS, feature_alignment
from model import ATTENTION, KNOWN, Hedgehog, InputError, ViT, device_and_dtype, linear_attention, linearize, run

LENGTHS = (256, 1024, 4096, 16384, 65536)                               # tokens
PIXELS = (224, 384, 512, 768, 1024, 1536, 2048)                         # rounded to the patch
MODELS = {f"vit{size[0]}14": f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large")}
HEAD_DIM = LANDMARKS = 64
SLOW = 5.0                                    # seconds: on a CPU a curve ends after a call that takes longer
COLUMNS = {                                   # of every CSV: what it holds, with its unit
    "part": "attention, model or train", "name": "what was called", "backend": "kernel of fused softmax",
    "model": "vits14, vitb14, vitl14", "heads": "H", "head_dim": "D", "batch": "B", "pixels": "height = width",
    "tokens": "N, with CLS in parts model and train", "pass": "forward, forward+backward or step", "mode": "eager or compiled",
    "dtype": "of the tensors, or of autocast in part train", "median_ms": "ms per call", "low_ms": "first quartile",
    "high_ms": "third quartile", "repeats": "timed calls behind them", "images_per_s": "batch / median",
    "gflops": "10^9 operations in matrix products", "gflops_per_s": "gflops / median",
    "ratio": "median / that of the row ratio_to of the same turns", "ratio_to": "that row's name",
    "peak_mb": "10^6 bytes at the peak, on top of resident_mb", "resident_mb": "10^6 bytes of weights and inputs",
    "status": "ok, or why there is no time", "device": "with CPU threads", "torch": "version", "torchvision": "version",
    "command": "that made the row",
}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="few points, small batch: a minute on two cores")
    parser.add_argument("--mode", choices=("eager", "compiled"), help="default: compiled on a GPU, eager on a CPU")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--heads", type=int, nargs="+", default=[6, 16], help="part attention: heads of 64")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="part model")
    parser.add_argument("--batch", type=int, nargs="+", help="default: attention 1, model 1 and 8 (GPU: 1 and 16), train 32")
    parser.add_argument("--points", type=int, nargs="+", help="tokens (attention) or pixels (model, train) instead of all")
    parser.add_argument("--out", default="results", help="folder for the CSV and the picture")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    args.mode = args.mode or ("compiled" if cuda else "eager")
    args.batch = args.batch or {"attention": [1], "model": [1, 16 if cuda else 8], "train": [8 if args.quick else 32]}[args.part]
    args.points = args.points or {"attention": LENGTHS, "model": PIXELS, "train": (224,)}[args.part][:3 if args.quick else None]
    if args.quick:
        args.heads, args.models, args.batch = args.heads[:1], args.models[:1], args.batch[:1]
    if min(*args.heads, *args.batch, *args.points) < 1:
        raise InputError("--heads, --batch and --points: expected 1 or more of each")
    if args.part == "attention" and any(tokens % LANDMARKS for tokens in args.points):
        raise InputError(f"--points {args.points}: expected multiples of Nystromformer's {LANDMARKS} landmarks")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What is compared: (q, k, v), each (B, H, N, D) -> (B, H, N, D)

def nystrom_attention(q, k, v, landmarks=LANDMARKS):
    """Nystromformer (Xiong et al. 2021, Eq. 13), O(N): softmax(q k'^T) pinv(softmax(q' k'^T)) softmax(q' k^T) v.

    q', k': means over `landmarks` segments of tokens. The inverse is the paper's six third-order steps. Its convolution on v has
    weights to be learned and no part in the approximation: left out.
    """
    segments = lambda x: x.unflatten(-2, (landmarks, -1)).mean(-2)      # (B,H,N,D) -> (B,H,64,D); N is a multiple of 64
    weights = lambda a, b: (a @ b.mT * q.shape[-1] ** -0.5).softmax(-1)
    q_few, k_few = segments(q), segments(k)
    a = weights(q_few, k_few)                                           # (B,H,64,64)
    eye = torch.eye(landmarks, dtype=a.dtype, device=a.device)
    z = a.mT / (a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1))[..., None, None]
    for _ in range(6):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return weights(q, k_few) @ (z @ (weights(q_few, k) @ v))            # (B,H,N,64) @ (B,H,64,D) -> (B,H,N,D)


def products(q, k, v):
    """Linear attention's two matrix products alone: no operator of this kind can be faster."""
    return q @ (k.mT @ v)                                               # (B,H,N,D) @ (B,H,D,D) -> (B,H,N,D)


def copy(q, k, v):
    """Reads q and k, writes as much: the bytes of reading q, k, v and writing the output once."""
    return q.clone(), k.clone()


def operators(heads, device, dtype):
    """{name: (q, k, v) -> (B, H, N, D)}, the rows of part attention."""
    maps = Hedgehog(heads, HEAD_DIM).to(device, dtype).requires_grad_(False)
    hedgehog = lambda q, k, v: linear_attention(maps.forward(q), maps.forward(k), v, phi=lambda x: x)
    return ATTENTION | {"hedgehog": hedgehog, "nystromformer": nystrom_attention, "products": products, "copy": copy}


def projected(batch, heads, tokens, device, dtype):
    """q, k, v with the strides that Attention.project gives them: three views of one tensor."""
    qkv = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device, dtype=dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)                         # each (B,H,N,D)


def forward_or_both(operator, q, k, v, backward):
    """The call to be timed: the operator, or the operator and its gradients for q, k, v."""
    if not backward:
        return lambda: operator(q, k, v)
    inputs, gradient = [x.detach().requires_grad_() for x in (q, k, v)], torch.ones_like(v)
    return lambda: torch.autograd.grad(operator(*inputs), inputs, gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def timed(call, device, loops=1):
    """Milliseconds per call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(loops):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / loops


def peak_memory(call, device):
    """10^6 bytes that a call holds at its peak, on top of what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):    # allocations, and frees as negative sizes
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def count_flops(make):
    """Operations in the matrix products of make()(), on tensors without memory: any size, no time.

    Neither compiled nor with the fused kernel, which would count as 0 operations on a CPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, \
            sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        make()()
    return counter.get_total_flops()


def linux(file, pattern, otherwise):
    """What follows `pattern` in a file of /proc; `otherwise` where there is none, as on a Mac."""
    found = re.search(pattern, Path("/proc", file).read_text()) if os.path.exists(f"/proc/{file}") else None
    return found[1] if found else otherwise


def measure(calls, ended, device, seconds, maps=0):
    """Time {name: call} in turns -> {name: {median_ms, low_ms, high_ms, repeats, peak_mb, status}}.

    ended: {name: why its curve has ended}, shared by the points of a curve. seconds: for the repeats of a call.
    maps: bytes of the N x N maps that softmax_reference holds, at most.
    """
    rows, times = {name: {"status": "ok"} for name in calls}, {}
    for name, call in calls.items():
        free = int(linux("meminfo", r"MemAvailable: +(\d+) kB", 8_000_000)) * 1024
        if device == "cpu" and name.startswith("softmax_reference") and maps > free / 2:
            rows[name]["status"] = f"skipped: its maps need {maps / 1e9:.1f} GB, more than half of the {free / 1e9:.1f} GB free"
            continue
        if name in ended:
            rows[name]["status"] = ended[name]
            continue
        try:
            call()                                                      # warm-up: compiles, fills caches
            times[name] = [timed(call, device)]
            rows[name]["peak_mb"] = peak_memory(call, device)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            rows[name]["status"] = ended[name] = "out of memory"
            times.pop(name, None)
            continue
        if device == "cpu" and times[name][0] > SLOW * 1e3:
            ended[name] = f"ended: an earlier point took {times[name][0] / 1e3:.1f} s"
    loops = {name: max(1, round(1 / first)) for name, (first,) in times.items()}      # a millisecond or more at a time
    repeats = {name: max(0 if name in ended else 5, min(30, int(seconds * 1e3 / first / loops[name])))
               for name, (first,) in times.items()}
    for turn in range(max(repeats.values(), default=0)):
        for name in times:
            if turn < repeats[name]:
                if times[name][0] < 1e3:
                    calls[name]()             # not timed: the caches hold what another call has left
                times[name].append(timed(calls[name], device, loops[name]))
    for name, values in times.items():
        values = values[1:] or values                                   # the first only told how often to repeat
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        rows[name] |= dict(median_ms=middle, low_ms=low, high_ms=high, repeats=len(values))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The parts: each yields its rows point by point

def attention(args, device, dtype):
    prepare = partial(torch.compile, dynamic=False) if args.mode == "compiled" else lambda operator: operator
    for batch, heads, backward in product(args.batch, args.heads, (False, True)):
        ended, called = {}, {name: operator if name == "softmax_reference" else prepare(operator)
                             for name, operator in operators(heads, device, dtype).items() if name != "copy" or not backward}
        for tokens in args.points:
            torch._dynamo.reset()
            q, k, v = projected(batch, heads, tokens, device, dtype)
            maps = (2 + backward) * batch * heads * tokens ** 2 * v.element_size()
            with torch.set_grad_enabled(backward):
                rows = measure({name: forward_or_both(operator, q, k, v, backward) for name, operator in called.items()},
                               ended, device, 0.3 if args.quick else 3, maps)
            for name, row in rows.items():
                row |= {"heads": heads, "head_dim": HEAD_DIM, "batch": batch, "tokens": tokens, "ratio_to": "products",
                        "pass": "forward+backward" if backward else "forward", "resident_mb": 3 * v.nbytes / 1e6}
                row["gflops"] = 1e-9 * count_flops(lambda: forward_or_both(
                    called[name], *projected(batch, heads, tokens, device, dtype), backward))
            rows["softmax"]["backend"] = SDPBackend(torch._fused_sdp_choice(q, k, v)).name.lower()
            yield rows


def model(args, device, dtype):
    for title, batch in product(args.models, args.batch):
        arch, ended = KNOWN[MODELS[title]].arch, {}
        teacher = ViT(arch).to(device).eval().requires_grad_(False)
        vits = {name: linearize(teacher, name).to(dtype) for name in ("softmax_reference", "softmax", "linear")}
        if dtype != torch.float32:            # like the paper's softmax rows of DINOv2-L, by their memory
            vits["softmax_reference, float32"] = linearize(teacher, "softmax_reference")
        for pixels in (round(p / arch.patch) * arch.patch for p in args.points):
            torch._dynamo.reset()
            for name in ("softmax", "linear") if args.mode == "compiled" else ():
                for block in vits[name].blocks:
                    block.compile(dynamic=False)                        # block by block: all share what the first compiled
            images, tokens = torch.randn(batch, 3, pixels, pixels, device=device), arch.prefix + (pixels // arch.patch) ** 2
            calls = {name: partial(vit, images.to(vit.norm.weight.dtype)) for name, vit in vits.items()}
            maps = 2 * batch * arch.heads * tokens ** 2 * torch.float32.itemsize
            with torch.no_grad():
                rows = measure(calls, ended, device, 0.5 if args.quick else 6, maps)
            for name, row in rows.items():
                row |= {"model": title, "heads": arch.heads, "head_dim": HEAD_DIM, "batch": batch, "pixels": pixels,
                        "tokens": tokens, "ratio_to": "softmax", "pass": "forward",
                        "gflops": 1e-9 * count_flops(lambda: partial(vits[name], torch.empty_like(calls[name].args[0]))),
                        "resident_mb": (sum(p.nbytes for p in vits[name].parameters()) + calls[name].args[0].nbytes) / 1e6}
            yield rows


def train(args, device, dtype):
    prepare = partial(torch.compile, fullgraph=True, dynamic=False) if args.mode == "compiled" else lambda function: function
    arch = KNOWN[MODELS["vits14"]].arch
    teacher = ViT(arch).to(device).requires_grad_(False)
    one, two = linearize(teacher).train(), linearize(teacher).train().requires_grad_(True)
    by_block = trained_parameters(one, "qkv")
    trained = {one: [p for block in by_block for p in block], two: list(two.parameters())}
    optimizers = {student: torch.optim.AdamW(parameters, weight_decay=0) for student, parameters in trained.items()}
    forward, align_block, align = prepare(teacher), prepare(block_alignment), prepare(feature_alignment)

    def teacher_forward():
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            forward(teacher.normalize(images))

    def stage_1():                            # as in align_attention.py's loop, without float16's scaler and the log
        alignment_step(teacher, one, images, "after", dtype, align_block, backward=torch.Tensor.backward)
        for block in by_block:
            nn.utils.clip_grad_norm_(block, 1.0)
        optimizers[one].step()
        optimizers[one].zero_grad()

    def stage_2():                            # as in align_features.py's
        align(teacher, two, images, LOSS["mse"], dtype).backward()
        nn.utils.clip_grad_norm_(trained[two], 1.0)
        optimizers[two].step()
        optimizers[two].zero_grad()

    for batch, pixels in product(args.batch, args.points):
        torch._dynamo.reset()
        images = torch.randint(256, (batch, 3, pixels, pixels), dtype=torch.uint8, device=device)
        calls = {"teacher forward": teacher_forward, "stage 1": stage_1, "stage 2": stage_2}
        rows = measure(calls, {}, device, 1 if args.quick else 60)
        for name, row in rows.items():
            row |= {"model": "vits14", "heads": arch.heads, "head_dim": HEAD_DIM, "batch": batch, "pixels": pixels,
                    "tokens": arch.prefix + (pixels // arch.patch) ** 2, "ratio_to": "teacher forward",
                    "pass": "forward" if name == "teacher forward" else "step"}
        yield rows


PARTS = {"attention": attention, "model": model, "train": train}


# ---------------------------------------------------------------------------------------------------------------------
# Table, conclusions, picture

def show(row):
    """A row on one line."""
    where = ", ".join(f"{row[key]} {key}" for key in ("model", "heads", "batch", "pixels", "tokens") if key in row)
    line = f"{row['name']:27s} {where:50s} {row['pass']:16s} "
    if "median_ms" not in row:
        return line + row["status"]
    speed = f"{row['images_per_s']:8.2f} images/s" if "images_per_s" in row else f"{row['gflops_per_s']:8.1f} GFLOP/s"
    ratio = f"{row['ratio']:7.2f} x {row['ratio_to']}" if "ratio" in row else ""
    line += f"{row['median_ms']:10.3f} ms ({row['low_ms']:.3f} to {row['high_ms']:.3f}) "
    return line + f"{speed} {row['peak_mb']:9.1f} MB {ratio}"


def crossover(rows):
    """Pixels from which on linear is at least as fast as fused softmax, log-log between points; None: never.

    rows: of one model and one batch.
    """
    speed = {(row["name"], row["pixels"]): row["images_per_s"] for row in rows if "images_per_s" in row}
    both = sorted(pixels for name, pixels in speed if name == "linear" and ("softmax", pixels) in speed)
    gain = [math.log(speed["linear", pixels] / speed["softmax", pixels]) for pixels in both]
    first = next((i for i in range(len(both)) if min(gain[i:]) >= 0), None)
    if not first:
        return None if first is None else both[0]
    return round(both[first - 1] * (both[first] / both[first - 1]) ** (gain[first - 1] / (gain[first - 1] - gain[first])))


def conclude(rows):
    """What the curves say, in sentences."""
    done = [row for row in rows if "median_ms" in row]
    if rows[0]["part"] == "model":
        for title, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
            curve = [row for row in done if (row["model"], row["batch"]) == (title, batch)]
            gains = ", ".join(f"{1 / row['ratio']:.2f}x at {row['pixels']}" for row in curve
                              if row["name"] == "linear" and "ratio" in row)
            where = f"from {crossover(curve)} pixels on" if crossover(curve) else "at no size measured"
            print(f"{title}, batch {batch}: linear is as fast as fused softmax {where} ({gains})")
    elif rows[0]["part"] == "attention":
        linear, copied = ({(row["heads"], row["batch"], row["pass"], row["tokens"]): row for row in done if row["name"] == name}
                          for name in ("linear", "copy"))
        for (heads, batch, kind, tokens), row in linear.items():
            shorter, moved = linear.get((heads, batch, kind, tokens // 16)), copied.get((heads, batch, kind, tokens))
            if shorter:
                print(f"{heads} heads, batch {batch}, {kind}: from {tokens // 16} to {tokens} tokens linear costs "
                      f"{row['ratio'] / shorter['ratio']:.2f}x what it costs its two products, "
                      f"{row['peak_mb'] / shorter['peak_mb']:.1f}x the memory")
            if shorter and moved:
                print(f"    at {tokens} tokens it takes {row['median_ms'] / moved['median_ms']:.1f}x the time of moving q, k, v "
                      "and out once")


def draw(rows, path):
    """The curves on logarithmic axes, as a PNG: a row of panels for each number of heads, or model."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return print("no picture: pip install matplotlib")
    matplotlib.use("agg")                     # no window
    from matplotlib import pyplot
    facet, x, series = ("heads", "tokens", "pass") if rows[0]["part"] == "attention" else ("model", "pixels", "batch")
    columns = {"median_ms": "ms per call", "peak_mb": "peak MB", "gflops": "GFLOPs"} if x == "tokens" else {
        "images_per_s": "images/s", "peak_mb": "peak MB"}
    panels = [(kind, column) for column in columns for kind in dict.fromkeys(row[series] for row in rows)
              if column != "gflops" or kind == "forward"]
    facets, points = (list(dict.fromkeys(row[key] for row in rows)) for key in (facet, x))
    figure, axes = pyplot.subplots(len(facets), len(panels), figsize=(4 * len(panels), 3.4 * len(facets)), squeeze=False,
                                   sharex=True, sharey="col")
    for (i, group), (j, (kind, column)) in product(enumerate(facets), enumerate(panels)):
        for name in dict.fromkeys(row["name"] for row in rows if row["name"] != "copy"):
            curve = [(row[x], row[column]) for row in rows
                     if (row["name"], row[facet], row[series]) == (name, group, kind) and row.get(column)]
            if curve:
                style = ":" if name == "products" else "-"
                axes[i, j].loglog(*zip(*curve), marker="o", markersize=3, label=name, linestyle=style)
        axes[i, j].set(title=f"{facet} {group}, {series} {kind}".replace("pass ", ""), xlabel=x, ylabel=columns[column])
        axes[i, j].set_xticks(points, points, fontsize=7)
        axes[i, j].set_xticks([], minor=True)
        axes[i, j].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {min(row['mode'] for row in rows)}, torch {rows[0]['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    print(f"wrote {path}")


def main(argv=None):
    args = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                     # the profiler complains of a missing GPU
    device, dtype = device_and_dtype(args.dtype)
    torch.manual_seed(0)
    chip = torch.cuda.get_device_name() if device == "cuda" else linux("cpuinfo", "model name.*: (.*)", platform.machine())
    slug = "cpu" if device == "cpu" else re.sub(r"\W+", "-", chip.lower())
    path = Path(args.out, f"bench-{slug}-{args.part}-{args.mode}{'-quick' * args.quick}.csv")
    settings = [f"{key}={value}" for key, value in os.environ.items() if key.startswith("MALLOC_")]
    same = dict(part=args.part, dtype=str(dtype).removeprefix("torch."),
                torch=torch.__version__, torchvision=torchvision.__version__,
                device=chip if device == "cuda" else f"{chip}, {torch.get_num_threads()} threads",
                command=" ".join([*settings, "python bench.py", *(argv or sys.argv[1:])]))
    rows = []
    for point in PARTS[args.part](args, device, dtype):
        for name, row in point.items():
            row |= same | {"name": name, "mode": "eager" if name.startswith("softmax_reference") else args.mode}
            if "median_ms" in row:
                if args.part != "train":
                    row["gflops_per_s"] = row["gflops"] / row["median_ms"] * 1e3
                if args.part != "attention":
                    row["images_per_s"] = row["batch"] / row["median_ms"] * 1e3
                if "median_ms" in point[row["ratio_to"]]:
                    row["ratio"] = row["median_ms"] / point[row["ratio_to"]]["median_ms"]
            print(show(row))
        rows += point.values()
        try:                                  # after every point: what was measured is not lost
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="") as file:
                table = csv.DictWriter(file, COLUMNS)
                table.writeheader()
                for row in rows:
                    table.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})
        except OSError as error:
            raise InputError(f"{path} could not be written: {error}") from None
    conclude(rows)
    print(f"wrote {path}")
    if len(args.points) > 1:
        draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
