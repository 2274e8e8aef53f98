"""Draws tables of bench.py: python results/bench_picture.py NAME.png CSV...

A row of panels for time or images/s, memory and FLOPs. A column for each model, batch, dtype and
mode. Axes are logarithmic.
"""
import csv
import math
import sys
from itertools import product

from matplotlib.figure import Figure

SHOWN = {"attention": ("tokens", ("heads", "pass", "dtype", "mode"),
                       ("median_ms", "peak_mb", "gflops")),
         "model": ("pixels", ("model", "batch", "dtype", "mode"), ("images_per_s", "peak_mb"))}


def main(target, *tables):
    rows = [row for path in tables for row in csv.DictReader(open(path, newline=""))]
    x, keys, columns = SHOWN[rows[0]["part"]]
    panels = {}
    for column, row in product(columns, rows):
        panel = panels.setdefault((column, *(f"{key} {row[key]}" for key in keys)), {})
        panel.setdefault(row["name"], []).append((int(row[x]), float(row[column] or math.nan)))
    shape = len(columns), len(panels) // len(columns)
    figure = Figure((4 * shape[1], 3.4 * shape[0]), layout="tight")
    axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey="row")
    for axis, ((column, *title), curves) in zip(axes.flat, panels.items()):
        for name, curve in curves.items():
            axis.loglog(*zip(*curve), marker=".", label=name)
        axis.set(title=", ".join(title), xlabel=x, ylabel=column)
        points = sorted({int(row[x]) for row in rows})
        axis.set_xticks(points, points, fontsize=7)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle("{device}, torch {torch}".format(**rows[0]), fontsize=9)
    figure.savefig(target, dpi=90)
    print(f"wrote {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
