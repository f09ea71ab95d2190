#!/usr/bin/env bash
# Trains on a TPU pod slice: creates it, installs, trains on all workers, follows
# the log, resumes after a preemption, and deletes it. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
scripts/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTION ...] [-- FLAG ...]

Commands:
  run      all of the following steps; recreates the slice after a preemption
           until the training is done, then deletes it
  create   create the pod slice and wait until it is ready
  install  copy this repository to all workers and install it
  train    start `python -m dualformer_jax.main FLAG ...` on all workers
  logs     follow the log until the training ends; Ctrl-C leaves it running
  delete   delete the pod slice

Options:
  --name=NAME        name of the pod slice
  --zone=ZONE        zone of Google Cloud, such as us-west4-a
  --project=PROJECT  project, instead of the default of gcloud
  --type=TYPE        v5litepod-16 (16 chips of v5e), v4-32, v5p-32, v6e-16, ...
  --version=VERSION  software of the workers: v2-alpha-tpuv5-lite for v5e,
                     tpu-ubuntu2204-base for v4, v2-alpha-tpuv5, v2-alpha-tpuv6e
  --queued           request a queued resource, and wait for it
  --spot             use a cheaper slice that may be preempted
  --setup=COMMAND    run on each worker after installing, such as a mount
  --max-restarts=N   maximum number of restarts of `run`; default 100
  --poll=SECONDS     time between two queries of the state; default 60
  --keep             do not delete the pod slice after `run`
  --dry-run          print all commands without running them

--workdir and --config.dataset.data_dir are at gs://, or on a file system that
all workers share, such as a mounted bucket: docs/many_hosts.md.
END
}

fail() {
  echo "error: $*" >&2
  exit 2
}

command='' name='' zone='' project='' type='' version='' setup=''
is_queued='' is_spot='' is_kept='' is_dry='' is_made='' max_restarts=100 poll=60
while (($#)); do
  case $1 in
    -h | --help) usage && exit ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --queued) is_queued=1 ;;
    --spot) is_spot=1 ;;
    --keep) is_kept=1 ;;
    --dry-run) is_dry=1 ;;
    --) shift && break ;;
    -*) fail "unknown option $1; see --help" ;;
    *)
      [[ -z $command ]] || fail "$command and $1: expected one command"
      command=$1
      ;;
  esac
  shift
done
flags=("$@")

case $command in
  run | create | install | train | logs | delete) ;;
  '') fail 'a command must be given: run, create, install, train, logs, delete' ;;
  *) fail "unknown command $command; see --help" ;;
esac
[[ $name ]] || fail '--name=NAME must be given'
[[ $zone ]] || fail '--zone=ZONE must be given, such as --zone=us-west4-a'
if [[ $command == @(run|create) ]]; then
  [[ $type ]] || fail '--type=TYPE must be given, such as --type=v5litepod-16'
  [[ $version ]] || fail '--version=VERSION must be given; see --help'
fi
if [[ $command == @(run|train) && " ${flags[*]-}" != *' --config='* ]]; then
  fail 'the flags of the training must be given: -- --config=FILE --workdir=DIR'
fi
if [[ -z $is_dry ]] && ! type -P gcloud >/dev/null; then
  fail 'gcloud is not installed: https://cloud.google.com/sdk/docs/install'
fi

# ------------------------------------------------------------------- commands

exec 3>&1 # for --dry-run, as the output of commands may be captured

run() {
  if [[ $is_dry ]]; then
    printf '%q ' "$@" >&3
    echo >&3
  else
    "$@"
  fi
}

# tpus GROUP VERB ARGUMENT ...
tpus() {
  run gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
}

# on WORKERS COMMAND
on() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

# query EXPECTED COMMAND ...: the output of a command, or what is expected of it
# with --dry-run
query() {
  local expected=$1
  shift
  if [[ $is_dry ]]; then
    "$@"
    echo "$expected"
  else
    "$@" 2>/dev/null || true
  fi
}

is_ready() {
  [[ -z $is_dry || $is_made ]] || return
  [[ $(query READY tpus tpu-vm describe "$name" --format='value(state)') == READY ]]
}

create() {
  echo "== Creating $name ($type)" >&2
  is_made=1
  if [[ -z $is_queued ]]; then
    tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" \
      ${is_spot:+--spot}
    return
  fi
  tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" ${is_spot:+--spot}
  local state
  while :; do
    state=$(query ACTIVE tpus queued-resources describe "$name" \
      --format='value(state.state)')
    case $state in
      ACTIVE) return ;;
      FAILED) fail "$name cannot be created; why: gcloud compute tpus" \
        "queued-resources describe $name --zone=$zone" ;;
    esac
    echo "   $name: ${state:-unknown}" >&2
    sleep "$poll"
  done
}

install() {
  echo '== Installing on all workers' >&2
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  # All files that git tracks, with local changes.
  git ls-files -z | tar --null --files-from=- --create --gzip --file="$archive"
  tpus tpu-vm scp "$archive" "$name:dualformer_jax.tar.gz" --worker=all
  rm "$archive"
  on all 'set -e
mkdir -p dualformer_jax
tar -xzf dualformer_jax.tar.gz -C dualformer_jax
cd dualformer_jax
if ! python3.11 -c "import ensurepip" 2>/dev/null; then
  sudo apt-get -qq update
  sudo apt-get -qq install -y python3.11-venv
fi
python3.11 -m venv .venv
.venv/bin/pip install -q -c constraints.txt -e ".[tpu,gcs]"'
  [[ -z $setup ]] || on all "$setup"
}

# Detached, so that the training continues when the connection is lost.
train() {
  echo '== Training on all workers' >&2
  local quoted
  printf -v quoted '%q ' "${flags[@]}"
  on all "cd dualformer_jax
rm -f train.status
nohup setsid bash -c '.venv/bin/python -m dualformer_jax.main \"\$@\"
echo \$? >train.status' train $quoted>train.log 2>&1 </dev/null &
echo \$! >train.pid"
}

logs() {
  on 0 "cd dualformer_jax && tail -n +1 -F --pid=\$(cat train.pid) train.log"
}

delete() {
  echo "== Deleting $name" >&2
  if [[ $is_queued ]]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

# ------------------------------------------------------------------------ run

train_until_done() {
  local restarts status start
  is_ready || create
  install
  for ((restarts = 0; ; restarts++)); do
    train
    start=$SECONDS
    # `logs` ends with the training, the worker, or the connection.
    status=running
    while [[ $status == running ]]; do
      logs || sleep "$poll"
      status=$(query 0 on 0 "cd dualformer_jax && cat train.status ||
kill -0 \$(cat train.pid) && echo running")
    done
    [[ $status != 0 ]] || return 0
    ((restarts < max_restarts)) ||
      fail "not done after $restarts restarts; $name still exists"
    if ! is_ready; then
      echo "== $name was preempted" >&2
      delete || true # it may not exist any more
      create
      install
    elif [[ $status == @(|1|134|137|143) ]] && ((SECONDS - start > 300)); then
      echo '== A process was lost; restarting' >&2
    else
      on all 'cd dualformer_jax && tail -n 5 train.log' || true
      echo "error: the training has failed (status ${status:-unknown}); $name still" \
        "exists and costs: $0 delete --name=$name --zone=$zone" \
        "${is_queued:+--queued}" >&2
      return 1
    fi
  done
}

if [[ $command == run ]]; then
  train_until_done
  [[ $is_kept ]] || delete
else
  "$command"
fi
