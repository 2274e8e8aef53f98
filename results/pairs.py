"""Do two fine-tuned backbones differ by more than chance? Both are scored on the same photos.

    python results/pairs.py --data imagenette160 --one runs/a/0-classify.safetensors --two ...

--one, --two: checkpoints of finetune.py, one a seed, of one task and size. It prints both scores,
their difference, and its standard error over held-out photos, by a bootstrap of 1,000 draws.
"""
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune import evaluate, make_head                                                # noqa: E402
from model import load_vit                                                              # noqa: E402
from support.labels import IGNORE, by_shape, load_data, read_item, views_of             # noqa: E402
from support.runs import InputError, device_and_dtype, run                              # noqa: E402


def main():
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--one", nargs="+", required=True)
    parser.add_argument("--two", nargs="+", required=True)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    args = parser.parse_args(namespace=Namespace(compile=False))
    device, dtype = device_and_dtype(args)
    facts = []
    for file in args.one + args.two:
        header = load_vit(file).header
        facts.append([header.get(key) for key in ("task", "size", "classes", "ids")])
        if facts[-1] != facts[0] or "head_kind" not in header:
            raise InputError(f"{file}: expected a checkpoint of finetune.py, of the task, size and "
                             f"classes of {args.one[0]}")
    task, size, *kinds = facts[0]
    _, items, classes, ids = load_data(args.data, task)
    if [classes, ids] != kinds:
        raise InputError(f"{args.data} has the classes {classes}, {args.one[0]} {kinds[0]}")
    lookup = torch.tensor([ids.index(i) if i in ids else IGNORE for i in range(256)]).byte()
    K, n = len(ids), len(items)
    torch.manual_seed(0)
    draws = [torch.randint(n, (n,)).bincount(minlength=n) for _ in range(1000)]
    draws = torch.stack([torch.ones(n), *draws]).double()   # how often each photo; first: all once

    both = []
    for files in (args.one, args.two):
        scores = []                                         # top-1 or mean IoU, a row a seed
        for vit in map(load_vit, files):
            head = make_head(vit.arch, task, K, vit.header["head_kind"], vit.attention)
            head.load_state_dict(vit.head)
            vit, head = vit.to(device), head.to(device).eval()
            whole = views_of(task, size, vit.arch.patch)[1]
            photos = (by_shape([whole(read_item(item, task, lookup, size))]) for item in items)
            counts = [evaluate(vit, head, [photo], task, K, device, dtype)[2] for photo in photos]
            counts = torch.tensordot(draws, torch.stack(counts).double(), 1)    # (draws, K, K)
            right, truth, guessed = counts.diagonal(dim1=1, dim2=2), counts.sum(2), counts.sum(1)
            top_1, iou = right.sum(1) / truth.sum(1), right / (truth + guessed - right)
            scores.append(100 * (top_1 if task == "classify" else iou.nanmean(1)))
        both.append(torch.stack(scores).mean(0))
    one, two = both
    print(f"one {one[0]:.2f}, two {two[0]:.2f}, difference {one[0] - two[0]:+.2f}, "
          f"standard error {(one - two)[1:].std():.2f}")


if __name__ == "__main__":
    run(main)
