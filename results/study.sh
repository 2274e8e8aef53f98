#!/usr/bin/env bash
# The study on real weights, every row one command. From the repository's root:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS="imagenette160 voc2012" \
#     PROBE=imagenette160 VOC=voc2012 bash results/study.sh 0
# PHOTOS: folders without labels; PROBE: train/CLASS/, val/CLASS/; VOC: train/images, train/masks,
# val/... The arguments are seeds. ONE, TWO, LAST: steps of 16 photos in stages 1 and 2, and of 8
# photos at 448 pixels. ROWS: students; SIZES, HEADS: how they are scored. Stopped, the same command
# goes on: what is there is not made again. Then
#   python results/collect.py runs/study results/study
set -eu
ONE=${ONE:-640} TWO=${TWO:-200} LAST=${LAST:-60} SIZES=${SIZES:-224 448 672} HEADS=${HEADS:-linear mask}
ROWS=${ROWS:-linear linear_conv linear-paper linear_conv-keep2 relu relu2 hedgehog-maps hedgehog-qkv}
[ $# -gt 0 ] || { echo "study.sh: expected seeds"; exit 1; }
unless() {                                    # unless FILE command: not again what has written FILE
  local file=$1; shift
  [ -f "$file" ] && [ ! -f "$(dirname "$file")/state.pt" ] || "$@"
}
for seed in "$@"; do
  out=runs/study/seed$seed
  same="--dtype bfloat16 --seed $seed"
  data="--teacher $WEIGHTS --data $PHOTOS $same"
  students="$WEIGHTS $WEIGHTS:linear"
  for row in $ROWS; do
    case $row in                              # what else a row trains, the defaults train
      linear-paper) flags="--attention linear --train qkv" ;;
      hedgehog-maps) flags="--attention hedgehog --train operator" ;;
      hedgehog-qkv) flags="--attention hedgehog --train operator qkv" ;;
      *-keep2) flags="--attention ${row%-keep2} --keep-softmax 2" ;;
      *) flags="--attention $row" ;;
    esac
    unless $out/$row-1/report.json \
      python align_attention.py $data $flags --size 224 --batch-size 16 --steps $ONE --out $out/$row-1
    unless $out/$row-12/report.json python align_features.py $data --size 224 --batch-size 16 \
      --steps $TWO --student $out/$row-1/student.safetensors --out $out/$row-12
    unless $out/$row-12-448/report.json python align_features.py $data --size 448 --batch-size 8 --lr 3e-5 \
      --steps $LAST --student $out/$row-12/student.safetensors --out $out/$row-12-448
    for part in 1 12 12-448; do students="$students $out/$row-$part/student.safetensors"; done
  done
  unless $out/linear-2/report.json python align_features.py $data --attention linear --size 224 \
    --batch-size 16 --steps $((2 * TWO)) --out $out/linear-2
  students="$students $out/linear-2/student.safetensors"
  for size in $SIZES; do
    unless $out/classify-$size/metrics.json python finetune.py --task classify --data $PROBE \
      --size $size --freeze --steps 1000 --every 1000 --lr 3e-4 --weights $students $same --out $out/classify-$size
    for head in $HEADS; do
      unless $out/segment-$size-$head/metrics.json python finetune.py --task segment --data $VOC \
        --size $size --freeze --head $head --steps 400 --every 400 --weights $students $same \
        --out $out/segment-$size-$head
    done
  done
done
for row in linear linear_conv; do             # tuned, with and without stage 1's loss
  for weight in 0 50; do
    teacher=$([ $weight = 0 ] || echo --teacher $WEIGHTS)
    unless runs/study/tuned-$row-$weight/metrics.json python finetune.py --task classify --data $PROBE \
      --size 224 --steps 400 --weights runs/study/seed$1/$row-12/student.safetensors --seed $1 \
      --dtype bfloat16 --align $weight $teacher --out runs/study/tuned-$row-$weight
  done
done
