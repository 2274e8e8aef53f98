#!/usr/bin/env bash
# The real-weights table: seven rows, both tasks, frozen backbones. From the repository's root:
#   WEIGHTS=vit_small_patch14_dinov2=vits14.safetensors PHOTOS=imagenette160 PROBE=imagenette160-third VOC=voc2012 \
#     bash results/vits14-cpu.sh 0 1
# PHOTOS: train/CLASS/, val/CLASS/; PROBE: the same with every third training photo. VOC: train/images, train/masks, val/...
# The arguments are the seeds. Then
#   python results/collect.py runs/vits14-cpu results/vits14-cpu
set -eu
same="--size 112 --batch-size 32 --dtype bfloat16"
for seed in "$@"; do
  out=runs/vits14-cpu/seed$seed
  data="--teacher $WEIGHTS --data $PHOTOS $VOC $same --seed $seed"
  python align_attention.py $data --steps 150 --out $out/one
  python align_attention.py $data --steps 150 --attention hedgehog --train operator --out $out/maps
  python align_features.py --student $out/one/student.safetensors $data --steps 150 --lr 5e-5 --out $out/one-two
  python align_features.py --student $out/maps/student.safetensors $data --steps 150 --lr 5e-5 --out $out/maps-two
  python align_features.py $data --steps 300 --lr 2e-4 --out $out/two
  rows="$WEIGHTS $WEIGHTS:linear $out/one/student.safetensors $out/two/student.safetensors $out/one-two/student.safetensors
        $out/maps/student.safetensors $out/maps-two/student.safetensors"
  python finetune.py --task classify --data $PROBE $same --freeze --steps 1000 --weights $rows --seed $seed --out $out/classify-frozen
  python finetune.py --task segment --data $VOC $same --freeze --steps 500 --weights $rows --seed $seed --out $out/segment-frozen
done
