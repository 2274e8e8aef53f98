"""Stage 3 of ViT-AdaLA, supervised fine-tuning: a head to classify or segment, on any ViT.

    python finetune.py                                      # the demo: the ablation in one table
    python finetune.py --task classify --data photos/ --weights runs/features/student.safetensors
    python finetune.py --task segment --data voc/ --freeze --weights NAME NAME:linear FILE
    python finetune.py --weights runs/finetune/0-segment.safetensors --predict photos/

--weights takes one file or several, and trains each in the same way. FILE:linear is FILE with its
attention swapped and nothing aligned. --freeze leaves the backbone as it is: its features are
computed once, and only the head is trained. --from-scratch keeps nothing of a file but its
architecture, the paper's other paradigm (Fig. 1). Given a checkpoint of this script with the same
task and classes, training goes on with its head; --steps 0 scores it without training.

Data: train/CLASS/ and val/CLASS/ (classify); train/images, train/masks and val/... (segment: masks
are PNGs of the same name, an id a pixel; classes.txt names id 0, 1, ... a line each). Writes to
--out: a checkpoint for each of --weights, metrics.json, log.jsonl and, to segment, segment.png.
"""
import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

from demo.shapes import Shapes
from model import ATTENTION, BICUBIC, KNOWN, SETS, Draws, InputError, ViT, complete, decode
from model import device_and_dtype, find_images, linearize, load_vit, open_out, open_set, read_image
from model import read_weights, run, save_vit, say_left_out, weights_file, write_whole

DEFAULTS = dict(steps=2000, batch_size=32)
DEMO = dict(size=64, steps=300, batch_size=64)              # without --data
ABLATION = ["demo/teacher.safetensors", "demo/teacher.safetensors:linear",
            "runs/attention/student.safetensors", "runs/features/student.safetensors"]
