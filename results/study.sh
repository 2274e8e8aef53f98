#!/usr/bin/env bash
# The study on real weights, every row one command. From the repository's root:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS="imagenette160 voc2012" \
#     PROBE=imagenette160 VOC=voc2012 bash results/study.sh 0
# PHOTOS: folders without labels; PROBE: train/CLASS/, val/CLASS/; VOC: train/images, train/masks,
# val/... The arguments are seeds. ONE, TWO, LAST: steps of 16 photos in stages 1 and 2, and of 8
# photos of VOC, which are large enough, at 448 pixels. SHORT: steps of stage 1 of the operators in
# QUICK, which end there. MASK: mask heads, of 224 pixels alone. FEW: linear_conv from so many photos,
# the steps the same. TUNED: steps of 8 photos of PROBE. Stopped, the same command goes on: what is
# there is not made again. Then
#   python results/collect.py runs/study results/study
set -eu
ONE=${ONE:-640} TWO=${TWO:-600} LAST=${LAST:-120} SHORT=${SHORT:-80}
ROWS=${ROWS:-linear linear_conv} HEADS=${HEADS:-linear:0 linear:1 linear:2} MASK=${MASK-mask:0} FEW=${FEW-500 1500} TUNED=${TUNED:-400}
QUICK=${QUICK-linear linear-qkv linear_conv linear_conv-keep2 relu relu2 hedgehog-maps hedgehog-qkv}
[ $# -gt 0 ] || { echo "study.sh: expected seeds"; exit 1; }
unless() {                                    # unless FILE command: not again what has written FILE
  local file=$1; shift
  [ -f "$file" ] && [ ! -f "$(dirname "$file")/state.pt" ] || "$@"
}
one() {                                       # one ROW STEPS OUT: stage 1
  local flags
  case $1 in                                  # what else a row trains, the defaults train
    *-qkv) flags="--attention ${1%-qkv} --train qkv" ;;
    *-maps) flags="--attention ${1%-maps} --train operator" ;;
    *-keep2) flags="--attention ${1%-keep2} --keep-softmax 2" ;;
    *) flags="--attention $1" ;;
  esac
  [ "$1" != hedgehog-qkv ] || flags="--attention hedgehog --train operator qkv"
  unless $3/report.json python align_attention.py $data $flags --size 224 --batch-size 16 --steps $2 --out $3
}
two() {                                       # two STAGE-1-FOLDER OUT: stage 2
  unless $2/report.json python align_features.py $data --size 224 --batch-size 16 --steps $TWO \
    --student $1/student.safetensors --out $2
}
links() {                                     # links COUNT -> a folder of so many of the training photos
  local part file i=0 to=runs/study/photos-$1
  for part in train val; do
    mkdir -p $to/$part
    find -L $PHOTOS -path "*/$part/*" -iname '*.jp*g' | sort | shuf --random-source=<(yes) |
      head -n $([ $part = val ] && echo 9999999 || echo $1) | while read -r file; do
        ln -sf "$(realpath "$file")" "$to/$part/$((++i))-$(basename "$file")"
      done
  done
  echo $to
}
for seed in "$@"; do
  out=runs/study/seed$seed
  same="--dtype bfloat16 --seed $seed"
  data="--teacher $WEIGHTS --data $PHOTOS $same"
  students= rows= few=
  for row in $ROWS; do
    one $row $ONE $out/$row-1
    two $out/$row-1 $out/$row-12
    for part in 1 12; do students="$students $out/$row-$part/student.safetensors"; done
    rows="$rows $row-12"
  done
  row=linear_conv-12
  unless $out/$row-448/report.json python align_features.py --teacher $WEIGHTS --data $VOC $same --size 448 \
    --batch-size 8 --lr 2e-5 --steps $LAST --student $out/$row/student.safetensors --out $out/$row-448
  for row in $QUICK; do one $row $SHORT $out/$row-short; done
  for count in $FEW; do
    data="--teacher $WEIGHTS --data $(links $count) $same"
    one linear_conv $ONE $out/linear_conv-1-of-$count
    two $out/linear_conv-1-of-$count $out/linear_conv-12-of-$count
    few="$few $out/linear_conv-12-of-$count/student.safetensors"
  done
  unless $out/classify-224/metrics.json python finetune.py --task classify --data $PROBE --size 224 \
    --freeze --steps 1000 --every 1000 --lr 3e-4 --weights $WEIGHTS $WEIGHTS:linear $students $same --out $out/classify-224
  segment="--data $VOC --dtype bfloat16 --every 1000"
  large="$out/linear-12/student.safetensors $out/linear_conv-12/student.safetensors"
  last=$out/linear_conv-12-448/student.safetensors
  python results/heads.py $out/segment-224 $HEADS -- $segment --size 224 --steps 400 \
    --weights $WEIGHTS $WEIGHTS:linear $students $last $few
  python results/heads.py $out/segment-224 $MASK -- $segment --size 224 --steps 400 --weights $WEIGHTS $large
  python results/heads.py $out/segment-448 $HEADS -- $segment --size 448 --steps 400 --weights $WEIGHTS $large $last
  for row in teacher linear_conv-12; do       # tuned, with the better head
    weights=$([ $row = teacher ] && echo $WEIGHTS || echo $out/$row/student.safetensors)
    unless $out/tuned-224/$row/metrics.json python finetune.py --task segment $segment --size 224 --head mask \
      --steps $TUNED --batch-size 8 --weights $weights --seed $seed --out $out/tuned-224/$row
  done
  kept() {                                    # kept SIZE OF HEADS ROW ...: heads of OF pixels, scored at SIZE
    local size=$1 of=$2 heads=$3; shift 3
    python results/heads.py $out/segment-$size-of-$of $heads -- $segment --size $size --steps 0 \
      --weights "$out/segment-$of/{row}-{head}-{seed}/0-segment.safetensors" --rows "$@"
  }
  kept 448 224 "$HEADS $MASK" teacher $rows
  kept 448 224 "$HEADS" linear_conv-12-448
  kept 672 448 "$HEADS" teacher $rows linear_conv-12-448
done
for row in teacher linear-12 linear_conv-12; do    # tuned, with and without stage 1's loss
  for weight in 0 50; do
    [ $row-$weight != teacher-50 ] || continue
    weights=$([ $row = teacher ] && echo $WEIGHTS || echo runs/study/seed$1/$row/student.safetensors)
    teacher=$([ $weight = 0 ] || echo --teacher $WEIGHTS)
    unless runs/study/tuned-$row-$weight/metrics.json python finetune.py --task classify --data $PROBE --size 224 \
      --steps $TUNED --batch-size 8 --every 1000 --weights $weights --align $weight $teacher --seed $1 --dtype bfloat16 \
      --out runs/study/tuned-$row-$weight
  done
done
