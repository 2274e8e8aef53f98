"""Draws bench.py's tables of part "model": python results/bench_picture.py NAME.png CSV..."""
import csv
import sys

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("bench_picture.py needs matplotlib: pip install matplotlib")

target, *tables = sys.argv[1:] if len(sys.argv) > 2 else sys.exit(__doc__)
groups = {}                                             # {title: rows of a column}
for path in tables:
    for row in csv.DictReader(open(path, newline="")):
        if not row.get("pixels"):
            sys.exit(f"{path} is no table of bench.py's part model")
        title = "{model} batch {batch} {dtype} {mode}\n{device}, torch {torch}".format(**row)
        groups.setdefault(title, []).append(row)
figure = Figure((5 * len(groups), 7), layout="constrained")
columns = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row").T
words = {"images_per_s": "images a second", "peak_mb": "peak memory, MB"}
for axes, (title, rows) in zip(columns, groups.items()):
    for axis, measure in zip(axes, words):
        for name in sorted({row["name"] for row in rows}):
            curve = [row for row in rows if row["name"] == name]
            points = [int(row["pixels"]) for row in curve]
            heights = [float(row[measure] or "nan") for row in curve]
            axis.loglog(points, heights, marker=".", label=name)
        axis.set(xlabel="pixels", ylabel=words[measure])
        axis.set_title(title, fontsize=7)
        axis.minorticks_off()
        axis.set_xticks(points, points)
        axis.legend()
figure.savefig(target, dpi=80)
