"""The loss of runs of stages 1 and 2: python results/curves.py NAME.png RUN..."""
import json
import sys
from pathlib import Path
from statistics import mean

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("curves.py needs matplotlib: pip install matplotlib")

target, *runs = sys.argv[1:] if len(sys.argv) > 2 else sys.exit(__doc__)
if Path(target).is_dir() or not all(Path(run, "log.jsonl").exists() for run in runs):
    sys.exit(f"expected a picture to write, then folders with a log.jsonl, found {target} {runs}")
figure = Figure((8, 4), layout="tight")
axis = figure.subplots()
axis.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
for run in runs:
    losses = [json.loads(line)["loss"] for line in Path(run, "log.jsonl").open()]
    steps = range(1, len(losses) + 1)
    axis.plot(steps, [mean(losses[max(0, i - 10):i]) for i in steps], label=run)
axis.legend()
figure.savefig(target)
