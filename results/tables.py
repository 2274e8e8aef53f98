"""The tables of README.md and results/README.md, from the CSV files beside this one.

    python results/tables.py                                    # prints them
    python results/tables.py collect runs/study results/study.csv       # makes a CSV from runs

collect reads FOLDER/ROW/seedS/NAME/metrics.json and report.json, as study.sh and demo.sh leave
them. In the CSV files here, rows have been given longer names afterwards.
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
    with open(HERE / name, newline="") as file:
        return list(csv.DictReader(file))


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def values(name):
    """{(row, measure): {seed: value}}; means over seeds have the seed "mean"."""
    found = {}
    for line in read(name):
        seeds = found.setdefault((line["row"], line["measure"]), {})
        seeds[line.get("seed", "mean")] = float(line["value"])
    return found


def scores(name, rows, columns, percent=False):
    """The mean over seeds, and how many seeds there were, if several. In brackets: minus the
    teacher's, of the same seeds, or percent of it. columns: {measure: title}."""
    found = values(name)

    def cell(row, measure):
        seeds, best = found.get((row, measure)), found.get(("teacher", measure), {})
        if not seeds:
            return "-"
        text = f"{mean(seeds.values()):.{3 if 'cosine' in measure else 1}f}"
        if row != "teacher" and (both := seeds.keys() & best):
            ours, theirs = (mean(each[seed] for seed in both) for each in (seeds, best))
            text += f" ({100 * ours / theirs:.1f}%)" if percent else f" ({ours - theirs:+.1f})"
        return text + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")

    return table(["backbone", *columns.values()],
                 [[row, *(cell(row, measure) for measure in columns)] for row in rows])


def demo():
    found = values("demo.csv")
    names = "teacher (softmax)", "no alignment", "stage 1", "stages 1 + 2"
    found = [found["demo", f"classify {i}"].values() for i in range(len(names))]
    return table(["row", f"top-1, mean (range) of {len(found[0])} seeds"],
                 [[name, f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})"]
                  for name, x in zip(names, found)])


def retention():
    """Frozen backbones on an H200."""
    one, two = ([f"{name}, {stage}" for stage in ("stage 1", "stage 2 alone", "stages 1 + 2")]
                for name in ("linear", "linear_conv"))
    return scores("study-h200.csv", ["teacher", "no alignment", *one, *two,
                                     "the same, from 500 photos"], {
        "cls_cosine": "cls cosine", "patch_cosine": "patch cosine", "top-1 224": "top-1, 224 px",
        "mIoU 224, linear head": "mIoU, 224 px", "mIoU 224, mask head": "mask head",
        "mIoU 448, linear head": "mIoU, 448 px",
        "mIoU 448, linear head of 224": "448 px, head of 224",
        "mIoU 672, linear head of 448": "672 px, head of 448"}, percent=True)


def retention_short():
    return scores("study-h200.csv", ["teacher", "no alignment", "linear, stages 1 + 2",
                                     "linear_conv, stages 1 + 2"], {
        "top-1 224": "top-1, 224 px", "mIoU 224, linear head": "mIoU, 224 px",
        "mIoU 448, linear head": "mIoU, 448 px"}, percent=True)


def sizes():
    """linear_conv at 224 pixels and larger, with its taps fixed, spread, and after more steps."""
    return scores("study-cpu-224.csv", ["teacher", "stage 2 at 224, taps 1 patch apart",
                                        "stage 2 at 224", "the same, 320 steps of stage 2"], {
        "classify 0": "top-1, 224 px", "segment 0": "mIoU, 224 px",
        "segment-at-2-times 0": "448 px, head of 224",
        "segment-at-3-times-quarter 0": "672 px, head of 224, 121 photos",
        "tune-classify 0": "top-1, tuned"})


def tuned(*steps):
    """Frozen and tuned backbones at 112 pixels. steps: of stages 1 and 2, by operator."""
    rows = steps or ["linear, 640 + 0", "linear, 640 + 320", "linear_conv, 640 + 0",
                     "linear_conv, 160 + 160", "linear_conv, 640 + 640",
                     "linear_conv, 640 + 640 at 2e-5"]
    return scores("study-cpu-112.csv", ["teacher", "linear_conv, no alignment", *rows,
                                        "linear_conv, random weights"], {
        "classify 0": "top-1, frozen", "tune-classify 0": "top-1, tuned",
        "segment 0": "mIoU, frozen", "tune-segment 0": "mIoU, tuned"})


def tuned_short():
    return tuned("linear, 640 + 320", "linear_conv, 640 + 640")


def tuned_first():
    """Students of a teacher that was tuned to segment before."""
    return scores("tuned-first-cpu-112.csv", [
        "teacher", "linear, 320 + 0", "linear, 320 + 320", "linear_conv, 320 + 0",
        "linear_conv, 320 + 320", "linear_conv, 320 + 320, a new head"], {
        "own-head 0": "mIoU, the teacher's head", "segment 0": "frozen, 400 steps more",
        "tune-segment 0": "tuned, 150 steps more"})


def fig5():
    """Stage 1's loss by what it trains."""
    lines = read("fig5-cpu.csv")
    return table(list(lines[0]), [list(line.values()) for line in lines])


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


PAGES = {"README.md": [demo, retention_short, tuned_short, efficiency_short],
         "results/README.md": [retention, sizes, tuned, tuned_first, fig5, efficiency]}

if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        collect(*sys.argv[2:])
    else:
        for makers in PAGES.values():
            print(*(make() for make in makers), sep="\n\n", end="\n\n")
