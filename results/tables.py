"""The tables of README.md and results/README.md, from the CSV files beside this one.

    python results/tables.py                                        # prints them
    python results/tables.py collect runs/study results/study.csv   # makes a CSV of runs
"""
import csv
import json
import sys
from pathlib import Path
from statistics import mean


def collect(folder, target):
    """FOLDER/ROW/seedS/NAME/metrics.json and .../two/report.json, as study.sh and demo.sh leave
    them, to CSV. In the CSV files here, rows have been given longer names afterwards, and some
    have lines that an earlier version wrote."""
    folder, lines = Path(folder), ["row,seed,measure,value"]
    files = [*folder.glob("*/seed*/*/metrics.json"), *folder.glob("*/seed*/two/report.json")]
    for file in sorted(files):
        row, seed, name = file.parts[-4:-1]
        found = json.loads(file.read_text())
        found = found["after"] if name == "two" else {i: x["score"] for i, x in enumerate(found)}
        lines += [f"{row},{seed.removeprefix('seed')},{name} {key},{value:.4f}"
                  for key, value in found.items() if value is not None]
    Path(target).write_text("\n".join(lines) + "\n")


def read(name):
    return list(csv.DictReader(Path(__file__).with_name(name).read_text().splitlines()))


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def scores(name, rows, columns, percent=False):
    """The mean over seeds, and how many seeds there were, if several. In brackets: minus the
    teacher's, of the same seeds, or percent of it. columns: {measure: title}."""
    found = {}                                          # {(row, measure): {seed: value}}
    for line in read(name):
        seeds = found.setdefault((line["row"], line["measure"]), {})
        seeds[line.get("seed", "mean")] = float(line["value"])

    def cell(row, measure):
        seeds, best = found.get((row, measure), {}), found.get(("teacher", measure), {})
        if not seeds:
            return "-"
        text = f"{mean(seeds.values()):.{3 if 'cosine' in measure else 1}f}"
        if row != "teacher" and (both := seeds.keys() & best):
            ours, theirs = (mean(each[seed] for seed in both) for each in (seeds, best))
            text += f" ({100 * ours / theirs:.1f}%)" if percent else f" ({ours - theirs:+.1f})"
        return text + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")

    return table(["backbone", *columns.values()],
                 [[row, *(cell(row, measure) for measure in columns)] for row in rows])


def efficiency(*dtypes):
    """Images/s of ViT-S/14 at batch 1, and times fused softmax in the same run."""
    rows = {}
    for line in (line for dtype in dtypes for line in read(f"bench-cpu-model-{dtype}.csv")):
        cells = rows.setdefault(f"{line['name']}, {line['dtype']}", {})
        speed, times = float(line["images_per_s"]), 1 / float(line["ratio"])
        cells[f"{line['pixels']} px"] = f"{speed:.2f} ({times:.2f}x)"
    return table(["ViT-S/14, batch 1", *cells],
                 [[row, *rows[row].values()] for row in rows if "reference" not in row])


def tables():
    """Those of README.md, then those of results/README.md."""
    every = {"cls_cosine": "cls cosine", "patch_cosine": "patch cosine",
             "top-1 224": "top-1, 224 px", "mIoU 224, linear head": "mIoU, 224 px",
             "mIoU 224, mask head": "mask head",
             "mIoU 448, linear head of 224": "448 px, head of 224"}
    tuned = {"classify 0": "top-1, frozen", "tune-classify 0": "top-1, tuned",
             "segment 0": "mIoU, frozen", "tune-segment 0": "mIoU, tuned"}
    stages = [f"{operator}, {stage}" for operator in ("linear", "linear_conv")
              for stage in ("stage 1", "stage 2 alone", "stages 1 + 2")]
    demo = []
    for i, name in enumerate(["teacher (softmax)", "no alignment", "stage 1", "stages 1 + 2"]):
        lines = [line for line in read("demo.csv") if line["measure"] == f"classify {i}"]
        x = [float(line["value"]) for line in lines]
        demo.append([name, f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})"])
    return [
        table(["row", f"top-1, mean (range) of {len(x)} seeds"], demo),
        scores("study-cpu-112.csv", ["teacher", "linear_conv, no alignment", "linear, 640 + 320",
               "linear_conv, 640 + 640"], tuned),
        efficiency("bfloat16"),
        scores("study-h200.csv", ["teacher", "no alignment", *stages, "the same, from 500 photos"],
               every, percent=True),
        scores("study-cpu-224.csv", [
            "teacher", "stage 2 at 224, taps 1 patch apart", "stage 2 at 224",
            "the same, 320 steps of stage 2", "the same, 320 more at 2e-5"], {
            "classify 0": "top-1, 224 px", "segment 0": "mIoU, 224 px",
            "segment-at-2-times 0": "448 px, head of 224",
            "segment-at-3-times-quarter 0": "672 px, head of 224, 121 photos",
            "tune-classify 0": "top-1, tuned", "tune-segment 0": "mIoU, tuned"}),
        scores("study-cpu-112.csv", [
            "teacher", "linear_conv, no alignment", "linear, 640 + 0", "linear, 640 + 320",
            "linear_conv, 0 + 320 at 2e-4", "linear_conv, 640 + 0", "linear_conv, 640 + 640",
            "linear_conv, 640 + 640 at 2e-5", "linear_conv, random weights"],
            tuned | {"tune-mask 0": "the same, mask head"}),
        scores("tuned-first-cpu.csv", [
            "teacher", "linear, 320 + 0", "linear, 320 + 320", "linear_conv, 320 + 0",
            "linear_conv, 320 + 320"], {
            "own-head 0": "mIoU, the teacher's head", "segment 0": "frozen, 400 steps more",
            "tune-segment 0": "tuned, 150 steps more"}),
        efficiency("float32", "bfloat16")]


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        collect(*sys.argv[2:])
    else:
        print(*tables(), sep="\n\n", end="\n\n")
