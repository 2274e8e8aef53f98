"""Stage 1 of ViT-AdaLA, attention alignment: each block learns to output what softmax does.

The frozen softmax teacher carries the residual stream. In every block the student's attention sees
exactly the teacher's normalised input, and its query, key and value weights (and its operator's own
parameters) are tuned until its output matches the teacher's. No labels.

    python align_attention.py                                   # the demo, a minute on a CPU
    python align_attention.py --teacher vit_small_patch14_dinov2 --data photos/ --size 224
    python align_attention.py --attention hedgehog --train operator --lr 1e-2       # LoLCATS

Reads the teacher's weights and images; writes to --out: student.safetensors,
log.jsonl (the loss of every block at every step), report.json (the table printed at the end).
"""
import argparse
import json
import math
import time
from functools import partial

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2
from tqdm import tqdm

from demo.shapes import Shapes
from model import ATTENTION, BICUBIC, Draws, InputError, complete, device_and_dtype, load_pair
from model import note_unread, open_out, read_image, run, save_vit, unlabelled, write_whole

DEFAULTS = dict(steps=2000, batch_size=32)
DEMO = dict(teacher="demo/teacher.safetensors", size=64, steps=100, batch_size=64)  # without --data
HELD_OUT = 256          # images for the table: more do not change its second digit


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--teacher", help="softmax ViT to imitate: a known name, a file of ours or NAME=FILE "
         f"(demo: {DEMO['teacher']})")
    flag("--student", help="one of this teacher to go on with (default: the teacher, swapped)")
    flag("--attention", choices=ATTENTION, help="the student's operator (default: linear)")
    flag("--train", choices=GROUPS, nargs="+", default=["qkv", "operator"],
         help="what is tuned (default: qkv, and the operator's own parameters)")
    flag("--data", nargs="+", help="folders of images, or torchvision sets (default: the demo's)")
    flag("--size", type=int, help="pixels, a multiple of the patch (default: the weights' native)")
    flag("--steps", type=int, help=f"(default: {DEFAULTS['steps']}, demo: {DEMO['steps']})")
    flag("--batch-size", type=int,
         help=f"(default: {DEFAULTS['batch_size']}, demo: {DEMO['batch_size']})")
    flag("--lr", type=float, default=3e-3,
         help="peak learning rate (default: 3e-3; give 1e-2 with --train operator)")
    flag("--out", default="runs/attention", help="folder to write (default: runs/attention)")
    flag("--seed", type=int, default=0, help="of photos, crops and flips (default: 0)")
    flag("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="of autocast (default: auto, half precision on a GPU, float32 on a CPU)")
    flag("--workers", type=int, help="that load photos (default: up to 8 on a GPU, else 0)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
         help="torch.compile (default: on a GPU)")
    args = complete(parser.parse_args(argv), DEFAULTS, DEMO)
    if args.teacher is None:
        raise InputError("--teacher is missing: with --data, name the softmax ViT to imitate")
    return args


def block_alignment(teacher, student, x, grid, dtype=torch.float32):
    """One block of stage 1 (Fig. 4, left): the same input for both, the teacher's output goes on.

    teacher, student: Block. x (B, N, C), the teacher's residual stream. -> (x after the teacher's
    block, loss). The loss is the squared error after the output projection, divided by that of
    uniform attention (the mean of V). 0: equals softmax. 1: no better than to ignore the query.
    Paper: "squared error"; here: the ratio, because it gives all blocks equal weight.
    Autocast is entered in here, since a compiled backward runs under the autocast of its call.
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            h = teacher.norm1(x)
            q, k, v = teacher.attn.project(h)                               # each (B,H,N,D)
            target = teacher.attn.proj(teacher.attn.attend(q, k, v, grid))  # (B,N,C)
            blind = v.mean(2).flatten(1).unsqueeze(1)                       # (B,H,N,D) -> (B,1,C)
            blind = teacher.attn.proj(blind)
            x = x + teacher.ls1(target)
            x = x + teacher.ls2(teacher.mlp(teacher.norm2(x)))
        output = student.attn(h, grid)                  # (B,N,C), the only trained forward pass
    target = target.float()
    error = (output.float() - target).square().sum()
    return x, error / (blind.float() - target).square().sum().clamp(min=1e-12)      # a single token


GROUPS = {                                  # what --train takes: tensors of a block, by name
    "qkv": lambda block: block.attn.qkv,
    "operator": lambda block: block.attn.operator,
    "proj": lambda block: block.attn.proj,
}


def trained_parameters(student, groups):
    """Freeze all but these GROUPS; -> a list of what is left for every block."""
    student.requires_grad_(False)
    by_block = [[p for name in dict.fromkeys(groups) for p in GROUPS[name](block).parameters()]
                for block in student.blocks]
    if not any(by_block):
        raise InputError(f"--train {' '.join(groups)}: {student.attention} attention has no "
                         "parameters of its own to train")
    for p in sum(by_block, []):
        p.requires_grad_(True)
    return by_block


@torch.no_grad()
def exponential_start(student):
    """Lower query and key biases, once, by what the operator says: 1 + ELU(x) is exp(x) below 0.

    Softmax weights are products of exponentials; the common factor cancels in the normaliser, and
    phi's linear part still bounds outliers. Paper: no word of phi's scale; here: held-out error
    after 60 steps 0.516 instead of 0.586 (results/README.md). DINOv3 has no such bias.
    """
    for block in student.blocks:
        if block.attn.qkv.bias is not None:
            q, k, _ = block.attn.qkv.bias.chunk(3)
            q += block.attn.operator.bias_shift
            k += block.attn.operator.bias_shift


@torch.no_grad()
def embed(teacher, images, dtype):
    """uint8 images (B, 3, H, W) -> (tokens before the first block, grid)."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return teacher.embed(teacher.normalize(images))


@torch.no_grad()
def relative_error(teacher, student, batches, device, dtype, note=lambda _: None):
    """Held-out error of each block's attention output: root of the loss, so 1 is the mean of V."""
    losses = []
    for images, messages in tqdm(batches, desc="held out", leave=False, delay=2):
        note(messages)                      # of photos that could not be read
        x, grid = embed(teacher, images.to(device), dtype)
        for theirs, ours in zip(teacher.blocks, student.blocks):
            x, loss = block_alignment(theirs, ours, x, grid, dtype)
            losses.append(loss)
    return torch.stack(losses).view(-1, len(teacher.blocks)).mean(0).sqrt().tolist()


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args.dtype)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    teacher, student, digest = load_pair(args.teacher, args.student, args.attention)
    args.size = teacher.arch.pixels[0] if args.size is None else args.size
    teacher.grid(args.size, args.size)
    by_block = trained_parameters(student, args.train)
    parameters = sum(by_block, [])
    source, held_out = unlabelled(args.data) if args.data else (Shapes("train"), Shapes("val"))
    out = open_out(args, [args.teacher, args.student, *(args.data or [])])
    teacher, student = teacher.to(device).requires_grad_(False), student.to(device).train()
    trained, all_of_it = (sum(p.numel() for p in part) / 1e6
                          for part in (parameters, student.parameters()))
    print(f"{student.attention} attention, training {trained:.2f} M of {all_of_it:.2f} M parameters"
          f" on {len(source)} images of {args.size} pixels, {device}, {dtype}")

    crop = v2.Compose([v2.RandomResizedCrop(args.size, (0.35, 1), **BICUBIC),
                       v2.RandomHorizontalFlip()])
    whole = v2.Compose([v2.Resize(args.size, **BICUBIC), v2.CenterCrop(args.size)])
    crop, whole = (crop, whole) if args.data else (v2.Identity(), v2.Identity())
    read = partial(read_image, short=args.size)
    gpu = device == "cuda"
    loader = partial(DataLoader, batch_size=args.batch_size, num_workers=args.workers,
                     pin_memory=gpu)
    draws = range(args.steps * args.batch_size)
    train = loader(Draws(source, read, crop, args.seed), sampler=draws)
    every = max(1, len(held_out) // HELD_OUT)
    held_out = loader(Draws(Subset(held_out, range(0, len(held_out), every)), read, whole))
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=0)  # stay near the teacher's
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, max(args.steps, 10) + 1, pct_start=0.1, cycle_momentum=False)
    align = torch.compile(block_alignment, fullgraph=True) if args.compile else block_alignment

    unread = []
    note = partial(note_unread, unread=unread, listed=len(source) + len(held_out.dataset))
    before = relative_error(teacher, student, held_out, device, dtype, note)
    if args.student is None:
        exponential_start(student)
    start, seconds = time.perf_counter(), 0.0
    with open(out / "log.jsonl", "w") as log, tqdm(total=args.steps * args.batch_size, unit="img",
                                                   mininterval=1) as bar:
        for step, (images, messages) in enumerate(train, 1):
            note(messages)
            x, grid = embed(teacher, images.to(device, non_blocking=True), dtype)
            losses = []
            for theirs, ours in zip(teacher.blocks, student.blocks):
                x, loss = align(theirs, ours, x, grid, dtype)               # attention alignment
                scaler.scale(loss).backward()   # now: memory holds one block's activations
                losses.append(loss.detach())
            losses = torch.stack(losses).tolist()
            if not math.isfinite(sum(losses)):
                raise InputError(f"the blocks' losses are {losses} at step {step}: try a lower "
                                 f"--lr than {args.lr}")
            scaler.unscale_(optimizer)
            for block in by_block:              # clipped apart: the blocks share nothing
                nn.utils.clip_grad_norm_(block, 1.0)
            scaler.step(optimizer)
            scaler.update()
            rate, loss = schedule.get_last_lr()[0], sum(losses) / len(losses)
            schedule.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            log.write(json.dumps({"step": step, "loss": loss, "lr": rate, "blocks": losses,
                                  "seconds": round(seconds, 2)}) + "\n")
            bar.update(len(images))
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")

    facts = dict(stage="attention", teacher=digest, training={
        key: getattr(args, key) for key in ("train", "size", "steps", "batch_size", "lr", "seed")})
    save_vit(student, out / "student.safetensors", **facts)
    after = relative_error(teacher, student, held_out, device, dtype, note)
    print("\nheld-out relative error of the attention output (1 = mean of V)\nblock  before  after")
    for block, (old, new) in enumerate(zip(before, after)):
        print(f"{block:5d}  {old:6.3f}  {new:5.3f}")
    print(f" mean  {sum(before) / len(before):6.3f}  {sum(after) / len(after):5.3f}   "
          f"{args.steps} steps in {seconds:.0f} s")
    write_whole(out / "report.json", facts | dict(before=before, after=after, seconds=seconds,
                                                  unread=unread, arguments=vars(args)))
    print(f"wrote {out / 'student.safetensors'}")


if __name__ == "__main__":
    run(main)
