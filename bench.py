"""What linear attention costs and what it saves (paper: Fig. 3 and the throughput table).

    python bench.py attention       # each operator alone, 256 to 65,536 tokens
    python bench.py model           # whole ViTs, 224 to 2,048 pixels: images/s and the crossover
    python bench.py train           # one step of stages 1 and 2, in forward passes of their teacher

Random weights and images. Writes bench-DEVICE-PART-DTYPE-MODE.csv to --out, after every point, and
replaces nothing, the next run writes ...-1.csv; results/bench_picture.py draws it. Calls take
turns, each timed after an untimed one of its own: other load and the caches affect all alike. Times
are medians and quartiles after a warm-up; memory is what a call holds at its peak, on top of
weights and inputs; FLOPs are of matrix products and convolutions. Written-out softmax is never
compiled: the compiler would put the fused kernel in its place.
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

from align_attention import GROUPS, block_alignment, trained_parameters
from align_features import LOSS, feature_alignment
from model import ATTENTION, KNOWN, Architecture, InputError, Operator, ViT, autocast
from model import device_and_dtype, linearize, one_cycle, one_line, run, update, write_whole

MODELS = {f"vit{size[0]}14": f"vit_{size}_patch14_dinov2.lvd142m"
          for size in ("small", "base", "large")}
POINTS = {"attention": (256, 1024, 4096, 16384, 65536),                 # tokens; others: pixels
          "model": (224, 384, 512, 768, 1024, 1536, 2048), "train": (224,)}
HEAD_DIM = LANDMARKS = 64
WRITTEN_OUT = ("softmax_reference", "softmax_reference, float32")       # with N x N maps
SLOW = 5.0                                  # seconds: on a CPU a longer call ends its curve
# low_ms, high_ms: quartiles. tokens: with CLS in a whole ViT. ratio: median_ms over that of the row
# ratio_to at the same point. resident_mb: weights and inputs. MB: 10^6 bytes.
COLUMNS = """part name backend model heads head_dim batch pixels tokens pass mode dtype median_ms
    low_ms high_ms repeats images_per_s gflops gflops_per_s ratio ratio_to peak_mb resident_mb
    status device torch torchvision command""".split()


def parse(argv):
    cuda = torch.cuda.is_available()
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag, usual = parser.add_argument, ["softmax_reference", "softmax", "linear", "linear_conv"]
    flag("part", choices=PARTS)
    flag("--quick", action="store_true", help="few points, a small batch (default: all of them)")
    flag("--mode", choices=("eager", "compiled"), default="compiled" if cuda else "eager",
         help="(default: compiled on a GPU, eager on a CPU)")
    flag("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="part train: of autocast (default: auto, half precision where the device has it)")
    flag("--heads", type=int, nargs="+", default=[6, 16], help="part attention (default: 6 16)")
    flag("--models", choices=MODELS, nargs="+", default=[*MODELS], help="part model (default: all)")
    flag("--operators", choices=ATTENTION, nargs="+", default=usual,
         help=f"part model; part train: those without softmax (default: {' '.join(usual)})")
    flag("--batch-size", type=int, nargs="+",
         help="(default: attention 1, model 1 8, on a GPU 1 16, train 32, with --quick 8)")
    flag("--points", type=int, nargs="+", help="tokens in part attention, else pixels (default: "
         "256 to 65536 tokens, 224 to 2048 pixels, train 224; with --quick the first three)")
    flag("--out", default="results", help="folder to write (default: results)")
    args = parser.parse_args(argv)
    first, step = 1 if args.quick else None, LANDMARKS if args.part == "attention" else 1
    usual = {"attention": [1], "model": [1, 16 if cuda else 8], "train": [8 if args.quick else 32]}
    args.batch_size = (args.batch_size or usual[args.part])[:first]
    args.points = args.points or POINTS[args.part][:3 if args.quick else None]
    args.heads, args.models = args.heads[:first], args.models[:first]
    if min(*args.heads, *args.batch_size, *args.points) < 1 or any(n % step for n in args.points):
        raise InputError(f"--heads {args.heads} --batch-size {args.batch_size} --points "
                         f"{args.points}: expected 1 or more, tokens in multiples of {LANDMARKS}")
    return args


def squarest(n):
    """The factors (rows, columns) of n that are closest to one another, rows <= columns."""
    return next((rows, n // rows) for rows in range(math.isqrt(n), 0, -1) if n % rows == 0)


# ---- Measured beside model.ATTENTION: q, k, v, each (B, H, N, D) -> (B, H, N, D)
def nystrom_attention(q, k, v):
    """Nystromformer (Xiong et al. 2021, Eq. 13) without its convolution on v, which has weights:
    softmax(q k'^T) Z softmax(q' k^T) v; q', k': means over 64 segments; Z: by its six steps, O(N).
    """
    segments = lambda x: x.unflatten(-2, (LANDMARKS, -1)).mean(-2)      # (B,H,N,D) -> (B,H,64,D)
    weights = lambda a, b: (a @ b.mT * q.shape[-1] ** -0.5).softmax(-1)
    q_few, k_few = segments(q), segments(k)
    a = weights(q_few, k_few)                           # (B,H,64,64)
    eye = torch.eye(LANDMARKS, dtype=a.dtype, device=a.device)
    z = a.mT / a.abs().sum(-2).amax(-1)[..., None, None]                # rows of a sum to 1
    for _ in range(6):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return weights(q, k_few) @ (z @ (weights(q_few, k) @ v))            # (B,H,N,64) @ (B,H,64,D)


def monarch_attention(q, k, v, block=None, steps=2):
    """MonarchAttention (Yaras et al. 2025, arXiv 2505.18698), O(N^1.5) with blocks of about sqrt(N)
    tokens. Softmax attention is the A, rows summing to 1, of largest <A, q k^T> + entropy(A). Here
    A[lj, ki] = left[j, l, k] right[k, j, i] (l, k: blocks; j, i: places in them); right and left
    are maximised in turn, from left = identity. Exact for blocks of 1 or N tokens.
    """
    block, wide = block or squarest(q.shape[-2])[0], torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.unflatten(-2, (-1, block)) for x in (q * q.shape[-1] ** -0.5, k, v))
    pulled, total, queries = q, 1.0, q.transpose(2, 3)  # (B,H,k,j,D), (B,H,k,j,1), (B,H,j,l,D)
    for step in range(steps):
        if step:
            pulled = (left.mT.to(q.dtype) @ queries).transpose(2, 3)    # (B,H,j,k,l) @ (B,H,j,l,D)
            total = left.sum(-2).mT.unsqueeze(-1) + 1e-12               # a block may attract none
        log = ((pulled @ k.mT).to(wide) / total).log_softmax(-1)        # (B,H,k,j,i)
        right = log.exp().to(q.dtype)
        entropy = -(log.exp() * log).sum(-1).mT.unsqueeze(-2)           # (B,H,j,1,k)
        keys = (right @ k).transpose(2, 3)                              # (B,H,j,k,D)
        left = ((queries @ keys.mT).to(wide) + entropy).softmax(-1)     # (B,H,j,l,k)
    out = left.to(q.dtype) @ (right @ v).transpose(2, 3)                # (B,H,j,l,D)
    return out.transpose(2, 3).flatten(2, 3)


OTHERS = {  # products: no operator of this kind is faster. copy: bytes of q, k, v and out, once
    "nystromformer": nystrom_attention, "monarch": monarch_attention,
    "products": lambda q, k, v: q @ (k.mT @ v), "copy": lambda q, k, v: (q.clone(), k.clone())}


def operators(heads, grid, device, dtype):
    """{name: Operator} as a block with these heads builds them."""
    arch = Architecture(heads * HEAD_DIM, 1, heads, 4 * heads * HEAD_DIM, patch=14, grid=grid)
    built = {name: make(arch) for name, make in ATTENTION.items()}
    built |= {name: Operator(arch, function) for name, function in OTHERS.items()}
    return {name: op.to(device, dtype).eval().requires_grad_(False) for name, op in built.items()}


def projected(batch, heads, tokens, device, dtype):
    """q, k, v with the strides that Attention.project gives them: three views of one tensor."""
    qkv = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device, dtype=dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)         # each (B,H,N,D)


def forward_or_both(operator, q, k, v, grid, backward):
    """The call to be timed: the operator, or the operator and its gradients for q, k and v."""
    if not backward:
        return lambda: operator(q, k, v, grid)
    inputs = [x.detach().requires_grad_().view_as(x) for x in (q, k, v)]    # no leaves: FlopCounter
    ones = torch.ones_like(v)
    return lambda: torch.autograd.grad(operator(*inputs, grid), inputs, ones, allow_unused=True)


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
    """Operations in a call's matrix products, on tensors without memory and thus of any size."""
    # by MATH: on a CPU the fused kernel and compiled code count as 0
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, \
            sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        call()
    return counter.get_total_flops()