IGNORE = 255                                # in our masks: neither in the loss nor in the score
HEAD_LR = 10                                # the head learns this much faster than the backbone


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--task", choices=("classify", "segment"), default="classify", help="(default: classify)")
    flag("--weights", nargs="+", help="files, known names or NAME=FILE, each may end in :OPERATOR "
         "(demo: teacher, teacher:linear and the students of stages 1 and 2, frozen)")
    flag("--freeze", action="store_true", help="train only the head")
    flag("--from-scratch", action="store_true", help="start from random weights")
    flag("--predict", metavar="PHOTOS", nargs="+",
         help="label these photos or folders with the one checkpoint in --weights, train nothing")
    flag("--data", help="a folder (see above), or a torchvision set (default: the demo's)")
    flag("--ignore", type=int, default=IGNORE, help="id in masks that counts nowhere, -1 for none "
         f"(default: {IGNORE})")
    flag("--size", type=int, help="pixels, a multiple of the patch (default: a checkpoint's own, "
         "else the weights' native)")
    flag("--steps", type=int, help=f"0 only scores (default: {DEFAULTS['steps']}, demo: "
         f"{DEMO['steps']})")
    flag("--batch-size", type=int,
         help=f"(default: {DEFAULTS['batch_size']}, demo: {DEMO['batch_size']})")
    flag("--lr", type=float, default=1e-4, help=f"peak, {HEAD_LR} times that for the head "
         "(default: 1e-4)")
    flag("--out", help="folder to write (default: runs/finetune, with --predict runs/predict)")
    flag("--seed", type=int, default=0, help="of head, photos, crops and flips (default: 0)")
    flag("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="of autocast (default: auto, half precision on a GPU, float32 on a CPU)")
    flag("--workers", type=int, help="that load photos (default: up to 8 on a GPU, else 0)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
         help="torch.compile (default: on a GPU)")
    args = parser.parse_args(argv)
    args.out = args.out or ("runs/predict" if args.predict else "runs/finetune")
    if args.weights is None and args.data is None and not args.predict:
        args.weights, args.freeze = ABLATION, not args.from_scratch
        print("demo:", "--freeze" * args.freeze, "--weights", *args.weights)
    args = complete(args, DEFAULTS, DEFAULTS if args.predict else DEMO)
    if args.weights is None or args.predict and len(args.weights) != 1:
        raise InputError("--weights: expected files to fine-tune, or one checkpoint to --predict "
                         f"with, found {args.weights}")
    if args.freeze and args.from_scratch:
        raise InputError("--freeze and --from-scratch exclude each other: random weights have no "
                         "features to keep")
    return args


# --------------------------------------------------------------------------------------------------
# Data: lists of (image, label or mask), each a path, a PIL image or a drawn tensor

def read_mask(source):
    """Path, PIL image or drawn mask -> ids as the file stores them, uint8 (H, W).

    Pillow stretches grey of 2 and 4 bits to 0 ... 255; that is undone here.
    """
    if isinstance(source, torch.Tensor):
        return source
    image, depth, start = decode(source), 8, b""
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            start = file.read(26)
        if start.startswith(b"\x89PNG") and start[25] == 0:                 # grey
            depth = start[24]
    lossy = start.startswith(b"\xff\xd8")
    if image.mode not in ("1", "L", "P", "I;16") or lossy:
        raise InputError(f"{source} is no mask: expected one id a pixel, grey or palette, without "
                         f"loss, found {'a JPEG' if lossy else f'mode {image.mode}'}")
    ids = v2.functional.pil_to_tensor(image)[0].int()
    if depth in (2, 4):
        ids = ids // (255 // (2 ** depth - 1))
    if ids.max() > 255:
        raise InputError(f"{source} holds ids up to {ids.max()}: expected 0 to 255")
    return ids.to(torch.uint8)


def read_item(item, task, lookup=None, short=None):
    """-> (uint8 (3, H, W), label), or with a mask of classes (H, W), lookup[id] of each id."""
    if task == "classify":
        return read_image(item, short), item[1]
    return read_image(item), tv_tensors.Mask(lookup[read_mask(item[-1]).long()])


def pairs(folder):
    """folder/images and folder/masks -> [(photo, mask), ...]."""
    images, masks, found = Path(folder, "images"), Path(folder, "masks"), {}
    if not images.is_dir() or not masks.is_dir():
        raise InputError(f"{folder} is not laid out for --task segment: expected the folders "
                         "images and masks in it")
    for photo in find_images(images):
        mask = masks / Path(photo).relative_to(images).with_suffix(".png")
        if mask in found:
            raise InputError(f"{found[mask]} and {photo} have the same mask, {mask}: rename one")
        found[mask] = photo
    return [(photo, mask) for mask, photo in found.items()]


def count_ids(items, colours):
    """Look at every photo and mask once -> pixels of each id (256,).

    colours: {colour of a palette: (its ids, file)}, so that no colour changes its id between files.
    """
    counts, turned = torch.zeros(256, dtype=torch.long), 0
    for item in tqdm(items, desc="reading masks", leave=False, delay=2):
        ids, size = read_mask(item[-1]), read_image(item).shape[1:]
        if ids.shape != size:
            raise InputError(f"{item[-1]} has {ids.shape[0]} x {ids.shape[1]} pixels, {item[0]}, "
                             f"upright by EXIF, has {size[0]} x {size[1]}: expected the same")
        counts += ids.flatten().bincount(minlength=256)
        if isinstance(item[-1], Path):
            with Image.open(item[0]) as photo, Image.open(item[-1]) as mask:
                turned += photo.getexif().get(0x0112, 1) != 1
                flat = mask.getpalette() or []
            palette = list(zip(flat[::3], flat[1::3], flat[2::3]))
            for id in (id for id in ids.unique().tolist() if id < len(palette)):
                alike = {i for i, colour in enumerate(palette) if colour == palette[id]}
                first, file = colours.setdefault(palette[id], (alike, item[-1]))
                if id not in first:
                    raise InputError(f"colour {palette[id]} is id {id} in {item[-1]}, {first} in "
                                     f"{file}: re-save the masks with one palette")
    if turned:
        print(f"{turned} photos are turned upright by EXIF; masks are taken as drawn on those")
    return counts


def by_class(data):
    """train/CLASS/ and val/CLASS/ -> [(photo, label), ...] of each part, class names."""
    parts = []
    for part in ("train", "val"):
        folders = [f for f in sorted(Path(data, part).iterdir())
                   if f.is_dir() and not f.name.startswith(".")]
        parts.append({f.name: find_images(f) for f in folders})
        loose = [f for f in Path(data, part).iterdir() if f.is_file() and f.name[0] != "."]
        say_left_out(f"{data}/{part}", [f.suffix or "without suffix" for f in loose])
    classes = sorted(parts[0].keys() | parts[1].keys())
    if classes == ["images", "masks"]:
        raise InputError(f"{data} is laid out for --task segment, expected a folder for each class")
    items = [[(path, classes.index(name)) for name, paths in part.items() for path in paths]
             for part in parts]
    for path, _ in tqdm(sum(items, []), desc="reading photos", leave=False, delay=2):
        read_image(path, short=32)          # a bad one ends the run here, not in the middle
    return *items, classes


def load_data(data, task, ignore):
    """-> (training items, held-out items, class names, their ids in masks), after a look at all."""
    if data is None:
        parts, names = (Shapes("train"), Shapes("val")), ["background", *Shapes.classes]
        names = names if task == "segment" else list(Shapes.classes)
    elif data in SETS and not Path(data).is_dir():
        if (data == "voc2012") != (task == "segment"):
            raise InputError(f"--data {data} has no labels for --task {task}")
        parts, names = open_set(data), []
        names = names if task == "segment" else list(map(str, parts[0].classes))
    else:
        for part in ("train", "val"):
            if not Path(data, part).is_dir():
                raise InputError(f"{data} is not laid out for --task {task}: expected the folders "
                                 "train and val in it")
        if task == "classify":
            *parts, names = by_class(data)
        else:
            parts, names = [pairs(Path(data, part)) for part in ("train", "val")], []
            if (file := Path(data, "classes.txt")).is_file():
                try:
                    names = file.read_text(encoding="utf-8-sig").splitlines()
                except ValueError as error:
                    raise InputError(f"{file} is no UTF-8 text: {error}") from None
    if not -1 <= ignore <= 255:
        raise InputError(f"--ignore {ignore}: expected an id from 0 to 255, or -1 for none")
    if task == "segment":
        colours = {}
        counts = torch.stack([count_ids(part, colours) for part in parts])              # (2, 256)
        if ignore >= 0:
            counts[:, ignore] = 0
    else:
        labels = [torch.tensor([item[1] for item in part], dtype=torch.long) for part in parts]
        counts = torch.stack([part.bincount(minlength=len(names)) for part in labels])
    ids = counts.sum(0).nonzero().flatten().tolist() if task == "segment" else range(len(names))
    if not 2 <= len(ids) <= 255 and task == "segment" or len(ids) < 2 or not counts.sum(1).all():
        hint = f" besides {ignore}, which --ignore -1 would count" if task == "segment" else ""
        raise InputError(f"{data} has the classes {list(ids) if hint else names}{hint}, and "
                         f"{counts.sum(1).tolist()} labels in train and val: expected two classes "
                         "or more, and labels in both")
    classes = [names[id] if id < len(names) and names.count(names[id]) == 1 else str(id)
               for id in ids]
    for id, name in zip(ids, classes):
        train, val = (100 * counts[:, id] / counts.sum(1)).tolist()
        print(f"class {name:24s} id {id:3d}  {train:6.2f} % of train  {val:6.2f} % of val")
    return *parts, classes, list(ids)


# --------------------------------------------------------------------------------------------------
# Heads and scores

def labelled(loader):
    """Batches without messages; a labelled photo that is gone by now ends the run."""
    for batch, messages in loader:
        if unread := next(filter(None, messages), None):
            raise InputError(unread)
        yield batch


def features(vit, images, task):
    """uint8 images (B, 3, H, W) -> what a head reads. segment: patches (B, rows, columns, C);
    classify: CLS and mean patch (B, 2C), or the mean patch alone (B, C) of a ViT without CLS.
    """
    tokens, grid = vit(vit.normalize(images)).float(), vit.grid(*images.shape[2:])
    patches = tokens[:, vit.arch.prefix:]                                   # (B, N, C)
    if task == "segment":
        return patches.unflatten(1, grid)
    return torch.cat([tokens[:, 0], patches.mean(1)], 1) if vit.arch.cls else patches.mean(1)


class Segmenter(nn.Module):
    """LayerNorm, linear layer on each patch, (B, rows, columns, C) -> (B, K, rows, columns)."""

    def __init__(self, width, classes):
        super().__init__()
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, patches):
        return self.classify(self.norm(patches)).permute(0, 3, 1, 2)


