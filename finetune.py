"""Stage 3 of ViT-AdaLA, supervised fine-tuning: a head to classify or segment, on any ViT.

    python finetune.py                                      # the demo: the ablation in one table
    python finetune.py --task classify --data photos/ --weights runs/features/student.safetensors
    python finetune.py --task segment --data voc/ --freeze --weights NAME NAME:linear FILE
    python finetune.py --weights runs/finetune/0-segment.safetensors --predict photos/ --size 672

--weights takes one file or several, and treats each in the same way. FILE:linear is FILE with its
attention swapped and nothing aligned. The head first learns on the frozen backbone's features, then
all weights are tuned (Kumar et al. 2022). --freeze stops after the head. --from-scratch keeps only
the architecture and operator of a file. --steps 0 scores a checkpoint of this script as it is.

To classify, photos lie in train/CLASS/ and val/CLASS/, and their middle square counts. To segment,
one of LAYOUTS fits the folder, masks hold an id a pixel, and classes.txt may name id 0, 1, ... line
by line. Photos keep their shape: the shorter side becomes --size, each side the nearest multiple of
the patch. The score counts the masks' own pixels. A tuned backbone sees crops of 0.5 to 2 times
that size.
It writes to --out: a checkpoint for each of --weights, metrics.json (the score of every class is
there), log.jsonl, and to segment ROW-segment.png; with --predict masks of the photos' own sizes.
"""
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from model import ATTENTION, Block, ViT, linearize, load_vit, save_vit, weights_file
from support.labels import IGNORE, PALETTE, by_shape, draw_segments, load_data, read_item, views_of
from support.photos import Draws, find_images, names, permutation, read_image
from support.runs import RANK, WORLD, InputError, Progress, autocast, average_gradients
from support.runs import bar, device_and_dtype, leave_signals, mean_over_processes, open_out
from support.runs import parse_args, run, show, warmup_cosine, widen, write_whole

DEFAULTS = dict(steps=2000, batch_size=32)
DEMO = dict(size=64, steps=300, batch_size=64)              # without --data
PREDICT = dict(steps=0, batch_size=1, compile=False)
ABLATION = ["demo/teacher.safetensors", "demo/teacher.safetensors:linear",
            "runs/attention/student.safetensors", "runs/features/student.safetensors"]
RATE, SCRATCH_RATE = 3e-5, 1e-4             # peaks: of a tuned backbone; of one from random weights
HEAD_RATES = {"classify": 3e-2, "linear": 3e-2, "mask": 1e-3}       # on frozen features, by head
HEAD_DECAY = 0.1            # is the weight decay of a standardised head
HEAD_BATCH = 16             # times --batch-size are in its batch, because features are cheap
HEAD_LR = 10                # a tuned backbone's head learns this much faster than the backbone
HEAD_PHOTOS = 2000          # at most, from which the head of a tuned backbone starts
POINTS = 4                  # squared: pixels of a patch's mask that teach a frozen backbone's head


def parse(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter,
                            add_help=False)
    flag = parser.add_argument
    flag("--task", choices=("classify", "segment"), help="(default: classify)")
    flag("--weights", nargs="+", help="files, known names or NAME=FILE, each may end in :OPERATOR "
         "(demo: teacher, teacher:linear and the students of stages 1 and 2, frozen)")
    flag("--freeze", action="store_true", help="train only the head, on features kept in memory "
         "(to segment P x C x 2 bytes a photo: 1 MB for ViT-S/14 at 518 pixels)")
    flag("--from-scratch", action="store_true", help="start from random weights")
    flag("--predict", metavar="PHOTOS", nargs="+",
         help="label photos or folders with the one checkpoint in --weights, train nothing")
    flag("--data", help="a folder, see above (default: the demo's)")
    flag("--head", choices=HEADS, help="to segment (default: a checkpoint's own, else linear)")
    flag("--ignore", type=int, nargs="+", help="ids in masks that count nowhere, -1 for none "
         f"(default: {IGNORE} and the layout's)")
    flag("--recompute", action="store_true", help="blocks again in the backward pass: less memory")
    flag("--lr", type=float, help=f"peak of a tuned backbone's rate, {HEAD_LR} times that for its "
         f"head; with --freeze the head's (default: {RATE}, from scratch {SCRATCH_RATE}, frozen "
         "by kind of head)")
    known = parser.parse_known_args(argv)[0]
    flag("-h", "--help", action="help", help="show this and exit")      # once all flags are known
    args = parse_args(parser, argv, "runs/predict" if known.predict else "runs/finetune",
                      *(PREDICT, PREDICT) if known.predict else (DEFAULTS, DEMO), least_steps=0)
    for name in ("task", "data", "head", "ignore", "freeze", "from_scratch", "lr"):
        if args.predict and getattr(args, name) is not parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} is for training, not for --predict")
    args.task = args.task or "classify"
    if (args.head or args.ignore) and args.task == "classify":
        raise InputError(f"--head {args.head} --ignore {args.ignore} are for --task segment")
    if args.weights is None and args.data is None and not args.predict:
        args.weights, args.freeze = ABLATION, not args.from_scratch
        print("demo:", "--freeze" * args.freeze, "--weights", *args.weights)
    if args.weights is None or args.predict and len(args.weights) != 1:
        raise InputError("--weights: expected files to fine-tune, or one checkpoint to --predict "
                         f"with, found {args.weights}")
    if args.freeze and args.from_scratch:
        raise InputError("--freeze with --from-scratch: random weights have no features to keep")
    return args


