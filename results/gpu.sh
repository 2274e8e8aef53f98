#!/usr/bin/env bash
# What README says of a GPU, in 10 minutes at most: a step that takes too long is ended.
#   PHOTOS=photos OUT=folder bash results/gpu.sh
OUT=${OUT:-gpu-results} PHOTOS=${PHOTOS:?name a folder of photos}
mkdir -p "$OUT"
ADALA_GPU=1 timeout 150 python -m pytest -q tests/test_cuda.py | tee "$OUT/test_cuda.txt"
timeout 150 python bench.py model --quick --dtype bfloat16 --operators softmax linear linear_conv \
    --models vitl14 --points 518 1022 252 2044 --out "$OUT"
# Seconds of a step in stages 1 and 2 with random weights, eager and compiled.
python -c "from model import *; \
    save_vit(ViT(KNOWN['vit_small_patch14_dinov2.lvd142m']), '$OUT/random.safetensors')"
for stage in align_attention align_features; do
    for mode in --no-compile --compile; do
        echo "$stage $mode"
        timeout 60 python $stage.py --teacher "$OUT/random.safetensors" --data "$PHOTOS" \
            --attention linear_conv --size 224 --steps 30 $mode --out "$OUT/$stage$mode"
    done
done | tee "$OUT/steps.txt"
