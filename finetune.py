"""Stage 3 of ViT-AdaLA, supervised fine-tuning: a head for classification or segmentation on teacher or students.

    python finetune.py                                                    # the demo: the whole ablation in one table
    python finetune.py --task classify --data photos/ --weights runs/features/student.safetensors
    python finetune.py --task segment --data photos/ --freeze --weights teacher.pth teacher.pth:linear student.safetensors
    python finetune.py --weights runs/finetune/0-segment.safetensors --predict folder/

--weights takes one file or several, and trains each in the same way. FILE:linear is FILE with its attention swapped and
nothing aligned. --freeze leaves the backbone as it is: its features are computed once, and only the head is trained.
--from-scratch keeps nothing of a file but its architecture (softmax, unless FILE:linear), the paper's other paradigm.

Data: train/<class>/ and val/<class>/ (classify), train/images + train/masks and val/... (segment: PNG masks of the same
name, 0 to K - 1, 255 is ignored). Writes to --out: a checkpoint for each of --weights, metrics.json, log.jsonl and for
segmentation segment.png (photo, truth, the prediction of each of --weights).
"""
import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

from model import KNOWN, OPERATORS, SETS, InputError, ViT, device_and_dtype, find_images, linearize, load_vit, open_out
from model import open_set, read_image, read_weights, run, save_vit

DEMO = dict(size=64, steps=300, batch=64)
ABLATION = ["demo/teacher.safetensors", "demo/teacher.safetensors:linear",
            "runs/attention/student.safetensors", "runs/features/student.safetensors"]
