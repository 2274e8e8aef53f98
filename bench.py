"""What linear attention costs and what it saves (paper: Fig. 3 and the throughput table).

    python bench.py attention       # each operator alone, 256 to 65,536 tokens
    python bench.py model           # whole ViTs, 224 to 2,048 pixels
    ADALA_KERNEL=plain python bench.py model        # linear without its GPU kernel

Weights and images are random. Students are as if aligned at the fewest pixels or tokens. Ratios are
to fused softmax. Modes: eager, and compiled block by block. At batch 1 a GPU may wait for launches.

Writes bench-DEVICE-PART-DTYPE.csv to --out after every point, and replaces nothing: the next run
writes ...-1.csv. results/bench_picture.py draws it. Calls take turns, each timed after an untimed
one of its own, so that load and caches affect all alike. Times are medians and quartiles after a
warm-up. Memory is what a call holds at its peak, on top of weights and inputs. FLOPs are those of
matrix products and convolutions. Written-out softmax runs eager only, because the compiler would
put the fused kernel in its place.
"""
import csv
import io
import math
import os
import platform
import re
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import accumulate, count, product
from pathlib import Path

import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import ATTENTION, KNOWN, Architecture, ViT, linearize
from support.runs import InputError, Stopped, device_and_dtype, run, write_whole

MODELS = {f"vit{s[0]}14": f"vit_{s}_patch14_dinov2.lvd142m" for s in ("small", "base", "large")}
POINTS = {"attention": (256, 1024, 4096, 16384, 65536),                 # tokens; others: pixels
          "model": (224, 384, 512, 768, 1024, 1536, 2048)}
MODES = "eager", "compiled"
HEAD_DIM = 64
BASE = "softmax"                            # the row that ratios are to
WRITTEN_OUT = "softmax_reference"           # with N x N maps
SECONDS = {False: 5, True: 0.5}             # of each call's repeats; True: with --quick
SLOW = 5.0                                  # seconds: on a CPU a longer call ends its curve
# low_ms, high_ms: quartiles. tokens: with CLS in a whole ViT. ratio: median_ms over that of the row
# ratio_to at the same point. MB: 10^6 bytes.
COLUMNS = """part name model heads head_dim batch pixels tokens pass mode dtype median_ms low_ms
    high_ms repeats images_per_s gflops ratio ratio_to peak_mb status device torch torchvision
    command""".split()


def parse(argv):
    cuda = torch.cuda.is_available()
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag, usual = parser.add_argument, ["softmax_reference", "softmax", "linear", "linear_conv"]
    flag("part", choices=PARTS)
    flag("--quick", action="store_true", help="few repeats; by default one model, three points")
    flag("--mode", choices=MODES, nargs="+", default=list(MODES if cuda else MODES[:1]),
         help="(default: both on a GPU, eager on a CPU)")
    flag("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="of weights (default: auto, half precision where the device has it)")
    flag("--heads", type=int, nargs="+", help="part attention (default: 6 16)")
    flag("--models", choices=MODELS, nargs="+", help="part model (default: all)")
    flag("--operators", choices=ATTENTION, nargs="+",
         help=f"(default: all, in part model {' '.join(usual)})")
    flag("--batch-size", type=int, nargs="+", default=[1], help="(default: 1)")
    flag("--points", type=int, nargs="+", help="tokens in part attention, else pixels (default: "
         "256 to 65536 tokens, 224 to 2048 pixels; with --quick the first three)")
    flag("--out", default="runs/bench", help="folder to write (default: runs/bench)")
    args = parser.parse_args(argv)
    args.heads = args.heads or [6, 16][:1 if args.quick else None]
    args.models = args.models or [*MODELS][:1 if args.quick else None]
    args.operators = args.operators or (usual if args.part == "model" else [*ATTENTION])
    args.points = args.points or POINTS[args.part][:3 if args.quick else None]
    args.compile = "compiled" in args.mode
    if min(*args.heads, *args.batch_size, *args.points) < 1:
        raise InputError(f"--heads {args.heads} --batch-size {args.batch_size} --points "
                         f"{args.points}: expected 1 or more")
    return args


# ---- The operators alone
def operators(names, heads, grid, device, dtype, side=None):
    """{name: Operator} as a block with these heads builds them, aligned on side x side patches."""
    arch = Architecture(heads * HEAD_DIM, 1, heads, 4 * heads * HEAD_DIM, 14, grid, aligned=side)
    return {name: ATTENTION[name](arch).to(device, dtype).eval().requires_grad_(False)
            for name in names}


def projected(batch, heads, tokens, device, dtype):
    """q, k, v with the strides that Attention.project gives them: three views of one tensor."""
    qkv = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device, dtype=dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)         # each (B,H,N,D)


