#!/usr/bin/env bash
# The demo with several seeds, from the repository's root: bash results/demo.sh 0 1 2. Then
#   python results/tables.py collect runs/demo results/demo.csv
set -e
for seed in "$@"; do
    out=runs/demo/demo/seed$seed
    python align_attention.py --seed $seed --out $out/one
    python align_features.py --seed $seed --student $out/one/student.safetensors --out $out/two
    python finetune.py --freeze --seed $seed --out $out/classify --weights \
        demo/teacher.safetensors demo/teacher.safetensors:linear $out/{one,two}/student.safetensors
done
