"""Stage 1 of ViT-AdaLA, attention alignment: each block learns to output what softmax does.

The frozen softmax teacher carries the residual stream. In every block the student's attention sees
exactly the teacher's normalised input; its query, key, value and output weights, and its operator's
own parameters, are tuned until its output matches the teacher's. No labels.

    python align_attention.py                                   # the demo, a minute on a CPU
    python align_attention.py --teacher vit_small_patch14_dinov2 --data photos/ --size 224
    python align_attention.py --attention hedgehog --train operator     # LoLCATS' maps
    torchrun --nproc-per-node 8 align_attention.py ...          # --batch-size is of all together

Reads the teacher's weights and images; writes to --out: student.safetensors, log.jsonl (the loss of
every block at every step), report.json (the table printed at the end), attention.png (where teacher
and student look) and curves.png. If it is stopped (Ctrl-C, kill -9), the same command goes on.
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from align_features import compare, whitening           # for the report at the end, see stage 2
from demo.shapes import Shapes
from model import InputError, Progress, autocast, average, bar, complete, device_and_dtype
from model import fingerprint, load_pair, loaders, note_unread, one_cycle, open_out, pair_flags
from model import run, run_flags, save_vit, unlabelled, update, widen, write_whole

DEFAULTS = dict(steps=2000, batch_size=32)
GROUPS = "qkv", "operator", "proj"      # what --train takes: modules of Attention
OPERATOR_LR = 5                 # what is new, not pretrained, learns this much faster
PREFIX_WEIGHT = 0.1             # in the loss, of CLS and registers together; the patches' is 1
DEMO = dict(teacher="demo/teacher.safetensors", size=64, steps=100, batch_size=64)  # without --data


def parse(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    pair_flags(flag, DEMO)
    flag("--train", choices=GROUPS, nargs="+", default=GROUPS,
         help="what is tuned: query, key and value (the paper's), the operator's own parameters, "
         "the output projection (default: all three)")
    flag("--lr", type=float, default=3e-3, help="peak learning rate, "
         f"{OPERATOR_LR} times that for the operator's own parameters (default: 3e-3)")
    run_flags(flag, "runs/attention", DEFAULTS, DEMO)
    return complete(parser.parse_args(argv), DEFAULTS, DEMO)


def weighted_square(x, patches):
    """Sum of squares of x (B, prefix + N, C), the last `patches` tokens being the N patches.

    Prefix tokens together weigh a tenth of the patches: CLS alone is one of hundreds, and half of
    what heads read. Paper: not said; here: CLS cosine after 80 steps 0.878, not 0.843.
    """
    prefix, x = x.square().tensor_split([x.shape[1] - patches], dim=1)
    return x.sum() + PREFIX_WEIGHT * x.numel() / max(1, prefix.numel()) * prefix.sum()


def block_alignment(teacher, student, x, grid, dtype=torch.float32):
    """One block of stage 1 (Fig. 4, left): the same input for both, the teacher's output goes on.

    teacher, student: Block. x (B, N, C), the teacher's residual stream. -> (x after the teacher's
    block, error, scale): the squared error after the output projection, and that of uniform
    attention (the mean of V). Their ratio is the loss. 0: equals softmax. 1: no better than to
    ignore the query. Paper: "squared error"; here: the ratio gives all blocks equal weight.
    """
    with autocast(x.device.type, dtype):
        with torch.no_grad():
            h = teacher.norm1(x)
            q, k, v = teacher.attn.project(h)                               # each (B,H,N,D)
            target = teacher.attn.proj(teacher.attn.attend(q, k, v, grid))  # (B,N,C)
            blind = teacher.attn.proj(v.mean(2).flatten(1).unsqueeze(1))    # (B,H,N,D) -> (B,1,C)
            x = x + teacher.ls1(target)
            x = x + teacher.ls2(teacher.mlp(teacher.norm2(x)))
        output = student.attn(h, grid)                  # (B,N,C), the only trained forward pass
    target = widen(target)
    error, scale = (weighted_square(widen(part) - target, grid[0] * grid[1])
                    for part in (output, blind))
    return x, error, scale.clamp(min=1e-12)             # 0: a single token


def trained_parameters(student, groups):
    """Freeze all but these GROUPS; -> for each changed block, its trained ones."""
    student.requires_grad_(False)
    changed = student.blocks[:len(student.blocks) - student.keep_softmax]   # others are softmax
    by_block = [[p for name in dict.fromkeys(groups)
                 for p in getattr(block.attn, name).parameters()] for block in changed]
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
            for part in block.attn.qkv.bias.chunk(3)[:2]:               # q, k, not v
                part += block.attn.operator.bias_shift


@torch.no_grad()
def embed(teacher, images, dtype):
    """uint8 images (B, 3, H, W) -> (tokens before the first block, grid)."""
    with autocast(images.device.type, dtype):
        return teacher.embed(teacher.normalize(images))


@torch.no_grad()
def relative_error(teacher, student, batches, device, dtype, note=lambda _: None):
    """Held-out error of each block's attention output: root of the loss, so 1 is the mean of V."""
    sums = torch.zeros(len(teacher.blocks), 2, dtype=torch.float64, device=device)
    for images, messages in bar(batches, "blocks"):
        note(messages)                      # of photos that could not be read
        x, grid = embed(teacher, images.to(device), dtype)
        for theirs, ours, total in zip(teacher.blocks, student.blocks, sums):
            x, error, scale = block_alignment(theirs, ours, x, grid, dtype)
            total += torch.stack([error, scale])
    return (sums[:, 0] / sums[:, 1]).sqrt().tolist()


