#!/usr/bin/env bash
# The study on real weights. Each row is one command, and goes on after a stop:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS="imagenette160 voc2012" \
#     PROBE=imagenette160 VOC=voc2012 bash results/study.sh linear_conv 0       # ROW SEED
# ROW is "teacher", or an operator and what its ViT went through: linear (stages 1 + 2),
# linear-sizes (the same at 224, 336 and 448 pixels), linear-one (stage 1), linear-two (stage 2
# alone), linear-none (the swap alone), linear-scratch (random weights).
# PHOTOS: folders to align on. PROBE: train/CLASS/, val/CLASS/. VOC: train/images, train/masks, ...
# STEPS of BATCH photos in each stage, TUNED steps of BATCH photos for a tuned backbone.
# PARTS: sizes (agreement with the teacher at each size), frozen and tuned (scores). After all rows:
#   python results/tables.py collect runs/study results/study.csv
set -euo pipefail
STEPS=${STEPS:-640} BATCH=${BATCH:-32} TUNED=${TUNED:-400} PARTS=${PARTS-sizes frozen tuned}
row=$1 seed=$2 operator=${1%%-*} kind=${1#*-} out=runs/study/$1/seed$2
same="--dtype bfloat16 --seed $seed --every 1000 ${FLAGS-}"

once() {                                        # once NAME SCRIPT FLAG...: not again what is done
    local to=$out/$1
    if [ -f $to/state.pt ] || [ ! -f $to/report.json ] && [ ! -f $to/metrics.json ]; then
        python "${@:2}" --out $to $same
    fi
}
align() {                                       # align NAME SCRIPT FLAG...
    local size=224
    if [ $kind = sizes ]; then size="224 336 448"; fi
    once $1 $2 --teacher $WEIGHTS --data $PHOTOS --size $size --steps $STEPS --batch-size $BATCH \
        "${@:3}"
    weights=$out/$1/student.safetensors
}
score() {                                       # score NAME TASK FLAG...
    local data=$PROBE
    if [ $2 = segment ]; then data=$VOC; fi
    once $1 finetune.py --task $2 --data $data --weights ${head:-$weights} "${@:3}"
}

case $kind in
    teacher) weights=$WEIGHTS ;;
    none) weights=$WEIGHTS:$operator ;;
    scratch) weights="$WEIGHTS:$operator --from-scratch" PARTS=${PARTS/frozen/} ;;
    one) align one align_attention.py --attention $operator ;;
    two) align two align_features.py --attention $operator --lr ${ALONE:-2e-4} ;;
    *)  align one align_attention.py --attention $operator
        align two align_features.py --student $weights ;;
esac
if [[ $PARTS = *sizes* && $weights = *student.safetensors ]]; then
    for size in 224 336 448 672 1022; do
        if [ -s $out/size-$size.txt ]; then continue; fi
        python align_features.py --teacher $WEIGHTS --student $weights --data $PHOTOS --steps 0 \
            --size $size --batch-size 16 --dtype bfloat16 ${FLAGS-} | tee $out/part.txt
        mv $out/part.txt $out/size-$size.txt
    done
fi
if [[ $PARTS = *frozen* ]]; then
    score classify-224 classify --size 224 --freeze --steps 1000 --batch-size 32
    score segment-224 segment --size 224 --freeze --steps 400 --batch-size 32
    for size in 448 672; do
        head=$out/segment-224/0-segment.safetensors \
            score segment-$size-of-224 segment --size $size --freeze --steps 0 --batch-size 32
    done
fi
if [[ $PARTS = *tuned* ]]; then
    score tuned-classify-224 classify --size 224 --steps $TUNED --batch-size $BATCH
    score tuned-segment-224 segment --size 224 --steps $TUNED --batch-size $BATCH
fi
