#!/usr/bin/env bash
# Runs the tests in a virtual environment, which the first run creates.
#
#   scripts/test.sh [--fast] [arguments of pytest]
#
# --fast skips the slow tests: those that start several processes, train
# by the command line, or compile whole models ahead of time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ ${1-} == --fast ]]; then
  shift
  set -- -m 'not slow' "$@"
fi
# The reference figures were computed on a CPU.
export JAX_PLATFORMS=cpu
# Most tests compile for longer than they compute.
flags=$("$python" -c 'from tests import xla_flags
print(xla_flags.fast_compilation(0))')
export XLA_FLAGS="$flags ${XLA_FLAGS-}"
# NumPy's threads wait for each other, busily, where the processors have others
# to run: products of small matrices then take 20 times as long.
export OPENBLAS_NUM_THREADS=1
# Programs that take long to compile are shared by the processes, and kept for the
# next run. Only with a maximal size (in bytes) do processes lock the folder; each
# new program then takes longer the more programs are there.
export JAX_COMPILATION_CACHE_DIR=$venv/compiled_tests
export JAX_COMPILATION_CACHE_MAX_SIZE=2000000000
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
# The tests of a file share what they prepare, so they run in one process. The
# order of files is that of tests/conftest.py.
exec "$python" -m pytest --numprocesses=auto --maxprocesses=4 \
  --dist=loadfile --no-loadscope-reorder "$@"
