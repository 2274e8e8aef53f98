"""The loss of runs, each step's a mean of ten: python results/curves.py RUN... writes curves.png

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
for run in sys.argv[1:] or sys.exit(__doc__):
    losses = [json.loads(line)["loss"] for line in Path(run, "log.jsonl").open()]
    axis.plot([mean(losses[max(0, i - 9):i + 1]) for i in range(len(losses))], label=run)
axis.legend()
figure.savefig("curves.png")
print("wrote curves.png")
