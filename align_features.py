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
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.utils import save_image

from demo.shapes import Shapes
from model import Progress, autocast, average, bar, complete, device_and_dtype, fingerprint
from model import load_pair, loaders, note_unread, one_cycle, open_out, pair_flags, run, run_flags
from model import save_vit, unlabelled, update, widen, write_whole

DEFAULTS = dict(steps=5000, batch_size=32, lr=5e-5)
DEMO = dict(teacher="demo/teacher.safetensors", size=64, steps=150, batch_size=64, lr=5e-4)
CURVE = "whitened_error"                        # what --every logs of held-out images
STAGE_1 = dict(student="runs/attention/student.safetensors")    # demo, unless --attention is given


def parse(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    pair_flags(flag, DEMO | STAGE_1)
    flag("--loss", choices=LOSS, default="whitened",
         help="of final tokens (default: whitened; the paper's: mse)")
    flag("--lr", type=float, help="peak learning rate; the better stage 1 was, the lower (default: "
         f"{DEFAULTS['lr']}, demo: {DEMO['lr']})")
    run_flags(flag, "runs/features", DEFAULTS, DEMO)
    args = parser.parse_args(argv)
    return complete(args, DEFAULTS, DEMO if args.attention else DEMO | STAGE_1)


def mse(student, teacher, whiten):
    """Squared error of all final tokens alike. Paper: not said whether CLS counts; here: yes."""
    return F.mse_loss(student, teacher)


def cosine(student, teacher, whiten):
    """1 - cosine of each token + 0.1 smooth-L1 for its length, so long tokens do not outweigh."""
    alike = F.cosine_similarity(student, teacher, dim=-1).mean()
    return 1 - alike + 0.1 * F.smooth_l1_loss(student, teacher)


def whitened(student, teacher, whiten):
    """Squared error in which all directions of the teacher's tokens weigh alike.

    One direction holds half of the variance of DINOv2's tokens, so it dominates mse and cosine;
    heads read the small directions, too.
    """
    return ((student - teacher) @ whiten).square().mean()


LOSS = {"mse": mse, "cosine": cosine, "whitened": whitened}


@torch.no_grad()
def whitening(teacher, draws, batch_size, device, dtype, images=128):
    """Covariance of the teacher's final tokens, CLS too, -> whiten (C, C), its -1/2th power.

    Of the run's first draws. 0.03 of the mean eigenvalue is added: no direction becomes all noise.
    """
    n = total = square = 0                              # all tokens at once would take gigabytes
    batches = DataLoader(draws, batch_size, sampler=range(min(images, len(draws))))
    for photos, _ in bar(batches, "whitening"):
        with autocast(device, dtype):
            tokens = widen(teacher(teacher.normalize(photos.to(device)))).flatten(0, 1)
        x = tokens.double()
        n, total, square = n + len(x), total + x.sum(0), square + x.T @ x
    values, vectors = torch.linalg.eigh((square - total.outer(total) / n) / (n - 1))
    whiten = (vectors * (values + 0.03 * values.mean()).rsqrt()) @ vectors.T
    return whiten.to(tokens.dtype)


def feature_alignment(teacher, student, images, loss, dtype=torch.float32):
    """Stage 2 (Fig. 4, middle): uint8 images (B, 3, H, W) -> loss of final tokens (B, 1+R+N, C)."""
    images = teacher.normalize(images)
    with autocast(images.device.type, dtype):
        with torch.no_grad():
            target = teacher(images)
        output = student(images)
    return loss(widen(output), widen(target))           # nothing in between is supervised


@torch.no_grad()
def compare(teacher, student, batches, whiten, device, dtype, note=lambda _: None):
    """Held-out agreement of the final tokens: cosine of CLS (None without) and patches, errors.

    The errors are roots of squared error over that of the mean token, plain and whitened: 1 is no
    better than a constant.
    """
    prefix, cls, patches = teacher.arch.prefix, [], []
    sums = torch.zeros(2, 2, dtype=torch.float64, device=device)    # plain, whitened; error, energy
    for images, messages in bar(batches, "tokens"):
        note(messages)                      # of photos that could not be read
        images = teacher.normalize(images.to(device))
        with autocast(device, dtype):
            want, have = widen(teacher(images)), widen(student(images))
        alike = F.cosine_similarity(have, want, dim=-1)                     # (B, 1+R+N)
        cls.append(alike[:, 0])
        patches.append(alike[:, prefix:].mean(1))
        for apart, total in zip((have - want, want - want.mean((0, 1))), sums.T):   # error, energy
            total += torch.stack([x.square().sum() for x in (apart, apart @ whiten)])
    plain, white = (sums[:, 0] / sums[:, 1].clamp(min=1e-12)).sqrt().tolist()
    return dict(cls_cosine=torch.cat(cls).mean().item() if teacher.arch.cls else None,
                patch_cosine=torch.cat(patches).mean().item(),
                relative_error=plain, whitened_error=white)


@torch.no_grad()
def picture(teacher, student, images, path):
    """Rows: photo, teacher, student. Three main axes of the teacher's patches are the colours."""
    normal, grid = teacher.normalize(images), teacher.grid(*images.shape[2:])
    want, have = (vit(normal)[:, vit.arch.prefix:].float() for vit in (teacher, student))
    centre = want.mean((0, 1))
    axes = torch.pca_lowrank(want.flatten(0, 1) - centre, q=3, center=False)[2]             # (C, 3)
    colours = (torch.cat([want, have]) - centre) @ axes                     # (2B, N, 3)
    low, high = (colours[:len(want)].flatten(0, 1).quantile(q, dim=0) for q in (0.01, 0.99))
    colours = ((colours - low) / (high - low)).clamp(0, 1).mT.unflatten(2, grid)
    rows = torch.cat([images / 255, F.interpolate(colours, size=images.shape[2:], mode="nearest")])
    write_whole(path, partial(save_image, rows, nrow=len(images), format="png"))


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    teacher, student, digest = load_pair(args.teacher, args.student, args.attention,
                                         args.keep_softmax)
    stage = "features" if student.facts.get("stage") in (None, "features") else "attention+features"
    args.size = teacher.arch.pixels[0] if args.size is None else args.size
    teacher.grid(args.size, args.size)
    source, held_out = unlabelled(args.data) if args.data else (Shapes("train"), Shapes("val"))
    read = fingerprint([args.teacher, args.student], source, held_out)
    out, saved = open_out(args, [args.teacher, args.student, *(args.data or [])], read)
    wide = torch.promote_types(dtype, torch.float32)    # of weights; autocast's is dtype
    teacher, student = teacher.to(device, wide).requires_grad_(False), student.to(device, wide)
    print(f"{student.attention} attention, training all "
          f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters on "
          f"{len(source)} images of {args.size} pixels, {device}, {dtype}")

    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=0)
    schedule = one_cycle(optimizer, args.steps)
    align = torch.compile(feature_alignment, fullgraph=True) if args.compile else feature_alignment
    train, held_out = loaders(args, source, held_out, saved["step"] if saved else 0)
    few = [(next(iter(held_out))[0], [])]   # one held-out batch, for the curve

    kept = saved["kept"] if saved else dict(unread=[])
    note = partial(note_unread, unread=kept["unread"], listed=len(source) + len(held_out.dataset))
    if not saved:
        kept["whiten"] = whitening(teacher, train.dataset, train.batch_size, device, dtype)
        kept["before"] = compare(teacher, student, held_out, kept["whiten"], device, dtype, note)
    whiten = kept["whiten"].to(device)
    loss_of = partial(LOSS[args.loss], whiten=whiten)
    student.train()
    progress = Progress(args, out, saved, read, kept, student=student, optimizer=optimizer,
                        schedule=schedule, scaler=scaler)
    with progress:
        for step, (images, messages) in enumerate(train, progress.step + 1):
            note(messages)
            images = images.to(device, non_blocking=True)
            loss = align(teacher, student, images, loss_of, dtype)          # feature alignment
            scaler.scale(loss).backward()
            row = dict(lr=update(scaler, optimizer, schedule, [[*student.parameters()]]))
            if step % args.every == 0:
                row["held_out"] = compare(teacher, student, few, whiten, device, dtype)[CURVE]
            progress.done(average([loss.detach()])[0].item(), **row)

    facts = dict(stage=stage, teacher=digest, training={
        key: getattr(args, key) for key in ("loss", "size", "steps", "batch_size", "lr", "seed")})
    save_vit(student, out / "student.safetensors", **facts)
    after = compare(teacher, student.eval(), held_out, whiten, device, dtype, note)
    print(f"\nheld-out final tokens, student against teacher ({args.steps} steps, "
          f"{progress.seconds:.0f} s)\n{'':16s}before  after")
    for key, old in kept["before"].items():
        if old is not None:
            print(f"{key:16s}{old:6.3f}  {after[key]:5.3f}")
    write_whole(out / "report.json", facts | dict(
        before=kept["before"], after=after, seconds=progress.seconds, unread=kept["unread"],
        arguments=vars(args)))
    shown = held_out.dataset                # eight of them, from all over the set
    places = range(0, len(shown), math.ceil(len(shown) / 8))
    images = torch.stack([shown[i][0] for i in places])
    if len(images) * (args.size // teacher.arch.patch) ** 2 > 3:    # 3 axes need 4 patches
        picture(teacher, student, images.to(device), out / "features.png")
    progress.finish()
    print(f"wrote {out / 'student.safetensors'}")


if __name__ == "__main__":
    run(main)
