#!/usr/bin/env bash
# What the README says of a GPU, the most important first: OUT=folder bash results/gpu.sh [STEP...]
# On a CPU, to rehearse: SMOKE=--smoke. A step that takes too long is ended; its rows are kept.
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-gpu-results} SMOKE=${SMOKE:-}
mkdir -p "$OUT"
for step in ${*:-check models tests train tune}; do
    echo "== $step, after $SECONDS s"
    case $step in
    check) timeout 60 python results/gpu.py check --out "$OUT" --minutes 0.7 $SMOKE ;;
    models) timeout 130 python results/gpu.py models --out "$OUT" --minutes 1.7 $SMOKE ;;
    tune) timeout 50 python results/gpu.py tune --out "$OUT" --minutes 0.6 $SMOKE ;;
    train) timeout 120 python results/gpu.py train --out "$OUT" --minutes 1.5 $SMOKE ;;
    tests)
        ADALA_GPU=1 timeout 120 python -m pytest -q --durations=8 tests/test_cuda.py \
            > "$OUT/test_cuda.txt" 2>&1
        tail -40 "$OUT/test_cuda.txt" ;;
    esac
done
echo "== done, after $SECONDS s"
