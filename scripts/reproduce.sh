#!/usr/bin/env bash
# Trains and tests a recipe, and compares its accuracy with the published one.
#
#   scripts/reproduce.sh RECIPE DATA [WORKDIR] [--config.FIELD=VALUE ...]
#
# RECIPE   a name in configs/, such as k400_tiny
# DATA     the --data_dir of `tfds build`, which prepared the dataset
# WORKDIR  folder of the run; runs/RECIPE by default
#
# Most recipes need --config.init_from=INIT (see their docstrings). The result is
# a row of docs/results.md, or of the file that RESULTS names. After an
# interruption, the same command resumes. It uses the active environment (README,
# "Install").
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ $# -lt 2 || $1 == -* || $2 == -* ]]; then
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
recipe=$1 data=$2
shift 2
workdir=runs/$recipe
if [[ $# -gt 0 && $1 != -* ]]; then
  workdir=$1
  shift
fi
config=$repository/configs/$recipe.py
if [[ ! -e $config ]]; then
  echo "error: no recipe $recipe; expected a name in $repository/configs" >&2
  exit 2
fi
if ! python -c 'import dualformer_jax.main' 2>/dev/null; then
  echo 'error: dualformer_jax is not installed for `python`; activate its' \
    'environment first (README, "Install")' >&2
  exit 2
fi
options=("--config=$config" "--config.dataset.data_dir=$data" "$@")

echo "== The dataset"
python "$repository/scripts/check_dataset.py" "${options[@]}"

if [[ -e $workdir/report.json ]]; then
  echo "== $workdir/report.json exists: remove it to train or test again"
else
  echo "== Training and testing in $workdir"
  python -m dualformer_jax.main "${options[@]}" --workdir="$workdir"
fi

echo "== The result"
python "$repository/scripts/results_table.py" \
  --out="${RESULTS:-$repository/docs/results.md}" "$workdir"
