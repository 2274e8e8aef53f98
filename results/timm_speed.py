"""Our softmax ViT-S/14 against timm's on the same weights, in turns: python results/timm_speed.py (needs timm).

Writes results/timm-speed.csv: milliseconds per batch, eager, float32, without gradients; ratio: timm's time / ours.
"""
import csv
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
from model import KNOWN, ViT, linearize

NAME = bench.MODELS["vits14"]
device = "cuda" if torch.cuda.is_available() else "cpu"
theirs = timm.create_model(NAME, dynamic_img_size=True).eval().to(device)
ours = ViT(KNOWN[NAME]).eval().to(device)
ours.load_state_dict(theirs.state_dict())
vits = {"timm": theirs.forward_features, "ours": ours, "ours, linear": linearize(ours, "linear")}
rows = []
for pixels in (224, 518):
    for batch in (1, 8):
        images = torch.randn(batch, 3, pixels, pixels, device=device)
        with torch.no_grad():
            points = bench.measure({name: lambda vit=vit: vit(images) for name, vit in vits.items()}, {}, device, seconds=15)
        for name, point in points.items():
            rows.append({"name": name, "pixels": pixels, "batch": batch} | {
                key: f"{point[key]:.2f}" for key in ("median_ms", "low_ms", "high_ms")} | {
                "ratio": f"{points['timm']['median_ms'] / point['median_ms']:.3f}", "repeats": point["repeats"],
                "device": f"{device}, {torch.get_num_threads()} threads", "torch": torch.__version__, "timm": timm.__version__})
            print(*rows[-1].values())
with open(Path(__file__).with_name("timm-speed.csv"), "w", newline="") as file:
    table = csv.DictWriter(file, rows[0])
    table.writeheader()
    table.writerows(rows)
