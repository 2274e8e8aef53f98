"""What each speed trick of linear attention is worth in a whole ViT: python results/operator_choices.py

Writes results/operator.csv: time of ViT-S/14's forward pass or training step with a variant, over that with the operator of
model.py, in turns, medians of the ratios; float32, the plain process. With malloc settings, for results/operator-malloc.csv:
    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 python results/operator_choices.py operator-malloc
"""
import csv
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
import model

POINTS = ((224, 8, False), (518, 1, False), (1022, 1, False), (224, 8, True), (518, 2, True))


def by_autograd(x):
    return x.clamp(-30, 0).exp() + x.relu()


def in_chunks(q, k, v, n=1024):
    """Chunks of tokens stay in a CPU's cache; the output is laid out as the network reads it."""
    kv, k_sum, out = 0, 0, []
    for k_n, v_n in zip(k.split(n, dim=-2), v.split(n, dim=-2)):
        k_n = model.elu_plus_one(k_n)
        kv, k_sum = kv + k_n.mT @ v_n, k_sum + k_n.sum(-2, keepdim=True)
    for q_n in q.split(n, dim=-2):
        q_n = model.elu_plus_one(q_n)
        out.append((q_n / (q_n * k_sum).sum(-1, keepdim=True) @ kv).transpose(1, 2))
    return torch.cat(out, dim=1).transpose(1, 2)


def textbook(q, k, v):
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))


VARIANTS = {
    "as it is": model.linear_attention,
    "phi's slope by autograd": partial(model.linear_attention, phi=by_autograd),
    "chunks of 1,024 tokens, output laid out": in_chunks,
    "textbook": textbook,
}


def main(target="operator", repeats=7):
    torch.manual_seed(0)
    vit = model.ViT(model.KNOWN["vit_small_patch14_dinov2.lvd142m"], "linear")
    device = f"{bench.linux('cpuinfo', 'model name.*: (.*)', 'CPU')}, {torch.get_num_threads()} threads"
    rows = []
    for pixels, batch, train in POINTS:
        images, times = torch.randn(batch, 3, pixels, pixels), {name: [] for name in VARIANTS}
        for _ in range(repeats + 2):
            for name, function in VARIANTS.items():
                for block in vit.blocks:
                    block.attn.operator.function = function
                start = time.perf_counter()
                with torch.set_grad_enabled(train):
                    tokens = vit(images)
                if train:
                    tokens.square().mean().backward()
                    vit.zero_grad()
                times[name].append(time.perf_counter() - start)
        for name in VARIANTS:
            ratio = statistics.median(a / b for a, b in zip(times[name][2:], times["as it is"][2:]))
            rows.append({"variant": name, "pixels": pixels, "batch": batch, "pass": "training step" if train else "forward",
                         "ratio": f"{ratio:.3f}", "median_ms": f"{1e3 * statistics.median(times[name][2:]):.0f}",
                         "device": device, "torch": torch.__version__})
            print(*rows[-1].values(), flush=True)
    with open(Path(__file__).with_name(f"{target}.csv"), "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
