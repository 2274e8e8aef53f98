"""The tables of README.md and results/README.md, from the CSV files beside this one.

    python results/tables.py                                    # prints them
    python results/tables.py collect runs/study results/study.csv       # makes a CSV from runs

collect reads FOLDER/ROW/seedS/NAME/metrics.json and report.json, as study.sh and demo.sh leave
them.
"""
import csv
import json
import sys
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent


def collect(folder, target):
    found = []
    for seed in sorted(Path(folder).glob("*/seed*")):
        same = seed.parent.name, seed.name.removeprefix("seed")
        for file in sorted(seed.glob("*/metrics.json")):
            for i, row in enumerate(json.loads(file.read_text())):
                found.append((*same, f"{file.parent.name} {i}", f"{row['score']:.2f}"))
        for file in sorted(seed.glob("*/report.json")):
            report = json.loads(file.read_text())
            found.append((*same, f"{file.parent.name} seconds", f"{report['seconds']:.0f}"))
            if report["stage"] != "attention":          # stage 2's, of final tokens
                found += [(*same, f"{file.parent.name} {measure}{when}", f"{value:.4f}")
                          for when, part in ((", before", "before"), ("", "after"))
                          for measure, value in report[part].items() if value is not None]
    with open(target, "w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([("row", "seed", "measure", "value"), *found])


def read(name):
    path = HERE / name
    return list(csv.DictReader(path.open())) if path.exists() else []


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def values(name):
    """{(row, measure): {seed: value}}."""
    found = {}
    for line in read(name):
        found.setdefault((line["row"], line["measure"]), {})[line["seed"]] = float(line["value"])
    return found


def demo():
    found = values("demo.csv")
    names = "teacher (softmax)", "no alignment", "stage 1", "stages 1 + 2"
    scores = [found["demo", f"classify {i}"].values() for i in range(len(names))]
    return table(["row", f"top-1, mean (range) of {len(scores[0])} seeds"],
                 [[name, f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})"]
                  for name, x in zip(names, scores)])


ROWS = {"teacher": "teacher", "no alignment": "no alignment", "linear-1": "linear, stage 1",
        "linear-2": "linear, stage 2 alone", "linear-12": "linear, stages 1 + 2",
        "linear_conv-1": "linear_conv, stage 1", "linear_conv-2": "linear_conv, stage 2 alone",
        "linear_conv-12": "linear_conv, stages 1 + 2",
        "linear_conv-12-of-500": "the same, from 500 photos"}
SCORES = {"cls_cosine": "cls cosine", "patch_cosine": "patch cosine", "top-1 224": "top-1, 224 px",
          "mIoU 224, linear head": "mIoU, 224 px", "mIoU 224, mask head": "mask head",
          "mIoU 448, linear head": "mIoU, 448 px",
          "mIoU 448, linear head of 224": "448 px, head of 224",
          "mIoU 672, linear head of 448": "672 px, head of 448"}


def retention(rows=ROWS, columns=SCORES):
    """Scores of frozen backbones; in brackets percent of the teacher's."""
    found = {(line["row"], line["column"]): float(line["mean"]) for line in read("study-h200.csv")}

    def cell(row, column):
        value, best = found.get((row, column)), found.get(("teacher", column))
        if value is None:
            return "-"
        if "cosine" in column:
            return f"{value:.3f}"
        return f"{value:.1f}" + (f" ({100 * value / best:.1f}%)" if row != "teacher" else "")

    return table(["frozen backbone", *(SCORES[column] for column in columns)],
                 [[ROWS[row], *(cell(row, column) for column in columns)] for row in rows])


def retention_short():
    return retention(["teacher", "no alignment", "linear-12", "linear_conv-12"],
                     ["top-1 224", "mIoU 224, linear head", "mIoU 448, linear head"])


