"""Draws tables of bench.py's part "model": python results/bench_picture.py NAME.png CSV...

A row of panels for images/s and one for memory. A column for each model, batch, dtype, mode and
device. It needs matplotlib (pip install matplotlib).
"""
import csv
import math
import sys

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("bench_picture.py needs matplotlib: pip install matplotlib")

WORDS = {"images_per_s": "images a second", "peak_mb": "peak memory, MB"}


def main(target, *tables):
    rows = [row for path in tables for row in csv.DictReader(open(path, newline=""))]
    names = sorted({row["name"] for row in rows})
    groups, colours = {}, {name: f"C{i}" for i, name in enumerate(names)}
    for row in rows:
        title = "{model} batch {batch} {dtype} {mode}\n{device}, torch {torch}".format(**row)
        groups.setdefault(title, {}).setdefault(row["name"], []).append(row)
    points = sorted({int(row["pixels"]) for row in rows})
    figure = Figure((5 * len(groups), 7), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row")
    for line, (column, word) in zip(axes, WORDS.items()):
        for axis, (title, curves) in zip(line, groups.items()):
            for name, curve in curves.items():
                axis.loglog([int(row["pixels"]) for row in curve],
                            [float(row[column] or math.nan) for row in curve], marker=".",
                            label=name, color=colours[name])
            axis.set(xlabel="pixels", ylabel=word)
            axis.set_title(title, fontsize=7)
            axis.minorticks_off()
            axis.set_xticks(points, points)
            axis.legend()
    figure.savefig(target, dpi=80)
    print(f"wrote {target}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
