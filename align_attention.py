"""Stage 1 of ViT-AdaLA, attention alignment: each block learns to output what softmax does.

The frozen softmax teacher carries the residual stream. In every block the student's attention sees
the teacher's input. Its query, key, value and output weights, and its operator's own parameters,
are tuned until its output matches the teacher's. No labels are used.

    python align_attention.py                                   # the demo, a minute on a CPU
    python align_attention.py --teacher vit_small_patch14_dinov2 --data photos/ --size 224
    python align_attention.py --attention hedgehog --train operator     # LoLCATS' maps
    torchrun --nproc-per-node 8 align_attention.py ...          # --batch-size is of all together

It reads the teacher's weights and photos. It writes to --out: student.safetensors, log.jsonl (the
loss of every block at every step), report.json (the table printed at the end) and attention.png
(where teacher and student look). After a stop (Ctrl-C, kill -9) the same command goes on.
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
import torch.nn as nn
import torch.nn.functional as F

from demo.shapes import Shapes
from model import ATTENTION, load_pair, save_vit, weights_file
from support.photos import loaders, names, save_picture, unlabelled
from support.runs import InputError, Progress, autocast, average_gradients, bar, device_and_dtype
from support.runs import mean_over_processes, open_out, parse_args, run, show, warmup_cosine
from support.runs import widen, write_whole

DEFAULTS = dict(steps=2000, batch_size=32)
DEMO = dict(teacher="demo/teacher.safetensors", size=64, steps=100, batch_size=64)    # no --data
GROUPS = "qkv", "operator", "proj"      # what --train takes: modules of Attention
OPERATOR_LR = 5                 # what is new, not pretrained, learns this much faster
PREFIX_WEIGHT = 0.1             # in the loss, of CLS and registers together; the patches' is 1


def parse(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--teacher", help=f"softmax ViT: a name, a file or NAME=FILE (demo: {DEMO['teacher']})")
    flag("--student", help="a student of this teacher to train further (default: the teacher, "
         "with its attention swapped)")
    flag("--attention", choices=ATTENTION, help="operator without --student (default: linear)")
    flag("--data", nargs="+", help="folders of photos (default: the demo's)")
    flag("--train", choices=GROUPS, nargs="+", default=GROUPS,
         help="what is tuned: query, key and value (the paper's), the operator's own parameters, "
         "the output projection (default: all three)")
    flag("--lr", type=float, default=3e-3, help="peak learning rate, "
         f"{OPERATOR_LR} times that for the operator's own parameters (default: 3e-3)")
    args = parse_args(parser, argv, "runs/attention", DEFAULTS, DEMO)
    if args.teacher is None:
        raise InputError("--teacher is missing: with --data, name the softmax ViT to imitate")
    return args


def trained_parameters(student, groups):
    """Freeze all but these GROUPS. -> for each block, its trained parameters."""
    student.requires_grad_(False)
    by_block = [[p for name in dict.fromkeys(groups)
                 for p in getattr(block.attn, name).parameters()] for block in student.blocks]
    if not any(by_block):
        raise InputError(f"--train {' '.join(groups)}: {student.attention} attention has no "
                         "parameters of its own to train")
    for p in sum(by_block, []):
        p.requires_grad_(True)
    return by_block


@torch.no_grad()
def exponential_start(student):
    """Lower query and key biases, once, by what the operator says: 1 + ELU(x) is exp(x) below 0.

    Softmax weighs by exponentials, so phi should be one. The factor exp(-4) cancels in the output.
    Paper: no word of phi's scale. Here: the held-out error after 60 steps is 0.516, not 0.586.
    """
    for block in student.blocks:
        if block.attn.qkv.bias is not None:             # DINOv3 has none
            for part in block.attn.qkv.bias.chunk(3)[:2]:               # q, k, not v
                part += block.attn.operator.bias_shift


@torch.no_grad()
def first_tokens(teacher, images, dtype):
    """uint8 images (B, 3, height, width) -> (tokens before the first block (B, N, C), grid)."""
    with autocast(images.device.type, dtype):
        return teacher.embed(teacher.normalize(images))


def attention_maps(teacher, vits, images, queries):
    """Where each of `vits` looks from patches `queries`, in a late block, on the teacher's stream.

    -> (vits, queries, B, P), mean over heads. No map is ever formed: the weights of a query are the
    gradient of its output with respect to V, so this is O(N) and holds for every operator. Absolute
    values show how much a patch counts, because a convolution's weights may be negative.
    """
    maps, late = [], teacher.arch.depth * 3 // 4
    with torch.no_grad():
        x, grid = teacher.embed(teacher.normalize(images))
        for block in teacher.blocks[:late]:
            x = block(x, grid)
    for vit in vits:
        block = vit.blocks[late]
        q, k, v = (part.detach() for part in block.attn.project(teacher.blocks[late].norm1(x)))
        with torch.enable_grad():
            out = block.attn.attend(q, k, v.requires_grad_(), grid)         # (B, N, C)
            maps += [torch.autograd.grad(out[:, vit.arch.prefix + query].sum(), v, retain_graph=True
                                         )[0].abs().mean((1, 3)) for query in queries]
    return torch.stack(maps)[..., teacher.arch.prefix:].unflatten(0, (len(vits), len(queries)))


def draw_attention(maps, images, queries, grid, path):
    """Columns: each query, a white patch, in each photo. Rows: photo, teacher, before, after."""
    maps = maps.float().permute(2, 1, 0, 3).flatten(0, 1)                   # (B * queries, vits, P)
    maps = (maps / maps[:, :1].amax(-1, keepdim=True)).clamp(max=1).sqrt()  # one scale a column
    marks = F.one_hot(torch.tensor(queries * len(images), device=maps.device), maps.shape[2])
    maps = torch.cat([marks.unsqueeze(1), maps], dim=1).unflatten(2, grid)
    mark, *maps = F.interpolate(maps, size=images.shape[2:]).unsqueeze(2).unbind(1)
    photos = (images.repeat_interleave(len(queries), 0) / 255).maximum(mark)
    rows = [photos, *(photos * 0.3 + 0.7 * part for part in maps)]
    save_picture(rows, ["photo; the white patch is the query", "where the softmax teacher looks",
                        "where the student looked before", "and after stage 1"], path)


def weighted_square(x, patches):
    """Sum of squares of x (B, N, C), of which the last `patches` tokens are the patches.

    Prefix tokens together weigh a tenth of the patches: CLS is one token of hundreds, and half of
    what heads read. Paper: not said. Here: CLS cosine after 80 steps is 0.878, not 0.843.
    """
    prefix, x = x.square().tensor_split([x.shape[1] - patches], dim=1)
    return x.sum() + PREFIX_WEIGHT * x.numel() / max(1, prefix.numel()) * prefix.sum()


def block_alignment(teacher, student, x, grid, dtype=torch.float32):
    """One block of stage 1 (Fig. 4, left): the same input for both, the teacher's output goes on.

    teacher, student: Block. x (B, N, C): the teacher's residual stream. -> (x after the teacher's
    block, error, scale): the squared error after the output projection, and that of uniform
    attention, whose output is the mean of V. Their ratio is the loss: 0 equals softmax, 1 ignores
    the query. Paper: "squared error". Here: the ratio, so that all blocks weigh alike.
    """
    with autocast(x.device.type, dtype):
        with torch.no_grad():
            h = teacher.norm1(x)
            q, k, v = teacher.attn.project(h)                               # each (B,H,N,D)
            target = teacher.attn.proj(teacher.attn.attend(q, k, v, grid))  # (B,N,C)
            uniform = teacher.attn.proj(v.mean(2).flatten(1).unsqueeze(1))  # (B,H,N,D) -> (B,1,C)
            x = x + teacher.ls1(target)
            x = x + teacher.ls2(teacher.mlp(teacher.norm2(x)))
        output = student.attn(h, grid)                  # (B,N,C), the only trained forward pass
    target = widen(target)
    error, scale = (weighted_square(widen(part) - target, grid[0] * grid[1])
                    for part in (output, uniform))
    return x, error, scale.clamp(min=1e-12)             # 0: a single token


@torch.no_grad()
def relative_error(teacher, student, batches, device, dtype):
    """Held-out error of each block's attention output: the root of the loss, so 1 is uniform."""
    sums = torch.zeros(len(teacher.blocks), 2, dtype=torch.float64, device=device)
    for images in bar(batches, "blocks"):
        x, grid = first_tokens(teacher, images.to(device), dtype)
        for theirs, ours, total in zip(teacher.blocks, student.blocks, sums):
            x, error, scale = block_alignment(theirs, ours, x, grid, dtype)
            total += torch.stack([error, scale])
    return (sums[:, 0] / sums[:, 1]).sqrt().tolist()


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args)
    scaler = torch.amp.GradScaler(device, 2.0 ** 12, enabled=dtype == torch.float16)

    teacher, student, digest = load_pair(args.teacher, args.student, args.attention, args.size)
    usual = (teacher.header | student.header).get("size", teacher.arch.pixels[0])
    args.size = usual if args.size is None else args.size
    teacher.grid_of(args.size, args.size)               # a multiple of the patch, or an InputError
    by_block = trained_parameters(student, args.train)
    parameters = sum(by_block, [])
    source, held_out = unlabelled(args.data) if args.data else (Shapes("train"), Shapes("val"))
    read = [weights_file(spec)[0] for spec in (args.teacher, args.student) if spec]
    out, saved = open_out(args, [*read, *(args.data or [])], names(source), names(held_out))
    wide = torch.promote_types(dtype, torch.float32)    # of weights; autocast's is dtype
    teacher, student = teacher.to(device, wide).requires_grad_(False), student.to(device, wide)
    print(f"{student.attention} attention, training {', '.join(args.train)} of all blocks on "
          f"{len(source)} images of {args.size} pixels, {device}, {dtype}")

    new = {p for block in student.blocks for p in block.attn.operator.parameters()}
    optimizer = torch.optim.AdamW(
        [dict(params=[p for p in parameters if p in new], lr=OPERATOR_LR * args.lr),
         dict(params=[p for p in parameters if p not in new])],
        args.lr, weight_decay=0)                        # stay near the teacher's
    schedule = warmup_cosine(optimizer, args.steps)
    align = block_alignment
    if args.compile:
        align = torch.compile(block_alignment, fullgraph=True, dynamic=False)
    train, held_out = loaders(args, source, held_out, saved["step"] if saved else 0)
    few = next(iter(held_out))              # one held-out batch, for the log and the picture
    pair = few[:2].to(device)
    rows, columns = teacher.grid_of(*pair.shape[2:])
    queries = [rows * n // 8 * columns + columns * n // 8 for n in (2, 4, 6)]

    kept = saved["kept"] if saved else dict(
        before=relative_error(teacher, student, held_out, device, dtype),
        maps=attention_maps(teacher, [teacher, student], pair, queries))
    if args.student is None:                            # after "before", which is the bare swap
        exponential_start(student)
    progress = Progress(args, out, saved, kept, student=student, optimizer=optimizer,
                        schedule=schedule, scaler=scaler)
    for step, images in progress.steps(train):
        x, grid = first_tokens(teacher, images.to(device, non_blocking=True), dtype)
        losses = []
        for theirs, ours in zip(teacher.blocks, student.blocks):
            x, error, scale = align(theirs, ours, x, grid, dtype)       # attention alignment
            loss = error / mean_over_processes(scale)   # error's mean is that of its gradients
            scaler.scale(loss).backward()               # now: memory holds one block's activations
            losses.append(loss.detach())
        average_gradients(parameters)                   # over torchrun's processes
        scaler.unscale_(optimizer)
        for part in by_block:                           # each block is a problem of its own
            nn.utils.clip_grad_norm_(part, 1.0)
        scaler.step(optimizer)
        scaler.update()
        rate = schedule.get_last_lr()[-1]
        schedule.step()
        optimizer.zero_grad()
        blocks = mean_over_processes(torch.stack(losses)).tolist()
        progress.done(sum(blocks) / len(blocks), lr=rate, blocks=blocks)
        if step % args.every == 0:
            errors = relative_error(teacher, student, [few], device, dtype)
            progress.log(held_out=sum(errors) / len(errors))

    stage = student.header.get("stage", "attention")
    stage = stage if stage.endswith("attention") else f"{stage}+attention"
    facts = student.header | dict(stage=stage, teacher=digest, size=args.size, training={
        key: getattr(args, key) for key in ("train", "size", "steps", "batch_size", "lr", "seed")})
    save_vit(student, out / "student.safetensors", **facts)
    before, after = kept["before"], relative_error(teacher, student, held_out, device, dtype)
    write_whole(out / "report.json", facts | dict(
        before=before, after=after, seconds=progress.seconds, arguments=vars(args)))
    print("\nheld-out relative error of the attention output: 0 is softmax, 1 is uniform\n"
          "attention, which ignores the query\nblock  before  after")
    for block, (old, new) in enumerate(zip(before, after)):
        print(f"{block:5d}  {old:6.3f}  {new:5.3f}")
    before, after = (sum(part) / len(part) for part in (before, after))
    print(f" mean  {before:6.3f}  {after:5.3f}\n{progress.summary()}")
    if after >= min(before, 1):
        print("Stage 1 did not help: its mean error is not below both 1 and what it was. Train "
              "for more --steps, or lower --lr.")
    maps = torch.cat([kept["maps"].to(device), attention_maps(teacher, [student], pair, queries)])
    show(draw_attention, maps, pair, queries, (rows, columns), out / "attention.png")
    progress.finish()
    print(f"wrote {out / 'student.safetensors'}")


if __name__ == "__main__":
    run(main)