def make_head(arch, task, classes):
    if task == "segment":
        return Segmenter(arch.width, classes)
    return nn.Linear(arch.width * (1 + arch.cls), classes)


def load_head(head, tensors, spec):
    """Give a head the weights head.* of a checkpoint; -> the head."""
    try:
        head.load_state_dict({n[5:]: t for n, t in tensors.items() if n.startswith("head.")})
    except RuntimeError as error:
        raise InputError(f"{spec} has no whole task head: {error}") from None
    return head


def kept_head(head, spec, task, classes, ids):
    """Give a fresh head the weights that a checkpoint has for the same task, classes and ids."""
    tensors, facts = read_weights(weights_file(spec)[0])
    if "classes" not in facts:
        return False
    if (facts["task"], facts["classes"], facts.get("ids", ids)) != (task, classes, ids):
        print(f"{spec}: its head is not kept, it is to {facts['task']} {facts['classes']}")
        return False
    load_head(head, tensors, spec)
    print(f"{spec}: its head is kept")
    return True


def task_loss(vit, head, inputs, targets, task, frozen, dtype=torch.float32):
    """inputs: uint8 images, or their features if the backbone is frozen; targets: labels or masks.

    Autocast is entered in here, since a compiled backward runs under the autocast of its call.
    """
    with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        logits = head(inputs.float() if frozen else features(vit, inputs, task))
    logits, ignore = logits.float(), -100
    if task == "segment":
        logits, ignore = F.interpolate(logits, targets.shape[1:], mode="bilinear"), IGNORE
    total = F.cross_entropy(logits, targets.long(), ignore_index=ignore, reduction="sum")
    return total / (targets != ignore).sum().clamp(min=1)       # a crop may hold ignored ones only


