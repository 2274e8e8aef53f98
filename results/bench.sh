#!/usr/bin/env bash
# The CPU's tables and their picture, from the repository's root: bash results/bench.sh
# Half an hour on two CPU cores with nothing else running. It writes runs/bench: copy what you keep.
export CUDA_VISIBLE_DEVICES=                            # also where there is a GPU
for dtype in float32 bfloat16; do
    python bench.py model --models vits14 --points 224 448 672 1022 --dtype $dtype --out runs/bench
done
python results/bench_picture.py runs/bench/model.png runs/bench/bench-cpu-model-*.csv
