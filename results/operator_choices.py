"""What each choice in model.linear_attention is worth: python results/operator_choices.py

Writes results/operator.csv: time of each variant over that of linear attention's two products alone, on q, k, v as the network
lays them out, float32, in turns (bench.measure).
"""
import csv
import os
import platform
import sys
import types
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
import model

os.environ.setdefault("KINETO_LOG_LEVEL", "99")                         # the profiler complains of a missing GPU


def textbook(q, k, v, phi=lambda x: F.elu(x) + 1):
    """As it is mostly published: the output is divided, phi(q) and phi(k) are whole."""
    q, k = phi(q), phi(k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))


def by_autograd(x):
    """The same phi, its slope left to autograd."""
    return x.clamp(max=0).exp() + x.relu()


def in_chunks(tokens):
    """model.linear_attention with another CHUNK."""
    operator = model.linear_attention
    return types.FunctionType(operator.__code__, vars(model) | {"CHUNK": tokens}, argdefs=operator.__defaults__)


EAGER = {
    "as it is": model.linear_attention,
    "textbook": textbook,
    "phi's slope by autograd": partial(model.linear_attention, phi=by_autograd),
    "phi = ReLU (another operator)": model.ATTENTION["relu"],
    "chunks of 256 tokens": in_chunks(256),
    "chunks of 4,096 tokens": in_chunks(4096),
    "one chunk": in_chunks(10 ** 9),
}
COMPILED = {                                  # in turns of their own
    "as it is, compiled": torch.compile(model.linear_attention, dynamic=False),
    "textbook, compiled": torch.compile(textbook, dynamic=False),
}


def main(points=((6, 4096), (16, 16384)), seconds=5):
    torch.manual_seed(0)
    device = f"{bench.linux('cpuinfo', 'model name.*: (.*)', platform.machine())}, {torch.get_num_threads()} threads"
    rows = []
    for (heads, tokens), backward, variants in product(points, (False, True), (EAGER, COMPILED)):
        torch._dynamo.reset()
        q, k, v = bench.projected(1, heads, tokens, "cpu", torch.float32)
        calls = {name: bench.forward_or_both(call, q, k, v, backward) for name, call in ({"products": bench.products} | variants).items()}
        with torch.set_grad_enabled(backward):
            measured = bench.measure(calls, {}, "cpu", seconds)
        for name in variants:
            row = measured[name]
            rows.append({"variant": name, "heads": heads, "tokens": tokens, "pass": "forward+backward" if backward else "forward",
                         "ratio": f"{row['median_ms'] / measured['products']['median_ms']:.2f}", "median_ms": f"{row['median_ms']:.2f}",
                         "peak_mb": f"{row['peak_mb']:.1f}", "repeats": row["repeats"], "device": device, "torch": torch.__version__})
            print(*rows[-1].values())
    with open(Path(__file__).with_name("operator.csv"), "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
