"""The loss of runs, each step's a mean of ten: python results/curves.py NAME.png RUN...

RUN is a folder of stage 1 or 2. It needs matplotlib (pip install matplotlib).
"""
import json
import sys
from pathlib import Path
from statistics import mean

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("curves.py needs matplotlib: pip install matplotlib")

figure = Figure((8, 4), layout="tight")
axis = figure.subplots()
axis.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
target, *runs = sys.argv[1:] if sys.argv[1:2] != ["--help"] else sys.exit(__doc__)
for run in runs or sys.exit(__doc__):
    if not Path(run, "log.jsonl").exists():
        sys.exit(f"{run} has no log.jsonl")
    losses = [json.loads(line)["loss"] for line in Path(run, "log.jsonl").open()]
    means = [mean(losses[max(0, i - 10):i]) for i in range(1, len(losses) + 1)]
    axis.plot(range(1, len(losses) + 1), means, label=run)
axis.legend()
figure.savefig(target)
print(f"wrote {target}")