# ---- Measuring
def timed(call, device, loops=1):
    """Milliseconds per call."""
    wait = getattr(torch, device).synchronize           # does nothing on a CPU
    wait()
    start = time.perf_counter()
    for _ in range(loops):
        call()
    wait()
    return (time.perf_counter() - start) * 1e3 / loops


def peak_memory(call, device):
    """10^6 bytes that a call holds at its peak, on top of what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()            # the allocator counts as calls are queued
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")     # the profiler's own log is none of ours
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as trace:
        call()
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]  # freed: below 0
    return max(accumulate(sizes, initial=0)) / 1e6


def count_flops(call):
    """Operations in the matrix products of a call that makes its own inputs, on tensors without
    memory, and so of any size. On a CPU, where no kernel of ours hides its products."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as counter:  # MATH: the fused kernel would count as 0
        call()
    return counter.get_total_flops()


def linux(file, pattern, otherwise):
    """What follows `pattern` in a file of /proc; `otherwise` where there is none, as on a Mac."""
    path = Path("/proc", file)
    found = re.search(pattern, path.read_text() if path.exists() else "")
    return found[1] if found else otherwise


def measure(calls, ended, device, seconds, maps=0):
    """Time {(name, mode): call} in turns -> {(name, mode): median_ms, low_ms, high_ms, repeats,
    peak_mb, status}.

    ended: {(name, mode): why its curve ended}, shared by a curve's points; seconds: of each call's
    repeats; maps: bytes of the N x N maps that written-out softmax holds at most.
    """
    rows, runs = {key: {"status": ended.get(key, "ok")} for key in calls}, {}
    free = int(linux("meminfo", r"MemAvailable: +(\d+) kB", 8_000_000)) * 1024
    for key, call in calls.items():
        if device == "cpu" and key[0] == WRITTEN_OUT and maps > free / 2:
            rows[key]["status"] = f"skipped: maps of {maps / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
        if rows[key]["status"] != "ok":
            continue
        try:
            call()                                      # warm-up: compiles, fills caches
            rows[key]["peak_mb"] = peak_memory(call, device)
            first = timed(call, device)
        except RuntimeError as error:
            if type(error) is not torch.OutOfMemoryError and "allocate memory" not in str(error):
                raise
            rows[key]["status"] = ended[key] = "out of memory"
            continue
        if device == "cpu" and first > SLOW * 1e3:
            ended[key] = f"ended: an earlier point took {first / 1e3:.1f} s"
        loops = max(1, round(1 / first))                # 1 ms or more at a time
        wanted = min(30, int(seconds * 1e3 / first / loops))
        runs[key] = [first], loops, max(0 if key in ended else 5, wanted)
    for turn in range(max((repeats for _, _, repeats in runs.values()), default=0)):
        for key, (times, loops, _) in ((k, run) for k, run in runs.items() if turn < run[2]):
            if times[0] < 1e3:
                calls[key]()                # not timed: the caches hold what another call has left
            times.append(timed(calls[key], device, loops))
    for key, (times, *_) in runs.items():
        times = torch.tensor(times[1:] or times).double()               # first: how often only
        low, middle, high = (times.quantile(part).item() for part in (0.25, 0.5, 0.75))
        rows[key] |= dict(median_ms=middle, low_ms=low, high_ms=high, repeats=len(times))
    return rows


# ---- The parts yield their points: what all rows say, {(name, mode): call}, {name: the same on a
# CPU, for count_flops}
def attention_points(args, device, dtype):
    side = math.isqrt(min(args.points))
    for batch, heads, tokens in product(args.batch_size, args.heads, args.points):
        facts = {"heads": heads, "batch": batch, "tokens": tokens}
        grid, calls = (math.isqrt(tokens),) * 2, {}     # tokens beyond a square are prefix
        q, k, v = projected(batch, heads, tokens, device, dtype)
        build = partial(operators, args.operators, heads, grid)
        counted = {name: lambda operator=operator: operator(
            *projected(batch, heads, tokens, "cpu", dtype), grid)
            for name, operator in build("cpu", dtype, side).items()}
        for mode in args.mode:
            for name, operator in build(device, dtype, side).items():
                if mode == "compiled" and name == WRITTEN_OUT:
                    continue
                if mode == "compiled":
                    operator.compile(dynamic=False)
                calls[name, mode] = partial(operator, q, k, v, grid)
        yield facts, calls, counted


