#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, through sbatch. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
scripts/slurm.sh [OPTION ...] -- FLAG ...

Submits `python -m dualformer_jax.main FLAG ...` to run on all GPUs of some
nodes, with the Python of .venv here, or else the one on the PATH. Two minutes
before its time is over, and when it is preempted, the job saves; it is then
queued again, and goes on.

Options:
  --nodes=N           2 unless given
  --gpus=N            of each node; 8 unless given, as A100 nodes have
  --processes=PER     gpu: one process for each GPU (unless given), whose threads
                      read its own clips; node: one process for all GPUs of a
                      node, which holds one copy of what is read and compiled
  --cpus=N            for each GPU; 16 unless given
  --time=TIME         1-00:00:00 unless given
  --partition=NAME, --account=NAME, --constraint=NAME
                      as sbatch has them
  --max-restarts=N    how often the job is queued again; 100 unless given
  --dry-run           prints what would be submitted, and submits nothing

All nodes must see this folder, --workdir and --config.dataset.data_dir.
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
    *) fail "there is no option $1; --help tells which there are" ;;
  esac
  shift
done
for number in "$nodes" "$gpus" "$cpus" "$max_restarts"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number is not a number of 1 or more"
done
case $processes in
  gpu) tasks=$gpus cpus_per_task=$cpus ;;
  node) tasks=1 cpus_per_task=$((cpus * gpus)) ;;
  *) fail "--processes=$processes: expected gpu or node" ;;
esac
[[ " $* " == *' --config='* ]] ||
  fail 'what to train must be given: -- --config=FILE --workdir=DIR ...'
if [[ -z $is_dry ]] && ! type -P sbatch >/dev/null; then
  fail 'sbatch is not here; run this on a login node of the cluster'
fi

python=python
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
printf -v command '%q ' "$python" -m dualformer_jax.main "$@"

# The signal goes to all processes, which agree on a step to save. GPUs are not
# bound to tasks: each process takes its share of those that its node has.
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
  # It was told to stop, and has saved; or a process was lost.
  143 | 75 | 134 | 137)
    if ((\${SLURM_RESTART_COUNT:-0} < $max_restarts)); then
      echo "== status \$status: queued again, to go on"
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
