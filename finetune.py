"""Stage 3 of ViT-AdaLA, supervised fine-tuning: a head to classify or segment, on any ViT.

    python finetune.py                                      # the demo: the ablation in one table
    python finetune.py --task classify --data photos/ --weights runs/features/student.safetensors
    python finetune.py --task segment --data voc/ --freeze --weights NAME NAME:linear FILE
    python finetune.py --weights runs/finetune/0-segment.safetensors --predict photos/ --size 672

--weights takes one file or several, and trains each in the same way. FILE:linear is FILE with its
attention swapped and nothing aligned. --freeze trains only the head, on features computed once.
--from-scratch keeps nothing of a file but architecture and operator, the paper's other paradigm.
Given a checkpoint of this script, training goes on with its head; --steps 0 scores it as it is.

Classify: train/CLASS/ and val/CLASS/, the middle square of a photo. Segment: a folder that one of
LAYOUTS fits, an id a pixel in masks, classes.txt with names of id 0, 1, ... a line each. Photos
keep their shape: the shorter side becomes --size, each side the nearest multiple of the patch; the
score counts the masks' own pixels. There a tuned backbone sees crops at 0.5 to 2 times that.
--head mask adds two blocks of the backbone's own attention, in which classes are tokens, too.
Writes to --out: a checkpoint for each of --weights, metrics.json, log.jsonl; to segment
segment.png; with --predict a mask of each photo's own size, and the photo with it laid over.
"""
import math
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import save_image

from align_attention import block_alignment, embed
from bench import peak_memory, timed
from demo.shapes import Shapes
from model import ATTENTION, BICUBIC, KNOWN, RANK, SETS, WORLD, Block, Draws, InputError, Progress
from model import ViT, autocast, average, bar, complete, decode, device_and_dtype, find_images
from model import fingerprint, leave_signals, linearize, load_vit, one_cycle, open_out, open_set
from model import permutation, read_image, read_weights, run, run_flags, save_vit, say_left_out
from model import update, views, walk, weights_file, widen, write_whole

DEFAULTS = dict(steps=2000, batch_size=32)
DEMO = dict(size=64, steps=300, batch_size=64)              # without --data
PREDICT = dict(steps=0, batch_size=1)                       # photos may be large
ABLATION = ["demo/teacher.safetensors", "demo/teacher.safetensors:linear",
            "runs/attention/student.safetensors", "runs/features/student.safetensors"]
PARTS = "train", "val"
IGNORE = 255                                # in our masks: neither in the loss nor in the score
HEAD_LR = 10                                # the head learns this much faster than the backbone
# The head of a frozen backbone learns from POINTS x POINTS pixels of the mask a patch, which is as
# good as all (VOC mIoU after 150 steps 24.6 and 24.1; 1 point: 23.7) in about a tenth of the time.
POINTS = 4


def parse(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--task", choices=("classify", "segment"), help="(default: classify)")
    flag("--weights", nargs="+", help="files, known names or NAME=FILE, each may end in :OPERATOR "
         "(demo: teacher, teacher:linear and the students of stages 1 and 2, frozen)")
    flag("--freeze", action="store_true", help="train only the head")
    flag("--from-scratch", action="store_true", help="start from random weights")
    flag("--predict", metavar="PHOTOS", nargs="+",
         help="label photos or folders with the one checkpoint in --weights, train nothing")
    flag("--data", help="a folder (see above), or a torchvision set (default: the demo's)")
    flag("--head", choices=HEADS, help="to segment (default: a checkpoint's own, else linear)")
    flag("--ignore", type=int, nargs="+", help="ids in masks that count nowhere, -1 for none "
         f"(default: {IGNORE} and the layout's)")
    flag("--lr", type=float, help=f"peak, {HEAD_LR} times that for the head (default: 1e-4; 3e-3 "
         "where a linear head to segment is all that is trained)")
    flag("--align", type=float, default=0.0, metavar="W", help="keep stage 1's loss against "
         "--teacher, this much of it, while the backbone is tuned (default: 0)")
    flag("--teacher", help="the softmax ViT for --align (default: none)")
    run_flags(flag, "runs/finetune", DEFAULTS, DEMO)
    args = parser.parse_args(argv)
    if args.predict and args.out == parser.get_default("out"):
        args.out = "runs/predict"
    for name in ("task", "data", "steps", "head", "ignore", "freeze", "from_scratch", "lr", "align",
                 "teacher", "every"):
        if args.predict and getattr(args, name) is not parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} means nothing with --predict: it trains "
                             "and scores nothing; task, classes and head are the checkpoint's")
    args.task = args.task or "classify"
    if (args.head or args.ignore) and args.task == "classify":
        raise InputError(f"--head {args.head} --ignore {args.ignore} are for --task segment")
    if args.weights is None and args.data is None and not args.predict:
        args.weights, args.freeze = ABLATION, not args.from_scratch
        print("demo:", "--freeze" * args.freeze, "--weights", *args.weights)
    if args.weights is None or args.predict and len(args.weights) != 1:
        raise InputError("--weights: expected files to fine-tune, or one checkpoint to --predict "
                         f"with, found {args.weights}")
    if bool(args.align) != bool(args.teacher) or args.align < 0 or args.align and args.freeze:
        raise InputError(f"--align {args.align} --teacher {args.teacher}: expected both or none, "
                         "and a backbone that is tuned")
    if args.freeze and args.from_scratch:
        raise InputError("--freeze with --from-scratch: random weights have no features to keep")
    return complete(args, PREDICT, PREDICT) if args.predict else complete(args, DEFAULTS, DEMO)


