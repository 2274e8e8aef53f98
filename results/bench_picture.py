"""Draws tables of bench.py: python results/bench_picture.py NAME.png CSV...

A row of panels for time or images/s and one for memory. A column for each model, heads, batch,
dtype and mode. It needs matplotlib (pip install matplotlib).
"""
import csv
import math
import sys

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("bench_picture.py needs matplotlib: pip install matplotlib")

SHOWN = {"attention": ("tokens", "median_ms", "peak_mb"),
         "model": ("pixels", "images_per_s", "peak_mb")}
WORDS = {"median_ms": "milliseconds a call", "images_per_s": "images a second",
         "peak_mb": "peak memory, MB"}


def main(target, *tables):
    rows = [row for path in tables for row in csv.DictReader(open(path, newline=""))]
    x, *columns = SHOWN[rows[0]["part"]]
    groups = {}
    for row in rows:
        title = "{model} heads {heads} batch {batch}\n{dtype} {mode}".format(**row)
        groups.setdefault(title, {}).setdefault(row["name"], []).append(row)
    points = sorted({int(row[x]) for row in rows})
    figure = Figure((4 * len(groups), 7), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row")
    for line, column in zip(axes, columns):
        for axis, (title, curves) in zip(line, groups.items()):
            for name, curve in curves.items():
                axis.loglog([int(row[x]) for row in curve],
                            [float(row[column] or math.nan) for row in curve], marker=".",
                            label=name)
            axis.set(title=title, xlabel=x, ylabel=WORDS[column])
            axis.minorticks_off()
            axis.set_xticks(points, points)
    axis.legend()
    figure.suptitle("{device}, torch {torch}".format(**rows[0]), fontsize=9)
    figure.savefig(target, dpi=80)
    print(f"wrote {target}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
