#!/usr/bin/env bash
# The README's real-weights table: seven rows, both tasks, frozen backbones; three rows tuned. From the repository's root:
#   WEIGHTS=vits14.safetensors PHOTOS=imagenette160 PROBE=imagenette160-third VOC=voc2012 bash results/vits14-cpu.sh 0 1
# PHOTOS: train/<class>/, val/<class>/; PROBE: the same with every third training photo. VOC: train/images, train/masks,
# val/... The arguments are the seeds; each took about an hour on one core. Then
#   python results/collect.py runs/vits14-cpu results/vits14-cpu
set -eu
same="--size 112 --batch 32 --dtype bfloat16"
for seed in "$@"; do
  out=runs/vits14-cpu/seed$seed
  data="--data $PHOTOS $VOC $same --seed $seed"
  python align_attention.py --weights "$WEIGHTS" $data --steps 150 --lr 3e-3 --out $out/one
  python align_attention.py --weights "$WEIGHTS" $data --steps 150 --lr 1e-2 --attention hedgehog --train maps --out $out/maps
  python align_features.py --weights $out/one/student.safetensors $data --steps 150 --lr 5e-5 --out $out/one-two
  python align_features.py --weights $out/maps/student.safetensors $data --steps 150 --lr 5e-5 --out $out/maps-two
  python align_features.py --weights "$WEIGHTS" $data --steps 300 --lr 2e-4 --out $out/two
  rows="$WEIGHTS $WEIGHTS:linear $out/one/student.safetensors $out/two/student.safetensors $out/one-two/student.safetensors
        $out/maps/student.safetensors $out/maps-two/student.safetensors"
  python finetune.py --task classify --data $PROBE $same --freeze --steps 1000 --weights $rows --seed $seed --out $out/classify-frozen
  python finetune.py --task segment --data $VOC $same --freeze --steps 500 --weights $rows --seed $seed --out $out/segment-frozen
done
rows="$WEIGHTS $WEIGHTS:linear runs/vits14-cpu/seed0/one-two/student.safetensors"
python finetune.py --task classify --data $PROBE $same --steps 40 --weights $rows --out runs/vits14-cpu/seed0/classify-tuned
python finetune.py --task segment --data $VOC $same --steps 40 --weights $rows --out runs/vits14-cpu/seed0/segment-tuned
