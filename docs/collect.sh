#!/usr/bin/env bash
# Draw the runs that the documentation shows, and copy their tables and figures here. From the repository's root:
#
#   for training in standard pgd; do
#     uv run python -m harness.track --dataset fashion-mnist --training $training --epochs 20 --probe 500 \
#       --estimator deepfool --estimator fmn --threads 1 --out runs/fashion-mnist-$training
#   done
#   uv run python -m harness.track --estimator deepfool --estimator fmn --out runs/digits
#   bash docs/collect.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mkdir -p docs/fashion-mnist
copy() { # RUN FIGURES-FOLDER FIGURE...
  local run=$1 figures=$2 to=docs/$1 figure
  shift 2
  rm -rf "$to" && mkdir -p "$to"
  cp "runs/$run/manifest.json" "runs/$run/summary.csv" "runs/$run/epochs.csv" "$to"
  for figure in "$@"; do cp "$figures/$figure.png" "$to"; done
}

uv run python -m harness.report runs/digits
copy digits runs/digits/figures margins

uv run python -m harness.report runs/fashion-mnist-standard runs/fashion-mnist-pgd --out runs/fashion-mnist.html
copy fashion-mnist-standard runs/fashion-mnist-figures/fashion-mnist-standard margins flow-train classes
copy fashion-mnist-pgd runs/fashion-mnist-figures/fashion-mnist-pgd margins ratios
cp runs/fashion-mnist-figures/distributions-l2.png runs/fashion-mnist-observations.csv docs/fashion-mnist
