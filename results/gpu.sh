#!/usr/bin/env bash
# What README says of a GPU, the most important first, in 16 minutes at most:
#   PHOTOS=photos OUT=folder bash results/gpu.sh
# Every row is written at once. A step that takes too long is ended, and what it measured is kept.
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-gpu-results} PHOTOS=${PHOTOS:?name a folder of photos}
mkdir -p "$OUT"
ADALA_GPU=1 timeout 150 python -m pytest -q tests/test_cuda.py > "$OUT/test_cuda.txt" 2>&1
tail -3 "$OUT/test_cuda.txt"
bench="python bench.py model --quick --dtype bfloat16 --operators softmax linear linear_conv"
timeout 150 $bench --models vitl14 --batch-size 1 --points 518 1022 252 2044 --out "$OUT"
timeout 100 $bench --models vits14 --batch-size 16 --points 448 672 224 1022 --out "$OUT"
ADALA_KERNEL=plain timeout 60 $bench --operators softmax linear --models vitl14 \
    --points 518 1022 --out "$OUT"
# Seconds of a step in stages 1 and 2 with random weights: plain and fused, eager and compiled.
python -c "from model import *; \
    save_vit(ViT(KNOWN['vit_small_patch14_dinov2.lvd142m']), '$OUT/random.safetensors')"
for kernel in fused plain; do
    for mode in --no-compile --compile; do
        for stage in align_attention align_features; do
            echo "$stage $kernel $mode"
            ADALA_KERNEL=$kernel timeout 60 python $stage.py --teacher "$OUT/random.safetensors" \
                --attention linear --data "$PHOTOS" --size 224 --steps 30 $mode \
                --out "$OUT/$stage-$kernel$mode" | grep "a step"
        done
    done
done | tee "$OUT/steps.txt"
