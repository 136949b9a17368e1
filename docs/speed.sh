#!/usr/bin/env bash
# Measure what docs/speed holds, from the repository's root, on a quiet machine (about an hour of one core):
#
#   uv pip install --no-deps adv-lib adversarial-robustness-toolbox six
#   bash docs/speed.sh
#
# Fashion-MNIST is looked for in data/ (see harness.track --data-root). What is there already is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-uv run --no-sync python}
export OMP_NUM_THREADS=1
mkdir -p docs/speed

[ -e runs/figure1/figure1.json ] || $python -m benchmarks.figure1 --out runs/figure1
cp runs/figure1/figure1.md docs/speed

speed() { # NAME ARGUMENT...
  local name=$1
  shift
  # speed.json grows table by table
  [ -e "runs/speed/$name/done" ] || { $python -m benchmarks.speed "$@" --out "runs/speed/$name" && touch "runs/speed/$name/done"; }
  cp "runs/speed/$name/speed.md" "docs/speed/$name.md"
}

run=(runs/figure1/run --epoch 40)
speed deepfool "${run[@]}" --images 1000
speed deepfool-unreachable "${run[@]}" --images 1000 --unreachable --peer foolbox adv-lib --no-memory
speed descents "${run[@]}" --images 300 --estimator fmn ddn pgd pgd:steps=10
few=(--peer foolbox adv-lib --no-memory)
speed sizes --problem dense-digits cnn-digits dense-fashion cnn-fashion --images 1 16 100 1000 "${few[@]}"
speed classes --problem dense-fashion cnn-fashion --classes 100 --images 100 1000 "${few[@]}"
speed resnet18 --problem resnet18-cifar10 --images 1 16 "${few[@]}"
# memory does not depend on the steps, of which a ResNet-50 takes a second an image
large=(--problem resnet50-224 --classes 100 --norm l2 --peer --repeats 1)
speed large "${large[@]}" --estimator fmn:steps=3 --images 40 --batch 128
speed large-deepfool "${large[@]}" --estimator deepfool:steps=2 --images 24 --batch 16

[ -e runs/fashion-mnist-pgd/summary.csv ] || $python -m harness.track --dataset fashion-mnist --training pgd --epochs 10 \
  --every 5 --probe 500 --estimator linear --threads 1 --resume --out runs/fashion-mnist-pgd
speed descents-pgd runs/fashion-mnist-pgd --epoch 10 --images 300 --estimator deepfool fmn ddn pgd pgd:steps=10 \
  --peer foolbox torchattacks --no-memory