def linux(file, pattern, otherwise):
    """What follows `pattern` in a file of /proc; `otherwise` where there is none, as on a Mac."""
    path = Path("/proc", file)
    found = re.search(pattern, path.read_text() if path.exists() else "")
    return found[1] if found else otherwise


def measure(calls, ended, device, seconds, maps=0):
    """Time {name: call} in turns -> {name: median_ms, low_ms, high_ms, repeats, peak_mb, status}.

    ended: {name: why its curve ended}, shared by a curve's points; seconds: of each call's repeats;
    maps: bytes of the N x N maps that written-out softmax holds at most.
    """
    rows, runs = {name: {"status": ended.get(name, "ok")} for name in calls}, {}
    free = int(linux("meminfo", r"MemAvailable: +(\d+) kB", 8_000_000)) * 1024
    for name, call in calls.items():
        if device == "cpu" and name in WRITTEN_OUT and maps > free / 2:
            rows[name]["status"] = f"skipped: maps of {maps / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
        if rows[name]["status"] != "ok":
            continue
        try:
            call()                                      # warm-up: compiles, fills caches
            first = timed(call, device)
            rows[name]["peak_mb"] = peak_memory(call, device)
        except RuntimeError as error:
            if type(error) is not torch.OutOfMemoryError and "allocate memory" not in str(error):
                raise
            rows[name]["status"] = ended[name] = "out of memory"
            continue
        if device == "cpu" and first > SLOW * 1e3:
            ended[name] = f"ended: an earlier point took {first / 1e3:.1f} s"
        loops = max(1, round(1 / first))                # 1 ms or more at a time
        wanted = min(30, int(seconds * 1e3 / first / loops))
        runs[name] = [first], loops, max(0 if name in ended else 5, wanted)
    for turn in range(max((repeats for _, _, repeats in runs.values()), default=0)):
        for name, (times, loops, _) in ((n, run) for n, run in runs.items() if turn < run[2]):
            if times[0] < 1e3:
                calls[name]()               # not timed: the caches hold what another call has left
            times.append(timed(calls[name], device, loops))
    for name, (times, *_) in runs.items():
        times = torch.tensor(times[1:] or times).double()               # first: how often only
        low, middle, high = (times.quantile(part).item() for part in (0.25, 0.5, 0.75))
        rows[name] |= dict(median_ms=middle, low_ms=low, high_ms=high, repeats=len(times))
    return rows


