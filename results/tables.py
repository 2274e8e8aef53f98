"""The tables of README.md and results/README.md, from the CSV files beside this one.

    python results/tables.py                                    # prints them
    python results/tables.py collect runs/study results/study.csv       # makes a CSV from runs

collect reads FOLDER/ROW/seedS/NAME/metrics.json and report.json, and size-PIXELS.txt, as study.sh
and demo.sh leave them.
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
        for file in sorted(seed.glob("size-*.txt")):
            for line in file.read_text().splitlines():
                if line.startswith(("cls_cosine", "patch_cosine", "whitened_error")):
                    measure, value = line.split()[:2]
                    found.append((*same, f"{measure} {file.stem.removeprefix('size-')}", value))
    with open(target, "w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([("row", "seed", "measure", "value"), *found])


def read(name):
    path = HERE / name
    return list(csv.DictReader(path.open())) if path.exists() else []


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def values(name):
    """{(row, measure): values of all seeds}."""
    found = {}
    for line in read(name):
        found.setdefault((line["row"], line["measure"]), []).append(float(line["value"]))
    return found


def demo():
    found = values("demo.csv")
    names = "teacher (softmax)", "no alignment", "stage 1", "stages 1 + 2"
    scores = [found["demo", f"classify {i}"] for i in range(len(names))]
    return table(["row", f"top-1, mean (range) of {len(scores[0])} seeds"],
                 [[name, f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})"]
                  for name, x in zip(names, scores)])
