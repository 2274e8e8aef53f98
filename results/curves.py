"""Curves of one run, or of several in one picture: python results/curves.py RUN... [--out FILE]

RUN is a folder with a log.jsonl. The picture shows the loss of each step, as a mean of 10, and the
held-out scores. It needs matplotlib (pip install matplotlib).
"""
import json
import sys
from pathlib import Path

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("curves.py: the picture needs matplotlib: pip install matplotlib")


def main(runs, target):
    figure = Figure((10, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    for run in runs:
        rows = [json.loads(line) for line in Path(run, "log.jsonl").open()]
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        means = [(step, sum(loss for _, loss in losses[max(0, i - 9):i + 1]) / min(10, i + 1))
                 for i, (step, _) in enumerate(losses)]
        left.plot(*zip(*means), label=run)
        scores = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
        if scores:
            right.plot(*zip(*scores), marker=".", label=run)
    left.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
    right.set(xlabel="step", ylabel="held-out score (error of stages 1, 2; percent of stage 3)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(target, dpi=100)
    print(f"wrote {target}")


if __name__ == "__main__":
    words = sys.argv[1:]
    where = words.index("--out") if "--out" in words else len(words)
    main(words[:where] or sys.exit(__doc__), (words + ["--out", "curves.png"])[where + 1])
