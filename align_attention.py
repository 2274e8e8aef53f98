"""Stage 1 of ViT-AdaLA, attention alignment: each block's linear attention learns to output what softmax attention does.

The frozen softmax teacher carries the residual stream. In every block the student's attention sees exactly the teacher's
normalised input, and its query, key and value weights are tuned until its output matches the teacher's. No labels.

    python align_attention.py                                                            # the demo, a minute on CPU
    python align_attention.py --weights vit_small_patch14_dinov2 --data photos/          # your own ViT and photos
    python align_attention.py --weights ... --data ... --attention hedgehog --train maps --lr 1e-2   # LoLCATS

Reads the teacher's weights and images; writes to --out: student.safetensors, log.jsonl (the loss of every block at every
step) and report.json (the table that is printed at the end).
"""
import argparse
import json
import math
import os
import time

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset
from torchvision.transforms import v2
from tqdm import tqdm

from model import OPERATORS, InputError, device_and_dtype, load_pair, open_out, read_image, run, save_vit, unlabelled

DEMO = dict(weights="demo/teacher.safetensors", size=64, steps=100, batch=64)
START = -4.0                                  # added to query and key biases, see exponential_start
HELD_OUT = 256                                # images behind the table: more do not change its second digit


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="softmax ViT to linearize: file, known name or NAME=FILE")
    parser.add_argument("--teacher", help="softmax ViT to imitate (default: the one that --weights names or is)")
    parser.add_argument("--attention", choices=OPERATORS, help="the student's operator (default: linear)")
    parser.add_argument("--train", choices=("qkv", "maps"), default="qkv", help="maps: Hedgehog's only, as LoLCATS does")
    parser.add_argument("--match", choices=("before", "after"), default="after", help="... the output projection")
    parser.add_argument("--data", nargs="+", default=["demo"], help="folders of images, a torchvision set's name, or demo")
    parser.add_argument("--size", type=int, help="pixels, a multiple of the patch (default: the weights' native size)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate; give 1e-2 with --train maps")
    parser.add_argument("--out", default="runs/attention", help="folder for student, log and report")
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
        raise InputError("--weights is missing: with --data of your own, name the softmax ViT to linearize")
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


