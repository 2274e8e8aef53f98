#!/usr/bin/env bash
# Every bench-*.csv and -.png here, load-speed.csv and timm-speed.csv (needs timm), from the repository's root:
#   PHOTOS=folder bash results/bench.sh
# Half an hour on two CPU cores with nothing else running; on a GPU the parts take its defaults (bfloat16, compiled).
set -eu
for dtype in float32 bfloat16; do
    python bench.py attention --mode eager --heads 6 --points 4096 16384 --dtype $dtype
    python bench.py model --models vits14 --points 224 448 672 1022 --batch-size 1 --dtype $dtype \
        --operators softmax_reference softmax linear linear_conv
    python bench.py train --quick --dtype $dtype
done
python bench.py attention --mode compiled --heads 6 --points 4096 16384 --dtype float32
for part in attention model; do
    python results/bench_picture.py results/bench-cpu-$part-eager.png results/bench-cpu-$part-*-eager.csv
done
python results/operator_choices.py
python results/load_speed.py "$PHOTOS"
python results/timm_speed.py
