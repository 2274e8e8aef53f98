"""Stage 2 of ViT-AdaLA, feature alignment: the whole student learns its teacher's final features.

After stage 1 each block imitates softmax attention on the teacher's input, but errors add up. Here
the student runs on its own, every weight is tuned, and only the final tokens are supervised.

    python align_features.py                                    # the demo, three minutes on a CPU
    python align_features.py --teacher vit_small_patch14_dinov2 --data photos/ --size 224 \\
        --student runs/attention/student.safetensors            # after stage 1 on your photos
    python align_features.py --teacher ... --data ... --attention linear    # without stage 1

It reads teacher, student and photos. It writes to --out: student.safetensors (with the head of a
fine-tuned teacher), log.jsonl, report.json and features.png (patch features as colours).
"""
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from demo.shapes import Shapes
from model import ATTENTION, load_pair, save_vit, weights_file
from support.photos import loaders, names, save_picture, unlabelled
from support.runs import InputError, Progress, autocast, average_gradients, bar, device_and_dtype
from support.runs import open_out, parse_args, run, show, warmup_cosine, widen, write_whole

DEFAULTS = dict(steps=5000, batch_size=32, lr=5e-5)
DEMO = dict(teacher="demo/teacher.safetensors", student="runs/attention/student.safetensors",
            size=64, steps=150, batch_size=64, lr=5e-4)       # without --data
RIDGES = [0.03 * 3 ** k for k in range(7)]      # of whitening, in mean eigenvalues


