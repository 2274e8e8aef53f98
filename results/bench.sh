#!/usr/bin/env bash
# Every bench-*.csv and -.png here, load-speed.csv and timm-speed.csv (needs timm), from the repository's root:
#   PHOTOS=folder bash results/bench.sh
# Half an hour on two CPU cores with nothing else running; on a GPU the parts take its defaults (bfloat16, compiled).
set -eu
python bench.py attention --mode eager --points 4096 16384
python bench.py attention --mode compiled --heads 6 --points 4096 16384
python bench.py model --models vits14 --points 224 384 512 768 1024 1536
python bench.py train --quick
python results/operator_choices.py
python results/load_speed.py "$PHOTOS"
python results/timm_speed.py
