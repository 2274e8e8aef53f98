#!/usr/bin/env bash
# The CPU's bench-*.csv and the picture here, from the repository's root: bash results/bench.sh
# Half an hour on two CPU cores with nothing else running. On a GPU bench.py takes its own defaults.
set -euo pipefail
for dtype in float32 bfloat16; do
    python bench.py attention --heads 6 --points 4096 16384 --dtype $dtype
    python bench.py model --models vits14 --points 224 448 672 1022 --batch-size 1 --dtype $dtype
done
python results/bench_picture.py results/bench-cpu-model.png results/bench-cpu-model-*.csv
