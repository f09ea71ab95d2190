#!/usr/bin/env bash
# Runs the tests, in an environment of their own: .venv, made by the first run.
#
#   scripts/test.sh [arguments for pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# The figures that the tests compare with were printed by a CPU.
export JAX_PLATFORMS=cpu
# Most tests compile more than they compute: with these, compiling a step takes a
# fifth of the time, and what is compiled is slower.
export XLA_FLAGS="--xla_backend_optimization_level=0 \
--xla_cpu_use_fusion_emitters=false ${XLA_FLAGS-}"
# A file's tests run in one process, as they share what they prepare; in order,
# as the files of most tests are not those that take longest.
exec "$python" -m pytest --numprocesses=auto --maxprocesses=4 \
  --dist=loadfile --no-loadscope-reorder "$@"
