"""The paper's Fig. 5 on our runs: stage 1's loss over its steps, tuned Q, K, V against LoLCATS' feature maps.

    python results/fig5.py runs/vits14-cpu results/fig5

Reads FOLDER/seed*/one/log.jsonl and FOLDER/seed*/maps/log.jsonl; writes TARGET.csv and TARGET.png (needs matplotlib).
"""
import csv
import json
import sys
from pathlib import Path

NAMES = {"one": "1 + ELU, tuned Q, K, V (ViT-AdaLA)", "maps": "Hedgehog maps only (LoLCATS)"}


def main(folder, target):
    runs = {}
    for file in sorted(Path(folder).glob("seed*/*/log.jsonl")):
        if file.parent.name in NAMES:
            runs[file.parent.name, file.parent.parent.name] = [json.loads(line)["loss"] for line in file.open()]
    if not runs:
        sys.exit(f"fig5.py: {folder} holds no seed*/one/log.jsonl or seed*/maps/log.jsonl: run results/vits14-cpu.sh first")
    with open(f"{target}.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["step", *(f"{row} {seed} loss" for row, seed in runs)])
        writer.writerows([step, *(f"{loss:.5f}" for loss in losses)] for step, losses in enumerate(zip(*runs.values()), 1))
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("fig5.py: for the picture, pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.figure(figsize=(6, 3.4))
    for (row, seed), losses in runs.items():
        pyplot.semilogy(range(1, len(losses) + 1), losses, color={"one": "C0", "maps": "C1"}[row], linewidth=1,
                        label=NAMES[row] if seed == "seed0" else None)
    pyplot.xlabel("step of 32 photos")
    pyplot.ylabel("squared error of the attention\noutput / that of the mean of V")
    pyplot.grid(alpha=0.3, which="both")
    pyplot.legend()
    pyplot.tight_layout()
    pyplot.savefig(f"{target}.png", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
