"""What scripts/tpu_pod.sh and scripts/slurm.sh tell gcloud and sbatch to do."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
POD = ('--name=pod', '--zone=us-west4-a')
SLICE = (*POD, '--type=v5litepod-16', '--version=v2-alpha-tpuv5-lite')
# With what a shell would break or run.
TRAIN = (
  '--config=configs/k400_base.py',
  "--workdir=/bucket/it's a run",
  '--config.model.depths=(2, 2)',
  '--config.init_from=$(false)',
)
# Notes its arguments, one call a line; each `describe` and `cat` of the status
# takes the next of what was prepared.
FAKE_GCLOUD = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$CALLS/calls"
echo >>"$CALLS/calls"
answer() {
  head -n 1 "$CALLS/$1" 2>/dev/null
  sed -i 1d "$CALLS/$1" 2>/dev/null
}
case "$*" in
  *' scp '*)
    for word; do
      [[ $word != /*.tar.gz ]] || cp "$word" "$CALLS"
    done
    ;;
  *queued-resources\\ describe*) answer queue ;;
  *tpu-vm\\ describe*) answer state ;;
  *train.status*cat* | *cat*train.status*) answer status ;;
esac
true
"""
FAKE_SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$CALLS/calls"
cat >"$CALLS/job"
"""


def run(script: str, *arguments: str, **environment: str):
  return subprocess.run(
    [ROOT / 'scripts' / script, *arguments],
    env=os.environ | environment,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


class Calls:
  """Runs a script with a fake gcloud and sbatch, and has what was called."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    for name, text in (('gcloud', FAKE_GCLOUD), ('sbatch', FAKE_SBATCH)):
      (folder / name).write_text(text)
      (folder / name).chmod(0o755)

  def prepare(self, **answers: str) -> None:
    for name, text in answers.items():
      (self.folder / name).write_text(text.replace(' ', '\n') + '\n')

  def run(self, script: str, *arguments: str):
    path = f'{self.folder}{os.pathsep}{os.environ["PATH"]}'
    return run(script, *arguments, CALLS=str(self.folder), PATH=path)

  def gcloud(self) -> list[list[str]]:
    """Arguments of each call after `gcloud compute tpus`, which all have."""
    lines = (self.folder / 'calls').read_text().splitlines()
    return [parse(line) for line in lines]


def parse(line: str) -> list[str]:
  """Arguments after `compute tpus` of a line that bash has quoted."""
  done = subprocess.run(
    ['bash', '-c', f"printf '%s\\0' {line}"], capture_output=True, check=True
  )
  words = done.stdout.decode().split('\0')[:-1]
  words = words[1:] if words[0] == 'gcloud' else words
  assert words[:2] == ['compute', 'tpus']
  assert '--zone=us-west4-a' in words
  return words[2:]


def kinds(calls: list[list[str]]) -> list[str]:
  """What each call is for, in a word."""
  result = []
  for call in calls:
    text = ' '.join(call)
    for kind, part in (
      ('install', 'pip install'),
      ('train', 'dualformer_jax.main'),
      ('logs', 'tail -n +1'),
      ('failure', 'tail -n 5'),
      ('status', 'cat train.status'),
      ('setup', 'mount it'),
    ):
      if part in text:
        result.append(kind)
        break
    else:
      result.append(call[1])
  return result


@pytest.fixture(name='calls')
def _calls(tmp_path) -> Calls:
  return Calls(tmp_path)


# --- TPU pods