def upsampled_classes(logits, size, strip=64):
    """Logits (B, K, rows, columns) -> the likeliest class at every pixel (B, *size), bilinear.

    A strip of pixel rows at a time: K maps of a 12-megapixel photo would need gigabytes.
    """
    rows, strips = logits.shape[2], []
    for top in range(0, size[0], strip):
        y = torch.arange(top, min(top + strip, size[0]), device=logits.device)
        y = ((y + 0.5) * rows / size[0] - 0.5).clamp(0, rows - 1)           # as F.interpolate does
        above, share = y.long(), (y % 1).view(-1, 1)
        below = (above + 1).clamp(max=rows - 1)
        part = logits[:, :, above] * (1 - share) + logits[:, :, below] * share
        strips.append(F.interpolate(part, (len(y), size[1]), mode="bilinear").argmax(1))
    return torch.cat(strips, dim=1)


@torch.no_grad()
def evaluate(vit, head, batches, task, frozen, classes, device, dtype=torch.float32):
    """-> (percent: top-1, or mIoU over classes that occur; that per class; first predictions)."""
    confusion, first = torch.zeros(classes, classes, dtype=torch.long), None
    for inputs, targets in tqdm(batches, desc="scoring", leave=False, delay=2):
        inputs = inputs.to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = head(inputs.float() if frozen else features(vit, inputs, task)).float()
        segment = task == "segment"
        guess = upsampled_classes(logits, targets.shape[1:]) if segment else logits.argmax(1)
        guess, counted = guess.cpu(), targets != (IGNORE if segment else -100)
        first = guess if first is None else first
        counts = classes * targets[counted].long() + guess[counted]
        confusion += counts.bincount(minlength=classes ** 2).view(classes, classes)
    if not confusion.any():
        raise InputError("no labelled pixel is left in the held-out masks at this --size")
    right, truth, guessed = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    if task == "classify":
        return 100 * (right.sum() / truth.sum()).item(), (100 * right / truth).tolist(), first
    iou = 100 * right / (truth + guessed - right)       # nan for a class neither there nor guessed
    return iou.nanmean().item(), iou.tolist(), first


PALETTE = torch.rand(256, 3, generator=torch.Generator().manual_seed(6)) * 0.8 + 0.2
PALETTE[0], PALETTE[IGNORE] = 0, 1                      # background black, ignored white


def load_backbone(spec, from_scratch):
    """FILE, NAME, NAME=FILE, each may end in :OPERATOR -> (ViT, without that, stages behind it)."""
    name, _, operator = spec.rpartition(":")
    name, operator = (name, operator) if name and operator in ATTENTION else (spec, None)
    if from_scratch:
        known = [arch for key, arch in KNOWN.items() if name in (key, key.partition(".")[0])]
        arch = known[0] if known else load_vit(name).arch       # a name need not be downloaded
        return ViT(arch, operator or "softmax"), name, "scratch"
    vit = load_vit(name)
    if operator not in (None, vit.attention):
        return linearize(vit, operator), name, "none"
    return vit, name, vit.facts.get("stage", "pretrained")