# --------------------------------------------------------------------------------------------------
# Data: lists of (image, label or mask), each a path, a PIL image or a drawn tensor

# {} is train or val, or the two of `parts`; ends: what photos' and masks' names have after the name
# they share; listed: a file of photos' names; ignore: ids that count nowhere; names: of id 0, 1 ...
LAYOUTS = {
    "images/masks": dict(photos="{}/images", masks="{}/masks"),
    "VOC": dict(
        photos="JPEGImages", masks="SegmentationClass", listed="ImageSets/Segmentation/{}.txt",
        names="background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, "
        "dining table, dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv"),
    "CamVid": dict(photos="{}", masks="{}annot", ignore=[11], names="sky, building, pole, road, "
                   "pavement, tree, sign, fence, car, pedestrian, bicyclist, void"),
    "Cityscapes": dict(
        photos="leftImg8bit/{}", masks="gtFine/{}", ends=("_leftImg8bit", "_gtFine_labelTrainIds"),
        names="road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, "
        "vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle"),
    "ADE20K": dict(photos="images/{}", masks="annotations/{}", parts=("training", "validation"),
                   ignore=[0]),                         # names: its own objectInfo150.txt
}


def read_mask(source):
    """Path, PIL image or drawn mask -> ids as the file stores them, uint8 (H, W)."""
    if isinstance(source, torch.Tensor):
        return source
    image = decode(source)
    if image.mode not in ("1", "L", "P", "I;16") or image.format in ("JPEG", "MPO"):
        raise InputError(f"{source} is no mask: expected one id a pixel, grey or palette, without "
                         f"loss, found {image.format}, mode {image.mode}")
    ids = v2.functional.pil_to_tensor(image)[0].int()
    if image.format == "PNG" and image.mode == "L" and not isinstance(source, Image.Image):
        bits = Path(source).read_bytes()[24]            # Pillow stretches 2 and 4 to 0 ... 255
        ids = ids // (255 // (2 ** bits - 1))
    if ids.max() > 255:
        raise InputError(f"{source} holds ids up to {ids.max()}: expected 0 to 255")
    return ids.to(torch.uint8)


def read_item(item, task, lookup=None, short=None):
    """-> (uint8 (3, H, W), label), or with a mask of classes (H, W), lookup[id] of each id."""
    if task == "classify":
        return read_image(item, short), item[1]
    return read_image(item), tv_tensors.Mask(lookup[read_mask(item[-1]).long()])


def pairs(data, part, photos, masks, ends=("", ""), listed=None, **_):
    """A part of a folder that a row of LAYOUTS fits -> [(photo, mask), ...], none opened."""
    top, below, found = Path(data, photos.format(part)), Path(data, masks.format(part)), {}
    wanted = {mask for mask in walk(below) if mask.name.endswith(f"{ends[1]}.png")}
    if listed:
        listed = {*Path(data, listed.format(part)).read_text().split()}
        wanted &= {below / f"{name}.png" for name in listed}
    for photo in find_images(top):
        name = str(Path(photo).relative_to(top).with_suffix(""))
        mask = below / f"{name.removesuffix(ends[0])}{ends[1]}.png"
        if mask in found:
            raise InputError(f"{found[mask]} and {photo} have the same mask, {mask}: rename one")
        if not listed or name in listed:
            found[mask] = photo
    both = [(photo, mask) for mask, photo in found.items() if mask in wanted]
    if not both:
        raise InputError(f"no photo in {top} has its mask in {below}: {mask} is expected, e.g.")
    if len(both) < max(len(found), len(wanted)):
        print(f"{top}: left out {len(found) - len(both)} photos without a mask, "
              f"{len(wanted) - len(both)} masks without a photo")
    return both


def by_layout(data):
    """-> training pairs, held-out pairs, names of id 0, 1, ..., the row of LAYOUTS that fits."""
    fits = [name for name, row in LAYOUTS.items() if all(
        Path(data, row[key].format(part)).is_dir() for key in ("photos", "masks")
        for part in row.get("parts", PARTS))]
    if not fits:
        known = "; ".join(f"{row['photos']} and {row['masks']}" for row in LAYOUTS.values())
        raise InputError(f"{data} is not laid out for --task segment, expected folders: {known}")
    row = LAYOUTS[fits[0]]
    names = row["names"].split(", ") if "names" in row else []
    print(f"{data}: read as {', though it could be '.join(fits)}")
    for file in (Path(data, name) for name in ("objectInfo150.txt", "classes.txt")):
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []
        except ValueError as error:
            raise InputError(f"{file} is no UTF-8 text: {error}") from None
        names = [line.split("\t")[-1].strip() for line in lines] or names
    return *(pairs(data, part, **row) for part in row.get("parts", PARTS)), names, row


