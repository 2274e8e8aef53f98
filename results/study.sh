#!/usr/bin/env bash
# The study on real weights, every row one command. From the repository's root:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS="imagenette160 voc2012" \
#     PROBE=imagenette160 VOC=voc2012 bash results/study.sh 0 1 2
# PHOTOS: folders without labels; PROBE: train/CLASS/, val/CLASS/; VOC: train/images, train/masks, val/... The arguments are
# seeds, of photos and heads. ROWS go through stages 1 and 2, ONE and TWO steps of BATCH photos; OTHERS, the curve over FEW photos
# (the steps the same) and stage 2 ALONE with the first seed only. LAST: steps of stage 2 at 448 pixels, of 8 photos of VOC,
# which are large enough. SHORT: steps of 16 photos of stage 1 of QUICK, which end there. TUNED: steps of BATCH photos of PROBE or VOC
# for a tuned backbone. JOBS: how many run at a time; FLAGS: more flags for all. Stopped, the same command goes on: what is there
# is not made again. Then
#   python results/collect.py runs/study results/study
set -eu
ONE=${ONE:-640} TWO=${TWO:-600} BATCH=${BATCH:-16} LAST=${LAST:-120} SHORT=${SHORT:-80} TUNED=${TUNED:-400} JOBS=${JOBS:-1} FLAGS=${FLAGS-}
ROWS=${ROWS-linear linear_conv} ALONE=${ALONE-linear linear_conv} FEW=${FEW-500 1500}
OTHERS=${OTHERS-linear-qkv relu relu2 hedgehog-maps hedgehog-qkv linear_conv-keep2} QUICK=${QUICK-$ROWS $OTHERS}
ALL="classify-224 segment-224-linear segment-448-linear segment-448-of-224-linear segment-672-of-448-linear segment-224-mask
     segment-448-of-224-mask classify-448"
BRIEF="classify-224 segment-224-linear"

unless() {                                    # unless FILE command: not again what has written FILE
  local file=$1; shift
  [ -f "$file" ] && [ ! -f "$(dirname "$file")/state.pt" ] || "$@"
}
lane() {                                      # in the background, JOBS at a time; a failure does not stop the others
  local what="$*"
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
  (trap '[ $? = 0 ] || echo "seed $seed: $what" >> $failed' EXIT; "$@") &
}
one() {                                       # one ROW OUT flags: stage 1
  local row=$1 to=$2 flags; shift 2
  case $row in                                # what else a row trains, the defaults train
    hedgehog-qkv) flags="--attention hedgehog --train operator qkv" ;;
    *-qkv) flags="--attention ${row%-qkv} --train qkv" ;;
    *-maps) flags="--attention ${row%-maps} --train operator" ;;
    *-keep2) flags="--attention ${row%-keep2} --keep-softmax 2" ;;
    *) flags="--attention $row" ;;
  esac
  unless $to/report.json python align_attention.py $same --size 224 $flags "$@" --out $to
}
two() {                                       # two OUT flags: stage 2
  local to=$1; shift
  unless $to/report.json python align_features.py $same "$@" --out $to
}
both() {                                      # both ROW END folders of photos: stages 1 and 2
  local row=$1 end=$2; shift 2
  one $row $out/$row-1$end --data "$@" --batch-size $BATCH --steps $ONE
  two $out/$row-12$end --data "$@" --batch-size $BATCH --steps $TWO --size 224 --student $out/$row-1$end/student.safetensors
}
with_last() {                                 # with_last ROW: both, then a last part at 448 pixels
  both $1 "" $PHOTOS
  two $out/$1-12-448 --data $VOC --batch-size 8 --steps $LAST --size 448 --lr 2e-5 --student $out/$1-12/student.safetensors
}
links() {                                     # links COUNT: a folder of so many of the training photos
  local part file i=0 to=runs/study/photos-$1
  for part in train val; do
    mkdir -p $to/$part
    find -L $PHOTOS -path "*/$part/*" -iname '*.jp*g' | sort | shuf --random-source=<(yes) |
      head -n $([ $part = val ] && echo 9999999 || echo $1) | while read -r file; do
        ln -sf "$(realpath "$file")" "$to/$part/$((++i))-$(basename "$file")"
      done
  done
}
score() {                                     # score RUNS ROW: of a frozen backbone, see score.py
  python results/score.py $out/scores/$2 "$(weights $2)" $PROBE $VOC $1 -- --dtype bfloat16 --seed $seed $FLAGS
}
weights() {
  case $1 in teacher) echo $WEIGHTS ;; no-alignment) echo $WEIGHTS:linear ;; *) echo $out/$1/student.safetensors ;; esac
}
tuned() {                                     # tuned TASK ROW WEIGHT: with WEIGHT of stage 1's loss
  local flags="--data $PROBE --every 1000"
  [ $1 = classify ] || flags="--data $VOC --head mask --every 1000"
  [ $3 = 0 ] || flags="$flags --align $3 --teacher $WEIGHTS"
  to=$out/tuned/$2/$1-224-align-$3
  unless $to/metrics.json python finetune.py --task $1 $flags --size 224 --steps $TUNED --batch-size $BATCH \
    --weights $(weights $2) --seed $seed --dtype bfloat16 $FLAGS --out $to
}

failed=$(mktemp)
for count in $FEW; do links $count; done
for part in train score tune others; do
  for seed in "$@"; do
    out=runs/study/seed$seed
    same="--teacher $WEIGHTS --dtype bfloat16 --seed $seed $FLAGS"
    first=$([ $seed != $1 ] || echo yes)
    case $part in
      train)
        for row in $ROWS; do lane with_last $row; done
        for row in ${first:+$OTHERS}; do lane both $row "" $PHOTOS; done
        for count in ${first:+$FEW}; do lane both linear_conv -of-$count runs/study/photos-$count; done
        for row in ${first:+$ALONE}; do lane two $out/$row-2 --data $PHOTOS --attention $row --batch-size $BATCH --steps $TWO --size 224; done
        for row in $QUICK; do lane one $row $out/$row-short --data $PHOTOS --batch-size 16 --steps $SHORT; done ;;
      score)
        for row in teacher no-alignment; do lane score "$ALL" $row; done
        for row in $ROWS; do lane score "$ALL" $row-12; lane score "$ALL" $row-12-448; lane score "$BRIEF" $row-1; done ;;
      tune)
        for row in teacher linear-12 linear_conv-12; do
          for weight in 0 50; do [ $row-$weight = teacher-50 ] || lane tuned classify $row $weight; done
          lane tuned segment $row 0
        done ;;
      others)
        for row in ${first:+$OTHERS}; do lane score "$BRIEF" $row-1; lane score "$BRIEF" $row-12; done
        for row in ${first:+$ALONE}; do lane score "$BRIEF" $row-2; done
        for count in ${first:+$FEW}; do lane score "$BRIEF" linear_conv-12-of-$count; done ;;
    esac
  done
  wait
done
[ ! -s $failed ] || { echo "study.sh: these failed, see above"; cat $failed; exit 1; }
