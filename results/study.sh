#!/usr/bin/env bash
# The study on real weights, every row one command. From the repository's root:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS="imagenette160 voc2012" \
#     PROBE=imagenette160 VOC=voc2012 bash results/study.sh 0 1 2
# PHOTOS: folders without labels; PROBE: train/CLASS/, val/CLASS/; VOC: train/images, train/masks, val/... The arguments are
# seeds, of photos and heads. ROWS go through stages 1 and 2, ONE and TWO steps of BATCH photos; OTHERS, the curve over FEW photos
# (the steps the same) and stage 2 ALONE with the first seed only. LAST: steps of stage 2 at 448 pixels, of 8 photos of VOC,
# which are large enough. SHORT: steps of 16 photos of stage 1 of ROWS, which end there. TUNED: steps of BATCH photos of PROBE or VOC
# for a tuned backbone. PARTS: rows, others, tuned. JOBS: how many run at a time; FLAGS: more flags for all. Stopped, the same
# command goes on: what is there is not made again. Then
#   python results/collect.py runs/study results/study
set -eum                                      # m: a lane is a process group, which one kill ends
trap 'trap - INT TERM; for lane in $(jobs -p); do kill -- -$lane; done; wait; exit 130' INT TERM
[ $# -gt 0 ] || { echo "study.sh: expected seeds, as in its first lines"; exit 1; }
ONE=${ONE:-640} TWO=${TWO:-600} BATCH=${BATCH:-16} LAST=${LAST:-120} SHORT=${SHORT:-80} TUNED=${TUNED:-400} JOBS=${JOBS:-1} FLAGS=${FLAGS-}
ROWS=${ROWS-linear linear_conv} ALONE=${ALONE-linear linear_conv} FEW=${FEW-500 1500}
OTHERS=${OTHERS-linear-qkv relu relu2 hedgehog-maps hedgehog-qkv linear_conv-keep2}
ALL="classify-224 segment-224-linear segment-448-linear segment-448-of-224-linear segment-672-of-448-linear segment-224-mask
     segment-448-of-224-mask classify-448"
BRIEF="classify-224 segment-224-linear"

unless() {                                    # unless FILE command: not again what has written FILE
  local file=$1; shift
  [ -f "$file" ] && [ ! -f "$(dirname "$file")/state.pt" ] || "$@"
}
lane() {                                      # in the background, JOBS at a time; a failure is noted and does not stop the others
  local what="$*"
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
  (trap : TERM; trap '[ $? = 0 ] || echo "seed $seed: $what" >> $failed' EXIT; "$@") &
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
  unless $to/report.json python align_attention.py --teacher $WEIGHTS $same --size 224 $flags "$@" --out $to
}
two() {                                       # two OUT flags: stage 2
  local to=$1; shift
  unless $to/report.json python align_features.py --teacher $WEIGHTS $same "$@" --out $to
}
both() {                                      # both ROW END folders of photos: stages 1 and 2
  local row=$1 end=$2; shift 2
  one $row $out/$row-1$end --data "$@" --batch-size $BATCH --steps $ONE
  two $out/$row-12$end --data "$@" --batch-size $BATCH --steps $TWO --size 224 --student $out/$row-1$end/student.safetensors
}
whole() {                                     # whole ROW: both, a last part at 448 pixels, and all scores
  both $1 "" $PHOTOS
  two $out/$1-12-448 --data $VOC --batch-size 8 --steps $LAST --size 448 --lr 2e-5 --student $out/$1-12/student.safetensors
  score "$ALL" $1-12
  score "$ALL" $1-12-448
  score "$BRIEF" $1-1
}
brief() {                                     # brief ROW ...: their scores
  for row in "$@"; do score "$BRIEF" $row; done
}
other() { both $1 "" $PHOTOS; brief $1-1 $1-12; }
few() { both linear_conv -of-$1 runs/study/photos-$1; brief linear_conv-12-of-$1; }
alone() {
  two $out/$1-2 --data $PHOTOS --attention $1 --batch-size $BATCH --steps $TWO --size 224
  brief $1-2
}
links() {                                     # links COUNT: a folder of so many of the training photos, and all held-out ones
  python - runs/study/photos-$1 $1 $PHOTOS <<'END'
import random
import sys
from pathlib import Path

to, count, *folders = sys.argv[1:]
for part, most in ("train", int(count)), ("val", None):
    Path(to, part).mkdir(parents=True, exist_ok=True)
    for link in filter(Path.is_symlink, [*Path(to, part).iterdir()]):         # of other PHOTOS
        link.unlink()
    photos = sorted(path.resolve() for folder in folders for path in Path(folder, part).rglob("*.[jJ]*"))
    for i, path in enumerate(random.Random(0).sample(photos, len(photos))[:most]):
        Path(to, part, f"{i}-{path.name}").symlink_to(path)
END
}
score() {                                     # score RUNS ROW: of a frozen backbone, see score.py
  python results/score.py $out/scores/$2 "$(weights $2)" $PROBE $VOC $1 -- $same
}
weights() {
  case $1 in teacher) echo $WEIGHTS ;; no-alignment) echo $WEIGHTS:linear ;; *) echo $out/$1/student.safetensors ;; esac
}
tuned() {                                     # tuned TASK ROW WEIGHT: with WEIGHT of stage 1's loss
  local task=$1 to=$out/tuned/$2/$1-224-align-$3 flags="--data $PROBE"
  [ $task = classify ] || flags="--data $VOC --head mask"
  [ $3 = 0 ] || flags="$flags --align $3 --teacher $WEIGHTS"
  unless $to/metrics.json python finetune.py --task $task $flags --size 224 --steps $TUNED --batch-size $BATCH --lr 3e-5 \
    --every 1000 --weights $(weights $2) $same --out $to
}

failed=$(mktemp)
for count in $FEW; do links $count; done
for part in ${PARTS-rows others tuned}; do
  [ $part != tuned ] || wait                  # for the students
  for seed in "$@"; do
    out=runs/study/seed$seed
    same="--dtype bfloat16 --seed $seed $FLAGS"
    first=$([ $seed != $1 ] || echo yes)
    case $part in
      rows)
        for row in $ROWS; do lane whole $row; done
        lane score "$ALL" teacher ;;
      others)
        for row in ${first:+$ALONE}; do lane alone $row; done
        for count in ${first:+$FEW}; do lane few $count; done
        for row in ${first:+$OTHERS}; do lane other $row; done
        [ ! $first ] || lane score "$ALL" no-alignment
        for row in $ROWS; do lane one $row $out/$row-short --data $PHOTOS --batch-size 16 --steps $SHORT; done ;;
      tuned)
        for row in teacher $(printf '%s-12 ' $ROWS); do
          for weight in 0 50; do [ $row-$weight = teacher-50 ] || lane tuned classify $row $weight; done
          lane tuned segment $row 0
        done ;;
    esac
  done
done
wait
[ ! -s $failed ] || { echo "study.sh: these failed, see above"; cat $failed; exit 1; }