def efficiency(*dtypes):
    """Images/s of ViT-S/14 at batch 1, and times fused softmax in the same run."""
    lines = {}
    for dtype in dtypes or ("float32", "bfloat16"):
        for row in read(f"bench-cpu-model-{dtype}.csv"):
            if row["name"] != "softmax_reference":
                lines.setdefault(f"{row['name']}, {dtype}", {})[f"{row['pixels']} px"] = (
                    f"{float(row['images_per_s']):.2f} ({1 / float(row['ratio']):.2f}x)")
    return table(["ViT-S/14, batch 1", *next(iter(lines.values()))],
                 [[name, *cells.values()] for name, cells in lines.items()])


def efficiency_short():
    return efficiency("bfloat16")


def scores(name, rows, columns):
    """Scores of a study on a CPU: the mean over seeds, and how many seeds there were, if several.
    In brackets: minus the teacher's, of the same seeds."""
    found = values(name)

    def cell(row, column):
        if not (seeds := found.get((row, column))):
            return "-"
        text, best = f"{mean(seeds.values()):.1f}", found.get(("teacher", column), {})
        if row != "teacher" and (both := seeds.keys() & best):
            less = mean(seeds[seed] - best[seed] for seed in both)
            text += f" ({less:+.1f})"
        return text + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")

    there = {row for row, _ in found}
    columns = {key: title for key, title in columns.items() if any(key == x for _, x in found)}
    return table(["backbone", *columns.values()],
                 [[title, *(cell(row, column) for column in columns)]
                  for row, title in rows.items() if row in there])


def sizes():
    """linear_conv at 224 pixels and larger, with its taps fixed, spread, and after more steps."""
    return scores("study-cpu-224.csv", {
        "teacher": "teacher", "linear_conv-fixed": "stage 2 at 224, taps 1 patch apart",
        "linear_conv": "stage 2 at 224", "linear_conv-long": "the same, 320 steps of stage 2"}, {
        "classify 0": "top-1, 224 px", "segment 0": "mIoU, 224 px", "segment-at-2-times 0":
        "448 px, head of 224", "segment-at-3-times-quarter 0": "672 px, head of 224, 121 photos",
        "tune-classify 0": "top-1, tuned"})


TUNED = {                               # operator and steps of stages 1 and 2 -> title
    "teacher": "teacher", "linear_conv-none": "linear_conv, no alignment",
    "linear-640-0": "linear, 640 + 0", "linear-160-160": "linear, 160 + 160",
    "linear-640-320": "linear, 640 + 320", "linear_conv-160-0": "linear_conv, 160 + 0",
    "linear_conv-640-0": "linear_conv, 640 + 0",
    "linear_conv-160-160": "linear_conv, 160 + 160",
    "linear_conv-640-640": "linear_conv, 640 + 640",
    "linear_conv-640-640-2e-5": "linear_conv, 640 + 640 at 2e-5",
    "linear_conv-scratch": "linear_conv, random weights"}


def tuned(rows=TUNED):
    """Frozen and tuned backbones at 112 pixels."""
    return scores("study-cpu-112.csv", rows, {
        "classify 0": "top-1, frozen", "tune-classify 0": "top-1, tuned",
        "segment 0": "mIoU, frozen", "tune-segment 0": "mIoU, tuned"})


def tuned_short():
    rows = ("teacher", "linear_conv-none", "linear-640-320", "linear_conv-640-0",
            "linear_conv-640-640", "linear_conv-640-640-2e-5", "linear_conv-scratch")
    return tuned({row: TUNED[row] for row in rows})


def fig5():
    """Stage 1's loss by what it trains."""
    lines = read("fig5-cpu.csv")
    return table(list(lines[0]), [list(line.values()) for line in lines])


PAGES = {"README.md": [demo, retention_short, tuned_short, efficiency_short],
         "results/README.md": [retention, sizes, tuned, fig5, efficiency]}

if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        collect(*sys.argv[2:])
    else:
        for makers in PAGES.values():
            print(*(make() for make in makers), sep="\n\n", end="\n\n")
