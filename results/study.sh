#!/usr/bin/env bash
# The study on real weights. Each row is one command, and goes on after a stop:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS="imagenette160 voc2012" \
#     PROBE=imagenette160 VOC=voc2012 bash results/study.sh linear_conv 0       # ROW SEED
# ROW is "teacher", or an operator and what its ViT went through: linear (stages 1 + 2),
# linear-one (stage 1), linear-two (stage 2 alone), linear-none (the swap alone), linear-scratch
# (random weights, only for PARTS that tune). PHOTOS are to align on, PROBE to classify, VOC to
# segment. STEPS of 32 photos are of stage 1, TWO of stage 2, TUNED of tuning; RATE is of stage 2.
# PARTS: classify, segment, mask (frozen), larger (the head of segment at 2 SIZE and 3 SIZE),
# tune-classify, tune-segment, tune-mask. Other settings need another folder OUT.
set -euo pipefail
SIZE=${SIZE:-224} STEPS=${STEPS:-640} TWO=${TWO:-$STEPS} TUNED=${TUNED:-400}
PARTS=${PARTS-classify segment larger tune-classify tune-segment}
row=${1?ROW and SEED are missing} seed=${2?SEED is missing} operator=${1%%-*} kind=${1#*-}
out=${OUT:-runs/study}/$row/seed$seed

once() {                                        # once NAME SCRIPT FLAG...: not again what is done
    if [ -f $out/$1/report.json ] || [ -f $out/$1/metrics.json ]; then
        echo "$out/$1 is done already. Other settings need another OUT."
    else
        python $2 --out $out/$1 --size $SIZE --batch-size 32 --dtype bfloat16 --seed $seed \
            --every 1000 "${@:3}"
    fi
}
align() {                                       # align NAME SCRIPT FLAG...
    once $1 $2 --teacher $WEIGHTS --data $PHOTOS "${@:3}"
    weights=$out/$1/student.safetensors
}
score() {                                       # score NAME TASK DATA FLAG...
    once $1 finetune.py --task $2 --data $3 --weights $weights "${@:4}"
}
one="one align_attention.py --attention $operator --steps $STEPS"
two="two align_features.py --steps $TWO"
case $kind in
    teacher) weights=$WEIGHTS ;;
    none) weights=$WEIGHTS:$operator ;;
    scratch) weights="$WEIGHTS:$operator --from-scratch" ;;
    one) align $one ;;
    two) align $two --attention $operator --lr ${RATE:-2e-4} ;;
    $operator) align $one; align $two --student $weights ${RATE:+--lr $RATE} ;;
    *) echo "unknown row $row: see the top of this file"; exit 1 ;;
esac
for part in $PARTS; do
    case $part in
        classify) score $part classify $PROBE --freeze --steps 1000 ;;
        segment) score $part segment $VOC --freeze --steps 400 ;;
        mask) score $part segment $VOC --freeze --steps 400 --head mask ;;
        larger) for times in 2 3; do            # of a flag given twice the later one counts
                score segment-at-$times-times segment $VOC --size $((SIZE * times)) --steps 0 \
                    --freeze --weights $out/segment/0-segment.safetensors
            done ;;
        tune-classify) score $part classify $PROBE --steps $TUNED ;;
        tune-segment) score $part segment $VOC --steps $TUNED ;;
        tune-mask) score $part segment $VOC --steps $TUNED --head mask ;;
    esac
done