def count_ids(items, colours):
    """Look at every photo and mask once -> pixels of each id (256,). No colour may change its id
    from file to file; colours: {colour of a palette: (its ids, file)}."""
    counts, turned = torch.zeros(256, dtype=torch.long), 0
    for item in bar(items, "reading masks"):
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
    for part in (Path(data, part) for part in PARTS):
        if not part.is_dir():
            raise InputError(f"{data} is not laid out for --task classify: expected the folders "
                             "train and val in it")
        seen = [entry for entry in sorted(part.iterdir()) if not entry.name.startswith(".")]
        parts.append({entry.name: find_images(entry) for entry in seen if entry.is_dir()})
        say_left_out(part, [entry for entry in seen if entry.is_file()])
    classes = sorted(parts[0].keys() | parts[1].keys())
    if classes == ["images", "masks"]:
        raise InputError(f"{data} is laid out for --task segment, expected a folder for each class")
    items = [[(path, classes.index(name)) for name, paths in part.items() for path in paths]
             for part in parts]
    for path, _ in bar(sum(items, []), "reading photos"):
        read_image(path, short=32)          # a bad one ends the run here, not in the middle
    return *items, classes


def load_data(data, task, ignore=None):
    """-> (training items, held-out items, class names, their ids in masks), after a look at all.
    ignore: ids that count nowhere; None: IGNORE and those of the folder's layout."""
    segment, row = task == "segment", {}
    if data is None:
        parts = Shapes("train"), Shapes("val")
        names = ["background"] * segment + list(Shapes.classes)
    elif data in SETS and not Path(data).is_dir():
        if (data == "voc2012") != segment:
            raise InputError(f"--data {data} has no labels for --task {task}")
        parts = open_set(data)
        names = LAYOUTS["VOC"]["names"].split(", ") if segment else [
            name if isinstance(name, str) else name[0] for name in parts[0].classes]
    elif segment:
        *parts, names, row = by_layout(data)
    else:
        *parts, names = by_class(data)
    ignore = [IGNORE, *row.get("ignore", ())] if ignore is None else ignore
    if not all(-1 <= id <= 255 for id in ignore):
        raise InputError(f"--ignore {ignore}: expected ids from 0 to 255, or -1 for none")
    if segment:
        colours = {}
        counts = torch.stack([count_ids(part, colours) for part in parts])              # (2, 256)
        counts[:, [id for id in ignore if id >= 0]] = 0
    else:
        labels = [torch.tensor([item[1] for item in part], dtype=torch.long) for part in parts]
        counts = torch.stack([part.bincount(minlength=len(names)) for part in labels])
    ids = counts.sum(0).nonzero().flatten().tolist() if segment else [*range(len(names))]
    if len(ids) < 2 or segment and len(ids) > 255 or not counts.sum(1).all():
        counted = segment and ignore != [-1]
        hint = f" besides {ignore}, which --ignore -1 would count" if counted else ""
        raise InputError(f"{data} has the classes {ids if segment else names}{hint}, and "
                         f"{counts.sum(1).tolist()} labels in train and val: expected two classes "
                         "or more, in masks 255 at most, and labels in both")
    classes = [names[id] if id < len(names) and names.count(names[id]) == 1 else str(id)
               for id in ids]
    for id, name in zip(ids, classes):
        train, val = (100 * counts[:, id] / counts.sum(1)).tolist()
        print(f"class {name:24s} id {id:3d}  {train:6.2f} % of train  {val:6.2f} % of val")
    return *parts, classes, ids


def fitted(item, size, patch, points=None):
    """(photo uint8 (3, H, W), mask) -> the photo in its own shape, its shorter side scaled to size,
    each side to the nearest multiple of the patch; points: the mask with that many a patch."""
    photo, mask = item
    grid = [max(1, round(n * size / min(photo.shape[1:]) / patch)) for n in photo.shape[1:]]
    if points:
        shape = [n * points for n in grid]
        mask = F.interpolate(mask[None, None], shape, mode="nearest-exact")[0, 0]
    return v2.functional.resize(photo, [n * patch for n in grid], **BICUBIC), mask