def model_points(args, device, dtype):
    for title, batch in product(args.models, args.batch_size):
        teacher = ViT(KNOWN[MODELS[title]]).eval()
        arch, vits = teacher.arch, {}
        sizes = [round(p / arch.patch) * arch.patch for p in args.points]
        students = {name: linearize(teacher, name, min(sizes)) for name in args.operators}
        for mode, name in product(args.mode, args.operators):
            if mode == "compiled" and name == WRITTEN_OUT:
                continue
            vits[name, mode] = linearize(students[name], name).to(device, dtype)
            for block in vits[name, mode].blocks if mode == "compiled" else ():
                block.compile(dynamic=False)            # all share what the first one compiled
        for pixels in sizes:
            tokens, shape = arch.prefix + (pixels // arch.patch) ** 2, (batch, 3, pixels, pixels)
            facts = {"model": title, "heads": arch.heads, "batch": batch, "pixels": pixels,
                     "tokens": tokens}
            images = torch.randn(shape).to(device, dtype)
            calls = {key: partial(vit, images) for key, vit in vits.items()}
            counted = {name: lambda vit=vit: vit(torch.randn(shape))
                       for name, vit in students.items()}
            yield facts, calls, counted


PARTS = {"attention": attention_points, "model": model_points}


def unused(folder, stem):
    """The path of a CSV that does not exist yet: nothing is ever replaced."""
    paths = (Path(folder, f"{stem}-{i}.csv" if i else f"{stem}.csv") for i in count())
    return next(path for path in paths if not os.path.lexists(path))


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64           # blocks of all operators share their code
    device, dtype = device_and_dtype(args)
    if not args.compile:                    # no compiler here, which device_and_dtype has said
        args.mode = ["eager"]
    kind = str(dtype).removeprefix("torch.")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    chip = gpu or linux("cpuinfo", "model name.*: (.*)", platform.machine())
    slug = re.sub(r"\W+", "-", (gpu or device).lower())
    os.makedirs(args.out, exist_ok=True)
    path = unused(args.out, f"bench-{slug}-{args.part}-{kind}{'-quick' * args.quick}")
    path.touch(exist_ok=False)                          # before hours of work: can it be written?
    kernel = "ADALA_KERNEL=plain " if os.environ.get("ADALA_KERNEL") == "plain" else ""
    same = {"part": args.part, "pass": "forward", "head_dim": HEAD_DIM, "dtype": kind,
            "ratio_to": BASE, "device": f"{chip}, {torch.get_num_threads()} threads",
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "command": f"{kernel}python bench.py {' '.join(words)}"}
    endings, sheet = {}, io.StringIO(newline="")
    table = csv.DictWriter(sheet, COLUMNS)
    table.writeheader()
    for facts, calls, counted in PARTS[args.part](args, device, dtype):
        torch._dynamo.reset()
        curve = tuple(facts.get(key) for key in ("model", "heads", "batch"))
        flops = {name: count_flops(call) for name, call in counted.items()}
        with torch.no_grad():
            ended = endings.setdefault(curve, {})
            maps = 2 * dtype.itemsize * facts["batch"] * facts["heads"] * facts["tokens"] ** 2
            point = measure(calls, ended, device, SECONDS[args.quick], maps)
        for (name, mode), row in point.items():
            row |= same | facts | {"name": name, "mode": mode, "gflops": flops[name] / 1e9}
            base = point.get((BASE, mode), {}).get("median_ms")
            if ms := row.get("median_ms"):
                row |= {"images_per_s": row["batch"] / ms * 1e3} if "pixels" in row else {}
                row |= {"ratio": ms / base} if base else {}
            text = {key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()}
            table.writerow(text)
            print(*(f"{key} {text[key]}" for key in COLUMNS if key in row.keys() - same))
        write_whole(path, sheet.getvalue().encode())     # after every point: nothing is lost
        Stopped.left = f"the rows that were measured are in {path}"
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
