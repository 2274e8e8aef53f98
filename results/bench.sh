#!/usr/bin/env bash
# Every bench-*.csv and -.png here, operator.csv, load-speed.csv and timm-speed.csv (needs timm), from the repository's root:
#   PHOTOS=folder bash results/bench.sh
# An hour or so on two CPU cores with nothing else running; on a GPU the parts take its defaults (bfloat16, compiled).
# The two settings keep freed memory in the process: without them a CPU's times are those of page faults (README, "Efficiency").
set -eu
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184
python bench.py attention --mode eager
python bench.py attention --mode compiled
python results/operator_choices.py
python bench.py model
python bench.py train
python results/load_speed.py "$PHOTOS"
python results/timm_speed.py