# ---- The parts yield their points: ({name: call}, {name: what its row says}, bytes of N x N maps)
def attention_points(args, device, dtype):
    for batch, heads, backward, tokens in product(args.batch_size, args.heads, (False, True),
                                                  args.points):
        grid, calls = squarest(tokens), {}
        q, k, v = projected(batch, heads, tokens, device, dtype)
        for name, operator in operators(heads, grid, device, dtype).items():
            if args.mode == "compiled" and name not in WRITTEN_OUT:
                operator.compile(dynamic=False)
            if name != "copy" or not backward:
                calls[name] = forward_or_both(operator, q, k, v, grid, backward)
        labels = {name: {"heads": heads, "batch": batch, "tokens": tokens,
                       "pass": "forward+backward" if backward else "forward",
                       "resident_mb": 3 * v.nbytes / 1e6} for name in calls}
        labels["softmax"]["backend"] = SDPBackend(torch._fused_sdp_choice(q, k, v)).name.lower()
        yield calls, labels, (2 + backward) * batch * heads * tokens ** 2 * v.element_size()


def vit_says(title, batch, pixels):
    arch = KNOWN[MODELS[title]]
    return {"model": title, "heads": arch.heads, "batch": batch, "pixels": pixels,
            "tokens": arch.prefix + (pixels // arch.patch) ** 2}


def model_points(args, device, dtype):
    for title, batch in product(args.models, args.batch_size):
        teacher = ViT(KNOWN[MODELS[title]]).to(device).eval()
        vits = {name: linearize(teacher, name).to(dtype) for name in args.operators}
        if "softmax_reference" in vits and dtype != torch.float32:      # the paper's softmax rows
            vits[WRITTEN_OUT[1]] = linearize(teacher, "softmax_reference")  # are, by their memory
        for name in set(vits).difference(WRITTEN_OUT) if args.mode == "compiled" else ():
            for block in vits[name].blocks:
                block.compile(dynamic=False)            # all share what the first one compiled
        for pixels in (round(p / teacher.arch.patch) * teacher.arch.patch for p in args.points):
            calls, labels, says = {}, {}, vit_says(title, batch, pixels) | {"pass": "forward"}
            for name, vit in vits.items():
                images = torch.randn(batch, 3, pixels, pixels).to(device, vit.norm.weight.dtype)
                held = sum(p.nbytes for p in vit.parameters()) + images.nbytes
                calls[name], labels[name] = partial(vit, images), says | {"resident_mb": held / 1e6}
            yield calls, labels, 2 * batch * teacher.arch.heads * says["tokens"] ** 2 * 4


def train_points(args, device, dtype):
    prepare = partial(torch.compile, fullgraph=True, dynamic=False, disable=args.mode == "eager")
    teacher = ViT(KNOWN[MODELS["vits14"]]).to(device).requires_grad_(False)
    loss = partial(LOSS["whitened"], whiten=torch.eye(teacher.arch.width, device=device))
    forward, align, align_block = map(prepare, (teacher, feature_alignment, block_alignment))
    scaler = torch.amp.GradScaler(device, enabled=False)

    @torch.no_grad()
    def with_teacher(function):
        with autocast(device, dtype):
            return function(teacher.normalize(images))

    def stage_1(student, finish):                       # as in align_attention.py
        x, grid = with_teacher(teacher.embed)
        for theirs, ours in zip(teacher.blocks, student.blocks):
            x, error, scale = align_block(theirs, ours, x, grid, dtype)
            (error / scale).backward()
        finish()

    def stage_2(student, finish):                       # as in align_features.py
        align(teacher, student, images, loss, dtype).backward()
        finish()

    calls = {"teacher forward": partial(with_teacher, forward)}
    for name in (name for name in args.operators if "softmax" not in name):
        one, two = linearize(teacher, name).train(), linearize(teacher, name).train()
        trained = (one, trained_parameters(one, GROUPS)), (two, [[*two.parameters()]])
        for stage, (student, groups) in zip((stage_1, stage_2), trained):
            optimizer = torch.optim.AdamW(sum(groups, []), weight_decay=0)
            finish = partial(update, scaler, optimizer, one_cycle(optimizer, 10 ** 6), groups)
            calls[f"{stage.__name__.replace('_', ' ')}, {name}"] = partial(stage, student, finish)
    for batch, pixels in product(args.batch_size, (round(p / 14) * 14 for p in args.points)):
        images = torch.randint(256, (batch, 3, pixels, pixels), dtype=torch.uint8, device=device)
        yield calls, {name: vit_says("vits14", batch, pixels) for name in calls}, 0


PARTS = {   # seconds of repeats, the same with --quick; the row that ratios are to
    "attention": (attention_points, 3, 0.3, "products"), "model": (model_points, 6, 0.5, "softmax"),
    "train": (train_points, 60, 1, "teacher forward")}


# ---- Crossover, table
def crossover(curve):
    """Pixels from which on an operator is as fast as fused softmax, log-log; None: never."""
    gains = sorted((row["pixels"], -math.log(row["ratio"])) for row in curve)
    start = max((i + 1 for i, (_, gain) in enumerate(gains) if gain < 0), default=0)
    if start in (0, len(gains)):
        return gains[0][0] if gains and start == 0 else None
    (left, below), (right, above) = gains[start - 1:start + 1]
    return round(left * (right / left) ** (below / (below - above)))


def claim(folder, stem):
    """An empty CSV under a name that no file has: nothing is ever replaced."""
    paths = (Path(folder, f"{stem}-{i}.csv" if i else f"{stem}.csv") for i in count())
    try:
        os.makedirs(folder, exist_ok=True)
        path = next(path for path in paths if not os.path.lexists(path))
        path.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"--out {folder} could not be written: {one_line(error)}") from None
    return path


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    points, *seconds, base = PARTS[args.part]
    torch.manual_seed(0)
    device, dtype = device_and_dtype(args)
    kind = str(dtype).removeprefix("torch.")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    chip = gpu or linux("cpuinfo", "model name.*: (.*)", platform.machine())
    slug = re.sub(r"\W+", "-", (gpu or device).lower())
    path = claim(args.out, f"bench-{slug}-{args.part}-{kind}-{args.mode}{'-quick' * args.quick}")
    same = {"part": args.part, "head_dim": HEAD_DIM, "dtype": kind, "ratio_to": base,
            "device": f"{chip}, {torch.get_num_threads()} threads", "torch": torch.__version__,
            "torchvision": torchvision.__version__, "command": f"python bench.py {' '.join(words)}"}
    curves, endings, sheet = {}, {}, io.StringIO(newline="")
    table = csv.DictWriter(sheet, COLUMNS)
    table.writeheader()
    for calls, labels, maps in points(args, device, dtype):
        torch._dynamo.reset()
        facts = next(iter(labels.values()))
        curve = tuple(facts.get(key) for key in ("model", "heads", "batch", "pass"))
        with torch.set_grad_enabled(facts.get("pass") != "forward"):
            point = measure(calls, endings.setdefault(curve, {}), device, seconds[args.quick], maps)
        other = point.get(base, {}).get("median_ms")
        for name, row in point.items():
            mode = "eager" if name in WRITTEN_OUT else args.mode
            row |= same | {"name": name, "pass": "step", "mode": mode} | labels[name]
            row |= {"gflops": count_flops(calls[name]) / 1e9} if args.part != "train" else {}
            if ms := row.get("median_ms"):
                row |= {"gflops_per_s": row["gflops"] / ms * 1e3} if "gflops" in row else {}
                row |= {"images_per_s": row["batch"] / ms * 1e3} if "pixels" in row else {}
                row |= {"ratio": ms / other} if other else {}
                if args.part == "model" and other and name != base:
                    curves.setdefault((row["model"], row["batch"], name), []).append(row)
            text = {key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()}
            table.writerow(text)
            print(*(f"{key} {text[key]}" for key in COLUMNS if key in row.keys() - same))
        write_whole(path, sheet.getvalue().encode())     # after every point: nothing is lost
    for curve, of_curve in curves.items():
        print(*curve, f"is as fast as {base} from {crossover(of_curve)} pixels on (None: never)")
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
