"""How well students agree with their teacher at each size: cosines of held-out CLS and patches.

    python results/sizes.py one=STUDENT --teacher NAME=FILE --data photos/ --size 224 448
"""
import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from align_features import compare                                      # noqa: E402
from model import load_pair                                             # noqa: E402
from support.photos import Draws, read_image, unlabelled, views         # noqa: E402
from support.runs import InputError, device_and_dtype, run              # noqa: E402


def main():
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("students", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--size", type=int, nargs="+", default=[224, 336, 448, 672, 1022])
    parser.add_argument("--photos", type=int, default=256, help="how many (default: 256)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    args = parser.parse_args(namespace=Namespace(compile=False))
    named = dict(text.split("=", 1) for text in args.students if "=" in text)
    if len(named) < len(args.students) or args.photos < 1:
        raise InputError(f"{args.students} --photos {args.photos}: expected students NAME=FILE, "
                         "each with a name of its own, and 1 photo or more")
    device, dtype = device_and_dtype(args)
    pairs = {name: load_pair(args.teacher, file)[:2] for name, file in named.items()}
    for (teacher, _), size in ((pair, size) for pair in pairs.values() for size in args.size):
        teacher.grid_of(size, size)                     # a multiple of the patch, or an InputError
    held_out = unlabelled(args.data)[1]
    few = Subset(held_out, range(0, len(held_out), math.ceil(len(held_out) / args.photos)))
    print("student,size,cls_cosine,patch_cosine")
    for name, pair in pairs.items():
        teacher, student = (vit.to(device) for vit in pair)
        whiten, constant = torch.eye(teacher.arch.width, device=device), 0  # of errors, not read
        for size in args.size:
            photos = DataLoader(Draws(few, read_image, views(size)[1], skip=True), 8)
            found = compare(teacher, student, photos, whiten, constant, device, dtype)
            cls = f"{found['cls_cosine']:.4f}" if teacher.arch.cls else ""
            print(name, size, cls, f"{found['patch_cosine']:.4f}", sep=",", flush=True)


if __name__ == "__main__":
    run(main)
