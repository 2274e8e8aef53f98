"""How well students agree with their teacher at each size, as a table and a curve.

    python results/sizes.py --teacher NAME=FILE --data photos/ --size 224 448 --out FILE.csv \\
        one=STUDENT two=STUDENT

Held-out photos, cosines of CLS and patches, and the whitened error: 1 is the teacher's mean token.
All sizes share one whitening, that of the training photos at the first size. The CSV grows by a row
a size and student. With matplotlib the picture FILE.png is drawn as well.
"""
import csv
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from align_features import compare, whitening                           # noqa: E402
from model import load_pair, load_vit                                   # noqa: E402
from support.photos import Draws, read_image, unlabelled, views         # noqa: E402
from support.runs import InputError, device_and_dtype, run              # noqa: E402

MEASURES = "cls_cosine", "patch_cosine", "whitened_error"


def draw(rows, target):
    """A panel a measure, a curve a student."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return print("no picture: it needs matplotlib (pip install matplotlib)")
    figure = Figure((12, 3.6), layout="tight")
    for axis, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES):
        for name in dict.fromkeys(row["student"] for row in rows):
            points = [(row["size"], row[measure]) for row in rows if row["student"] == name]
            axis.plot(*zip(*points), marker="o", label=name)
        axis.set(xlabel="pixels a side", title=measure.replace("_", " "))
        axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(target, dpi=100)
    print(f"wrote {target}")


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("students", nargs="+", metavar="NAME=FILE", help="a name for the table, and its file")
    flag("--teacher", required=True)
    flag("--data", nargs="+", required=True)
    flag("--size", type=int, nargs="+", default=[224, 336, 448, 672, 1022])
    flag("--photos", type=int, default=256, help="of the held-out part (default: 256)")
    flag("--batch-size", type=int, default=8)
    flag("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    flag("--out", default="sizes.csv")
    args = parser.parse_args(argv)
    args.compile = False
    if Path(args.out).exists():
        raise InputError(f"--out {args.out} is there already: name another")
    device, dtype = device_and_dtype(args)
    teacher = load_vit(args.teacher).to(device)
    names, files = zip(*(text.partition("=")[::2] for text in args.students))
    students = [load_pair(args.teacher, file)[1].to(device) for file in files]
    for size in args.size:
        teacher.grid_of(size, size)                     # a multiple of the patch, or an InputError
    train, held_out = unlabelled(args.data)
    draws = Draws(train, read_image, views(args.size[0])[0], seed=0, skip=True)
    kept = whitening(teacher, draws, 1024, device, dtype)
    tokens, patch = kept["constant"].tensor_split([teacher.arch.prefix])
    step, rows = math.ceil(len(held_out) / args.photos), []
    with open(args.out, "w", newline="") as file:
        table = csv.DictWriter(file, ["student", "size", *MEASURES], lineterminator="\n")
        table.writeheader()
        for size in args.size:
            whole = Draws(held_out, read_image, views(size)[1], skip=True)
            batches = DataLoader(Subset(whole, range(0, len(whole), step)), args.batch_size)
            constant = torch.cat([tokens, patch[:1].expand((size // teacher.arch.patch) ** 2, -1)])
            for name, student in zip(names, students):
                found = compare(teacher, student, batches, kept["whiten"], constant, device, dtype)
                rows.append({"student": name, "size": size} | {key: found[key] for key in MEASURES})
                table.writerow({key: f"{x:.4f}" if isinstance(x, float) else x
                                for key, x in rows[-1].items()})
                print(*(f"{x:.4f}" if isinstance(x, float) else x for x in rows[-1].values()))
            file.flush()
    draw(rows, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    run(main)