def block_alignment(teacher, student, x, grid, match, dtype=torch.float32):
    """One block of stage 1 (Fig. 4, left): the same input for both attentions, the teacher's output carried on.

    teacher, student: Block. x (B, N, C), the teacher's residual stream. Returns (x after the teacher's block, loss).
    The loss is the squared error of the attention output, over that of attending to all tokens alike (the mean of V):
    0 is softmax itself, 1 is blind to the query. Paper: squared error; here: divided, so that all blocks weigh the same.
    Autocast to dtype begins and ends in here, because a compiled backward runs under what its forward was called under.
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            h = teacher.norm1(x)
            q, k, v = teacher.attn.project(h)                           # each (B,H,N,D)
            target = teacher.attn.attend(q, k, v, grid)                 # (B,N,C)
            uniform = v.mean(2).flatten(1).unsqueeze(1)                 # (B,H,N,D) -> (B,H,D) -> (B,1,C)
            projected = teacher.attn.proj(target)
            x = x + teacher.ls1(projected)
            x = x + teacher.ls2(teacher.mlp(teacher.norm2(x)))
            if match == "after":
                target, uniform = projected, teacher.attn.proj(uniform)
        output = student.attn.attend(*student.attn.project(h), grid)    # (B,N,C)
        if match == "after":
            output = student.attn.proj(output)
    target = target.float()
    return x, (output.float() - target).square().sum() / (uniform.float() - target).square().sum()


def alignment_step(teacher, student, images, match, dtype=torch.float32, align=block_alignment, backward=None):
    """All blocks on one batch of uint8 images (B, 3, H, W), autocast to `dtype` -> the blocks' losses (depth,).

    `backward` is called on each block's loss at once: only one block's activations are ever held.
    """
    losses = []
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        x, grid = teacher.embed(teacher.normalize(images))
    for teacher_block, student_block in zip(teacher.blocks, student.blocks):
        x, loss = align(teacher_block, student_block, x, grid, match, dtype)
        if backward:
            backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def exponential_start(student):
    """Lower the query and key biases, once, before training: phi(x) = 1 + ELU(x) is exp(x) below 0 and linear above.

    Softmax weights are products of exponentials; the common factor exp(START) cancels in the normaliser, and the linear
    part still bounds outliers. Paper: no word of the scale of phi; here: this start, which needs no new tensor and costs
    nothing, lowers the held-out error after 60 steps from 0.586 to 0.516 (README, "What helped").
    """
    for block in student.blocks:
        if block.attn.qkv.bias is not None:   # DINOv3 has none, and its rotation would turn the shift away
            q, k, _ = block.attn.qkv.bias.chunk(3)
            q += START
            k += START


def trained_parameters(student, train):
    """Freeze everything but the query, key and value weights (or LoLCATS' feature maps); return what is left, by block."""
    if train == "maps" and student.attention != "hedgehog":
        raise InputError(f"--train maps: expected --attention hedgehog, whose maps it trains, found {student.attention}")
    student.requires_grad_(False)
    for block in student.blocks:
        for module in ([block.attn.qkv] if train == "qkv" else [block.attn.map_q, block.attn.map_k]):
            module.requires_grad_(True)
    return [[p for p in block.parameters() if p.requires_grad] for block in student.blocks]


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args.dtype)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    teacher, student, origin = load_pair(args.weights, args.teacher, args.attention)
    args.size = teacher.arch.pixels[0] if args.size is None else args.size
    teacher.grid(args.size, args.size)
    by_block = trained_parameters(student, args.train)
    parameters = [p for block in by_block for p in block]
    source, held_out = unlabelled(args.data)
    out = open_out(args.out, student)
    teacher, student = teacher.to(device).requires_grad_(False), student.to(device).train()
    print(f"student: {student.attention} attention, training {sum(p.numel() for p in parameters) / 1e6:.2f} M "
          f"of {sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters "
          f"on {len(source)} images of {args.size} pixels, {device}, {dtype}")

    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0
    draws = torch.Generator().manual_seed(args.seed)
    photos = Photos(source, args.size, True, teacher.arch.interpolation)
    loader = DataLoader(photos, args.batch, num_workers=workers, pin_memory=device == "cuda", generator=draws,
                        sampler=RandomSampler(photos, num_samples=args.steps * args.batch, generator=draws))
    every = max(1, len(held_out) // HELD_OUT)
    held_out = Subset(Photos(held_out, args.size, False, teacher.arch.interpolation), range(0, len(held_out), every))
    held_out = DataLoader(held_out, args.batch, num_workers=workers)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0)   # the weights must stay near the teacher's
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=max(args.steps, 10) + 1,
                                                   pct_start=0.1, cycle_momentum=False)
    align = torch.compile(block_alignment, fullgraph=True) if device == "cuda" else block_alignment

    @torch.no_grad()
    def relative_error():
        """Held-out error of each block's attention output: root of the loss, so 1 is the mean of V."""
        losses = [alignment_step(teacher, student, images.to(device), args.match, dtype) for images in held_out]
        return torch.stack(losses).mean(0).sqrt().tolist()

    before, start = relative_error(), time.perf_counter()
    if student.attention == "linear" and "stage" not in student.facts:      # fresh from a softmax file, not a student's
        exponential_start(student)
    with open(out / "log.jsonl", "w") as log, tqdm(total=args.steps * args.batch, unit="img", mininterval=1) as bar:
        for step, images in enumerate(loader, 1):
            images = images.to(device, non_blocking=True)
            losses = alignment_step(teacher, student, images, args.match, dtype, align,
                                    backward=lambda loss: scaler.scale(loss).backward()).tolist()
            for block, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise InputError(f"the loss of block {block} is {loss} at step {step}: try a lower --lr than {args.lr}")
            scaler.unscale_(optimizer)
            for block in by_block:            # clipped apart: the blocks share nothing
                nn.utils.clip_grad_norm_(block, 1.0)
            scaler.step(optimizer)
            scaler.update()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            optimizer.zero_grad()
            log.write(json.dumps({"step": step, "loss": sum(losses) / len(losses), "lr": rate, "blocks": losses,
                                  "seconds": round(time.perf_counter() - start, 2)}) + "\n")
            bar.update(len(images))
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", lr=f"{rate:.1e}")
    seconds, after = time.perf_counter() - start, relative_error()

    print(f"\nheld-out relative error of the attention output, {args.match} the output projection (1 = mean of V)")
    print("block  before  after")
    for block, (old, new) in enumerate(zip(before, after)):
        print(f"{block:5d}  {old:6.3f}  {new:5.3f}")
    print(f" mean  {sum(before) / len(before):6.3f}  {sum(after) / len(after):5.3f}   {args.steps} steps in {seconds:.0f} s")
    facts = dict(stage="attention", teacher=origin, training=vars(args))
    save_vit(student, out / "student.safetensors", **facts)
    (out / "report.json").write_text(json.dumps(facts | dict(before=before, after=after, seconds=seconds), indent=1))
    print(f"wrote {out / 'student.safetensors'}")


if __name__ == "__main__":
    run(main)