# ---- Heads and scores

def features_of(vit, images, task):
    """uint8 images (B, 3, height, width) -> what a head reads. segment: patches (B, rows, columns,
    C). classify: CLS and mean patch (B, 2C), or of a ViT without CLS the mean patch (B, C)."""
    grid, tokens = vit.grid_of(*images.shape[2:]), widen(vit(vit.normalize(images)))
    patches = tokens[:, vit.arch.prefix:]                                   # (B, P, C)
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

    A token per class joins the patches, as a ViT's prefix, in two blocks with the backbone's own
    operator: O(N) if the backbone is. Segmenter: a linear layer before the blocks, and masks alone.
    Here: that layer starts by whitening, and a linear layer on its output adds to the masks,
    because a few hundred photos and steps do not teach both.
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
        """Start from features (n, C), so that all directions have mean 0 and variance 1. Few
        directions hold most of the variance of some ViTs, and classes lie in the others."""
        x = self.start[0](patches)
        values, axes = torch.linalg.eigh(x.T.cov().double())
        axes = axes / (values.clamp(min=0) + 1e-3 * values.mean()).sqrt()   # (C, C), a column each
        self.start[1].weight.copy_(axes.T)
        self.start[1].bias.copy_(-axes.T @ x.mean(0).double())

    def forward(self, patches):
        grid, K = tuple(patches.shape[1:3]), self.tokens.shape[1]
        start = self.start(patches.flatten(1, 2))                           # (B, P, C)
        x = torch.cat([self.tokens.expand(len(start), -1, -1), start], 1)   # (B, K + P, C)
        for block in self.blocks:
            x = block(x, grid)
        tokens, x = self.norm(x).tensor_split([K], dim=1)
        x, tokens = self.of_patch(x), self.of_class(tokens)
        masks = F.normalize(x, dim=-1) @ F.normalize(tokens, dim=-1).mT     # (B, P, K)
        masks = self.scale(masks) + self.classify(start)
        return masks.mT.unflatten(2, grid)


HEADS = {"linear": LinearHead, "mask": MaskHead}


def make_head(arch, task, classes, kind="linear", attention="softmax"):
    if task == "segment":
        return HEADS[kind](arch, classes, attention)
    return nn.Linear(arch.width * (1 + arch.cls), classes)


def logits_of(vit, head, inputs, task, dtype=torch.float32):
    """Logits (B, K) or (B, K, rows, columns), float32 or float64. inputs: uint8 images (B, 3,
    height, width); where vit is None, the features of images."""
    with autocast(inputs.device.type, dtype):
        return widen(head(widen(inputs) if vit is None else features_of(vit, inputs, task)))


def upsampled_classes(logits, size):
    """Logits (B, K, rows, columns) -> the likeliest class at every pixel (B, *size), bilinear. A
    class at a time, because K maps of a 12-megapixel photo would need gigabytes."""
    best = torch.full((len(logits), *size), -math.inf, dtype=logits.dtype, device=logits.device)
    classes = torch.zeros_like(best, dtype=torch.long)
    for k, one in enumerate(logits.split(1, dim=1)):
        one = F.interpolate(one, size, mode="bilinear")[:, 0]
        classes = torch.where(one > best, k, classes)
        best = best.maximum(one)
    return classes


