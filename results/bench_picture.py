"""Draws tables of bench.py: python results/bench_picture.py NAME.png CSV...

A row of panels for time or images/s, memory and FLOPs. A column for each model, batch, dtype and
mode. Axes are logarithmic. It needs matplotlib (pip install matplotlib).
"""
import csv
import math
import sys
from itertools import product

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("bench_picture.py: the picture needs matplotlib: pip install matplotlib")

SHOWN = {"attention": ("tokens", ("heads", "pass", "dtype", "mode"),
                       ("median_ms", "peak_mb", "gflops")),
         "model": ("pixels", ("model", "batch", "dtype", "mode"), ("images_per_s", "peak_mb"))}
WORDS = {"median_ms": "milliseconds a call", "peak_mb": "peak memory, MB",
         "gflops": "billion operations", "images_per_s": "images a second",
         "pixels": "height and width, pixels", "tokens": "tokens"}


def main(target, *tables):
    rows = [row for path in tables for row in csv.DictReader(open(path, newline=""))]
    x, keys, columns = SHOWN[rows[0]["part"]]
    panels = {}
    for column, row in product(columns, rows):
        panel = panels.setdefault((column, *(f"{key} {row[key]}" for key in keys)), {})
        panel.setdefault(row["name"], []).append((int(row[x]), float(row[column] or math.nan)))
    shape = len(columns), len(panels) // len(columns)
    figure = Figure((4 * shape[1], 3.4 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey="row")
    for axis, ((column, *title), curves) in zip(axes.flat, panels.items()):
        for name, curve in curves.items():
            axis.loglog(*zip(*curve), marker=".", label=name)
        axis.set_title("\n".join([", ".join(title[:2]), ", ".join(title[2:])]), fontsize=8)
        axis.set(xlabel=WORDS[x], ylabel=WORDS[column])
        points = sorted({int(row[x]) for row in rows})
        axis.minorticks_off()
        axis.set_xticks(points, points, fontsize=7, rotation=45)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle("{device}, torch {torch}".format(**rows[0]), fontsize=9)
    figure.savefig(target, dpi=90)
    print(f"wrote {target}")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].endswith(".png"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
