"""Several heads to segment on one frozen backbone, its features computed once for all of them.

    python results/heads.py OUT linear:0 linear:1 linear:2 mask:0 -- --data voc2012 --size 448 \
        --weights NAME=FILE FILE ...

HEAD:SEED, then flags of finetune.py: each of --weights x HEAD:SEED is what `finetune.py --task segment --freeze --head HEAD
--seed SEED` with these flags does, if its steps draw every photo, written to OUT/ROW-HEAD-SEED. What is there is not made again. Heads that are to be scored
at another size: --steps 0 and `--weights OUT/{row}-{head}-{seed}/0-segment.safetensors`, the braces as they are, with --rows ROW ....
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune
from results.collect import name


def main(out, *rest):
    heads, flags = rest[:rest.index("--")], [*rest[rest.index("--") + 1:]]
    weights, rows = [], []
    for flag, values in (("--weights", weights), ("--rows", rows)):
        if flag in flags:
            start = flags.index(flag)
            end = next((i for i in range(start + 1, len(flags)) if flags[i].startswith("--")), len(flags))
            values += flags[start + 1:end]
            del flags[start:end]
    compute = finetune.cached
    for row, spec in [(row, weights[0]) for row in rows] or [(name(spec).replace(" ", "-"), spec) for spec in weights]:
        parts = []                                      # features of this backbone: of each part that has been asked for
        for head, seed in (each.split(":") for each in heads):
            target, asked = Path(out, f"{row}-{head}-{seed}"), iter(range(2))

            def cached(vit, batches, task, frozen, *more):
                if frozen:                              # of features, for the start of a mask head
                    return compute(vit, batches, task, frozen, *more)
                place = next(asked)
                if place == len(parts):
                    parts.append(compute(vit, batches, task, frozen, *more))
                return parts[place]

            finetune.cached = cached
            if not (target / "metrics.json").exists():
                finetune.main(["--task", "segment", "--freeze", "--head", head, "--seed", seed, "--out", str(target), *flags,
                               "--weights", spec.format(row=row, head=head, seed=seed)])


if __name__ == "__main__":
    finetune.run(lambda: main(*sys.argv[1:]))