IGNORE = 255                                  # in a mask: counts neither in the loss nor in the score
HEAD_LR = 10                                  # a fresh head on pretrained weights learns this much faster than they


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("classify", "segment"), default="classify")
    parser.add_argument("--weights", nargs="+", help="files, known names or NAME=FILE, each may end in :OPERATOR")
    parser.add_argument("--freeze", action="store_true", help="train only the head")
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights")
    parser.add_argument("--predict", metavar="FOLDER", help="label these photos with the checkpoint --weights, train nothing")
    parser.add_argument("--data", default="demo", help="a folder (see above), a torchvision set's name, or demo")
    parser.add_argument("--size", type=int, help="pixels, a multiple of the patch (default: the first weights' native size)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4, help=f"peak; the head's is {HEAD_LR} times that")
    parser.add_argument("--out", default="runs/finetune", help="folder for checkpoints, metrics and picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of autocast")
    args = parser.parse_args(argv)
    if args.data == "demo" and not args.predict:
        parser.set_defaults(**DEMO)           # inherited: what the demo needs, for flags that were not given
        if args.weights is None:
            parser.set_defaults(weights=ABLATION, freeze=not args.from_scratch)
        args = parser.parse_args(argv)
        if args.size != DEMO["size"]:
            raise InputError(f"--size {args.size}: the demo's images have {DEMO['size']} pixels; --data names your own")
        print("demo defaults:", *(f"--{key} {getattr(args, key)}" for key in DEMO), "--freeze" * args.freeze,
              "--weights", *args.weights)
    if min(args.steps, args.batch) < 1:
        raise InputError(f"--steps {args.steps} --batch {args.batch}: expected 1 or more of each")
    if not 0 < args.lr < math.inf:
        raise InputError(f"--lr {args.lr}: expected a number above 0")
    if args.weights is None:
        raise InputError("--weights is missing: name the files to fine-tune, or the checkpoint to --predict with")
    if args.predict and len(args.weights) != 1:
        raise InputError(f"--predict takes one checkpoint in --weights, found {len(args.weights)}")
    if args.freeze and args.from_scratch:
        raise InputError("--freeze and --from-scratch exclude each other: random weights have no features to keep")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data

class Labelled(Dataset):
    """Items (uint8 image (3, size, size), label int or mask uint8 (size, size)) from pairs of image and label or mask."""

    def __init__(self, source, task, size, augment, resize="bicubic"):
        self.source, self.task = source, task
        resize = dict(interpolation=v2.InterpolationMode(resize), antialias=True)
        if type(source[0][0]) is torch.Tensor:                          # the demo's images have their size already
            steps = [v2.RandomHorizontalFlip()] if augment else [v2.Identity()]
        elif augment:
            steps = [v2.RandomResizedCrop(size, scale=(0.35, 1), **resize), v2.RandomHorizontalFlip()]
        elif task == "classify":
            steps = [v2.Resize(size, **resize), v2.CenterCrop(size)]
        else:                                                           # the whole photo, squeezed to a square
            steps = [v2.Resize((size, size), **resize)]
        self.transform = v2.Compose([v2.ToImage(), *steps])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image, target, *mask = self.source[i]
        if self.task == "segment":
            target = mask[0] if mask else Image.open(target) if isinstance(target, Path) else target
            target = tv_tensors.Mask(target if mask else v2.functional.pil_to_tensor(target)[0])
        image, target = self.transform(read_image(image) if isinstance(image, Path) else image, target)
        return image.as_subclass(torch.Tensor), target.as_subclass(torch.Tensor) if self.task == "segment" else target


def pairs(folder):
    """folder/images and folder/masks -> ([(image path, mask path), ...], number of classes). Every mask is looked at."""
    found, highest = [], 0
    if not Path(folder, "images").is_dir() or not Path(folder, "masks").is_dir():
        raise InputError(f"{folder} is not laid out for --task segment: expected the folders images and masks in it")
    for image in find_images(Path(folder, "images")):
        mask = Path(folder, "masks", image.relative_to(Path(folder, "images"))).with_suffix(".png")
        try:
            with Image.open(image) as photo, Image.open(mask) as truth:
                size = photo.size[::-1] if photo.getexif().get(0x0112, 1) > 4 else photo.size   # lying on its side, by EXIF
                if truth.mode not in ("L", "P") or truth.size != size:
                    raise InputError(f"{mask} is no mask of {image}: expected 8 bits a pixel and size {size}, "
                                     f"found mode {truth.mode} and size {truth.size}")
                highest = max([highest, *(value for value, count in enumerate(truth.histogram()[:IGNORE]) if count)])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{mask} is not a readable mask: {error}") from None
        found.append((image, mask))
    return found, highest + 1


def load_data(data, task):
    """-> (training source, validation source, class names). A source's items are (image, label) or (image, mask)."""
    if data == "demo":
        from demo.shapes import Shapes
        return Shapes("train"), Shapes("val"), list(Shapes.classes) if task == "classify" else ["background", *Shapes.classes]
    if data in SETS:
        if (data == "voc2012") != (task == "segment"):
            raise InputError(f"--data {data} has no labels for --task {task}")
        train, val = open_set(data, held_out=False), open_set(data, held_out=True)
        return train, val, [str(i) for i in range(21)] if task == "segment" else [str(name) for name in train.classes]
    for part in ("train", "val"):
        if not Path(data, part).is_dir():
            raise InputError(f"{data} is not laid out for --task {task}: expected the folders train and val in it")
    if task == "segment":
        train, val = pairs(Path(data, "train")), pairs(Path(data, "val"))
        return train[0], val[0], [str(i) for i in range(max(train[1], val[1]))]
    if Path(data, "train", "masks").is_dir():
        raise InputError(f"{data} is laid out for --task segment: expected a folder for each class in {data}/train, found masks")
    for part in ("train", "val"):
        find_images(Path(data, part))                                   # opens each, so that a bad one stops us here
    try:
        train, val = ImageFolder(Path(data, "train"), loader=read_image), ImageFolder(Path(data, "val"), loader=read_image)
    except FileNotFoundError as error:
        raise InputError(f"{data} is not laid out for --task classify: {str(error).splitlines()[0]}") from None
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(f"{data}: train and val differ in their class folders: {', '.join(odd)}")
    return train, val, train.classes


# ---------------------------------------------------------------------------------------------------------------------
# Heads and scores

def features(vit, images, task):
    """uint8 images (B, 3, H, W) -> what a head reads: classify (B, 2C), CLS and mean patch; segment (B, rows, columns, C)."""
    tokens, grid = vit(vit.normalize(images)).float(), vit.grid(*images.shape[2:])
    patches = tokens[:, vit.arch.prefix:]                               # (B, N, C)
    if task == "segment":
        return patches.unflatten(1, grid)
    return torch.cat([tokens[:, 0], patches.mean(1)], dim=1) if vit.arch.cls else patches.mean(1)


class Segmenter(nn.Module):
    """LayerNorm and a 1x1 convolution (a linear layer on each patch), (B, rows, columns, C) -> (B, K, rows, columns)."""

    def __init__(self, width, classes):
        super().__init__()
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, patches):
        return self.classify(self.norm(patches)).permute(0, 3, 1, 2)


def make_head(arch, task, classes):
    return Segmenter(arch.width, classes) if task == "segment" else nn.Linear(arch.width * (1 + arch.cls), classes)


def task_loss(vit, head, inputs, targets, task, frozen, dtype=torch.float32):
    """inputs: uint8 images, or their features when the backbone is frozen; targets: labels (B,) or masks (B, H, W).

    Autocast to dtype begins and ends in here, because a compiled backward runs under what its forward was called under.
    """
    with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        logits = head(inputs.float() if frozen else features(vit, inputs, task))
    logits = logits.float()
    if task == "segment":
        logits = F.interpolate(logits, size=targets.shape[1:], mode="bilinear")
    ignore = IGNORE if task == "segment" else -100
    total = F.cross_entropy(logits, targets.long(), ignore_index=ignore, reduction="sum")
    return total / (targets != ignore).sum().clamp(min=1)               # a crop may hold nothing but ignored pixels


