"""Collect runs of several seeds into results/NAME.csv and print them as README's table.

    python results/collect.py runs/vits14-cpu results/vits14-cpu

Reads FOLDER/seed*/*/metrics.json (finetune.py) and FOLDER/seed*/*/report.json (stages 1 and 2).
"""
import csv
import json
import statistics
import sys
from pathlib import Path


def name(weights):
    """The row a weight file belongs to: its run's folder for a student, else teacher or none."""
    path = Path(weights)
    return path.parent.name if path.stem == "student" else "none" if ":" in path.name else "teacher"


def show(values):
    digits = 3 if max(values) < 2 else 1      # cosines and errors, scores and seconds
    low, mean, high = (f"{f(values):.{digits}f}" for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def main(folder, target):
    scores, extra = {}, {}
    for file in sorted(Path(folder).glob("seed*/*/metrics.json")):
        for row in json.loads(file.read_text()):
            column = f"{row['task']} {row['metric']} {'frozen' if row['frozen'] else 'tuned'}"
            scores.setdefault(name(row["weights"]), {}).setdefault(column, []).append(row["score"])
    for file in sorted(Path(folder).glob("seed*/*/report.json")):
        report = json.loads(file.read_text())
        row = extra.setdefault(file.parent.name, {})
        row.setdefault("seconds", []).append(report["seconds"])
        row.setdefault("steps", []).append(report["training"]["steps"])
        if isinstance(report["after"], dict):                           # stage 2: "before" is the row it started from
            start = report["arguments"]["student"]
            start = extra.setdefault(Path(start).parent.name if start else "none", {})
            for key in ("cls_cosine", "patch_cosine", "relative_error"):
                row.setdefault(key, []).append(report["after"][key])
                start.setdefault(key, []).append(report["before"][key])
    if not scores:
        sys.exit(f"collect.py: {folder} holds no seed*/*/metrics.json: run the script of that name in results/ first")
    table = {row: columns | extra.get(row, {}) for row, columns in scores.items()}
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    with open(f"{target}.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["row", "column", "mean", "lowest", "highest", "seeds"])
        for row, values in table.items():
            for column, found in values.items():
                writer.writerow([row, column, *(f"{f(found):.4f}" for f in (statistics.mean, min, max)), len(found)])
    print("| row |", " | ".join(columns), "|\n|---" + "|---" * len(columns) + "|")
    for row, values in table.items():
        cells = [show(values[c]) if c in values else "" for c in columns]
        print("|", row, "|", " | ".join(cells), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