@torch.no_grad()
def cached(vit, batches, task, device, dtype):
    """-> [(what a head reads, target), ...] of all photos, on the CPU, in float16 or float64."""
    kept, items = dtype if dtype == torch.float64 else torch.float16, []
    for batch in bar(batches, "features"):
        for images, targets in batch:
            features = logits_of(vit, nn.Identity(), images.to(device), task, dtype)
            features, targets = features.to(kept).cpu(), targets.clone()
            items += zip(features, targets)     # cloned: each would keep a worker's file open
    return items


@torch.no_grad()
def evaluate(vit, head, batches, task, classes, device, dtype=torch.float32):
    """batches: lists of (inputs, targets), see by_shape; masks have their own resolution. -> (in
    percent top-1, or the mean IoU of classes that occur or are guessed; that of each class; counts,
    rows: truth)."""
    confusion, segment = torch.zeros(classes, classes, dtype=torch.long), task == "segment"
    for batch in bar(batches, "scoring"):
        for inputs, targets in batch:
            guess = logits_of(vit, head, inputs.to(device), task, dtype)
            guess = upsampled_classes(guess, targets.shape[1:]) if segment else guess.argmax(1)
            counted = targets != (IGNORE if segment else -100)
            counts = classes * targets[counted].long() + guess.cpu()[counted]
            confusion += counts.bincount(minlength=classes ** 2).view(classes, classes)
    right, truth, guessed = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    if task == "classify":
        return 100 * (right.sum() / truth.sum()).item(), (100 * right / truth).tolist(), confusion
    iou = 100 * right / (truth + guessed - right)       # nan for a class neither there nor guessed
    return iou.nanmean().item(), iou.tolist(), confusion


# ---- Load, train, score, predict

def load_backbone(spec, args):
    """FILE, NAME or NAME=FILE, each may end in :OPERATOR -> (ViT, spec without :OPERATOR, stages
    that it went through). Where args.size is None, it becomes the file's."""
    name, _, operator = spec.rpartition(":")
    name, operator = (name, operator) if name and operator in ATTENTION else (spec, None)
    vit = load_vit(name)
    if args.size is None:                               # the first file's holds for all
        args.size = vit.header.get("size", vit.arch.pixels[0])
    if args.from_scratch:
        return linearize(ViT(vit.arch), operator or vit.attention, args.size), name, "scratch"
    if operator in (None, vit.attention):
        return vit, name, vit.header.get("stage", "pretrained")
    swapped = linearize(vit, operator, args.size)
    swapped.header, swapped.head = vit.header, vit.head
    stage = vit.header.get("stage", "pretrained")       # a student was aligned, but not for this
    return swapped, name, "none" if vit.attention == "softmax" else f"{stage}, swapped"


def begin_row(spec, args, classes, ids):
    """-> (ViT before training, head before training, stages that the ViT went through, whether the
    checkpoint's own head is kept). It is if its task, classes and ids are the same."""
    torch.manual_seed(args.seed)
    vit, _, stage = load_backbone(spec, args)
    torch.manual_seed(args.seed)                        # the same head for each row
    head = make_head(vit.arch, args.task, len(classes), args.head, vit.attention)
    wanted = dict(task=args.task, classes=classes, ids=ids, head_kind=args.head)
    other = [key for key, value in wanted.items() if vit.header.get(key) != value]
    shapes = [{key: x.shape for key, x in part.items()} for part in (vit.head, head.state_dict())]
    other = other or ["operator"] * (shapes[0] != shapes[1])            # a mask head's
    if not other:
        head.load_state_dict(vit.head)
    if "classes" in vit.header:
        print(f"{spec}:", f"a new head, its own has another {', '.join(other)}" if other else
              "its head is kept")
    return vit, head, stage, not other


@torch.no_grad()
def standardised(head, features, its_own=False):
    """A linear head, its features standardised for AdamW. its_own: both do what it did alone."""
    norm = nn.BatchNorm1d(features.shape[1], affine=False).to(head.weight).eval()
    norm.running_mean, norm.running_var = features.mean(0), features.var(0, correction=0)
    norm.eps = 1e-3 * norm.running_var.mean().item() + 1e-12    # else what hardly varies is noise
    if its_own:
        head.bias += head.weight @ norm.running_mean
        head.weight *= (norm.running_var + norm.eps).sqrt()
    return nn.Sequential(norm, head)


