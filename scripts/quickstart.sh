#!/usr/bin/env bash
# Renders small videos, trains a DualFormer on them, and shows that it has learnt
# motion. All of it lands in .venv and .quickstart; a second run skips what is
# done, and goes on where an interrupted one stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

data=.quickstart/data
workdir=.quickstart/motion

# Only a dataset that is complete has this file.
if ! compgen -G "$data/motion/*/dataset_info.json" >/dev/null; then
  echo "== Rendering videos into $data"
  # Level 3: without what TensorFlow says of processors and GPUs.
  TF_CPP_MIN_LOG_LEVEL=3 .venv/bin/tfds build data/motion --data_dir="$data"
fi

if [[ ! -e $workdir/report.json ]]; then
  echo "== Training in $workdir"
  "$python" -m dualformer_jax.main --config=configs/motion.py \
    --workdir="$workdir" --config.dataset.data_dir="$data"
fi

echo "== Is it motion that it has learnt?"
"$python" scripts/motion_proof.py --workdir="$workdir" --data_dir="$data"
