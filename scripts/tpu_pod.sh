#!/usr/bin/env bash
# Trains on a TPU pod slice: creates it, installs, trains on all workers, follows
# the log, goes on after a preemption, and deletes it. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
scripts/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTION ...] [-- FLAG ...]

Commands:
  run      all of this, in this order; creates anew what is preempted, until the
           training is done, and then deletes it
  create   creates the pod slice and waits until it is there
  install  copies this repository to all workers, and installs it
  train    starts `python -m dualformer_jax.main FLAG ...` on all workers
  logs     follows the log until the training ends; Ctrl-C leaves it running
  delete   deletes the pod slice

Options:
  --name=NAME        of the pod slice
  --zone=ZONE        of Google Cloud, such as us-west4-a
  --project=PROJECT  instead of gcloud's own
  --type=TYPE        v5litepod-16 (16 chips of v5e), v4-32, v5p-32, v6e-16, ...
  --version=VERSION  software of the workers: v2-alpha-tpuv5-lite for v5e,
                     tpu-ubuntu2204-base for v4, v2-alpha-tpuv5, v2-alpha-tpuv6e
  --queued           waits in the queue for its turn, as a queued resource
  --spot             cheaper, and may be preempted
  --setup=COMMAND    run on each worker after installing: mount a bucket, say
  --max-restarts=N   of `run`; 100 unless given
  --poll=SECONDS     until it looks again at the queue, or at what has not
                     answered; 60 unless given
  --keep             `run` leaves the pod slice there at the end
  --dry-run          prints every command, runs none

--workdir and --config.dataset.data_dir must be on a file system that all workers
share, such as a mounted bucket: docs/many_hosts.md.
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
    -*) fail "there is no option $1; --help tells which there are" ;;
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
  *) fail "there is no command $command; --help tells which there are" ;;
esac
[[ $name ]] || fail '--name=NAME must be given'
[[ $zone ]] || fail '--zone=ZONE must be given, such as --zone=us-west4-a'
if [[ $command == @(run|create) ]]; then
  [[ $type ]] || fail '--type=TYPE must be given, such as --type=v5litepod-16'
  [[ $version ]] || fail '--version=VERSION must be given; --help tells of them'
fi
if [[ $command == @(run|train) && " ${flags[*]-}" != *' --config='* ]]; then
  fail 'what to train must be given: -- --config=FILE --workdir=DIR ...'
fi
if [[ -z $is_dry ]] && ! type -P gcloud >/dev/null; then
  fail 'gcloud is not installed: https://cloud.google.com/sdk/docs/install'
fi

# ------------------------------------------------------------------- commands

exec 3>&1 # where --dry-run prints, whatever takes the output of commands

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

# A command's output, or what it would be where none is run.
asked() {
  local expected=$1
  shift
  if [[ $is_dry ]]; then
    "$@"
    echo "$expected"
  else
    "$@" 2>/dev/null || true
  fi
}

is_there() {
  [[ -z $is_dry || $is_made ]] || return
  [[ $(asked READY tpus tpu-vm describe "$name" --format='value(state)') == READY ]]
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
    state=$(asked ACTIVE tpus queued-resources describe "$name" \
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
  # What git knows of, as it is now.
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
.venv/bin/pip install -q -c constraints.txt -e ".[tpu]"'
  [[ -z $setup ]] || on all "$setup"
}

# Not bound to this terminal: the training goes on when the connection is lost.
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
  local restarts status
  is_there || create
  install
  for ((restarts = 0; ; restarts++)); do
    train
    # Ends with the training, with the worker, or with the connection.
    status=running
    while [[ $status == running ]]; do
      logs || sleep "$poll"
      status=$(asked 0 on 0 "cd dualformer_jax && cat train.status ||
kill -0 \$(cat train.pid) && echo running")
    done
    [[ $status != 0 ]] || return 0
    ((restarts < max_restarts)) ||
      fail "still not done after $restarts restarts; $name is still there"
    if ! is_there; then
      echo "== $name was preempted" >&2
      delete || true # it may be gone altogether
      create
      install
    elif [[ $status == @(|75|134|137|143) ]]; then
      echo '== A process was lost; the others have ended, too' >&2
    else
      on all 'cd dualformer_jax && tail -n 5 train.log' || true
      echo "error: the training has failed (status ${status:-unknown}); $name is" \
        "still there, and costs: $0 delete --name=$name --zone=$zone" \
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
