#!/usr/bin/env bash
# Measure what docs/brackets.md says, from the repository's root (an hour or two of one core):
#
#   bash docs/brackets.sh [digits | networks]
#
# The MNIST and Fashion-MNIST networks are those of `python -m benchmarks.reproduce --stage 1 --stage 2`; without them
# only the digits' tables are made. What is there already is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-uv run python}
export OMP_NUM_THREADS=1
part=${1:-all}
out=docs/brackets
mkdir -p "$out" runs/brackets

train() { # MODEL EPOCHS
  [ -e "runs/brackets/digits-$1/summary.csv" ] || $python -m harness.track --dataset digits --model "$1" --epochs "$2" \
    --every 10 --estimator cascade --threads 1 --resume --out "runs/brackets/digits-$1"
}

brackets() { # NAME ARGUMENT...
  local name=$1
  shift
  [ -e "$out/$name.json" ] || $python -m benchmarks.brackets "$@" --out "$out/$name.json"
}

polish() { # NAME ARGUMENT...
  local name=$1 one
  local estimators=()
  for one in deepfool cascade; do estimators+=(--estimator "$one" --estimator "$one:refine=polish"); done
  shift
  [ -e "runs/brackets/$name/comparison.json" ] || $python -m benchmarks.compare "$@" "${estimators[@]}" --out "runs/brackets/$name"
  $python -m benchmarks.compare.digest "runs/brackets/$name" --manifest "$out/$name.json" > "$out/$name.md"
}

if [ $part != networks ]; then
  train dense 20
  train cnn 60

  several=(--certifier ibp --certifier crown:rounds=0 --certifier crown --certifier crown:rounds=8,cuts=8)
  brackets digits --problem relu --problem relu-deep --estimator deepfool:refine=polish "${several[@]}" --certifier exact
  brackets digits-20-seconds --problem relu-deep --estimator deepfool:refine=polish --certifier exact:seconds=20 --points 0
  brackets digits-dense runs/brackets/digits-dense --epoch 20 --images 1000 "${several[@]}" --points 300
  brackets digits-cnn runs/brackets/digits-cnn --epoch 10 --epoch 60 --images 1000 --certifier ibp --certifier crown \
    --certifier crown:rounds=6,cuts=8 --points 300
  polish polish-digits --problem relu --problem relu-deep --images 100
fi

if [ $part != digits ]; then
  networks=()
  for network in mnist-dense fashion-mnist-dense fashion-mnist-cnn; do
    for training in standard pgd; do
      run=runs/reproduce/$network-$training
      [ ! -e "$run/summary.csv" ] || networks+=("$run")
    done
  done
  if [ ${#networks[@]} -gt 0 ]; then
    brackets networks "${networks[@]}" --images 50 --points 2000
    polish polish-networks "${networks[@]}" --images 10
  fi
fi
