#!/usr/bin/env bash
# The README's real-weights table: seven rows, both tasks, frozen; three rows tuned. From the repository's root:
#   WEIGHTS=vits14.safetensors PHOTOS=imagenette160 VOC=voc2012 bash results/vits14-cpu.sh 0 1
# PHOTOS: train/<class>/, val/<class>/. VOC: train/images, train/masks, val/... The arguments are the seeds. Then
#   python results/collect.py runs/vits14-cpu results/vits14-cpu
set -eu
ONE=${ONE:-150} TWO=${TWO:-200} PROBE=${PROBE:-1000}
same="--size 112 --batch 32 --dtype bfloat16"
for seed in "$@"; do
  out=runs/vits14-cpu/seed$seed
  data="--data $PHOTOS $VOC $same --seed $seed"
  python align_attention.py --weights "$WEIGHTS" $data --steps $ONE --lr 3e-3 --out $out/one
  python align_features.py --weights $out/one/student.safetensors $data --steps $TWO --out $out/one-two
  python align_attention.py --weights "$WEIGHTS" $data --steps $ONE --lr 1e-2 --attention hedgehog --train maps --out $out/maps
  python align_features.py --weights $out/maps/student.safetensors $data --steps $TWO --out $out/maps-two
  python align_features.py --weights "$WEIGHTS" $data --steps $((ONE + TWO)) --out $out/two
  rows="$WEIGHTS $WEIGHTS:linear $out/one/student.safetensors $out/two/student.safetensors $out/one-two/student.safetensors
        $out/maps/student.safetensors $out/maps-two/student.safetensors"
  python finetune.py --task classify --data $PHOTOS $same --freeze --steps $PROBE --weights $rows --seed $seed --out $out/classify-frozen
  python finetune.py --task segment --data $VOC $same --freeze --steps $PROBE --weights $rows --seed $seed --out $out/segment-frozen
done