@torch.no_grad()
def evaluate(vit, head, batches, task, frozen, classes, device, autocast):
    """-> (score in percent: top-1, or mIoU over the classes that occur; per class; first batch's predictions)."""
    confusion, first = torch.zeros(classes, classes, dtype=torch.long), None
    for inputs, targets in batches:
        with autocast():
            logits = head(inputs.to(device).float() if frozen else features(vit, inputs.to(device), task)).float()
        if task == "segment":
            logits = F.interpolate(logits, size=targets.shape[1:], mode="bilinear")
        guess, counted = logits.argmax(1).cpu(), targets != (IGNORE if task == "segment" else -100)
        first = guess if first is None else first
        counts = torch.bincount(classes * targets[counted].long() + guess[counted], minlength=classes ** 2)
        confusion += counts.view(classes, classes)
    right, truth, guessed = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    if task == "classify":
        return 100 * (right.sum() / truth.sum()).item(), (100 * right / truth).tolist(), first
    iou = 100 * right / (truth + guessed - right)                       # nan for a class neither there nor guessed
    return iou.nanmean().item(), iou.tolist(), first


def colour(masks):
    """Masks (B, H, W) -> float colours (B, 3, H, W): background black, ignored white."""
    palette = torch.rand(256, 3, generator=torch.Generator().manual_seed(6)) * 0.8 + 0.2
    palette[0], palette[IGNORE] = 0, 1
    return palette[masks.long()].permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------

def load_backbone(spec, from_scratch):
    """FILE, NAME, FILE:OPERATOR -> (ViT, the stages behind it in words)."""
    file, _, operator = spec.rpartition(":") if spec.rpartition(":")[2] in OPERATORS else (spec, "", None)
    if from_scratch:
        arch = KNOWN[file].arch if file in KNOWN else load_vit(file).arch
        return ViT(arch, operator or "softmax"), "scratch"
    vit = load_vit(file)
    if operator and operator != vit.attention:
        return linearize(vit, operator), "none"
    return vit, vit.facts.get("stage", "pretrained")


@torch.no_grad()
def predict(args, device):
    """Label the photos of a folder with a checkpoint of ours: a line each, and for segmentation a mask in --out."""
    tensors, facts = read_weights(args.weights[0])
    if "classes" not in facts:
        raise InputError(f"{args.weights[0]} has no task head: --predict needs a checkpoint that finetune.py wrote")
    paths, vit, classes = find_images(args.predict), load_vit(args.weights[0]).to(device), facts["classes"]
    head = make_head(vit.arch, facts["task"], len(classes)).to(device)
    head.load_state_dict({name[5:]: tensor for name, tensor in tensors.items() if name.startswith("head.")})
    whole = Labelled([(path, 0) for path in paths], "classify", facts["size"], augment=False, resize=vit.arch.interpolation)
    resize = v2.InterpolationMode(vit.arch.interpolation)
    out = open_out(args.out, vit) if facts["task"] == "segment" else None
    for i, path in enumerate(paths):
        if facts["task"] == "classify":
            share, best = head(features(vit, whole[i][0][None].to(device), "classify")).softmax(1)[0].max(0)
            print(f"{path}\t{classes[best]}\t{share:.3f}")
            continue
        photo = read_image(path)
        squeezed = v2.functional.resize(photo, [facts["size"]] * 2, resize, antialias=True)[None].to(device)
        logits = F.interpolate(head(features(vit, squeezed, "segment")), size=photo.shape[1:], mode="bilinear")
        mask = logits.argmax(1)[0].to(torch.uint8).cpu()
        target = out / path.relative_to(args.predict).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        v2.functional.to_pil_image(mask).save(target)
        print(f"{path}\t{', '.join(classes[value] for value in mask.unique())}\t{target}")


