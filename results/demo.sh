#!/usr/bin/env bash
# The demo with three seeds; from the repository's root: bash results/demo.sh 0 1 2. Then
#   python results/collect.py runs/demo results/demo
set -eu
for seed in "$@"; do
  out=runs/demo/seed$seed
  python align_attention.py --seed $seed --out $out/one
  python align_features.py --seed $seed --student $out/one/student.safetensors --out $out/one-two
  python finetune.py --freeze --seed $seed --out $out/classify --weights demo/teacher.safetensors demo/teacher.safetensors:linear \
    $out/one/student.safetensors $out/one-two/student.safetensors
done