def parse(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--teacher", help=f"softmax ViT: a name, a file or NAME=FILE (demo: {DEMO['teacher']})")
    flag("--student", help="a student of this teacher to train further (default: the teacher, "
         f"with its attention swapped; demo: {DEMO['student']})")
    flag("--attention", choices=ATTENTION, help="operator without --student (default: linear)")
    flag("--data", nargs="+", help="folders of photos (default: the demo's)")
    flag("--loss", choices=LOSS, default="whitened",
         help="of final tokens (default: whitened; the paper's: mse)")
    flag("--lr", type=float, help="peak learning rate; the better stage 1 was, the lower (default: "
         f"{DEFAULTS['lr']}, demo: {DEMO['lr']})")
    flag("--recompute", action="store_true", help="blocks again in the backward pass: less memory")
    args = parse_args(parser, argv, "runs/features", DEFAULTS, DEMO)
    if args.teacher is None:
        raise InputError("--teacher is missing: with --data, name the softmax ViT to imitate")
    return args


def mse(student, teacher, whiten):
    """Squared error of all final tokens alike. Paper: not said whether CLS counts. Here: yes."""
    return F.mse_loss(student, teacher)


def whitened(student, teacher, whiten):
    """Squared error after whitening with the covariance of the teacher's tokens, so that the few
    large directions do not dominate: one holds half of the variance of DINOv2's tokens, and heads
    read the small ones, too. student, teacher: (B, N, C)."""
    return ((student - teacher) @ whiten).square().mean()


LOSS = {"mse": mse, "whitened": whitened}


def moments(sums):
    """Sum of (x, 1) (x, 1)^T over vectors x (C) -> their mean (C) and covariance (C, C)."""
    sums = sums / sums[-1, -1].clamp(min=1)
    return sums[-1, :-1], sums[:-1, :-1] - sums[-1, :-1].outer(sums[-1, :-1])


@torch.no_grad()
def whitening(teacher, draws, most, device, dtype):
    """Look at the teacher's final tokens on the first `most` draws. -> dict(whiten (C, C), the
    -1/2th power of their covariance plus a ridge; constant (N, C), the mean of each prefix token,
    and for every patch the mean patch; ridge, in mean eigenvalues).

    A covariance of few photos overrates the directions in which they happen not to vary. So each
    quarter of the photos is whitened by the other three. The ridge is the smallest of RIDGES for
    which the quarters' mean square is within 5 % of what it is on the three, else the largest.
    whiten is scaled so that it is 1 over all photos: a loss of 1 is no better than a constant.
    """
    sums, means = torch.zeros(4, *[teacher.arch.width + 1] * 2, device=device).double(), []
    order = range(min(most, len(draws)))
    for photos in bar(DataLoader(draws, 8, sampler=order), "whitening"):
        with autocast(device, dtype):
            tokens = widen(teacher(teacher.normalize(photos.to(device)))).double()      # (B,N,C)
        prefix, patches = tokens.tensor_split([teacher.arch.prefix], dim=1)
        means += torch.cat([prefix, patches.mean(1, keepdim=True)], dim=1)
        for i, total in enumerate(sums):
            x = F.pad(tokens[i::4].flatten(0, 1), (0, 1), value=1)
            total += x.T @ x
    pairs = []                                          # variance along axes: of three, of one
    for part in sums:
        (mean, three), (centre, quarter) = map(moments, (sums.sum(0) - part, part))
        values, axes = torch.linalg.eigh(three)
        quarter = quarter + (centre - mean).outer(centre - mean)        # around the same mean
        pairs.append(torch.stack([values, (quarter @ axes * axes).sum(0)]))
    for ridge in RIDGES if len(order) >= 4 else RIDGES[-1:]:
        three, quarter = sum((both / (both[0] + ridge * both[0].mean())).mean(1) for both in pairs)
        gap = (quarter / three - 1).item()
        if abs(gap) < 0.05:
            break
    print(f"whitening: {len(order)} photos, ridge {ridge:.2f}, energy of unseen ones {gap:+.1%}")
    values, axes = torch.linalg.eigh(moments(sums.sum(0))[1])           # of all of them
    floor = values + ridge * values.mean()
    whiten = axes * (floor * (values / floor).mean()).rsqrt() @ axes.T
    constant = torch.stack(means).mean(0)
    constant = torch.cat([constant[:-1], constant[-1:].expand(patches.shape[1], -1)])
    wide = torch.promote_types(dtype, torch.float32)
    return dict(whiten=whiten.to(wide), constant=constant.to(wide), ridge=ridge)


@torch.no_grad()
def compare(teacher, student, batches, whiten, constant, device, dtype):
    """Held-out agreement of the final tokens: cosine of CLS (None without) and patches, errors.

    student: a ViT, or any function from normalised images to tokens (B, N, C). The errors are roots
    of the squared error over that of the constant (N, C), plain and whitened.
    """
    prefix, cls, patches = teacher.arch.prefix, [], []
    sums = torch.zeros(2, 2, dtype=torch.float64, device=device)    # error, energy; plain, whitened
    for images in bar(batches, "tokens"):
        images = teacher.normalize(images.to(device))
        with autocast(device, dtype):
            want, have = widen(teacher(images)), widen(student(images))
        alike = F.cosine_similarity(have, want, dim=-1)                     # (B, N)
        cls.append(alike[:, 0])
        patches.append(alike[:, prefix:].mean(1))
        for x, total in zip((have - want, constant - want), sums):
            total += torch.stack([x.square().sum(), (x @ whiten).square().sum()])
    plain, white = (sums[0] / sums[1].clamp(min=1e-12)).sqrt().tolist()
    return dict(cls_cosine=torch.cat(cls).mean().item() if teacher.arch.cls else None,
                patch_cosine=torch.cat(patches).mean().item(),
                relative_error=plain, whitened_error=white)


def report(before, after, constant):
    """Print all measures. Say which cosine fell, and which error is no better than a constant's."""
    print(f"\nheld-out final tokens, student against teacher\n{'':16s}before  after  constant")
    worse = []
    for key in (key for key in after if after[key] is not None):
        print(f"{key:16s}{before[key]:6.3f}  {after[key]:5.3f}  {constant[key]:8.3f}")
        if after[key] < before[key] if "cosine" in key else after[key] >= constant[key]:
            worse.append(key + (" fell" if "cosine" in key else " is no better than a constant's"))
    print("constant: the teacher's mean CLS token and mean patch token, whatever the photo")
    if worse:
        print(f"{'; '.join(worse)}: run stage 1 for more --steps, or lower --lr.")


@torch.no_grad()
def draw_features(teacher, student, images, path):
    """Rows: photo, teacher, student. Three main axes of the teacher's patches are the colours."""
    normal, grid = teacher.normalize(images), teacher.grid_of(*images.shape[2:])
    want, have = (vit(normal)[:, vit.arch.prefix:].float() for vit in (teacher, student))
    centre = want.mean((0, 1))
    axes = torch.pca_lowrank(want.flatten(0, 1) - centre, q=3, center=False)[2]             # (C, 3)
    colours = (torch.cat([want, have]) - centre) @ axes                     # (2B, P, 3)
    colours = (colours / colours[:len(want)].std((0, 1))).sigmoid().mT.unflatten(2, grid)
    colours = F.interpolate(colours, size=images.shape[2:], mode="nearest")
    save_picture([images / 255, *colours.chunk(2)],
                 ["photo", "the teacher's patch features, three main axes as colours",
                  "the student's, in the same colours"], path)


def feature_alignment(teacher, student, images, loss, dtype=torch.float32):
    """Stage 2 (Fig. 4, middle): uint8 images (B, 3, S, S) -> loss of the final tokens (B, N, C)."""
    images = teacher.normalize(images)
    with autocast(images.device.type, dtype):
        with torch.no_grad():
            target = teacher(images)
        output = student(images)
    return loss(widen(output), widen(target))           # nothing in between is supervised


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args)
    scaler = torch.amp.GradScaler(device, 2.0 ** 12, enabled=dtype == torch.float16)

    teacher, student, digest = load_pair(args.teacher, args.student, args.attention, args.size)
    usual = (teacher.header | student.header).get("size", teacher.arch.pixels[0])
    args.size = usual if args.size is None else args.size
    teacher.grid_of(args.size, args.size)               # a multiple of the patch, or an InputError
    source, held_out = unlabelled(args.data) if args.data else (Shapes("train"), Shapes("val"))
    read = [weights_file(spec)[0] for spec in (args.teacher, args.student) if spec]
    out, saved = open_out(args, [*read, *(args.data or [])], names(source), names(held_out))
    wide = torch.promote_types(dtype, torch.float32)    # of weights; autocast's is dtype
    teacher, student = teacher.to(device, wide).requires_grad_(False), student.to(device, wide)
    parameters, student.recompute = [*student.parameters()], args.recompute
    print(f"{student.attention} attention, training all weights on {len(source)} images of "
          f"{args.size} pixels, {device}, {dtype}")

    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=0)
    schedule = warmup_cosine(optimizer, args.steps)
    align = feature_alignment
    if args.compile:
        align = torch.compile(feature_alignment, fullgraph=True, dynamic=False)
    train, held_out = loaders(args, source, held_out, saved["step"] if saved else 0)
    few = [next(iter(held_out))]            # one held-out batch, for the log
    most = min(1024, args.steps * args.batch_size)
    kept = saved["kept"] if saved else whitening(teacher, train.dataset, most, device, dtype)
    whiten, constant = kept["whiten"].to(device), kept["constant"].to(device)
    measure = partial(compare, teacher, whiten=whiten, constant=constant, device=device,
                      dtype=dtype)
    if not saved:
        kept["before"] = measure(student, held_out)
        kept["of_constant"] = measure(lambda images: constant.expand(len(images), -1, -1), held_out)
    loss_of = partial(LOSS[args.loss], whiten=whiten)
    student.train()
    progress = Progress(args, out, saved, kept, student=student, optimizer=optimizer,
                        schedule=schedule, scaler=scaler)
    for step, images in progress.steps(train):
        images = images.to(device, non_blocking=True)
        loss = align(teacher, student, images, loss_of, dtype)          # feature alignment
        scaler.scale(loss).backward()
        average_gradients(parameters)                   # over torchrun's processes
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        rate = schedule.get_last_lr()[-1]
        schedule.step()
        optimizer.zero_grad()
        progress.done(loss.item(), lr=rate)
        if step % args.every == 0:
            progress.log(held_out=measure(student, few)["whitened_error"])

    stage = student.header.get("stage", "features")
    stage = stage if stage.endswith("features") else f"{stage}+features"
    facts = student.header | dict(stage=stage, teacher=digest, size=args.size, training={
        key: getattr(args, key) for key in ("loss", "size", "steps", "batch_size", "lr", "seed")})
    save_vit(student, out / "student.safetensors", **facts)
    before, after = kept["before"], measure(student.eval(), held_out)
    write_whole(out / "report.json", facts | dict(
        before=before, after=after, constant=kept["of_constant"], ridge=kept["ridge"],
        seconds=progress.seconds, arguments=vars(args)))
    report(before, after, kept["of_constant"])
    print(progress.summary())
    photos = held_out.dataset               # eight of them, from all over the set
    images = [photos[i] for i in range(0, len(photos), math.ceil(len(photos) / 8))]
    show(draw_features, teacher, student, torch.stack(images).to(device), out / "features.png")
    progress.finish()
    print(f"wrote {out / 'student.safetensors'}")


if __name__ == "__main__":
    run(main)