@torch.no_grad()
def fold(norm, head):
    """Back: the head alone does what both did, weight @ (x - mean) / deviation + bias."""
    head.weight /= (norm.running_var + norm.eps).sqrt()
    head.bias -= head.weight @ norm.running_mean


def task_loss(vit, head, inputs, targets, task, dtype=torch.float32):
    """Stage 3 (Fig. 4, right): inputs as in logits_of; targets: labels (B,), or masks (B, height,
    width) of any size -> (sum of cross-entropies, how many there are in it)."""
    logits, ignore = logits_of(vit, head, inputs, task, dtype), -100
    if task == "segment":
        logits, ignore = F.interpolate(logits, targets.shape[1:], mode="bilinear"), IGNORE
    total = F.cross_entropy(logits, targets.long(), ignore_index=ignore, reduction="sum")
    return total, (targets != ignore).sum()


def train(spec, args, vit, head, draws, score, phase, out, saved, kept, device, dtype):
    """Phase "head": train a head on features, [(input, target), ...]. Phase "all": head and ViT on
    draws of photos. score: () -> (percent of the held-out part, ...). -> its Progress."""
    frozen, task = phase == "head", args.task
    rate = HEAD_RATES[args.head if task == "segment" else task] if frozen else (
        SCRATCH_RATE if args.from_scratch else RATE)
    if args.lr and frozen == args.freeze:
        rate = args.lr
    groups = [dict(params=[*head.parameters()], lr=rate)]
    if not frozen:
        groups[0]["lr"] *= 1 if args.from_scratch else HEAD_LR
        groups.append(dict(params=[*vit.train().parameters()], lr=rate))
    batch_size = args.batch_size
    if isinstance(head, nn.Sequential):                 # standardised
        groups[0]["weight_decay"], batch_size = HEAD_DECAY, HEAD_BATCH * batch_size
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = warmup_cosine(optimizer, args.steps)
    scaler = torch.amp.GradScaler(device, 2.0 ** 12, enabled=dtype == torch.float16)
    loss_of = task_loss
    if args.compile and not frozen:                 # features have many shapes, each would compile
        loss_of = torch.compile(task_loss, fullgraph=True, dynamic=False)
    progress = Progress(args, out, saved, kept, head=head, vit=nn.Identity() if frozen else vit,
                        optimizer=optimizer, schedule=schedule, scaler=scaler)
    order = range(progress.step * batch_size + RANK, args.steps * batch_size, WORLD)
    if frozen:                                      # features: nothing of a draw is random but this
        n = len(draws)
        order = (permutation(n, args.seed, i // n)[i % n].item() for i in order)
    batches = DataLoader(draws, batch_size // WORLD, sampler=order, collate_fn=by_shape,
                         num_workers=0 if frozen else args.workers, pin_memory=device == "cuda",
                         worker_init_fn=leave_signals)
    for step, batch in progress.steps(batches):
        total = count = 0
        for inputs, targets in batch:               # one shape each; of crops there is one
            inputs, targets = (x.to(device, non_blocking=True) for x in (inputs, targets))
            part = loss_of(None if frozen else vit, head, inputs, targets, task, dtype)
            total, count = total + part[0], count + part[1]
        count = mean_over_processes(count.to(total.dtype))
        loss = total / count.clamp(min=1)           # crops may hold ignored pixels only
        scaler.scale(loss).backward()
        average_gradients(parameters)               # over torchrun's processes
        scaler.unscale_(optimizer)
        for group in groups:                        # a new head's gradients are large
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        scaler.step(optimizer)
        scaler.update()
        rate = schedule.get_last_lr()[-1]
        schedule.step()
        optimizer.zero_grad()
        progress.done(loss.item(), weights=spec, phase=phase, lr=rate)
        if step % args.every == 0:
            progress.log(held_out=score()[0])
    print(f"{spec}, phase {phase}: {progress.summary()}")
    return progress


def fine_tune(spec, args, data, out, saved, kept, device, dtype):
    """Train and score one of --weights. Its row is added to kept["rows"]. data: see load_data.
    -> the last Progress."""
    torch.compiler.reset()                              # each row compiles and caches anew
    (source, val_source, classes, ids), task, segment = data, args.task, args.task == "segment"
    wide = torch.promote_types(dtype, torch.float32)    # of weights, loss and logits
    vit, head, stage, its_own = begin_row(spec, args, classes, ids)
    vit, head = vit.to(device, wide).eval(), head.to(device, wide)
    vit.recompute = args.recompute
    phases = ["head", "all"] if args.steps and not args.from_scratch else ["all"]
    phases = ["head"] if args.freeze else phases

    lookup = torch.tensor([ids.index(i) if i in ids else IGNORE for i in range(256)]).byte()
    read = partial(read_item, task=task, lookup=lookup, short=args.size)
    crop, whole = views_of(task, args.size, vit.arch.patch)
    crop = crop if args.data else v2.RandomHorizontalFlip()
    loader = partial(DataLoader, batch_size=args.batch_size // WORLD, num_workers=args.workers,
                     collate_fn=by_shape, worker_init_fn=leave_signals)
    shown = Draws(val_source, read, whole)
    held_out = loader(shown)
    score = partial(evaluate, classes=len(classes), task=task, device=device, dtype=dtype)
    for phase in phases[phases.index(kept["phase"]):] if saved else phases:
        kept["phase"], draws, trained = phase, Draws(source, read, crop, args.seed, True), head
        scored = partial(score, vit, head, held_out)
        if phase == "head":             # features of whole photos, computed once, of what is drawn
            most = args.steps * args.batch_size * (1 if segment else HEAD_BATCH)
            most = most if args.freeze else min(most, HEAD_PHOTOS)
            drawn = permutation(len(source), args.seed, 0)[:most]
            view = partial(whole, points=POINTS) if segment else whole
            photos = loader(Draws(Subset(source, sorted(drawn.tolist())), read, view, skip=True),
                            batch_size=args.batch_size)     # items in one order, whatever WORLD is
            draws, seen = (cached(vit, part, task, device, dtype) for part in (photos, held_out))
            seen = loader(seen, num_workers=0)
            if args.steps and not segment:
                features = torch.stack([x for x, _ in draws]).to(device, wide)
                trained = standardised(head, features, its_own)
            elif args.steps and not its_own and args.head == "mask":
                start = [x.flatten(0, 1) for x, _ in draws[::max(1, len(draws) // args.batch_size)]]
                head.whiten(torch.cat(start).to(device, wide))
            scored = partial(score, None, trained, seen)
        progress = train(spec, args, vit, trained, draws, scored, phase, out, saved, kept, device,
                         dtype)
        saved = None                                    # it was of the phase that had been stopped
        if trained is not head:
            fold(*trained)

    facts = dict(task=task, classes=classes, ids=ids, size=args.size, seed=args.seed,
                 head_kind=args.head,
                 frozen=args.freeze if args.steps else vit.header.get("frozen", False))
    i = len(kept["rows"])
    checkpoint = out / f"{i}-{task}.safetensors"
    save_vit(vit, checkpoint, head, stage=stage + "+finetune" * (args.steps > 0), **facts)
    vit.eval()
    percent, per_class, _ = score(None, head, seen) if args.freeze else score(vit, head, held_out)
    kept["rows"].append(dict(
        weights=spec, stage=stage, score=percent, metric="mIoU" if segment else "top-1",
        attention=vit.attention, per_class={
            name: None if math.isnan(value) else value      # JSON knows no NaN
            for name, value in zip(classes, per_class)},
        kept_head=its_own, held_out=len(val_source), device=device, checkpoint=str(checkpoint),
        arguments=vars(args), **facts))
    write_whole(out / "metrics.json", kept["rows"])
    if segment:
        show(picture, vit, head, shown, classes, out / f"{i}-segment.png", device)
    return progress


@torch.no_grad()
def picture(vit, head, held_out, classes, path, device):
    """Eight held-out photos from all over the set, their masks, and what the head says of them."""
    items = [held_out[i] for i in range(0, len(held_out), math.ceil(len(held_out) / 8))]
    logits = [logits_of(vit, head, photo[None].to(device), "segment") for photo, _ in items]
    guesses = [upsampled_classes(logit, mask.shape)[0].cpu()
               for logit, (_, mask) in zip(logits, items)]
    draw_segments(*zip(*items), guesses, classes, path)


@torch.no_grad()
def predict(args, device, dtype):
    """Label photos with a checkpoint of ours: print a line each; to segment, also write a mask of
    ids with a palette. A photo that cannot be read is named, and the others are labelled."""
    spec, wide = args.weights[0], torch.promote_types(dtype, torch.float32)
    vit = load_vit(spec)
    header = vit.header
    if not {"classes", "ids", "head_kind"} <= header.keys():
        raise InputError(f"{spec} has no task head: --predict needs a checkpoint of finetune.py")
    task, classes = header["task"], header["classes"]
    size = header["size"] if args.size is None else args.size
    vit.grid_of(size, size)
    head = make_head(vit.arch, task, len(classes), header["head_kind"], vit.attention)
    head.load_state_dict(vit.head)
    vit, head = vit.to(device, wide), head.to(device, wide).eval()
    ids = torch.tensor(header["ids"])
    photos = {}                                         # real path: (as given, name of its mask)
    for given in map(Path, args.predict):
        for path in map(Path, find_images(given)) if given.is_dir() else [given]:
            name = path.relative_to(given) if given.is_dir() else given.name
            photos[path.resolve()] = path, str(name)
    if len({name for _, name in photos.values()}) < len(photos) and task == "segment":
        raise InputError("two photos of --predict have one name: give their folders one at a time")
    out = open_out(args, [spec, *args.predict])[0] if task == "segment" else None
    whole, failed = views_of(task, size, vit.arch.patch)[1], []
    for path, name in photos.values():
        try:
            photo = read_image(path, None if task == "segment" else size)
            images = whole((photo, 0))[0][None] if task == "segment" else whole(photo)[None]
            logits = logits_of(vit, head, images.to(device), task, dtype)
            if task == "classify":
                share, best = logits[0].softmax(0).max(0)
                print(f"{path}\t{classes[best]}\t{share:.3f}")
                continue
            mask = upsampled_classes(logits, photo.shape[1:])[0].cpu()
            target = out / "masks" / f"{name}.png"      # with its suffix: not a.jpg's over a.png's
            image = Image.fromarray(ids[mask].byte().numpy())
            image.putpalette((PALETTE * 255).byte().flatten().tolist())
            write_whole(target, partial(image.save, format="png"))
            print(f"{path}\t{', '.join(classes[value] for value in mask.unique())}\t{target}")
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
            failed.append(str(path))
    named = [path for path in failed if path in map(str, map(Path, args.predict))]
    if named or len(failed) == len(photos):             # what lies in a folder is only named
        raise InputError(f"not done: {', '.join(named or failed[:3])}")


def main(argv=None):
    args = parse(argv)
    device, dtype = device_and_dtype(args)
    if args.predict:
        return predict(args, device, dtype)
    files, segment = [], args.task == "segment"
    for spec in args.weights:                           # all must be good before we start
        vit, file, _ = load_backbone(spec, args)
        files.append(file)
        args.head = args.head or vit.header.get("head_kind")
        vit.grid_of(args.size, args.size)
    args.head = segment and args.head or "linear"
    source, val_source, classes, ids = data = load_data(args.data, args.task, args.ignore)
    for spec in args.weights if args.steps == 0 else ():
        if not begin_row(spec, args, classes, ids)[-1]:
            raise InputError(f"--steps 0 only scores, but {spec} has no head that fits")
    read = [weights_file(file)[0] for file in files]
    out, saved = open_out(args, [*read, args.data], names(source), names(val_source))
    how = f"{'frozen' if args.freeze else 'tuned'} backbone" if args.steps else "nothing trained"
    print(f"{args.task}: {len(source)} images of {args.size} pixels, {len(val_source)} held out, "
         f"{len(classes)} classes, {how}, {device}, {dtype}")
    kept = saved["kept"] if saved else dict(rows=[])
    for spec in args.weights[len(kept["rows"]):]:
        progress = fine_tune(spec, args, data, out, saved, kept, device, dtype)
        saved = None                                    # it was of the row that had been stopped
    progress.finish()
    rows = kept["rows"]
    print(f"\n{rows[0]['metric']} on {len(val_source)} held-out images, {how}, seed {args.seed}")
    print(f"{' score':7s} attention   stage                weights")
    for row in rows:
        print(f"{row['score']:6.2f}  {row['attention']:11s} {row['stage']:20s} {row['weights']}")
    print("wrote", out / "metrics.json", *(row["checkpoint"] for row in rows))


if __name__ == "__main__":
    run(main)