def test_a_dry_run_prints_every_command_and_runs_none(calls):
  arguments = ('run', *SLICE, '--queued', '--spot', '--setup=mount it')
  done = calls.run('tpu_pod.sh', *arguments, '--dry-run', '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  assert not (calls.folder / 'calls').exists()
  printed = [parse(line) for line in done.stdout.splitlines()]
  assert kinds(printed) == [
    'create',
    'describe',
    'scp',
    'install',
    'setup',
    'train',
    'logs',
    'status',
    'delete',
  ]
  assert printed[0] == [
    'queued-resources',
    'create',
    'pod',
    '--node-id=pod',
    '--accelerator-type=v5litepod-16',
    '--runtime-version=v2-alpha-tpuv5-lite',
    '--spot',
    '--zone=us-west4-a',
  ]
  assert printed[-1][:4] == ['queued-resources', 'delete', 'pod', '--force']


def test_flags_reach_the_workers_as_they_were_given(calls, tmp_path):
  done = calls.run('tpu_pod.sh', 'train', *POD, '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  ((*_, worker, command, _zone),) = calls.gcloud()
  assert worker == '--worker=all'
  # As a worker would run it, with a Python that notes its arguments.
  python = tmp_path / 'dualformer_jax' / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"; exit 7\n')
  python.chmod(0o755)
  script = command.removeprefix('--command=')
  subprocess.run(
    ['bash', '-c', f'{script}\nwait'], cwd=tmp_path, check=True, timeout=30
  )
  repository = tmp_path / 'dualformer_jax'
  assert (repository / 'train.log').read_text().splitlines() == [
    '-m',
    'dualformer_jax.main',
    *TRAIN,
  ]
  assert (repository / 'train.status').read_text() == '7\n'
  assert (repository / 'train.pid').read_text().strip().isdigit()


def test_a_preempted_pod_is_made_anew_and_goes_on(calls):
  # Not there; preempted; there, but a process was lost.
  calls.prepare(state='none PREEMPTED READY', status='running none 75 0')
  done = calls.run('tpu_pod.sh', 'run', *SLICE, '--spot', '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  assert kinds(calls.gcloud()) == [
    *('describe', 'create', 'scp', 'install'),
    *('train', 'logs', 'status'),
    *('logs', 'status', 'describe'),  # the connection was lost
    *('delete', 'create', 'scp', 'install'),
    *('train', 'logs', 'status', 'describe'),
    *('train', 'logs', 'status'),
    'delete',
  ]
  trained = [c for c in calls.gcloud() if kinds([c]) == ['train']]
  assert trained[0] == trained[1] == trained[2]
  assert 'pod was preempted' in done.stderr


def test_a_pod_whose_training_fails_is_kept_and_told(calls):
  calls.prepare(state='READY READY', status='2')
  done = calls.run('tpu_pod.sh', 'run', *SLICE, '--', *TRAIN)
  assert done.returncode == 1
  assert kinds(calls.gcloud())[-4:] == ['logs', 'status', 'describe', 'failure']
  assert 'create' not in kinds(calls.gcloud())
  assert 'has failed (status 2); pod is still there, and costs' in done.stderr


def test_it_waits_for_its_turn_in_the_queue(calls):
  calls.prepare(queue='WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  done = calls.run(
    'tpu_pod.sh', 'create', *SLICE, '--queued', '--poll=0.1', '--project=mine'
  )
  assert done.returncode == 0, done.stderr
  assert kinds(calls.gcloud()) == ['create', *3 * ['describe']]
  assert all('--project=mine' in call for call in calls.gcloud())
  calls.prepare(queue='PROVISIONING FAILED')
  done = calls.run('tpu_pod.sh', 'create', *SLICE, '--queued', '--poll=0.1')
  assert done.returncode == 2
  assert 'cannot be created' in done.stderr


def test_what_git_knows_is_installed(calls):
  done = calls.run('tpu_pod.sh', 'install', *POD)
  assert done.returncode == 0, done.stderr
  (archive,) = calls.folder.glob('*.tar.gz')
  with tarfile.open(archive) as tar:
    names = tar.getnames()
  assert {'setup.cfg', 'dualformer_jax/main.py'} <= set(names)
  assert not [name for name in names if name.startswith(('.git/', '.venv/'))]


# --- SLURM


@pytest.mark.parametrize(
  ('processes', 'tasks', 'cpus'), [('gpu', 4, 16), ('node', 1, 64)]
)
def test_a_job_has_a_process_for_each_gpu_or_node(
  calls, processes, tasks, cpus
):
  options = ('--nodes=3', '--gpus=4', f'--processes={processes}')
  done = calls.run('slurm.sh', *options, '--partition=a b', '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  assert (calls.folder / 'calls').read_text() == '--partition=a b\n'
  job = (calls.folder / 'job').read_text()
  subprocess.run(['bash', '-n'], input=job, text=True, check=True)
  lines = job.splitlines()
  for option in (
    '--nodes=3',
    f'--ntasks-per-node={tasks}',
    f'--cpus-per-task={cpus}',
    '--gpus-per-node=4',
    '--signal=TERM@120',
    '--requeue',
  ):
    assert f'#SBATCH {option}' in lines
  (line,) = [line for line in lines if line.startswith('srun ')]
  words = shlex.split(line)
  assert words[-len(TRAIN) - 2 :] == ['-m', 'dualformer_jax.main', *TRAIN]


@pytest.mark.parametrize(
  ('status', 'restarts', 'is_queued_again'),
  [(0, 0, False), (2, 0, False), (143, 0, True), (75, 4, True), (75, 5, False)],
)
def test_a_job_that_was_stopped_is_queued_again(
  calls, status, restarts, is_queued_again
):
  calls.run('slurm.sh', '--max-restarts=5', '--', *TRAIN)
  for name, text in (
    ('srun', f'exit {status}'),
    ('scontrol', 'echo "$@" >"$CALLS/again"'),
  ):
    (calls.folder / name).write_text(f'#!/bin/bash\n{text}\n')
    (calls.folder / name).chmod(0o755)
  done = subprocess.run(
    ['bash', calls.folder / 'job'],
    env=os.environ
    | {
      'CALLS': str(calls.folder),
      'PATH': f'{calls.folder}{os.pathsep}{os.environ["PATH"]}',
      'SLURM_JOB_ID': '17',
      'SLURM_RESTART_COUNT': str(restarts),
    },
    capture_output=True,
    timeout=30,
    check=False,
  )
  assert done.returncode == status
  again = calls.folder / 'again'
  assert again.exists() == is_queued_again
  if is_queued_again:
    assert again.read_text() == 'requeue 17\n'


def test_a_job_can_be_looked_at_first(calls):
  done = calls.run('slurm.sh', '--account=us', '--dry-run', '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("sbatch --account=us <<'END'\n#!/usr/bin/env")
  assert not (calls.folder / 'calls').exists()


# --- Both


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'slurm.sh'])
def test_help_tells_every_option(script):
  done = run(script, '--help')
  assert done.returncode == 0
  text = (ROOT / 'scripts' / script).read_text()
  options = re.findall(r'(--[a-z-]+)(?:=\*)?(?:\)| \|)', text)
  assert len(options) > 8
  for option in set(options) - {'--help'}:
    assert option in done.stdout


@pytest.mark.parametrize(
  ('script', 'arguments', 'expected'),
  [
    ('tpu_pod.sh', (), 'a command must be given'),
    ('tpu_pod.sh', ('start',), 'there is no command start'),
    ('tpu_pod.sh', ('run', 'logs'), 'run and logs: expected one command'),
    ('tpu_pod.sh', ('run', *SLICE), 'what to train must be given'),
    ('tpu_pod.sh', ('logs', '--name=a'), '--zone=ZONE must be given'),
    ('tpu_pod.sh', ('logs', '--nme=a'), 'there is no option --nme=a'),
    ('tpu_pod.sh', ('create', *POD), '--type=TYPE must be given'),
    ('slurm.sh', (), 'what to train must be given'),
    ('slurm.sh', ('--nodes=0', '--', *TRAIN), '0 is not a number of 1 or more'),
    ('slurm.sh', ('--processes=cpu', '--', *TRAIN), 'expected gpu or node'),
  ],
)
def test_a_mistake_is_told_in_one_line(script, arguments, expected):
  done = run(script, *arguments)
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert expected in line
  assert (done.returncode, done.stdout) == (2, '')
