"""Measures on a GPU what the README says of one: python results/gpu.py STEP... --out FOLDER

results/gpu.sh runs the steps in order, each in its own process with its own limit of time. Every
row is written to FOLDER/gpu.jsonl at once. --smoke rehearses on a CPU with the demo's ViT.

    check   the kernel against float64 on the CPU: out and gradients, all dtypes
    tune    BLOCK, PROGRAMS and warps of the kernel; the convolution of linear_conv
    models  the position table; images/s eager, as a graph, and as a graph of compiled blocks
    train   seconds of a step in stages 1 and 2; peak memory with recompute
"""
import argparse
import json
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.nn.functional as F

import align_attention
import align_features
import bench
import model
from bench import MODELS, PLAIN, once_graphed, vit_of


CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
OPERATORS = "softmax", "linear", PLAIN, "linear_conv"
POINTS = [("vitl14", 1, 518), ("vitl14", 1, 1022), ("vits14", 16, 448), ("vitl14", 1, 252),
          ("vits14", 16, 224), ("vits14", 16, 672), ("vitl14", 1, 2044), ("vits14", 16, 1022)]
SHAPES = [(1, 16, 1370), (16, 6, 1025), (1, 16, 5330)]                  # B, H, N; D is 64


def add(step, measured, **says):
    """Write what measured() returns, or why it returned nothing, and the seconds that it took."""
    start, row = time.monotonic(), {"step": step, **says}
    if start > args.end:
        row["status"] = "no time left"
    else:
        try:
            row |= measured()
        except Exception as error:                      # out of memory, does not compile
            row["status"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row = {key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in row.items()}
    row["took_s"] = round(time.monotonic() - start, 1)
    print(*(f"{key}={x}" for key, x in row.items()), flush=True)
    with open(args.out / "gpu.jsonl", "a") as file:
        print(json.dumps(row), file=file)


def speed(calls, batch=None, seconds=0.15):
    """{(name, mode): call}, timed in turns -> {name: row}."""
    with torch.no_grad():
        rows = bench.measure(calls, {}, DEVICE, seconds)
    for row in rows.values():
        if batch and "median_ms" in row:
            row["images_per_s"] = batch / row["median_ms"] * 1e3
    return rows


def ms(call, seconds=0.15):
    return speed({("", "eager"): call}, seconds=seconds)["", "eager"]


def graph_of(call):
    return once_graphed(lambda _: call(), torch.zeros(1, device=DEVICE)) if CUDA else call


# ---- check
def out_and_gradients(function, qkv):
    leaf = qkv.clone().requires_grad_()
    out = function(*leaf.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradient, = torch.autograd.grad((out * weight).sum(), leaf)
    return [part.double().cpu() for part in (out.detach(), *gradient.unbind(2))]


def check():
    shapes = [(2, 3, 1370, 64), (1, 2, 1, 64), (3, 2, 65, 32), (16, 6, 257, 64), (1, 2, 5330, 16)]
    for shape, shift, dtype in product(shapes[1:3] if args.smoke else shapes, (0, -4, -12), (
            torch.bfloat16, torch.float16, torch.float32)):
        B, H, N, D = shape
        qkv = torch.randn(B, N, 3, H, D, generator=torch.Generator().manual_seed(N))
        qkv[:, :, :2] += shift
        qkv = qkv.to(dtype)
        truth = out_and_gradients(model.linear_reference, qkv.double())
        functions = {"kernel": kernel, "plain": model.linear_plain}
        if N == 65 and shift == 0:
            functions["kernel, compiled"] = torch.compile(model.linear_attention, fullgraph=True)
        for name, function in functions.items():
            def errors():
                found, floor = out_and_gradients(function, qkv.to(DEVICE)), 1e-9
                if N == 1:                              # gradients of q and k are 0
                    floor = truth[3].norm()
                parts = zip(("out", "dq", "dk", "dv"), found, truth)
                return {part: ((a - b).norm() / b.norm().clamp(min=floor)).item()
                        for part, a, b in parts}
            add("check", errors, name=name, shape=str(shape), shift=shift, dtype=str(dtype)[6:])
    q, k, v = (torch.randn(2, 3, 1025, 64, device=DEVICE, dtype=DTYPE) for _ in range(3))
    add("check", lambda: {"same bits": torch.equal(kernel(q, k, v), kernel(q, k, v))})
    add("check", lambda: {"usable": model.linear_triton.usable(q, model.linear_plain, k, v)})


def kernel(q, k, v):
    return model.linear_triton.linear_attention(q, k, v) if CUDA else model.linear_plain(q, k, v)


# ---- tune
class Warps:
    """A kernel that is launched with this many warps."""
    def __init__(self, kernel, warps):
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid):
        return lambda *given, **more: self.kernel[grid](*given, **more | {"num_warps": self.warps})


def tune():
    lt = model.linear_triton
    kept = lt.sum_keys, lt.read_queries, lt.PROGRAMS, lt.BLOCK[torch.bfloat16]
    for shape in SHAPES:
        B, H, N = shape if not args.smoke else (1, 2, 65)
        q, k, v = torch.randn(B, N, 3, H, 64).to(DEVICE, DTYPE).permute(2, 0, 3, 1, 4).unbind(0)
        for name in ("softmax", PLAIN):
            function = model.softmax_attention if name == "softmax" else model.linear_plain
            call = graph_of(lambda: function(q, k, v))
            add("tune", lambda: ms(call), name=name, shape=str(shape))
        for block, warps, programs in product((64, 128), (4, 8), (132, 264, 528)):
            lt.sum_keys, lt.read_queries = (Warps(kernel, warps) for kernel in kept[:2])
            lt.PROGRAMS, lt.BLOCK[torch.bfloat16] = programs, block
            add("tune", lambda: ms(graph_of(lambda: kernel(q, k, v))), name="kernel",
                shape=str(shape), block=block, warps=warps, programs=programs)
        lt.sum_keys, lt.read_queries, lt.PROGRAMS, lt.BLOCK[torch.bfloat16] = kept
    for batch, width, side in ((1, 1024, 73), (1, 1024, 37), (16, 384, 32)):
        x = torch.randn(batch, width, side, side).to(DEVICE, DTYPE)
        weight = torch.randn(width, 1, 5, 5).to(DEVICE, DTYPE)
        for layout in (torch.channels_last, torch.contiguous_format):
            y, w = (part.to(memory_format=layout) for part in (x, weight))
            for name, kernel_weight in (("", weight), (", weight too", w)):
                call = graph_of(lambda: F.conv2d(y, kernel_weight, padding=2, groups=width))
                add("conv", lambda: ms(call), shape=str((batch, width, side)),
                    layout=str(layout)[6:] + name)


# ---- models
@torch.no_grad()
def models():
    torch.manual_seed(0)
    points = [("demo", 2, 64), ("demo", 1, 96)] if args.smoke else POINTS
    teachers = {title: model.ViT(model.KNOWN[MODELS.get(title, title)]).to(DEVICE).eval()
                for title, *_ in points}
    vits = {(title, name, compiled): vit_of(vit, name, DTYPE).eval() for title, vit in
            teachers.items() for name, compiled in product(OPERATORS, (False, True))}
    for (title, name, compiled), vit in vits.items():
        for block in vit.blocks if compiled else ():
            block.compile(dynamic=False, fullgraph=True)
    for title, side in dict.fromkeys((title, pixels) for title, _, pixels in points):
        vit = vits[title, "softmax", False]
        grid = vit.grid_of(side, side)
        table = vit.pos_embed[:, -(vit.arch.grid[0] * vit.arch.grid[1]):]
        table = table.float().unflatten(1, vit.arch.grid).permute(0, 3, 1, 2)
        factors = [(n + 0.1) / m for n, m in zip(grid, vit.arch.grid)]
        both = partial(F.interpolate, table, scale_factor=factors, mode="bicubic")
        for name, call in (("ours", partial(vit.positions, grid)), ("F.interpolate once", both)):
            add("table", lambda: ms(call), model=title, pixels=side, name=name)
    for (title, batch, pixels), mode in product(points, ("eager", "graph")):
        of_modes(vits, title, batch, pixels, mode, OPERATORS)
    for i, (title, batch, pixels) in enumerate(points):
        of_modes(vits, title, batch, pixels, "compiled-graph",
                 OPERATORS if i in (0, 2) else [name for name in OPERATORS if name != PLAIN])


def of_modes(vits, title, batch, pixels, mode, names):
    """A row for each operator at one point in one mode, times fused softmax in the same mode."""
    if "graph" in mode and not CUDA:
        mode = mode.removesuffix("-graph").replace("graph", "eager")
    calls, start, other = {}, time.monotonic(), []
    for name in names:
        vit = vits[title, name, "compiled" in mode]
        images = torch.randn(batch, 3, pixels, pixels).to(DEVICE, DTYPE)
        make = once_graphed if "graph" in mode else partial
        calls[name, mode] = make(vit, images)
    try:
        rows = {} if time.monotonic() > args.end else speed(calls, batch)
    except Exception as error:
        rows = {key: {"status": repr(error)[:300]} for key in calls}
    for (name, _), row in rows.items():
        other = other or [row.get("median_ms")]         # softmax is the first
        if other[0] and "median_ms" in row:
            row["times_softmax"] = other[0] / row["median_ms"]
        add("models", lambda: row, model=title, batch=batch, pixels=pixels, mode=mode, name=name)
    if not rows:
        add("models", dict, model=title, batch=batch, pixels=pixels, mode=mode)
    print(f"    {time.monotonic() - start:.1f} s", flush=True)


# ---- train
def seconds_a_step(step, repeats=5):
    wait = getattr(torch, DEVICE).synchronize
    start = time.monotonic()
    step()
    wait()
    first = time.monotonic() - start
    times = []
    for _ in range(repeats):
        start = time.monotonic()
        step()
        wait()
        times.append(time.monotonic() - start)
    return dict(first_s=first, step_s=sorted(times)[len(times) // 2])


def stage(number, name, compiled, title, batch, pixels, recompute=False):
    torch._dynamo.reset()
    teacher = model.ViT(model.KNOWN[MODELS.get(title, title)]).to(DEVICE).eval()
    student = vit_of(teacher, name, torch.float32).train().requires_grad_(True)
    teacher.requires_grad_(False)
    student.recompute = recompute
    images = torch.randint(256, (batch, 3, pixels, pixels), dtype=torch.uint8, device=DEVICE)
    function = align_attention.block_alignment if number == 1 else align_features.feature_alignment
    function = torch.compile(function, fullgraph=True) if compiled else function
    parameters = [*student.parameters()] if number == 2 else [
        p for block in student.blocks for p in block.attn.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-5)
    mse = partial(align_features.LOSS["mse"], whiten=None)

    def step():
        if number == 1:
            with torch.no_grad(), torch.autocast(DEVICE, DTYPE, enabled=DTYPE != torch.float32):
                x, grid = teacher.embed(teacher.normalize(images))
            for theirs, ours in zip(teacher.blocks, student.blocks):
                x, error, scale = function(theirs, ours, x, grid, DTYPE)
                (error / scale).backward()
        else:
            function(teacher, student, images, mse, DTYPE).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    found = seconds_a_step(step, 1 if recompute else 5)
    return found | ({"peak_mb": torch.cuda.max_memory_allocated() / 1e6} if CUDA else {})


def train():
    title, batch, pixels = ("demo", 2, 64) if args.smoke else ("vits14", 32, 224)
    order = [(1, False), (2, False), (1, True)]
    for (number, compiled), name in product(order, ("linear", PLAIN)):
        add("train", lambda: stage(number, name, compiled, title, batch, pixels), stage=number,
            name=name, compiled=compiled)
    title, side = ("demo", 64) if args.smoke else ("vitl14", 518)
    for recompute in (True, False):
        add("memory", lambda: stage(2, "linear", False, title, 8, side, recompute), model=title,
            pixels=side, batch=8, recompute=recompute)
    title = "demo" if args.smoke else "vits14"
    for name in ("linear", PLAIN, "softmax"):
        add("train", lambda: stage(2, name, True, title, batch, pixels), stage=2, name=name,
            compiled=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="+", choices=("check", "tune", "models", "train"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.end = time.monotonic() + 60 * args.minutes
    torch.backends.cudnn.allow_tf32 = False             # as device_and_dtype
    torch._dynamo.config.recompile_limit = 256          # blocks of all operators share their code
    for name in args.steps:
        globals()[name]()
