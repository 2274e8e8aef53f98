"""Stage 2 of ViT-AdaLA, feature alignment: the whole student learns to reproduce the frozen teacher's final features.

After stage 1 each block imitates its softmax attention on the teacher's input; errors still add up over the depth. Here
the student runs on its own, every weight is tuned, and only the final tokens (CLS, registers, patches) are supervised.

    python align_features.py                                                              # the demo, a minute on CPU
    python align_features.py --weights runs/attention/student.safetensors --data photos/  # after stage 1 on your own photos
    python align_features.py --weights vit_small_patch14_dinov2 --data photos/            # the ablation without stage 1

Reads a student (or a softmax ViT, which it linearizes), its teacher and images; writes to --out: student.safetensors,
log.jsonl, report.json and features.png (photo, teacher's and student's patch features as colours).
"""
import argparse
import json
import math
import os
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

from model import OPERATORS, InputError, device_and_dtype, load_pair, open_out, read_image, run, save_vit, unlabelled

DEMO = dict(weights="runs/attention/student.safetensors", size=64, steps=150, batch=64, lr=5e-4)
HELD_OUT = 256                                # images behind the table: more do not change its second digit


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="student of stage 1, or a softmax ViT to linearize")
    parser.add_argument("--teacher", help="softmax ViT to imitate (default: the one that --weights names or is)")
    parser.add_argument("--attention", choices=OPERATORS, help="the student's operator, when --weights is a softmax ViT")
    parser.add_argument("--loss", choices=("mse", "cosine"), default="mse", help="mse: the paper's; cosine: see LOSS")
    parser.add_argument("--data", nargs="+", default=["demo"], help="folders of images, a torchvision set's name, or demo")
    parser.add_argument("--size", type=int, help="pixels, a multiple of the patch (default: the weights' native size)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate; the better stage 1 was, the lower")
    parser.add_argument("--out", default="runs/features", help="folder for student, log, report and picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of autocast")
    args = parser.parse_args(argv)
    if args.data == ["demo"]:                 # inherited: what the demo needs, for flags that were not given
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
        if args.size != DEMO["size"]:
            raise InputError(f"--size {args.size}: the demo's images have {DEMO['size']} pixels; --data names your own")
        print("demo defaults:", *(f"--{key} {getattr(args, key)}" for key in DEMO))
    if min(args.steps, args.batch) < 1:
        raise InputError(f"--steps {args.steps} --batch {args.batch}: expected 1 or more of each")
    if not 0 < args.lr < math.inf:
        raise InputError(f"--lr {args.lr}: expected a number above 0")
    if args.weights is None:
        raise InputError("--weights is missing: with --data of your own, name stage 1's student (or a softmax ViT)")
    return args


class Photos(Dataset):
    """uint8 images (3, size, size) from paths or from a set whose items begin with an image; drawn ones stay as they are.

    resize: torchvision's name of the interpolation that the weights are used to, as their Architecture says.
    """

    def __init__(self, source, size, augment, resize="bicubic"):
        resize = dict(interpolation=v2.InterpolationMode(resize), antialias=True)
        crop = [v2.RandomResizedCrop(size, scale=(0.35, 1), **resize), v2.RandomHorizontalFlip()]
        whole = [v2.Resize(size, **resize), v2.CenterCrop(size)]
        self.source, self.transform = source, v2.Compose([v2.ToImage(), *(crop if augment else whole)])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        item = self.source[i]
        image = item[0] if isinstance(item, tuple) else read_image(item)
        return image if type(image) is torch.Tensor else self.transform(image).as_subclass(torch.Tensor)


def mse(student, teacher):
    """Squared error of the final tokens, all alike (the paper's loss; whether it counts CLS is not published: here, yes)."""
    return F.mse_loss(student, teacher)