def views_of(task, size, patch):
    """-> (a random crop, mirrored or not, for training; all of a photo), with its mask, if any."""
    if task == "classify":
        return views(size)
    fill = {tv_tensors.Mask: IGNORE, "others": 124}     # about the mean of photos
    crop = v2.Compose([v2.RandomResize(size // 2, 2 * size, **BICUBIC),
                       v2.RandomCrop(size, pad_if_needed=True, fill=fill),
                       v2.RandomHorizontalFlip()])
    return crop, partial(fitted, size=size, patch=patch)


def by_shape(draws):
    """A batch of Draws, [((input, target), unread), ...] -> [(inputs, targets), ...], stacked where
    shapes agree. A photo that is gone by now ends the run: its neighbour would count twice."""
    groups = {}
    for (inputs, target), unread in draws:
        if unread:
            raise InputError(unread)
        target = torch.as_tensor(target)
        groups.setdefault((inputs.shape, target.shape), []).append((inputs, target))
    return [tuple(map(torch.stack, zip(*group))) for group in groups.values()]


# --------------------------------------------------------------------------------------------------
# Heads and scores

def features(vit, images, task):
    """uint8 images (B, 3, H, W) -> what a head reads. segment: patches (B, rows, columns, C);
    classify: CLS and mean patch (B, 2C), or the mean patch alone (B, C) of a ViT without CLS."""
    grid, tokens = vit.grid(*images.shape[2:]), widen(vit(vit.normalize(images)))
    patches = tokens[:, vit.arch.prefix:]                                   # (B, N, C)
    if task == "segment":
        return patches.unflatten(1, grid)
    return torch.cat([tokens[:, 0], patches.mean(1)], 1) if vit.arch.cls else patches.mean(1)


class LinearHead(nn.Module):
    """LayerNorm, linear layer on each patch, (B, rows, columns, C) -> (B, K, rows, columns)."""

    def __init__(self, arch, classes, attention):
        super().__init__()
        self.norm, self.classify = nn.LayerNorm(arch.width), nn.Linear(arch.width, classes)

    def forward(self, patches):
        return self.classify(self.norm(patches)).permute(0, 3, 1, 2)


class MaskHead(nn.Module):
    """Segmenter's decoder (arXiv 2105.05633): (B, rows, columns, C) -> (B, K, rows, columns).

    A token per class joins the patches in two blocks with the backbone's own operator, O(N) if that
    is; before them, as a ViT's prefix: operators that know the grid let it bypass. Segmenter: a
    linear layer before it, masks alone; here: that layer starts by whitening, and a linear layer on
    its output adds to the masks, because a few hundred photos and steps do not teach both.
    """

    def __init__(self, arch, classes, attention):
        super().__init__()
        C = arch.width
        self.start = nn.Sequential(nn.LayerNorm(C, elementwise_affine=False), nn.Linear(C, C))
        self.blocks = nn.ModuleList(Block(arch, attention) for _ in range(2))
        self.norm, self.classify = nn.LayerNorm(C), nn.Linear(C, classes)
        self.of_class, self.of_patch = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        self.scale = nn.LayerNorm(classes)              # cosines alone are too alike for a softmax
        for name, tensor in self.named_parameters():
            if ".operator." not in name and tensor.ndim > 1:
                nn.init.trunc_normal_(tensor, std=0.02)
        self.tokens = nn.Parameter(torch.randn(1, classes, C))      # as large as whitened patches

    @torch.no_grad()
    def whiten(self, patches):
        """Features (n, C) -> none: start makes them of mean 0 and variance 1 in all directions. Few
        directions hold most of the variance of some ViTs, and classes lie in the others."""
        x = self.start[0](patches)
        values, axes = torch.linalg.eigh(x.T.cov().double())
        axes = axes / (values.clamp(min=0) + 1e-3 * values.mean()).sqrt()   # (C, C), a column each
        self.start[1].weight.copy_(axes.T)
        self.start[1].bias.copy_(-axes.T @ x.mean(0).double())

    def forward(self, patches):
        grid, K = tuple(patches.shape[1:3]), self.tokens.shape[1]
        start = self.start(patches.flatten(1, 2))                           # (B, N, C)
        x = torch.cat([self.tokens.expand(len(start), -1, -1), start], 1)   # (B, K + N, C)
        for block in self.blocks:
            x = block(x, grid)
        tokens, x = self.norm(x).tensor_split([K], dim=1)
        x, tokens = self.of_patch(x), self.of_class(tokens)
        masks = F.normalize(x, dim=-1) @ F.normalize(tokens, dim=-1).mT     # (B, N, K)
        masks = self.scale(masks) + self.classify(start)
        return masks.mT.unflatten(2, grid)


HEADS = {"linear": LinearHead, "mask": MaskHead}


def make_head(arch, task, classes, kind="linear", attention="softmax"):
    if task == "segment":
        return HEADS[kind](arch, classes, attention)
    return nn.Linear(arch.width * (1 + arch.cls), classes)


def load_head(head, tensors, spec):
    """Give a head the weights head.* of a checkpoint; -> the head. After FILE:OPERATOR a mask head
    has that operator, too; its parameters are then fresh, as in model.linearize."""
    theirs = {n[5:]: t for n, t in tensors.items() if n.startswith("head.")}
    fresh = {n: t for n, t in head.state_dict().items() if ".operator." in n}
    if fresh.keys() != {n for n in theirs if ".operator." in n}:
        theirs = fresh | {n: t for n, t in theirs.items() if ".operator." not in n}
    try:
        head.load_state_dict(theirs)
    except RuntimeError as error:
        raise InputError(f"{spec} has no whole task head: {error}") from None
    return head


def kept_head(head, spec, task, classes, ids, kind="linear"):
    """Give a fresh head the weights that a checkpoint has for the same task, classes and ids."""
    tensors, facts = read_weights(weights_file(spec)[0])
    theirs = [facts.get("task"), facts.get("classes"), facts.get("ids", ids),
              facts.get("head_kind", "linear")]
    if kept := theirs == [task, classes, ids, kind]:
        load_head(head, tensors, spec)
    if "classes" in facts:
        print(f"{spec}: its head is " + ("kept" if kept else f"not kept, it is {theirs}"))
    return kept


def logits_of(vit, head, inputs, task, frozen, dtype=torch.float32):
    """What the head says of uint8 images, or of features, in float32 or float64."""
    with autocast(inputs.device.type, dtype):
        return widen(head(widen(inputs) if frozen else features(vit, inputs, task)))


def task_loss(vit, head, inputs, targets, task, frozen, dtype=torch.float32):
    """inputs: uint8 images, or their features if the backbone is frozen; targets: labels (B,), or
    masks (B, rows, columns) of any size -> (sum of cross-entropies, how many there are in it)."""
    logits, ignore = logits_of(vit, head, inputs, task, frozen, dtype), -100
    if task == "segment":
        logits, ignore = F.interpolate(logits, targets.shape[1:], mode="bilinear"), IGNORE
    total = F.cross_entropy(logits, targets.long(), ignore_index=ignore, reduction="sum")
    return total, (targets != ignore).sum()


def alignment(teacher, vit, images, dtype):
    """Stage 1's loss, mean of all blocks, while the backbone is tuned for a task (as in
    "Copy the same, distill the difference": what softmax attends to stays)."""
    (x, grid), losses = embed(teacher, images, dtype), []
    for theirs, ours in zip(teacher.blocks, vit.blocks):
        x, error, scale = block_alignment(theirs, ours, x, grid, dtype)
        losses.append(error / average([scale])[0])
    return torch.stack(losses).mean()


def upsampled_classes(logits, size):
    """Logits (B, K, rows, columns) -> the likeliest class at every pixel (B, *size), bilinear. A
    class at a time: K maps of a 12-megapixel photo would need gigabytes."""
    best = torch.full((len(logits), *size), -math.inf, dtype=logits.dtype, device=logits.device)
    classes = torch.zeros_like(best, dtype=torch.long)
    for k, one in enumerate(logits.split(1, dim=1)):
        one = F.interpolate(one, size, mode="bilinear")[:, 0]
        classes = torch.where(one > best, k, classes)
        best = best.maximum(one)
    return classes


@torch.no_grad()
def cached(vit, batches, task, frozen, device, dtype):
    """The same batches with what a head reads as inputs, on the CPU, in float16 or float64."""
    kept = dtype if dtype == torch.float64 else torch.float16
    return [[(logits_of(vit, nn.Identity(), inputs.to(device), task, frozen, dtype).to(kept).cpu(),
              truth.clone())                            # of a worker: each would keep a file open
             for inputs, truth in batch] for batch in bar(batches, "features")]


@torch.no_grad()
def evaluate(vit, head, batches, task, frozen, classes, device, dtype=torch.float32):
    """batches: lists of (inputs, targets), see by_shape; masks have their own resolution.
    -> (percent: top-1, or mIoU over classes that occur; that per class)."""
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    for batch in bar(batches, "scoring"):
        for inputs, targets in batch:
            guess = logits_of(vit, head, inputs.to(device), task, frozen, dtype)
            segment, size = task == "segment", targets.shape[1:]
            guess = (upsampled_classes(guess, size) if segment else guess.argmax(1)).cpu()
            counted = targets != (IGNORE if segment else -100)
            counts = classes * targets[counted].long() + guess[counted]
            confusion += counts.bincount(minlength=classes ** 2).view(classes, classes)
    right, truth, guessed = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    if task == "classify":
        return 100 * (right.sum() / truth.sum()).item(), (100 * right / truth).tolist()
    iou = 100 * right / (truth + guessed - right)       # nan for a class neither there nor guessed
    return iou.nanmean().item(), iou.tolist()


PALETTE = torch.rand(256, 3, generator=torch.Generator().manual_seed(6)) * 0.8 + 0.2
PALETTE[0], PALETTE[IGNORE] = 0, 1                      # background black, ignored white


def picture(path, rows, classes, ids, cell=160, line=20):
    """Write rows, [(caption, [uint8 photo (3, H, W) or mask of classes (H, W), ...]), ...], and
    below all a legend of the classes. In pixels: cell, the height of an image, and line."""
    colours = (torch.cat([PALETTE[ids], torch.ones(256 - len(ids), 3)]) * 255).byte()
    widths = [max(1, round(photo.shape[2] * cell / photo.shape[1])) for photo in rows[0][1]]
    width, below = max(600, sum(widths)), len(rows) * (line + cell) + line // 2
    sheet = Image.new("RGB", (width, below + line * (1 + len(ids) // (width // 200))), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (caption, images) in enumerate(rows):
        draw.text((4, i * (line + cell) + 2), caption, "black", font)
        for j, image in enumerate(images):
            image = image if image.ndim == 3 else colours[image.long()].movedim(-1, 0)
            image = v2.functional.to_pil_image(image).resize((widths[j], cell))
            sheet.paste(image, (sum(widths[:j]), i * (line + cell) + line))
    for i, (id, name) in enumerate(zip(ids, classes)):
        x, y = 200 * (i % (width // 200)) + 4, below + line * (i // (width // 200))
        draw.rectangle((x, y, x + 13, y + 13), tuple(colours[i].tolist()), "black")
        draw.text((x + 18, y), f"{id} {name[:22]}" if name != str(id) else name, "black", font)
    write_whole(path, partial(sheet.save, format="png"))


def load_backbone(spec, from_scratch):
    """FILE, NAME, NAME=FILE, each may end in :OPERATOR -> (ViT, what of that is read, if anything,
    stages behind it)."""
    name, _, operator = spec.rpartition(":")
    name, operator = (name, operator) if name and operator in ATTENTION else (spec, None)
    if from_scratch:
        known = [arch for key, arch in KNOWN.items() if name in (key, key.partition(".")[0])]
        if known:                                       # a name need not be downloaded
            return ViT(known[0], operator or "softmax"), None, "scratch"
        vit = load_vit(name)
        return ViT(vit.arch, operator or vit.attention), None, "scratch"
    vit = load_vit(name)
    if operator in (None, vit.attention):
        return vit, name, vit.facts.get("stage", "pretrained")
    swapped = linearize(vit, operator)
    swapped.facts = vit.facts                           # its size and kind of head
    return swapped, name, "none"


@torch.no_grad()
def predict(args, device, dtype):
    """Label photos with a checkpoint of ours: a line each, and to segment a mask and an overlay."""
    spec, wide = args.weights[0], torch.promote_types(dtype, torch.float32)
    vit, (tensors, facts) = load_vit(spec), read_weights(weights_file(spec)[0])
    if "classes" not in facts:
        raise InputError(f"{spec} has no task head: --predict needs a checkpoint of finetune.py")
    task, classes = facts["task"], facts["classes"]
    size = facts["size"] if args.size is None else args.size
    vit.grid(size, size)
    head = make_head(vit.arch, task, len(classes), facts.get("head_kind", "linear"), vit.attention)
    vit, head = vit.to(device, wide), load_head(head, tensors, spec).to(device, wide).eval()
    ids = torch.tensor(facts.get("ids", range(len(classes))))
    for given in args.predict:
        if not Path(given).exists():
            raise InputError(f"--predict {given}: expected a photo or a folder, found none")
    photos = [(path, Path(path).relative_to(given) if Path(given).is_dir() else Path(path).name)
              for given in args.predict
              for path in (find_images(given) if Path(given).is_dir() else [given])]
    if len({str(name) for _, name in photos}) < len(photos) and task == "segment":
        raise InputError("two photos of --predict have one name: give their folders one at a time")
    out = open_out(args, [spec, *args.predict])[0] if task == "segment" else None
    whole = views_of(task, size, vit.arch.patch)[1]
    for start in range(0, len(photos), args.batch_size):
        batch, found = [], {}
        for i, (path, _) in enumerate(photos[start:start + args.batch_size], start):
            try:
                photo = read_image(path, None if task == "segment" else size)
                batch.append((whole((photo, i)), ""))
            except InputError as error:
                print(f"left out: {error}")
        for images, places in by_shape(batch):
            logits = logits_of(vit, head, images.to(device), task, False, dtype)
            found |= dict(zip(places.tolist(), logits))
        for (path, name), logits in ((photos[i], found[i]) for i in sorted(found)):
            if task == "classify":
                share, best = logits.softmax(0).max(0)
                print(f"{path}\t{classes[best]}\t{share:.3f}")
                continue
            photo = read_image(path)                    # again: a batch of originals may be large
            mask = upsampled_classes(logits[None], photo.shape[1:])[0].cpu()
            target = out / "masks" / f"{name}.png"      # with its suffix: not a.jpg's over a.png's
            target.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(ids[mask].byte().numpy())
            image.putpalette((PALETTE * 255).byte().flatten().tolist())
            write_whole(target, partial(image.save, format="png"))
            overlay = photo.float() / 510 + PALETTE[ids[mask]].movedim(-1, 0) / 2
            write_whole(target.with_name(f"{target.stem}.overlay.png"),
                        partial(save_image, overlay, format="png"))
            print(f"{path}\t{', '.join(classes[value] for value in mask.unique())}\t{target}")


def begin_row(spec, args, classes, ids):
    """-> ViT and head as they are before training, stages behind the ViT, is the head its own?"""
    torch.manual_seed(args.seed)
    vit, file, stage = load_backbone(spec, args.from_scratch)
    torch.manual_seed(args.seed)                        # the same head for each row
    head = make_head(vit.arch, args.task, len(classes), args.head, vit.attention)
    own = bool(file) and kept_head(head, file, args.task, classes, ids, args.head)
    return vit, head, stage, own


def fine_tune(spec, args, data, teacher, start_progress, device, dtype):
    """Train and score one of --weights; its row is added to what Progress keeps. data: see
    load_data; teacher: of --align, or None; start_progress: Progress but for its parts."""
    torch.compiler.reset()                              # each row compiles and caches anew
    (source, val_source, classes, ids), task, segment = data, args.task, args.task == "segment"
    wide = torch.promote_types(dtype, torch.float32)    # of weights, loss and logits
    vit, head, stage, its_own = begin_row(spec, args, classes, ids)
    vit, head = vit.to(device, wide), head.to(device, wide)

    lookup = torch.tensor([ids.index(i) if i in ids else IGNORE for i in range(256)]).byte()
    read = partial(read_item, task=task, lookup=lookup, short=args.size)
    crop, whole = views_of(task, args.size, vit.arch.patch)
    crop = crop if args.data else v2.RandomHorizontalFlip()
    draws, held_out = Draws(source, read, crop, args.seed), Draws(val_source, read, whole)
    # A generator of its own: scoring leaves other randomness alone.
    loader = partial(DataLoader, num_workers=args.workers, collate_fn=by_shape,
                     generator=torch.Generator(), worker_init_fn=leave_signals)
    val = loader(held_out, args.batch_size // WORLD)
    if args.freeze:             # features of whole photos, computed once, of what will be drawn
        short = partial(whole, points=POINTS) if segment else whole
        drawn = permutation(len(source), args.seed, 0)[:args.steps * args.batch_size]
        photos = loader(Draws(Subset(source, sorted(drawn.tolist())), read, short),
                        args.batch_size // WORLD)
        found, val = (cached(vit, part, task, False, device, dtype) for part in (photos, val))
        items = [item for batch in found for group in batch for item in zip(*group)]
        draws = Draws(items, tuple, tuple, args.seed)
    if args.head == "mask" and not its_own and args.steps:
        photos = [by_shape([draws[j]]) for j in range(args.batch_size)]
        start = sum(cached(vit, photos, task, args.freeze, device, dtype), [])
        head.whiten(torch.cat([x.flatten(0, 2) for x, _ in start]).to(device, wide))

    trained = [[*part.parameters()] for part in ([head] if args.freeze else [head, vit.train()])]
    rates = args.lr * (1 if args.from_scratch else HEAD_LR), args.lr
    optimizer = torch.optim.AdamW([dict(params=part, lr=lr) for part, lr in zip(trained, rates)],
                                  weight_decay=0.01)
    schedule = one_cycle(optimizer, args.steps)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    compiles = args.compile and not args.freeze         # frozen: each of many shapes would compile
    loss_of = torch.compile(task_loss, fullgraph=True) if compiles else task_loss
    score_of = partial(evaluate, vit, head, val, task, args.freeze, len(classes), device, dtype)
    facts = dict(task=task, classes=classes, ids=ids, size=args.size, frozen=args.freeze,
                 seed=args.seed, head_kind=args.head)
    write = partial(save_vit, vit, head=head, stage=f"{stage}+finetune", **facts)
    progress = start_progress(head=head, vit=nn.Identity() if args.freeze else vit,
                              optimizer=optimizer, schedule=schedule, scaler=scaler)
    out, kept, i = progress.out, progress.kept, len(progress.kept["rows"])
    order = range(progress.step * args.batch_size + RANK, args.steps * args.batch_size, WORLD)
    train = loader(draws, args.batch_size // WORLD, sampler=order, pin_memory=device == "cuda",
                   num_workers=0 if args.freeze else args.workers)
    with progress:
        for step, batch in enumerate(train, progress.step + 1):
            total = count = 0
            for inputs, targets in batch:               # one shape each; of crops there is one
                inputs, targets = (x.to(device, non_blocking=True) for x in (inputs, targets))
                part = loss_of(vit, head, inputs, targets, task, args.freeze, dtype)    # the stage
                total, count = total + part[0], count + part[1]
            count = average([count.to(total.dtype)])[0]
            loss = total / count.clamp(min=1)           # crops may hold ignored pixels only
            if args.align:
                loss = loss + args.align * alignment(teacher, vit, inputs, dtype)
            scaler.scale(loss).backward()
            row = dict(weights=spec, lr=update(scaler, optimizer, schedule, trained))
            if step % args.every == 0:
                row["held_out"] = score_of()[0]
                if row["held_out"] > kept["best"]:
                    kept["best"] = row["held_out"]
                    write(out / f"{i}-{task}-best.safetensors", best=dict(
                        step=step, score=kept["best"], chosen_on="held-out part"))
            progress.done(average([loss.detach()])[0].item(), **row)

    checkpoint = out / f"{i}-{task}.safetensors"
    write(checkpoint)
    score, per_class = score_of()
    look = torch.no_grad()(lambda photo: logits_of(     # photo by photo: what one costs, a picture
        vit, head, photo[None].to(device), task, False, dtype))
    shown = [held_out[j][0] for j in range(min(6, len(held_out)))]
    first = partial(look, shown[0][0])
    if segment:
        kept["guesses"].append((f"{spec}: {vit.attention}, mIoU {score:.1f}", [upsampled_classes(
            look(photo), mask.shape)[0].byte().cpu() for photo, mask in shown]))
        photos, masks = zip(*shown)
        picture(out / "segment.png", [("photo", photos), ("truth", masks), *kept["guesses"]],
                classes, ids)
    kept["rows"].append(dict(
        weights=spec, stage=stage, score=score, metric="mIoU" if segment else "top-1",
        attention=vit.attention + f"+{vit.keep_softmax} softmax" * (vit.keep_softmax > 0),
        per_class={name: None if math.isnan(value) else value       # JSON knows no NaN
                   for name, value in zip(classes, per_class)},
        images_per_s=1e3 / min(timed(first, device) for _ in range(3)),
        peak_mb=peak_memory(first, device), seconds=progress.seconds, kept_head=its_own,
        held_out=len(val_source), steps=args.steps, batch_size=args.batch_size, lr=args.lr,
        device=device, dtype=str(dtype), checkpoint=str(checkpoint), **facts))
    kept["best"] = -1.0                                 # of the next row
    write_whole(out / "metrics.json", kept["rows"])
    if len(kept["rows"]) == len(args.weights):
        progress.finish()


def main(argv=None):
    args = parse(argv)
    device, dtype = device_and_dtype(args)
    if args.predict:
        return predict(args, device, dtype)
    wide, files = torch.promote_types(dtype, torch.float32), [args.teacher]
    teacher = load_vit(args.teacher).to(device, wide) if args.align else None
    for spec in args.weights:                           # all must be good before we start
        vit, file, _ = load_backbone(spec, args.from_scratch)
        files.append(file)
        if args.align and (teacher.attention != "softmax" or "softmax" in vit.attention
                           or vit.arch != teacher.arch):
            raise InputError(f"--align: expected a linear student and its softmax teacher, found "
                             f"{spec}, {vit.attention}, and {args.teacher}, {teacher.attention}")
        if args.size is None:
            args.size = vit.facts.get("size", vit.arch.pixels[0])
        args.head = args.head or vit.facts.get("head_kind")
        vit.grid(args.size, args.size)
    segment = args.task == "segment"
    args.head = segment and args.head or "linear"
    if args.lr is None:
        args.lr = 3e-3 if args.freeze and segment and args.head == "linear" else 1e-4
    source, val_source, classes, ids = data = load_data(args.data, args.task, args.ignore)
    for spec in args.weights if args.steps == 0 else ():
        if not begin_row(spec, args, classes, ids)[-1]:
            raise InputError(f"--steps 0 only scores, but {spec} has no head for these classes")
    masks = [zlib.crc32(item[-1].read_bytes()) for part in (source, val_source) if segment
             for item in bar(part, "hashing masks") if isinstance(item[-1], Path)]
    mark = fingerprint(files, source, val_source, masks)
    out, saved = open_out(args, [*args.weights, args.data, args.teacher], mark)
    print(f"{args.task}: {len(source)} images of {args.size} pixels, {len(val_source)} held out, "
          f"{len(classes)} classes, {'head alone' if args.freeze else 'head and backbone'}, "
          f"{device}, {dtype}")
    kept = saved["kept"] if saved else dict(rows=[], guesses=[], best=-1.0)
    rows = kept["rows"]
    for spec in args.weights[len(rows):]:
        start_progress = partial(Progress, args, out, saved, mark, kept)
        fine_tune(spec, args, data, teacher, start_progress, device, dtype)
        saved = None                                    # it was of the row that had been stopped

    if segment:
        print(f"\n{'IoU of class':25s} id", *(f"  row {i}" for i in range(len(rows))))
        for id, name in zip(ids, classes):
            found = (row["per_class"][name] for row in rows)
            print(f"{name:24s} {id:3d}", *("      -" if x is None else f"{x:7.1f}" for x in found))
    print(f"\n{rows[0]['metric']} on {len(val_source)} held-out images, "
          f"{'frozen' if args.freeze else 'tuned'} backbone, seed {args.seed}")
    print(f"{' score':7s} img/s     MB  attention   stage                weights")
    for row in rows:
        print(f"{row['score']:6.2f} {row['images_per_s']:6.2f} {row['peak_mb']:6.0f}  "
              f"{row['attention']:11s} {row['stage']:20s} {row['weights']}")
    print(f"wrote {out / 'metrics.json'}")


if __name__ == "__main__":
    run(main)
