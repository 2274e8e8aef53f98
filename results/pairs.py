"""Do two fine-tuned backbones differ by more than chance? Both are scored on the same photos.

    python results/pairs.py --data imagenette160 --two ... \\
        --one runs/a0/0-classify.safetensors runs/a1/0-classify.safetensors

--one, --two: checkpoints of finetune.py, one a seed, of one task and size. It prints the scores,
their difference, and its standard error over held-out photos, seeds averaged: by a bootstrap, 1,000
draws of as many photos.
"""
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune import load_head, logits_of, make_head, upsampled_classes         # noqa: E402
from model import load_vit                                                      # noqa: E402
from support.labels import IGNORE, load_data, read_item, views_of               # noqa: E402
from support.runs import InputError, device_and_dtype, run                      # noqa: E402


@torch.no_grad()
def confusions(file, task, size, items, ids, device, dtype):
    """A checkpoint -> how often each photo, or pixel of it, of a class is taken for which other:
    (photos, K, K), rows are the true class."""
    vit, K, found = load_vit(file), len(ids), []
    if [vit.header.get(key) for key in ("task", "size", "ids")] != [task, size, ids]:
        raise InputError(f"{file}: expected a checkpoint for {task} at {size} pixels, ids {ids}")
    head = make_head(vit.arch, task, K, vit.header["head_kind"], vit.attention)
    vit, head = vit.to(device), load_head(head, vit, file).to(device).eval()
    lookup = torch.tensor([ids.index(i) if i in ids else IGNORE for i in range(256)]).byte()
    whole = views_of(task, size, vit.arch.patch)[1]
    for item in items:
        photo, truth = whole(read_item(item, task, lookup, size))
        guess = logits_of(vit, head, photo[None].to(device), task, dtype).cpu()
        if task == "segment":
            counted = truth != IGNORE
            truth, guess = truth[counted], upsampled_classes(guess, truth.shape)[0, counted]
        else:
            truth, guess = torch.tensor([truth]), guess.argmax(1)
        found.append((K * truth.long() + guess).bincount(minlength=K * K).view(K, K))
    return torch.stack(found)


def score(confusion, task):
    """(seeds, K, K) -> the seeds' mean, percent: top-1, or mean IoU of the classes that occur."""
    right = confusion.diagonal(dim1=1, dim2=2).double()
    if task == "classify":
        return 100 * (right.sum(1) / confusion.sum((1, 2))).mean()
    return 100 * (right / (confusion.sum(1) + confusion.sum(2) - right)).nanmean(1).mean()


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    for name, number in dict(data=None, one="+", two="+").items():
        parser.add_argument(f"--{name}", nargs=number, required=True)
    args = parser.parse_args(argv)
    args.compile = False
    where, header = device_and_dtype(args), load_vit(args.one[0]).header
    task, size = header["task"], header["size"]
    _, items, _, ids = load_data(args.data, task)
    both = [torch.stack([confusions(file, task, size, items, ids, *where) for file in files])
            for files in (args.one, args.two)]                  # each (seeds, photos, K, K)
    one, two = (score(part.sum(1), task) for part in both)
    generator, n, drawn = torch.Generator().manual_seed(0), len(items), []
    for _ in range(1000):
        photos = torch.randint(n, (n,), generator=generator).bincount(minlength=n).view(n, 1, 1)
        first, second = (score((part * photos).sum(1), task) for part in both)
        drawn.append(first - second)
    print(f"one {one:.2f}, two {two:.2f}, difference {one - two:+.2f}, "
          f"standard error {torch.stack(drawn).std():.2f}")


if __name__ == "__main__":
    run(main)
