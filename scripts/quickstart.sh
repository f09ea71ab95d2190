#!/usr/bin/env bash
# Renders small videos, trains a DualFormer on them, and shows that it has
# learned motion. Everything is written to .venv and .quickstart. A second run
# skips finished parts and resumes interrupted ones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

data=.quickstart/data
workdir=.quickstart/motion

# Only a complete dataset has this file.
if ! compgen -G "$data/motion/*/dataset_info.json" >/dev/null; then
  echo "== Rendering videos into $data"
  # Level 3 hides TensorFlow's messages about processors and GPUs.
  TF_CPP_MIN_LOG_LEVEL=3 "$venv/bin/tfds" build data/motion --data_dir="$data"
fi

if [[ ! -e $workdir/report.json ]]; then
  echo "== Training in $workdir"
  "$python" -m dualformer_jax.main --config=configs/motion.py \
    --workdir="$workdir" --config.dataset.data_dir="$data"
fi

echo "== Has it learned motion?"
"$python" scripts/motion_proof.py --workdir="$workdir" --data_dir="$data"