def attention_maps(teacher, vits, images, queries):
    """Where each of `vits` looks from patches `queries`, in a late block, on the teacher's stream.

    -> (vits, queries, B, N), mean over heads. No map is ever formed: the weights of a query are the
    gradient of its output with respect to V, so this is O(N) and holds for every operator.
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
            out = block.attn.attend(q, k, v.requires_grad_(), grid)         # (B, prefix + N, C)
            maps += [torch.autograd.grad(out[:, vit.arch.prefix + query].sum(), v,
                                         retain_graph=True)[0].mean((1, 3)) for query in queries]
    return torch.stack(maps)[..., teacher.arch.prefix:].unflatten(0, (len(vits), len(queries)))


def draw_attention(maps, images, queries, grid, path):
    """Columns: three queries (white) in each photo. Rows: photo, teacher, before, after."""
    maps = maps.clamp(min=0).permute(2, 1, 0, 3).flatten(0, 1)              # (B * queries, vits, N)
    maps = (maps / maps[:, :1].amax(-1, keepdim=True)).clamp(max=1).sqrt()  # one scale a column
    marks = F.one_hot(torch.tensor(queries * len(images), device=maps.device), maps.shape[2])
    maps = torch.cat([marks.unsqueeze(1), maps], dim=1).unflatten(2, grid)
    mark, *maps = F.interpolate(maps, size=images.shape[2:]).unsqueeze(2).unbind(1)
    photos = (images.repeat_interleave(len(queries), 0) / 255).maximum(mark)    # the query white
    rows = [photos, *(photos * 0.3 + 0.7 * part for part in maps)]
    write_whole(path, partial(save_image, torch.cat(rows), nrow=len(photos), format="png"))


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    teacher, student, digest = load_pair(args.teacher, args.student, args.attention,
                                         args.keep_softmax)
    args.size = teacher.arch.pixels[0] if args.size is None else args.size
    grid = teacher.grid(args.size, args.size)
    by_block = trained_parameters(student, args.train)
    parameters = sum(by_block, [])
    source, held_out = unlabelled(args.data) if args.data else (Shapes("train"), Shapes("val"))
    read = fingerprint([args.teacher, args.student], source, held_out)
    out, saved = open_out(args, [args.teacher, args.student, *(args.data or [])], read)
    wide = torch.promote_types(dtype, torch.float32)    # of weights; autocast's is dtype
    teacher, student = teacher.to(device, wide).requires_grad_(False), student.to(device, wide)
    trained, total = (sum(p.numel() for p in part) / 1e6
                      for part in (parameters, student.parameters()))
    print(f"{student.attention} attention, training {trained:.2f} M of {total:.2f} M parameters "
          f"on {len(source)} images of {args.size} pixels, {device}, {dtype}")

    new = {p for block in student.blocks for p in block.attn.operator.parameters()}
    optimizer = torch.optim.AdamW(
        [dict(params=[p for p in parameters if p in new], lr=OPERATOR_LR * args.lr),
         dict(params=[p for p in parameters if p not in new])],
        args.lr, weight_decay=0)                        # stay near the teacher's
    schedule = one_cycle(optimizer, args.steps)
    align = torch.compile(block_alignment, fullgraph=True) if args.compile else block_alignment
    train, held_out = loaders(args, source, held_out, saved["step"] if saved else 0)
    few = next(iter(held_out))[0]           # one held-out batch, for curves and the picture
    queries = [grid[0] * n // 8 * grid[1] + grid[1] * n // 8 for n in (2, 4, 6)]
    maps = partial(attention_maps, teacher, images=few[:2].to(device), queries=queries)

    kept = saved["kept"] if saved else dict(unread=[])
    note = partial(note_unread, unread=kept["unread"], listed=len(source) + len(held_out.dataset))
    if not saved:
        kept["before"] = relative_error(teacher, student, held_out, device, dtype, note)
        kept["maps"] = maps([teacher, student])
        if args.student is None:
            exponential_start(student)
    progress = Progress(args, out, saved, read, kept, student=student, optimizer=optimizer,
                        schedule=schedule, scaler=scaler)
    with progress:
        for step, (images, messages) in enumerate(train, progress.step + 1):
            note(messages)
            x, grid = embed(teacher, images.to(device, non_blocking=True), dtype)
            losses = []
            for theirs, ours in zip(teacher.blocks, student.blocks):
                x, error, scale = align(theirs, ours, x, grid, dtype)       # attention alignment
                loss = error / average([scale])[0]
                if loss.requires_grad:          # a block that keeps softmax has nothing to learn
                    scaler.scale(loss).backward()   # now: memory holds one block's activations
                losses.append(loss.detach())
            row = dict(lr=update(scaler, optimizer, schedule, by_block),    # clipped block by block
                       blocks=torch.stack(average(losses)).tolist())
            if step % args.every == 0:
                blocks = relative_error(teacher, student, [(few, [])], device, dtype)
                row["held_out"] = sum(blocks) / len(blocks)
            progress.done(sum(row["blocks"]) / len(losses), **row)

    facts = dict(stage="attention", teacher=digest, training={
        key: getattr(args, key) for key in ("train", "size", "steps", "batch_size", "lr", "seed")})
    save_vit(student, out / "student.safetensors", **facts)
    before, after = kept["before"], relative_error(teacher, student, held_out, device, dtype, note)
    whiten = whitening(teacher, train.dataset, train.batch_size, device, dtype)
    final = compare(teacher, student.eval(), held_out, whiten, device, dtype, note)
    print("\nheld-out relative error of the attention output (1 = mean of V)\nblock  before  after")
    for block, (old, new) in enumerate(zip(before, after)):
        print(f"{block:5d}  {old:6.3f}  {new:5.3f}")
    print(f" mean  {sum(before) / len(before):6.3f}  {sum(after) / len(after):5.3f}   "
          f"{args.steps} steps in {progress.seconds:.0f} s\nheld-out final tokens:",
          *(f"{key} {value:.3f}" for key, value in final.items() if value is not None))
    write_whole(out / "report.json", facts | dict(
        before=before, after=after, final=final, seconds=progress.seconds, unread=kept["unread"],
        arguments=vars(args)))
    maps = torch.cat([kept["maps"].to(device), maps([student])])
    draw_attention(maps.float(), few[:2].to(device), queries, grid, out / "attention.png")
    progress.finish()
    print(f"wrote {out / 'student.safetensors'}")


if __name__ == "__main__":
    run(main)
