"""Stage 2 of ViT-AdaLA, feature alignment: the whole student learns its teacher's final features.

After stage 1 each block imitates softmax attention on the teacher's input; errors still add up over
the depth. Here the student runs on its own, every weight is tuned, and only the final tokens (CLS,
registers, patches) are supervised.

    python align_features.py                                    # the demo, a minute on a CPU
    python align_features.py --teacher vit_small_patch14_dinov2 --data photos/ --size 224 \\
        --student runs/attention/student.safetensors            # after stage 1 on your photos
    python align_features.py --teacher ... --data ... --attention linear    # without stage 1

Reads teacher, student and images; writes to --out: student.safetensors, log.jsonl, report.json and
features.png (photo, teacher's and student's patch features as colours).
"""
import argparse
import json
import math
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

from demo.shapes import Shapes
from model import ATTENTION, BICUBIC, Draws, InputError, complete, device_and_dtype, load_pair
from model import note_unread, open_out, read_image, run, save_vit, unlabelled, write_whole

DEFAULTS = dict(steps=5000, batch_size=32, lr=1e-4)
DEMO = dict(teacher="demo/teacher.safetensors", size=64, steps=150, batch_size=64, lr=5e-4)
STAGE_1 = "runs/attention/student.safetensors"  # the demo's student, unless --attention is given
HELD_OUT = 256          # images for the table: more do not change its second digit


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    both = lambda key: f"(default: {DEFAULTS[key]}, demo: {DEMO[key]})"
    flag("--teacher", help="softmax ViT to imitate: a known name, a file of ours or NAME=FILE "
         f"(demo: {DEMO['teacher']})")
    flag("--student", help=f"stage 1's (default: the teacher, swapped; demo: {STAGE_1})")
    flag("--attention", choices=ATTENTION, help="operator without --student (default: linear)")
    flag("--loss", choices=LOSS, default="mse", help="of final tokens (default: the paper's mse)")
    flag("--data", nargs="+", help="folders of images, or torchvision sets (default: the demo's)")
    flag("--size", type=int, help="pixels, a multiple of the patch (default: the weights' native)")
    flag("--steps", type=int, help=both("steps"))
    flag("--batch-size", type=int, help=both("batch_size"))
    flag("--lr", type=float, help=f"peak, the lower the better stage 1 was {both('lr')}")
    flag("--out", default="runs/features", help="folder to write (default: runs/features)")
    flag("--seed", type=int, default=0, help="of photos, crops and flips (default: 0)")
    flag("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="of autocast (default: auto, half precision on a GPU, float32 on a CPU)")
    flag("--workers", type=int, help="that load photos (default: up to 8 on a GPU, else 0)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
         help="torch.compile (default: on a GPU)")
    args = parser.parse_args(argv)
    from_stage_1 = {} if args.attention else dict(student=STAGE_1)
    args = complete(args, DEFAULTS, DEMO | from_stage_1)
    if args.teacher is None:
        raise InputError("--teacher is missing: with --data, name the softmax ViT to imitate")
    return args


def mse(student, teacher):
    """Squared error of all final tokens alike. Paper: not said whether CLS counts; here: yes."""
    return F.mse_loss(student, teacher)


def cosine(student, teacher):
    """1 - cosine of each token + 0.1 smooth-L1 for its length, so long tokens do not outweigh."""
    alike = F.cosine_similarity(student, teacher, dim=-1).mean()
    return 1 - alike + 0.1 * F.smooth_l1_loss(student, teacher)


LOSS = {"mse": mse, "cosine": cosine}


def feature_alignment(teacher, student, images, loss, dtype=torch.float32):
    """Stage 2 (Fig. 4, middle): uint8 images (B, 3, H, W) -> loss of final tokens (B, 1+R+N, C).

    Autocast is entered in here, since a compiled backward runs under the autocast of its call.
    """
    images = teacher.normalize(images)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            target = teacher(images)
        output = student(images)
    return loss(output.float(), target.float())         # nothing in between is supervised


@torch.no_grad()
def compare(teacher, student, batches, dtype, device, note=lambda _: None):
    """Held-out agreement of the final tokens: cosine of CLS (None without) and patches, error."""
    prefix, cls, patches, error, energy = teacher.arch.prefix, [], [], 0.0, 0.0
    for images, messages in tqdm(batches, desc="held out", leave=False, delay=2):
        note(messages)                      # of photos that could not be read
        images = teacher.normalize(images.to(device))
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            want, have = teacher(images).float(), student(images).float()
        alike = F.cosine_similarity(have, want, dim=-1)                     # (B, 1+R+N)
        cls.append(alike[:, 0].mean())
        patches.append(alike[:, prefix:].mean())
        centre = want.mean((0, 1))          # the mean token has error 1: no constant looks good
        error += (have - want).square().sum()
        energy += (want - centre).square().sum()
    return dict(cls_cosine=torch.stack(cls).mean().item() if teacher.arch.cls else None,
                patch_cosine=torch.stack(patches).mean().item(),
                relative_error=(error / energy.clamp(min=1e-12)).sqrt().item())


@torch.no_grad()
def picture(teacher, student, images, path):
    """Rows: photo, teacher, student. Three main axes of the teacher's patches are the colours."""
    normal, grid = teacher.normalize(images), teacher.grid(*images.shape[2:])
    want, have = (vit(normal)[:, vit.arch.prefix:].float() for vit in (teacher, student))
    centre = want.mean((0, 1))
    axes = torch.pca_lowrank(want.flatten(0, 1) - centre, q=3, center=False)[2]             # (C, 3)
    colours = [(tokens - centre) @ axes for tokens in (want, have)]         # (B, N, 3)
    low, high = (colours[0].flatten(0, 1).quantile(q, dim=0) for q in (0.01, 0.99))
    rows = [((c - low) / (high - low)).clamp(0, 1).mT.unflatten(2, grid) for c in colours]
    rows = [F.interpolate(row, size=images.shape[2:], mode="nearest") for row in rows]
    save_image(torch.cat([images / 255, *rows]), path, nrow=len(images))


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args.dtype)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    teacher, student, digest = load_pair(args.teacher, args.student, args.attention)
    stage = "features" if student.facts.get("stage") in (None, "features") else "attention+features"
    args.size = teacher.arch.pixels[0] if args.size is None else args.size
    teacher.grid(args.size, args.size)
    source, held_out = unlabelled(args.data) if args.data else (Shapes("train"), Shapes("val"))
    out = open_out(args, [args.teacher, args.student, *(args.data or [])])
    teacher, student = teacher.to(device).requires_grad_(False), student.to(device)
    print(f"{student.attention} attention, training all "
          f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters on "
          f"{len(source)} images of {args.size} pixels, {device}, {dtype}")

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
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, max(args.steps, 10) + 1, pct_start=0.1, cycle_momentum=False)
    align = torch.compile(feature_alignment, fullgraph=True) if args.compile else feature_alignment

    unread = []
    note = partial(note_unread, unread=unread, listed=len(source) + len(held_out.dataset))
    before = compare(teacher, student.eval(), held_out, dtype, device, note)
    student.train()
    start, seconds = time.perf_counter(), 0.0
    with open(out / "log.jsonl", "w") as log, tqdm(total=args.steps * args.batch_size, unit="img",
                                                   mininterval=1) as bar:
        for step, (images, messages) in enumerate(train, 1):
            note(messages)
            images = images.to(device, non_blocking=True)
            loss = align(teacher, student, images, LOSS[args.loss], dtype)  # feature alignment
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(f"the loss is {value} at step {step}: try a lower --lr than "
                                 f"{args.lr}")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            log.write(json.dumps({"step": step, "loss": value, "lr": rate,
                                  "seconds": round(seconds, 2)}) + "\n")
            bar.update(len(images))
            bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.1e}")

    facts = dict(stage=stage, teacher=digest, training={
        key: getattr(args, key) for key in ("loss", "size", "steps", "batch_size", "lr", "seed")})
    save_vit(student, out / "student.safetensors", **facts)
    after = compare(teacher, student.eval(), held_out, dtype, device, note)
    print(f"\nheld-out final tokens, student against teacher ({args.steps} steps, {seconds:.0f} s)"
          f"\n{'':16s}before  after")
    for key, old in before.items():
        if old is not None:
            print(f"{key:16s}{old:6.3f}  {after[key]:5.3f}")
    write_whole(out / "report.json", facts | dict(before=before, after=after, seconds=seconds,
                                                  unread=unread, arguments=vars(args)))
    shown = held_out.dataset                # eight of them, from all over the set
    places = range(0, len(shown), math.ceil(len(shown) / 8))
    images = torch.stack([shown[i][0] for i in places])
    if len(images) * (args.size // teacher.arch.patch) ** 2 > 3:        # patches: three axes need 4
        picture(teacher, student, images.to(device), out / "features.png")
    print(f"wrote {out / 'student.safetensors'}")


if __name__ == "__main__":
    run(main)