@torch.no_grad()
def predict(args, device):
    """Label photos with a checkpoint of ours: a line each, and to segment a mask and an overlay."""
    vit = load_vit(args.weights[0]).to(device)
    tensors, facts = read_weights(weights_file(args.weights[0])[0])
    if "classes" not in facts:
        raise InputError(f"{args.weights[0]} has no task head: --predict needs a checkpoint that "
                         "finetune.py wrote")
    task, classes, size = facts["task"], facts["classes"], facts["size"]
    head = load_head(make_head(vit.arch, task, len(classes)), tensors, args.weights[0]).to(device)
    ids = torch.tensor(facts.get("ids", range(len(classes))))
    photos = [(path, Path(path).relative_to(given) if Path(given).is_dir() else Path(path).name)
              for given in args.predict
              for path in (find_images(given) if Path(given).is_dir() else [given])]
    if len({str(name) for _, name in photos}) < len(photos) and task == "segment":
        raise InputError("two photos of --predict have one name: give their folders one at a time")
    out = open_out(args, [args.weights[0], *args.predict]) if task == "segment" else None
    whole = v2.Compose([v2.Resize(size, **BICUBIC), v2.CenterCrop(size)])
    if task == "segment":
        whole = v2.Resize((size, size), **BICUBIC)
    for path, name in photos:
        try:
            photo = read_image(path, size if task == "classify" else None)
        except InputError as error:
            print(f"left out: {error}")
            continue
        logits = head(features(vit, whole(photo)[None].to(device), task))
        if task == "classify":
            share, best = logits.softmax(1)[0].max(0)
            print(f"{path}\t{classes[best]}\t{share:.3f}")
            continue
        mask = upsampled_classes(logits, photo.shape[1:])[0].cpu()
        target = out / "masks" / f"{name}.png"          # with its suffix: not a.jpg's over a.png's
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(ids[mask].byte().numpy())
        picture.putpalette((PALETTE * 255).byte().flatten().tolist())
        picture.save(target)
        overlay = photo.float() / 510 + PALETTE[ids[mask]].permute(2, 0, 1) / 2
        save_image(overlay, target.with_name(f"{target.stem}.overlay.png"))
        print(f"{path}\t{', '.join(classes[value] for value in mask.unique())}\t{target}")


