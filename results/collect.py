"""Collect the runs of several seeds into TARGET.csv and print them as a table of results/README.md.

    python results/collect.py runs/study results/study

Reads FOLDER/seed*/**/metrics.json (finetune.py, heads.py), FOLDER/tuned-ROW-WEIGHT/metrics.json (WEIGHT of --align) and
FOLDER/seed*/*/report.json (stages 1 and 2).
"""
import csv
import json
import statistics
import sys
from pathlib import Path

FINAL = ("cls_cosine", "patch_cosine", "whitened_error")


def name(weights):
    """The row a weight file belongs to: its run's folder for a student, else teacher or no alignment; heads.py's checkpoints
    lie in ROW-HEAD-SEED."""
    path = Path(weights)
    if path.stem == "0-segment":
        return path.parent.name.rsplit("-", 2)[0].replace("no-alignment", "no alignment")
    return path.parent.name if path.stem == "student" else "no alignment" if ":" in path.name else "teacher"


def show(values):
    digits = 3 if max(values) < 2 else 0 if min(values) > 100 else 1        # cosines and errors, photos, scores
    low, mean, high = (f"{f(values):.{digits}f}" for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def main(folder, target):
    scores, extra = {}, {}
    for file in sorted([*Path(folder).glob("seed*/**/metrics.json"), *Path(folder).glob("tuned-*/metrics.json")]):
        for row in json.loads(file.read_text()):
            head = f", {row['head_kind']} head" if row["task"] == "segment" else ""
            head += f" of {Path(row['weights']).parts[-3].split('-')[1]}" if row["kept_head"] else ""   # segment-SIZE
            aligned = f", --align {file.parent.name.rpartition('-')[2]}" if file.parent.name.startswith("tuned-") else ""
            column = f"{row['metric']} {row['size']}{head}" + ("" if row["frozen"] else f", tuned{aligned}")
            scores.setdefault(name(row["weights"]), {}).setdefault(column, []).append(row["score"])
    for file in sorted(Path(folder).glob("seed*/*/report.json")):
        report = json.loads(file.read_text())
        row, training = extra.setdefault(file.parent.name, {}), report["training"]
        final = report["final"] if "final" in report else report["after"]
        for key, value in {"photos": training["steps"] * training["batch_size"], **final}.items():
            row.setdefault(key, []).append(value)
    if not scores:
        sys.exit(f"collect.py: {folder} holds no seed*/*/metrics.json: run the script of that name in results/ first")
    table = {row: extra.get(row, {}) | scores.get(row, {}) for row in dict.fromkeys([*scores, *extra])}
    columns = [*FINAL, *sorted({column for found in scores.values() for column in found})]
    with open(f"{target}.csv", "w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["row", "column", "mean", "lowest", "highest", "seeds"])
        for row, values in table.items():
            for column, found in values.items():
                writer.writerow([row, column, *(f"{f(found):.4f}" for f in (statistics.mean, min, max)), len(found)])
    print("| row |", " | ".join(columns), "|\n|---" + "|---" * len(columns) + "|")
    for row, values in table.items():
        print("|", row, "|", " | ".join(show(values[c]) if c in values else "" for c in columns), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
