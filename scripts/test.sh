#!/usr/bin/env bash
# Runs the tests, in an environment of their own: .venv, made by the first run.
#
#   scripts/test.sh [arguments for pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# The figures that the tests compare with were printed by a CPU.
export JAX_PLATFORMS=cpu
# A file's tests run in one process, as they share what they prepare.
exec "$python" -m pytest --numprocesses=auto --maxprocesses=4 \
  --dist=loadfile "$@"
