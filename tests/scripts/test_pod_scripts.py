"""The commands of scripts/tpu_pod.sh and scripts/slurm.sh, without running any.

Only a dry run is tested: whether gcloud and sbatch accept the commands can only
be seen on Google Cloud and on a cluster.
"""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
POD = ('--name=pod', '--zone=us-west4-a')
SLICE = (*POD, '--type=v5litepod-16', '--version=v2-alpha-tpuv5-lite')
# With characters that a shell would interpret.
TRAIN = (
  '--config=configs/k400_base.py',
  "--workdir=/bucket/it's a run",
  '--config.model.depths=(2, 2)',
  '--config.init_from=$(false)',
)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [ROOT / 'scripts' / script, *arguments],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def dry_run(*arguments: str) -> list[list[str]]:
  """Returns the arguments of each command that tpu_pod.sh would run."""
  done = run('tpu_pod.sh', *arguments, '--dry-run', '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  words = subprocess.run(
    ['bash', '-c', f"printf '%s\\0' {done.stdout.replace(chr(10), ' ')}"],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split('\0')[:-1]
  starts = [i for i, word in enumerate(words) if word == 'gcloud']
  return [
    words[start:end]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True)
  ]


def test_run_creates_installs_trains_and_deletes_a_pod():
  commands = dry_run('run', *SLICE, '--queued', '--spot', '--setup=mount it')
  expected = (
    'queued-resources create pod --node-id=pod',
    'queued-resources describe pod',
    'tpu-vm scp',
    'pip install',
    'mount it',
    'dualformer_jax.main',
    'tail -n +1 -F',
    'cat train.status',
    'queued-resources delete pod --force',
  )
  assert len(commands) == len(expected)
  for command, part in zip(commands, expected, strict=True):
    text = ' '.join(command)
    assert text.startswith('gcloud compute tpus ')
    assert part in text
    assert '--zone=us-west4-a' in command
  assert {'--spot', '--accelerator-type=v5litepod-16'} < set(commands[0])


def test_flags_reach_the_training_on_the_workers_unchanged(tmp_path):
  (command,) = dry_run('train', *POD)
  (script,) = [x for x in command if x.startswith('--command=')]
  # Runs the command of a worker with a Python that prints its arguments.
  python = tmp_path / 'dualformer_jax' / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"; exit 7\n')
  python.chmod(0o755)
  script = script.removeprefix('--command=')
  subprocess.run(
    ['bash', '-c', f'{script}\nwait'], cwd=tmp_path, check=True, timeout=30
  )
  repository = tmp_path / 'dualformer_jax'
  lines = (repository / 'train.log').read_text().splitlines()
  assert lines == ['-m', 'dualformer_jax.main', *TRAIN]
  assert (repository / 'train.status').read_text() == '7\n'
  assert (repository / 'train.pid').read_text().strip().isdigit()


@pytest.mark.parametrize(
  ('processes', 'tasks', 'cpus'), [('gpu', 4, 16), ('node', 1, 64)]
)
def test_slurm_job_has_a_process_per_gpu_or_node(processes, tasks, cpus):
  options = ('--nodes=3', '--gpus=4', f'--processes={processes}')
  done = run('slurm.sh', *options, '--account=us', '--dry-run', '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  head, *lines = done.stdout.splitlines()
  assert head == "sbatch --account=us <<'END'"
  job = '\n'.join(lines[:-1])
  subprocess.run(['bash', '-n'], input=job, text=True, check=True)
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
  ('status', 'seconds', 'is_requeued'),
  [(0, 900, 0), (2, 900, 0), (143, 900, 1), (134, 900, 1), (134, 9, 0)],
)
def test_stopped_slurm_job_is_queued_again(
  tmp_path, status, seconds, is_requeued
):
  done = run('slurm.sh', '--dry-run', '--', *TRAIN)
  job = done.stdout.partition('\n')[2].rpartition('END')[0]
  job = job.replace('set -uo pipefail', f'set -uo pipefail; SECONDS={seconds}')
  for name, text in (
    ('srun', f'exit {status}'),
    ('scontrol', 'echo "called $@"'),
  ):
    (tmp_path / name).write_text(f'#!/bin/bash\n{text}\n')
    (tmp_path / name).chmod(0o755)
  path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
  done = subprocess.run(
    ['bash', '-c', job],
    env=os.environ | {'PATH': path, 'SLURM_JOB_ID': '17'},
    capture_output=True,
    text=True,
    timeout=30,
    check=False,
  )
  assert done.returncode == status
  assert done.stdout.count('called requeue 17') == is_requeued


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'slurm.sh'])
def test_help_lists_every_option(script):
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
    ('tpu_pod.sh', ('run', *SLICE), 'the flags of the training must be given'),
    ('tpu_pod.sh', ('logs', '--nme=a'), 'unknown option --nme=a'),
    ('slurm.sh', ('--nodes=0', '--', *TRAIN), 'expected a positive number'),
    ('slurm.sh', ('--processes=cpu', '--', *TRAIN), 'expected gpu or node'),
  ],
)
def test_invalid_arguments_print_one_line(script, arguments, expected):
  done = run(script, *arguments)
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert expected in line
  assert (done.returncode, done.stdout) == (2, '')