def cosine(student, teacher):
    """1 - cosine of each token, plus 0.1 smooth-L1 for its length: a few long tokens do not outweigh the rest (cf. IronViT)."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean() + 0.1 * F.smooth_l1_loss(student, teacher)


LOSS = {"mse": mse, "cosine": cosine}


def feature_alignment(teacher, student, images, loss, dtype=torch.float32):
    """uint8 images (B, 3, H, W) -> the stage's loss (Fig. 4, middle): final tokens (B, 1+R+N, C) of both, nothing between.

    Autocast to dtype begins and ends in here, because a compiled backward runs under what its forward was called under.
    """
    images = teacher.normalize(images)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            target = teacher(images)
        output = student(images)
    return loss(output.float(), target.float())


@torch.no_grad()
def compare(teacher, student, batches, dtype, device):
    """Held-out agreement of the final tokens: cosine of CLS (if there is one) and of patches, relative error of all."""
    prefix, cls, patches, error, energy = teacher.arch.prefix, [], [], 0.0, 0.0
    for images in batches:
        images = teacher.normalize(images.to(device))
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            want, have = teacher(images).float(), student(images).float()
        similar = F.cosine_similarity(have, want, dim=-1)               # (B, 1+R+N)
        cls.append(similar[:, 0].mean())
        patches.append(similar[:, prefix:].mean())
        centre = want.mean((0, 1))            # the mean token counts as error 1, so a constant cannot look good
        error += (have - want).square().sum()
        energy += (want - centre).square().sum()
    mean = lambda values: torch.stack(values).mean().item()
    return dict(cls_cosine=mean(cls) if teacher.arch.cls else None, patch_cosine=mean(patches),
                relative_error=(error / energy).sqrt().item())


@torch.no_grad()
def picture(teacher, student, images, path):
    """Rows: photo, teacher, student. The first three principal axes of the teacher's patches are red, green, blue in both."""
    normal, grid = teacher.normalize(images), teacher.grid(*images.shape[2:])
    want, have = (vit(normal)[:, vit.arch.prefix:].float() for vit in (teacher, student))    # (B, N, C)
    centre = want.mean((0, 1))
    axes = torch.pca_lowrank(want.flatten(0, 1) - centre, q=3, center=False)[2]              # (C, 3)
    colours = [(tokens - centre) @ axes for tokens in (want, have)]                          # (B, N, 3)
    low, high = (colours[0].flatten(0, 1).quantile(q, dim=0) for q in (0.01, 0.99))
    rows = [((c - low) / (high - low)).clamp(0, 1).transpose(1, 2).unflatten(2, grid) for c in colours]
    rows = [F.interpolate(row, size=images.shape[2:], mode="nearest") for row in rows]       # (B, 3, H, W)
    save_image(torch.cat([images / 255, *rows]), path, nrow=len(images))


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args.dtype)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    teacher, student, origin = load_pair(args.weights, args.teacher, args.attention)
    stage = "attention+features" if student.facts.get("stage", "").startswith("attention") else "features"
    args.size = teacher.arch.pixels[0] if args.size is None else args.size
    teacher.grid(args.size, args.size)
    source, held_out = unlabelled(args.data)
    out = open_out(args.out, student)
    teacher, student = teacher.to(device).requires_grad_(False), student.to(device).train()
    print(f"student: {student.attention} attention, training all {sum(p.numel() for p in student.parameters()) / 1e6:.2f} M "
          f"parameters on {len(source)} images of {args.size} pixels, {device}, {dtype}")

    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0
    draws = torch.Generator().manual_seed(args.seed)
    photos = Photos(source, args.size, True, teacher.arch.interpolation)
    loader = DataLoader(photos, args.batch, num_workers=workers, pin_memory=device == "cuda", generator=draws,
                        sampler=RandomSampler(photos, num_samples=args.steps * args.batch, generator=draws))
    every = max(1, len(held_out) // HELD_OUT)
    held_out = Subset(Photos(held_out, args.size, False, teacher.arch.interpolation), range(0, len(held_out), every))
    held_out = DataLoader(held_out, args.batch, num_workers=workers)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=max(args.steps, 10) + 1,
                                                   pct_start=0.1, cycle_momentum=False)
    align = torch.compile(feature_alignment, fullgraph=True) if device == "cuda" else feature_alignment

    before, start = compare(teacher, student.eval(), held_out, dtype, device), time.perf_counter()
    student.train()
    with open(out / "log.jsonl", "w") as log, tqdm(total=args.steps * args.batch, unit="img", mininterval=1) as bar:
        for step, images in enumerate(loader, 1):
            images = images.to(device, non_blocking=True)
            loss = align(teacher, student, images, LOSS[args.loss], dtype)
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(f"the loss is {value} at step {step}: try a lower --lr than {args.lr}")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            optimizer.zero_grad()
            seconds = round(time.perf_counter() - start, 2)
            log.write(json.dumps({"step": step, "loss": value, "lr": rate, "seconds": seconds}) + "\n")
            bar.update(len(images))
            bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.1e}")
    seconds, after = time.perf_counter() - start, compare(teacher, student.eval(), held_out, dtype, device)

    print(f"\nheld-out final tokens, student against teacher ({args.steps} steps in {seconds:.0f} s)\n{'':16s}before  after")
    for key, old in before.items():
        if old is not None:
            print(f"{key:16s}{old:6.3f}  {after[key]:5.3f}")
    facts = dict(stage=stage, teacher=origin, training=vars(args))
    save_vit(student, out / "student.safetensors", **facts)
    (out / "report.json").write_text(json.dumps(facts | dict(before=before, after=after, seconds=seconds), indent=1))
    shown = held_out.dataset                  # eight of them, from all over the set
    shown = torch.stack([shown[i * len(shown) // 8] for i in range(8)]) if len(shown) >= 8 else next(iter(held_out))
    picture(teacher, student, shown.to(device), out / "features.png")
    print(f"wrote {out / 'student.safetensors'} and {out / 'features.png'}")


if __name__ == "__main__":
    run(main)
