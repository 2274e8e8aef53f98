"""Collect the runs of several seeds into TARGET.csv and print them as a table of results/README.md.

    python results/collect.py runs/study results/study

Reads FOLDER/seed*/**/metrics.json of finetune.py, where SCORES/ROW/RUN/metrics.json (study.sh) says which row and what was scored, else the
weights do, and FOLDER/seed*/*/report.json of stages 1 and 2.
"""
import csv
import json
import statistics
import sys
from pathlib import Path

FINAL = ("cls_cosine", "patch_cosine", "whitened_error")


def names(file, row):
    """-> the row, the column that a score belongs to."""
    column, weights = f"{row['metric']} {row['size']}", Path(row["weights"])
    if row["task"] == "segment":
        column += f", {row['head_kind']} head"
    if file.parts[-4] in ("scores", "tuned"):           # scores/ROW/segment-SIZE-of-OLD-HEAD, tuned/ROW/TASK-SIZE-align-WEIGHT
        task, size, *more = file.parent.name.split("-")
        column += f" of {more[1]}" if len(more) == 3 else f", tuned, --align {more[1]}" if len(more) == 2 else ""
        return file.parts[-3].replace("no-alignment", "no alignment"), column
    name = weights.parent.name if weights.stem == "student" else "no alignment" if ":" in weights.name else "teacher"
    return name, column + ("" if row["frozen"] else ", tuned")


def show(values):
    digits = 3 if max(values) < 2 else 0 if min(values) > 100 else 1        # cosines and errors, photos, scores
    low, mean, high = (f"{f(values):.{digits}f}" for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def main(folder, target):
    scores, extra = {}, {}
    for file in sorted(Path(folder).glob("seed*/**/metrics.json")):
        for row in json.loads(file.read_text()):
            name, column = names(file, row)
            scores.setdefault(name, {}).setdefault(column, []).append(row["score"])
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
