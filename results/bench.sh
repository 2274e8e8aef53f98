#!/usr/bin/env bash
# Every bench-*.csv and -.png here, load-speed.csv and timm-speed.csv (needs timm), from the repository's root:
#   PHOTOS=folder bash results/bench.sh
# Half an hour on two CPU cores with nothing else running; on a GPU the parts take its defaults (bfloat16, compiled).
set -eu
python bench.py attention --mode eager
python bench.py attention --mode compiled
python bench.py model --models vits14
python bench.py train
python results/load_speed.py "$PHOTOS"
python results/timm_speed.py
