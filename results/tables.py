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
SCORES = {"top-1 224": "top-1, 224 px", "mIoU 224, linear head": "mIoU, 224 px",
          "mIoU 224, mask head": "mask head", "mIoU 448, linear head": "mIoU, 448 px",
          "mIoU 448, linear head of 224": "448 px, head of 224",
          "mIoU 672, linear head of 448": "672 px, head of 448"}


def retention(rows=ROWS, scores=SCORES, agreement=True):
    """Scores of frozen backbones; in brackets percent of the teacher's."""
    found = {(line["row"], line["column"]): float(line["mean"]) for line in read("study-h200.csv")}

    def score(row, column):
        value, best = found.get((row, column)), found[("teacher", column)]
        if value is None:
            return "-"
        return f"{value:.1f}" + (f" ({100 * value / best:.1f}%)" if row != "teacher" else "")

    cosines = ["cls_cosine", "patch_cosine"] if agreement else []
    return table(["frozen backbone", *(name.replace("_", " ") for name in cosines),
                  *scores.values()],
                 [[rows[row], *(f"{found[row, c]:.3f}" if (row, c) in found else "-"
                                for c in cosines), *(score(row, c) for c in scores)]
                  for row in rows])


def retention_short():
    rows = "teacher", "no alignment", "linear-12", "linear_conv-12"
    scores = "top-1 224", "mIoU 224, linear head", "mIoU 448, linear head"
    return retention({row: ROWS[row] for row in rows}, {c: SCORES[c] for c in scores}, False)


def efficiency(*dtypes):
    """Images/s of ViT-S/14 at batch 1, and times fused softmax in the same run."""
    lines = []
    for dtype in dtypes or ("float32", "bfloat16"):
        rows = [row for row in read(f"bench-cpu-model-{dtype}.csv")
                if row["name"] in ("softmax", "linear", "linear_conv") and row["images_per_s"]]
        pixels = list(dict.fromkeys(row["pixels"] for row in rows))
        for name in dict.fromkeys(row["name"] for row in rows):
            of_name = {row["pixels"]: row for row in rows if row["name"] == name}
            lines.append([f"{name}, {dtype}", *(
                f"{float(of_name[p]['images_per_s']):.2f} ({1 / float(of_name[p]['ratio']):.2f}x)"
                for p in pixels)])
    return table(["ViT-S/14, batch 1", *(f"{p} px" for p in pixels)], lines)


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
            text += f" ({round(less, 1) + 0:+.1f})"     # + 0: no -0.0
        return text + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")

    there = {row for row, _ in found}
    columns = {key: title for key, title in columns.items() if any(key == x for _, x in found)}
    return table(["backbone", *columns.values()],
                 [[title, *(cell(row, column) for column in columns)]
                  for row, title in rows.items() if row in there])


def sizes():
    """linear_conv, stage 2 at 224 pixels alone and at several sizes; longer; its taps fixed."""
    return scores("study-cpu-224.csv", {
        "teacher": "teacher", "linear_conv-fixed": "stage 2 at 224, taps 1 patch apart",
        "linear_conv": "stage 2 at 224", "linear_conv-long": "the same, 320 steps of stage 2",
        "linear_conv-sizes": "stage 2 at 224, 336, 448"}, {
        "classify 0": "top-1, 224 px", "segment 0": "mIoU, 224 px", "segment-at-2-times 0":
        "448 px, head of 224", "segment-at-3-times-quarter 0": "672 px, head of 224, 121 photos",
        "tune-classify 0": "top-1, tuned"})


def spread():
    """Patch cosine of linear_conv, by the distance of its taps at s times the size it learned at.
    Not every distance was tried: each column has the nearest one."""
    lines, rows = read("spread-cpu.csv"), []
    for learned, size in dict.fromkeys((line["learned_at"], line["size"]) for line in lines
                                       if line["learned_at"] != line["size"]):
        tried = {float(line["distance"]): line["patch_cosine"] for line in lines
                 if (line["learned_at"], line["size"]) == (learned, size)}
        times = int(size) / int(learned)
        near = [min(tried, key=lambda d: abs(d - wanted)) for wanted in (1, (1 + times) / 2, times)]
        rows.append([f"{learned} px", f"{size} px", *(f"{tried[d]} ({d:g})" for d in near)])
    return table(["learned at", "seen at", "1 patch", "(1 + s) / 2", "s"], rows)


def agreement():
    """CLS cosine, patch cosine and whitened error at each size."""
    rows = {}
    for line in read("sizes-cpu.csv"):
        rows.setdefault(line["student"], []).append(" ".join(
            f"{float(line[key]):.3f}" for key in ("cls_cosine", "patch_cosine", "whitened_error")))
    pixels = dict.fromkeys(line["size"] for line in read("sizes-cpu.csv"))
    return table(["student", *(f"{size} px" for size in pixels)],
                 [[name, *cells] for name, cells in rows.items()])


def tuned(lengths=((160, 0), (640, 0), (160, 160), (640, 320), (640, 640))):
    """Frozen and tuned backbones at 112 pixels, by the steps of stages 1 and 2."""
    return scores("study-cpu-112.csv", {
        "teacher": "teacher", "linear_conv-none": "no alignment",
        **{f"{name}-{one}-{two}": f"{name}, {one} + {two}" for name in ("linear", "linear_conv")
           for one, two in lengths},
        "linear_conv-scratch": "random weights"}, {
        "classify 0": "top-1, frozen", "tune-classify 0": "top-1, tuned",
        "segment 0": "mIoU, frozen", "tune-segment 0": "mIoU, tuned", "tune-mask 0":
        "mIoU, mask head, tuned"})


def tuned_short():
    return tuned(((640, 0), (640, 320), (640, 640)))


def larger():
    """A frozen head of 112 pixels at larger sizes."""
    return scores("study-cpu-112.csv", {"teacher": "teacher", "linear_conv-640-640":
                                        "linear_conv, 640 + 640"}, {
        "segment 0": "mIoU, 112 px", "segment-at-2-times 0": "224 px, head of 112",
        "segment-at-3-times 0": "336 px, head of 112"})


def efficiency_short():
    return efficiency("bfloat16")


def fig5():
    """Stage 1's loss by what it trains."""
    lines = read("fig5-cpu.csv")
    return table(list(lines[0]), [list(line.values()) for line in lines])


PAGES = {"README.md": [demo, retention_short, tuned_short, efficiency_short],
         "results/README.md": [retention, spread, sizes, agreement, tuned, larger, fig5,
                               efficiency]}

if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        collect(*sys.argv[2:])
    else:
        for makers in PAGES.values():
            print(*(make() for make in makers), sep="\n\n", end="\n\n")