def main(argv=None):
    args = parse(argv)
    device, dtype = device_and_dtype(args.dtype)
    if args.predict:
        return predict(args, device)

    for spec in args.weights:                           # all must be good before we start
        model, _, _ = load_backbone(spec, args.from_scratch)
        if args.size is None:
            args.size = model.facts.get("size", model.arch.pixels[0])
        model.grid(args.size, args.size)
    source, val_source, classes, ids = load_data(args.data, args.task, args.ignore)
    for spec in args.weights if args.steps == 0 else ():
        model, file, _ = load_backbone(spec, args.from_scratch)
        head = make_head(model.arch, args.task, len(classes))
        if args.from_scratch or not kept_head(head, file, args.task, classes, ids):
            raise InputError(f"--steps 0 only scores, but {spec} has no head for these classes")
    out = open_out(args, [*args.weights, args.data])
    lookup = torch.full((256,), IGNORE, dtype=torch.uint8)
    lookup[ids] = torch.arange(len(ids), dtype=torch.uint8)
    crop = v2.Compose([v2.RandomResizedCrop(args.size, (0.35, 1), **BICUBIC),
                       v2.RandomHorizontalFlip()])
    whole = v2.Compose([v2.Resize(args.size, **BICUBIC), v2.CenterCrop(args.size)])
    if args.task == "segment":                          # the whole photo, squeezed to a square
        whole = v2.Resize((args.size, args.size), **BICUBIC)
    if args.data is None:
        crop, whole = v2.RandomHorizontalFlip(), v2.Identity()
    read = partial(read_item, task=args.task, lookup=lookup, short=args.size)
    gpu = device == "cuda"
    loader = partial(DataLoader, batch_size=args.batch_size, num_workers=args.workers,
                     pin_memory=gpu)
    print(f"{args.task}: {len(source)} images of {args.size} pixels, {len(val_source)} held out, "
          f"{len(classes)} classes, {'head alone' if args.freeze else 'head and backbone'}, "
          f"{device}, {dtype}")
    rows, guesses, log = [], [], open(out / "log.jsonl", "w", buffering=1)

    for i, spec in enumerate(args.weights):
        torch.compiler.reset()                          # each row compiles anew
        torch.manual_seed(args.seed)
        vit, file, stage = load_backbone(spec, args.from_scratch)
        torch.manual_seed(args.seed)                    # the same head for each row
        vit, head = vit.to(device), make_head(vit.arch, args.task, len(classes)).to(device)
        kept = not args.from_scratch and kept_head(head, file, args.task, classes, ids)
        start = time.perf_counter()
        if args.freeze:
            vit.eval().requires_grad_(False)
            parts = []
            for part in (source, val_source):
                found = []
                batches = tqdm(loader(Draws(part, read, whole)), f"{spec}: features", delay=2)
                for images, targets in labelled(batches):
                    with torch.no_grad(), torch.autocast(device, dtype,
                                                         enabled=dtype != torch.float32):
                        images = features(vit, images.to(device), args.task)
                    found.append((images.half().cpu(), targets))
                parts.append(TensorDataset(*(torch.cat(tensors) for tensors in zip(*found))))
            draws = RandomSampler(parts[0], num_samples=max(1, args.steps * args.batch_size),
                                  generator=torch.Generator().manual_seed(args.seed))
            orders = draws if args.steps else [], range(len(parts[1]))
            train, val = (DataLoader(part, batch_size=None,
                                     sampler=BatchSampler(order, args.batch_size, drop_last=False))
                          for part, order in zip(parts, orders))
        else:
            draws = range(args.steps * args.batch_size)
            train = labelled(loader(Draws(source, read, crop, args.seed), sampler=draws))
            val = labelled(loader(Draws(val_source, read, whole)))
        head_lr = args.lr if args.from_scratch else HEAD_LR * args.lr
        groups = [dict(params=list(head.parameters()), lr=head_lr)]
        if not args.freeze:
            groups.append(dict(params=list(vit.train().parameters()), lr=args.lr))
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], max(args.steps, 10) + 1, pct_start=0.1,
            cycle_momentum=False)
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        loss_of = torch.compile(task_loss, fullgraph=True) if args.compile else task_loss

        with tqdm(total=args.steps * args.batch_size, desc=spec, unit="img", mininterval=1) as bar:
            for step, (inputs, targets) in enumerate(train, 1):
                inputs = inputs.to(device, non_blocking=True)
                targets = targets.to(device, non_blocking=True)
                loss = loss_of(vit, head, inputs, targets, args.task, args.freeze, dtype)
                value = loss.item()
                if not math.isfinite(value):
                    raise InputError(f"{spec}: the loss is {value} at step {step}: try a lower "
                                     f"--lr than {args.lr}")
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                for group in groups:
                    nn.utils.clip_grad_norm_(group["params"], 1.0)
                scaler.step(optimizer)
                scaler.update()
                rate = schedule.get_last_lr()[-1]
                schedule.step()
                optimizer.zero_grad()
                log.write(json.dumps({"weights": spec, "step": step, "loss": value,
                                      "lr": rate}) + "\n")
                bar.update(len(inputs))
                bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.1e}")
        facts = dict(task=args.task, classes=classes, ids=ids, size=args.size, frozen=args.freeze,
                     seed=args.seed)
        checkpoint = out / f"{i}-{args.task}.safetensors"
        save_vit(vit, checkpoint, head=head, stage=f"{stage}+finetune", **facts)
        score, per_class, guess = evaluate(vit.eval(), head.eval(), val, args.task, args.freeze,
                                           len(classes), device, dtype)
        per_class = {name: None if math.isnan(value) else value
                     for name, value in zip(classes, per_class)}
        rows.append(dict(weights=spec, attention=vit.attention, stage=stage, score=score,
                         metric="top-1" if args.task == "classify" else "mIoU",
                         head=type(head).__name__, kept_head=kept, held_out=len(val_source),
                         per_class=per_class, steps=args.steps, batch_size=args.batch_size,
                         lr=args.lr, seconds=time.perf_counter() - start, device=device,
                         dtype=str(dtype), checkpoint=str(checkpoint), **facts))
        write_whole(out / "metrics.json", rows)
        guesses.append(guess)

    if args.task == "segment":
        shown = Draws(val_source, read, whole)
        shown = [shown[j][0] for j in range(min(8, args.batch_size, len(shown)))]
        images, masks = (torch.stack(tensors) for tensors in zip(*shown))
        panels = [PALETTE[mask[:len(images)].long()].movedim(-1, 1) for mask in (masks, *guesses)]
        save_image(torch.cat([images / 255, *panels]), out / "segment.png", nrow=len(images))
    print(f"\n{rows[0]['metric']} on {len(val_source)} held-out images, "
          f"{'frozen' if args.freeze else 'tuned'} backbone, seed {args.seed}")
    for row in rows:
        print(f"{row['score']:6.2f}  {row['attention']:9s} {row['stage']:20s} {row['weights']}")
    print(f"wrote {out / 'metrics.json'}")


if __name__ == "__main__":
    run(main)