def main(argv=None):
    args = parse(argv)
    device, dtype = device_and_dtype(args.dtype)
    autocast = lambda: torch.autocast(device, dtype, enabled=dtype != torch.float32)
    if args.predict:
        return predict(args, device)

    for spec in args.weights:                                           # all of --weights must be good before we start
        model, _ = load_backbone(spec, args.from_scratch)
        args.size = model.arch.pixels[0] if args.size is None else args.size
        model.grid(args.size, args.size)
    source, val_source, classes = load_data(args.data, args.task)
    out = open_out(args.out, model, copies=len(args.weights))
    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0
    loader = dict(num_workers=workers, pin_memory=device == "cuda")
    train_set = Labelled(source, args.task, args.size, augment=not args.freeze, resize=model.arch.interpolation)
    val_set = Labelled(val_source, args.task, args.size, augment=False, resize=model.arch.interpolation)
    print(f"{args.task}: {len(train_set)} images of {args.size} pixels, {len(val_set)} held out, {len(classes)} classes, "
          f"{'head alone' if args.freeze else 'head and backbone'}, {device}, {dtype}")
    rows, guesses, log = [], [], open(out / "log.jsonl", "w", buffering=1)

    for i, spec in enumerate(args.weights):
        torch.compiler.reset()                                          # each row compiles anew
        torch.manual_seed(args.seed)
        vit, stage = load_backbone(spec, args.from_scratch)
        torch.manual_seed(args.seed)                                    # the same head for each row
        vit, head = vit.to(device), make_head(vit.arch, args.task, len(classes)).to(device)
        start, data = time.perf_counter(), (train_set, val_set)
        if args.freeze:
            vit.eval().requires_grad_(False)
            data = []
            for part in (train_set, val_set):
                kept = []
                for images, targets in tqdm(DataLoader(part, args.batch, **loader), desc=f"{spec}: features", mininterval=1):
                    with torch.no_grad(), autocast():
                        kept.append((features(vit, images.to(device), args.task).half().cpu(), targets))
                data.append(TensorDataset(*(torch.cat(tensors) for tensors in zip(*kept))))
        train, val = data
        draws = torch.Generator().manual_seed(args.seed)
        order = RandomSampler(train, num_samples=args.steps * args.batch, generator=draws)
        if args.freeze:                                                 # tensors: a batch is one index, not many
            train = DataLoader(train, batch_size=None, sampler=BatchSampler(order, args.batch, drop_last=False))
            val = DataLoader(val, batch_size=None, sampler=BatchSampler(range(len(val)), args.batch, drop_last=False))
        else:
            train = DataLoader(train, args.batch, sampler=order, generator=draws, **loader)
            val = DataLoader(val, args.batch, **loader)
        head_lr = args.lr if args.from_scratch else HEAD_LR * args.lr
        groups = [dict(params=list(head.parameters()), lr=head_lr)]
        if not args.freeze:
            groups.append(dict(params=list(vit.train().parameters()), lr=args.lr))
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], total_steps=max(args.steps, 10) + 1,
                                                       pct_start=0.1, cycle_momentum=False)
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        loss_of = torch.compile(task_loss, fullgraph=True) if device == "cuda" else task_loss

        with tqdm(total=args.steps * args.batch, desc=spec, unit="img", mininterval=1) as bar:
            for step, (inputs, targets) in enumerate(train, 1):
                inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                loss = loss_of(vit, head, inputs, targets, args.task, args.freeze, dtype)
                value = loss.item()
                if not math.isfinite(value):
                    raise InputError(f"{spec}: the loss is {value} at step {step}: try a lower --lr than {args.lr}")
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                for group in groups:
                    nn.utils.clip_grad_norm_(group["params"], 1.0)
                scaler.step(optimizer)
                scaler.update()
                rate = schedule.get_last_lr()[-1]
                schedule.step()
                optimizer.zero_grad()
                log.write(json.dumps({"weights": spec, "step": step, "loss": value, "lr": rate}) + "\n")
                bar.update(len(inputs))
                bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.1e}")
        score, by_class, guess = evaluate(vit.eval(), head.eval(), val, args.task,
                                          args.freeze, len(classes), device, autocast)
        facts = dict(task=args.task, classes=classes, size=args.size, frozen=args.freeze, seed=args.seed)
        checkpoint = out / f"{i}-{args.task}.safetensors"
        save_vit(vit, checkpoint, head=head, stage=f"{stage}+finetune", **facts)
        rows.append(dict(weights=spec, attention=vit.attention, stage=stage, head=type(head).__name__, score=score,
                         metric="top-1" if args.task == "classify" else "mIoU", held_out=len(val_set),
                         per_class={name: None if math.isnan(value) else value for name, value in zip(classes, by_class)},
                         steps=args.steps, batch=args.batch, lr=args.lr, seconds=time.perf_counter() - start,
                         device=device, dtype=str(dtype), checkpoint=str(checkpoint), **facts))
        (out / "metrics.json").write_text(json.dumps(rows, indent=1))
        guesses.append(guess)

    if args.task == "segment":
        images, masks = zip(*(val_set[j] for j in range(min(8, args.batch, len(val_set)))))
        panels = [torch.stack(images) / 255, *(colour(m[:len(images)]) for m in (torch.stack(masks), *guesses))]
        save_image(torch.cat(panels), out / "segment.png", nrow=len(images))
    backbone = "frozen" if args.freeze else "tuned"
    print(f"\n{rows[0]['metric']} on {len(val_set)} held-out images, {backbone} backbone, seed {args.seed}")
    for row in rows:
        print(f"{row['score']:6.2f}  {row['attention']:9s} {row['stage']:20s} {row['weights']}")
    print(f"wrote {out / 'metrics.json'}")


if __name__ == "__main__":
    run(main)
