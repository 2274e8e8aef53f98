"""How well students agree with their teacher at each size: cosines of held-out CLS and patches.

    python results/sizes.py --teacher NAME=FILE --data photos/ --size 224 448 --out FILE.csv \\
        one=STUDENT two=STUDENT
"""
import csv
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from align_features import compare                                      # noqa: E402
from model import load_pair                                             # noqa: E402
from support.photos import Draws, read_image, unlabelled, views         # noqa: E402
from support.runs import device_and_dtype, run                          # noqa: E402


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("students", nargs="+", metavar="NAME=FILE", help="a name for the table, and its file")
    flag("--teacher", required=True)
    flag("--data", nargs="+", required=True)
    flag("--size", type=int, nargs="+", default=[224, 336, 448, 672, 1022])
    flag("--photos", type=int, default=256, help="of the held-out part (default: 256)")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    flag("--out", default="sizes.csv", help="a new file (default: sizes.csv)")
    args = parser.parse_args(argv)
    args.compile = False
    device, dtype = device_and_dtype(args)
    pairs = {}
    for name, file in (text.split("=", 1) for text in args.students):
        teacher, student, _ = load_pair(args.teacher, file)
        pairs[name] = teacher.to(device), student.to(device)
    # compare() also has errors, plain and whitened. They are not read, so nothing is whitened.
    C, measures = teacher.arch.width, ["cls_cosine"] * teacher.arch.cls + ["patch_cosine"]
    no_whitening = torch.eye(C, device=device), torch.zeros(C, device=device)
    held_out = unlabelled(args.data)[1]
    few = range(0, len(held_out), math.ceil(len(held_out) / args.photos))
    with open(args.out, "x", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["student", "size", *measures])
        for size in args.size:
            photos = Subset(Draws(held_out, read_image, views(size)[1], skip=True), few)
            for name, pair in pairs.items():
                found = compare(*pair, DataLoader(photos, 8), *no_whitening, device, dtype)
                row = [name, size, *(f"{found[key]:.4f}" for key in measures)]
                table.writerow(row)
                print(*row)
                file.flush()
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
