#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, through sbatch. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
scripts/slurm.sh [OPTION ...] -- FLAG ...

Submits a job that runs `python -m dualformer_jax.main FLAG ...` on all GPUs of
several nodes, with the Python of .venv, or else the one on the PATH. Two minutes
before the time limit, and when it is preempted, the job saves its state and is
queued again.

Options:
  --nodes=N           number of nodes; default 2
  --gpus=N            GPUs per node; default 8
  --processes=PER     gpu (default): one process per GPU, each decodes its own
                      clips; node: one process per node, compiles only once
  --cpus=N            cores per GPU; default 16
  --time=TIME         time limit; default 1-00:00:00
  --partition=NAME, --account=NAME, --constraint=NAME
                      passed on to sbatch
  --max-restarts=N    how often the job is queued again; default 100
  --dry-run           print the job without submitting it

All nodes must share this folder, --workdir and --config.dataset.data_dir.
END
}

fail() {
  echo "error: $*" >&2
  exit 2
}

nodes=2 gpus=8 processes=gpu cpus=16 time=1-00:00:00 max_restarts=100 is_dry=''
options=()
while (($#)); do
  case $1 in
    -h | --help) usage && exit ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --processes=*) processes=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --partition=* | --account=* | --constraint=*) options+=("$1") ;;
    --dry-run) is_dry=1 ;;
    --) shift && break ;;
    *) fail "unknown option $1; see --help" ;;
  esac
  shift
done
for number in "$nodes" "$gpus" "$cpus" "$max_restarts"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "expected a positive number, got $number"
done
case $processes in
  gpu) tasks=$gpus cpus_per_task=$cpus ;;
  node) tasks=1 cpus_per_task=$((cpus * gpus)) ;;
  *) fail "--processes=$processes: expected gpu or node" ;;
esac
[[ " $* " == *' --config='* ]] ||
  fail 'the flags of the training must be given: -- --config=FILE --workdir=DIR'
if [[ -z $is_dry ]] && ! type -P sbatch >/dev/null; then
  fail 'sbatch not found; run this on a login node of the cluster'
fi

python=python
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
printf -v command '%q ' "$python" -m dualformer_jax.main "$@"

# All processes receive the signal and agree on a step to save. GPUs are not bound
# to tasks, as JAX selects them by index.
job() {
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=dualformer
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
#SBATCH --cpus-per-task=$cpus_per_task
#SBATCH --gpus-per-node=$gpus
#SBATCH --time=$time
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dualformer-%j.log
set -uo pipefail
export SRUN_CPUS_PER_TASK=$cpus_per_task
srun --kill-on-bad-exit=1 --gpu-bind=none $command
status=\$?
case \$status in
  # It was stopped and has saved, or a process was lost; but not right at the
  # start, where an error of one process ends the others likewise.
  143 | 134 | 137)
    if ((SECONDS > 300 && \${SLURM_RESTART_COUNT:-0} < $max_restarts)); then
      echo "== status \$status: queued again to resume"
      scontrol requeue "\$SLURM_JOB_ID"
    fi
    ;;
esac
exit \$status
END
}

if [[ $is_dry ]]; then
  printf '%q ' sbatch "${options[@]}"
  echo "<<'END'"
  job
  echo END
else
  job | sbatch "${options[@]}"
fi
