"""Everything that is scored of one frozen backbone, in one process, which reads data and computes features once.

    python results/score.py OUT WEIGHTS PROBE VOC classify-224 segment-224-linear segment-448-of-224-linear ... -- --seed 0

classify-SIZE: a linear head on the photos of PROBE. segment-SIZE-HEAD: such a head on VOC. segment-SIZE-of-OLD-HEAD: the head of segment-OLD-HEAD,
which comes before it, scored at another size. Each is the finetune.py command that it prints, and is written to a folder of its name in OUT; what is
there is not made again, so remove OUT with a student that is.
"""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune

STEPS = {"classify": ["--steps", "1000", "--lr", "3e-4"], "segment": ["--steps", "400"]}


def once(function, key):
    """The function, its results kept by key(*arguments); None: not kept."""
    kept = {}

    def remembering(*arguments):
        if (place := key(*arguments)) is None:
            return function(*arguments)
        if place not in kept:
            kept[place] = function(*arguments)
        return kept[place]
    return remembering


def features_of(vit, batches, task, *_):
    """What tells sets of features apart: of which backbone and photos, read how. Not kept: those of a list, which a mask head starts from, and of no photo."""
    if isinstance(batches, list) or not len(batches.dataset):
        return None
    photos, digest = batches.dataset, hashlib.sha256(vit.attention.encode())
    for tensor in vit.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.digest(), task, len(photos), str(photos.source[0]), str(photos.transform)


def main(out, weights, probe, voc, *rest):
    finetune.load_data = once(finetune.load_data, lambda *arguments: str(arguments))
    finetune.cached = once(finetune.cached, features_of)
    runs, flags = rest[:rest.index("--")], rest[rest.index("--") + 1:]
    for run in runs:
        target, (task, size, *more) = Path(out, run), run.split("-")      # more: HEAD, or "of", OLD, HEAD
        if (target / "metrics.json").exists():
            continue
        words = ["--task", task, "--data", probe if task == "classify" else voc, "--size", size, "--freeze", "--every", "1000"]
        words += ["--head", more[-1]] if more else []
        if len(more) == 3:
            words += ["--steps", "0", "--weights", str(Path(out, f"segment-{more[1]}-{more[2]}", "0-segment.safetensors"))]
        else:
            words += [*STEPS[task], "--weights", weights]
        words += [*flags, "--out", str(target)]
        print("python finetune.py", *words, flush=True)
        finetune.main(words)


if __name__ == "__main__":
    finetune.run(lambda: main(*sys.argv[1:]))
