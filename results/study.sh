#!/usr/bin/env bash
# The study on real weights: every row one command. From the repository's root:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS="imagenette160 voc2012" PROBE=imagenette160 VOC=voc2012 \
#     bash results/study.sh 0
# PHOTOS: folders without labels; PROBE: train/CLASS/, val/CLASS/; VOC: train/images, train/masks, val/... The arguments are
# seeds. ONE, TWO: steps of 16 photos in stages 1 and 2. ROWS, SIZES: which students, at which sizes they are scored. Then
#   python results/collect.py runs/study results/study
set -eu
ONE=${ONE:-320} TWO=${TWO:-200} ROWS=${ROWS:-linear linear_conv} SIZES=${SIZES:-224 448 672}
for seed in "$@"; do
  out=runs/study/seed$seed
  data="--teacher $WEIGHTS --data $PHOTOS --batch-size 16 --dtype bfloat16 --seed $seed"
  students="$WEIGHTS $WEIGHTS:linear"
  for row in $ROWS; do
    case $row in                              # the paper's row; LoLCATS' two; all others train what the defaults train
      linear-paper) flags="--attention linear --train qkv" ;;
      hedgehog-maps) flags="--attention hedgehog --train operator --lr 1e-2" ;;
      hedgehog-qkv) flags="--attention hedgehog --train operator qkv" ;;
      *) flags="--attention $row" ;;
    esac
    python align_attention.py $data --size 224 --steps $ONE $flags --out $out/$row-1
    python align_features.py $data --size 224 --steps $TWO --student $out/$row-1/student.safetensors --out $out/$row-12
    students="$students $out/$row-1/student.safetensors $out/$row-12/student.safetensors"
  done
  for size in $SIZES; do
    python finetune.py --task classify --data $PROBE --size $size --freeze --steps 1000 --weights $students \
      --dtype bfloat16 --seed $seed --out $out/classify-$size
    for head in linear mask; do
      python finetune.py --task segment --data $VOC --size $size --freeze --head $head --steps 1000 --weights $students \
        --dtype bfloat16 --seed $seed --out $out/segment-$size-$head
    done
  done
done
