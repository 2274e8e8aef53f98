"""How fast one loader worker makes training images of photos: python results/load_speed.py photos/

Writes results/load-speed.csv: images/s of reading alone (whole, and with the JPEG decoder's short cut), and of the stages'
own Draws (read, crop, resize, flip), each on one thread over the same photos, in turns.
"""
import csv
import platform
import sys
from functools import partial
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
from model import Draws, find_images, read_image, run

PIXELS, PHOTOS = 224, 256


def main(folder):
    paths = find_images(folder)
    paths = paths[::max(1, len(paths) // PHOTOS)]
    torch.set_num_threads(1)                  # as in a loader's worker
    read = partial(read_image, short=PIXELS)
    crop = v2.Compose([v2.RandomResizedCrop(PIXELS, (0.35, 1), interpolation=3), v2.RandomHorizontalFlip()])
    photos = Draws(paths, read, crop, seed=0)
    points = bench.measure({"read whole": lambda: [read_image(path) for path in paths],
                            "read": lambda: [read(path) for path in paths],
                            "read, augment": lambda: [photos[i] for i in range(len(photos))]}, {}, "cpu", seconds=20)
    chip = bench.linux("cpuinfo", "model name.*: (.*)", platform.machine())
    rows = [{"name": name, "images_per_s": f"{len(paths) / point['median_ms'] * 1e3:.0f}", "pixels": PIXELS, "photos": len(paths)} | {
             key: f"{point[key]:.2f}" for key in ("median_ms", "low_ms", "high_ms")} | {"repeats": point["repeats"],
             "device": f"{chip}, 1 thread", "torch": torch.__version__, "torchvision": torchvision.__version__}
            for name, point in points.items()]
    with open(Path(__file__).with_name("load-speed.csv"), "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    for row in rows:
        print(*row.values())


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:2] or ["photos"]))
