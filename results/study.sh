#!/usr/bin/env bash
# The study on real weights. Each row is one command, and goes on after a stop:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS="imagenette160 voc2012" \
#     PROBE=imagenette160 VOC=voc2012 bash results/study.sh linear_conv 0       # ROW SEED
# ROW is "teacher", or an operator and what its ViT went through: linear (stages 1 + 2),
# linear-one (stage 1), linear-two (stage 2 alone), linear-none (the swap alone), linear-scratch
# (random weights).
# PHOTOS: folders to align on. PROBE: train/CLASS/, val/CLASS/. VOC: train/images, train/masks, ...
# SIZE pixels. STEPS of BATCH photos in stage 1 and, if TWO is not given, in stage 2; TUNED steps of
# BATCH for a tuned backbone.
# PARTS: classify and segment (frozen), larger (that head to segment at 2 SIZE and 3 SIZE),
# tune-classify, tune-segment, tune-mask (the mask head). OUT: folder to write. FLAGS: more flags.
# RATE: of stage 2 (default: the script's own; of stage 2 alone 2e-4). WEIGHTS may also be a teacher
# that finetune.py has tuned. After all rows:
#   python results/tables.py collect runs/study results/study.csv
set -euo pipefail
SIZE=${SIZE:-224} STEPS=${STEPS:-640} TWO=${TWO:-$STEPS} BATCH=${BATCH:-32} TUNED=${TUNED:-400}
PARTS=${PARTS-classify segment larger tune-classify tune-segment}
row=${1?ROW and SEED are missing} seed=${2?SEED is missing} operator=${1%%-*} kind=${1#*-}
out=${OUT:-runs/study}/$row/seed$seed
same="--dtype bfloat16 --seed $seed --every 1000 ${FLAGS-}"

once() {                                        # once NAME SCRIPT FLAG...: not again what is done
    local to=$out/$1
    if [ -f $to/state.pt ] || [ ! -f $to/report.json ] && [ ! -f $to/metrics.json ]; then
        python "${@:2}" --out $to $same
    else
        echo "$to is done already. Other settings need another OUT."
    fi
}
align() {                                       # align NAME SCRIPT FLAG...
    local steps=$STEPS
    if [ $1 = two ]; then steps=$TWO; fi
    once $1 $2 --teacher $WEIGHTS --data $PHOTOS --size $SIZE --steps $steps --batch-size $BATCH \
        "${@:3}"
    weights=$out/$1/student.safetensors
}
score() {                                       # score NAME TASK FLAG...
    local data=$PROBE
    if [ $2 = segment ]; then data=$VOC; fi
    once $1 finetune.py --task $2 --data $data --batch-size $BATCH --weights ${head:-$weights} \
        "${@:3}"
}

case $kind in
    teacher) weights=$WEIGHTS ;;
    none) weights=$WEIGHTS:$operator ;;
    scratch) weights="$WEIGHTS:$operator --from-scratch" ;;
    one) align one align_attention.py --attention $operator ;;
    two) align two align_features.py --attention $operator --lr ${RATE:-2e-4} ;;
    $operator)
        align one align_attention.py --attention $operator
        align two align_features.py --student $weights ${RATE:+--lr $RATE} ;;
    *) echo "unknown row $row: expected one that the top of this file names"; exit 1 ;;
esac
for part in $PARTS; do
    if [[ $kind = scratch && $part != tune-* ]]; then continue; fi      # has no features to keep
    case $part in
        classify) score $part classify --size $SIZE --freeze --steps 1000 ;;
        segment) score $part segment --size $SIZE --freeze --steps 400 ;;
        larger) for times in 2 3; do
                head=$out/segment/0-segment.safetensors score segment-at-$times-times segment \
                    --size $((SIZE * times)) --freeze --steps 0
            done ;;
        tune-mask) score $part segment --head mask --size $SIZE --steps $TUNED ;;
        tune-*) score $part ${part#tune-} --size $SIZE --steps $TUNED ;;
    esac
done
