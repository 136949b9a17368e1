#!/usr/bin/env bash
# Measure what docs/estimators.md says, from the repository's root (two to three hours of one core):
#
#   bash docs/estimators.sh
#
# `bash docs/estimators.sh exact` makes the first comparison alone, of digits, which takes half an hour.
#
# The data sets are looked for in data/ (see harness.track --data-root). A comparison that is there already is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-uv run --extra bb python}
export OMP_NUM_THREADS=1

# only the checkpoints are of use here: margins by the cheapest estimator, at the first and last epochs
train() { # DATASET TRAINING EPOCHS
  [ -e "runs/$1-$2/summary.csv" ] || $python -m harness.track --dataset "$1" --training "$2" --epochs "$3" --every "$3" \
    --probe 500 --estimator linear --threads 1 --resume --out "runs/$1-$2"
}

compare() { # NAME ARGUMENT...
  local name=$1
  shift
  [ -e "runs/estimators/$name/comparison.json" ] || $python -m benchmarks.compare "$@" --out "runs/estimators/$name"
}

cheap=(deepfool fmn sdf fab linear cascade cascade:budget=100)
dear=(apgd apgd:steps=40,rounds=9,targets=9 ddn:steps=1000)
reference=(cw fmn:steps=1000 fmn:steps=300,targets=5 fab:steps=100 pgd:restarts=5 bb)

small=(relu relu-deep relu-conv relu-conv-pgd relu-pool relu-pool-pgd affine affine-box affine-free)
compare exact "${small[@]/#/--problem=}" --images 100 "${cheap[@]/#/--estimator=}" "${dear[@]/#/--estimator=}" \
  --estimator best
mkdir -p docs/estimators
$python -m benchmarks.compare.digest runs/estimators/exact --manifest docs/estimators/exact.json > docs/estimators/exact.md
[ "${1:-}" != exact ] || exit 0

for training in standard pgd; do
  train fashion-mnist "$training" 40
  compare "fashion-mnist-$training" "runs/fashion-mnist-$training" --epoch 1 --epoch 10 --epoch 40 --images 200 \
    "${cheap[@]/#/--estimator=}" "${dear[@]/#/--estimator=}" "${reference[@]/#/--reference=}" --without cascade
done

for dataset in mnist cifar10; do
  for training in standard pgd; do
    train "$dataset" "$training" 10
    compare "$dataset-$training" "runs/$dataset-$training" --epoch 1 --epoch 10 --images 100 \
      "${cheap[@]/#/--estimator=}" --estimator apgd --reference ddn:steps=1000 --reference fmn:steps=300,targets=5 \
      --without cascade
  done
done

cp runs/estimators/fashion-mnist-*/cost-*-epoch-40-test.png docs/estimators
$python -m benchmarks.compare.digest runs/estimators/fashion-mnist-{standard,pgd} \
  --manifest docs/estimators/manifest.json > docs/estimators/tables.md
$python -m benchmarks.compare.digest runs/estimators/{mnist,cifar10}-{standard,pgd} \
  --manifest docs/estimators/other-data.json > docs/estimators/other-data.md
$python -m benchmarks.estimators --out docs/estimators/defaults.json > docs/estimators/defaults.md
