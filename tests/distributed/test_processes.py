"""Several processes and devices train as one; no process outlives another."""

from __future__ import annotations

import json
import pathlib
import re
import signal
import socket
import subprocess
import time
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from dualformer_jax.distributed import processes
from dualformer_jax.errors import UserError
from tests import training_command

NUM_STEPS = 12
FLAGS = (
  *training_command.TINY,
  '--config.num_epochs=2',
  '--config.validation.every_epochs=1',
  '--config.checkpoint.every_steps=4',
  '--config.log_every_steps=1',
)
# After one process has ended, all others must end within two minutes.
SECONDS = 120


class Launcher:
  """Starts runs of several processes that share a workdir."""

  def __init__(self, root: pathlib.Path, cache: pathlib.Path, data: str):
    self._root, self._data = root, data
    self._environment = training_command.environment(cache, with_writers=True)
    self._runs = 0

  def workdir(self, name: str) -> pathlib.Path:
    return self._root / name

  def run_here(self, name: str) -> str:
    """Trains to the end, alone, in this process; returns the log."""
    done = training_command.run_here(
      *FLAGS,
      f'--config.dataset.data_dir={self._data}',
      workdir=self.workdir(name),
    )
    assert done.returncode == 0, done.stderr
    return done.stderr

  def start(
    self,
    count: int,
    name: str,
    *flags: str,
    of_last: tuple[str, ...] = (),
    num_devices: int = 1,
  ) -> Run:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    self._runs += 1
    logs = [self._root / f'run{self._runs}.{i}.log' for i in range(count)]
    xla_flags = (
      f'--xla_force_host_platform_device_count={num_devices} '
      + training_command.UNOPTIMIZED
    )
    started = []
    for index, log in enumerate(logs):
      others = (
        f'--coordinator_address=127.0.0.1:{port}',
        f'--num_processes={count}',
        f'--process_id={index}',
      )
      command = training_command.command(
        *FLAGS,
        f'--config.dataset.data_dir={self._data}',
        *flags,
        *(others if count > 1 else ()),
        *(of_last if index == count - 1 else ()),
        workdir=self.workdir(name),
      )
      with log.open('w') as stderr:
        started.append(
          subprocess.Popen(
            command,
            env={**self._environment, 'XLA_FLAGS': xla_flags},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
          )
        )
    return Run(started, logs, self.workdir(name) / 'checkpoints')


class Run:
  def __init__(
    self,
    started: list[subprocess.Popen[bytes]],
    logs: list[pathlib.Path],
    checkpoints: pathlib.Path,
  ):
    self._processes, self._logs = started, logs
    self._checkpoints = checkpoints

  def is_saved(self) -> bool:
    """Whether a checkpoint is complete: the run saves in the background."""
    return any(p.name.isdigit() for p in self._checkpoints.glob('*'))

  def log(self, index: int) -> str:
    return self._logs[index].read_text()

  def signal_after_step(self, step: int, index: int, sent: int) -> None:
    deadline = time.monotonic() + 300
    while f' step {step}/' not in self.log(0) or (
      sent == signal.SIGKILL and not self.is_saved()
    ):
      if time.monotonic() > deadline or self._processes[0].poll() is not None:
        self.kill()
        pytest.fail(f'ended before step {step}: {self.log(0)}')
      time.sleep(0.02)
    self._processes[index].send_signal(sent)

  def kill(self) -> None:
    for process in self._processes:
      process.kill()
      process.wait()

  def wait(self, seconds: float = 600) -> list[int]:
    """Returns exit statuses; kills what is still running after `seconds`."""
    deadline = time.monotonic() + seconds
    try:
      return [
        process.wait(max(0.1, deadline - time.monotonic()))
        for process in self._processes
      ]
    finally:
      self.kill()


@pytest.fixture(scope='module', name='launcher')
def _launcher(motion_dataset, compilation_cache, tmp_path_factory) -> Launcher:
  root = tmp_path_factory.mktemp('processes')
  return Launcher(root, compilation_cache, str(motion_dataset))


@pytest.fixture(scope='module', name='alone')
def _alone(launcher) -> pathlib.Path:
  """Returns the workdir of one process that was not interrupted."""
  launcher.run_here('alone')
  return launcher.workdir('alone')


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns all arrays of a checkpoint, by path, and its metadata."""
  here = jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0])
  found: Any = ocp.checkpointables_metadata(str(folder)).metadata
  tree = ocp.load_checkpointables(
    str(folder),
    jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
      {name: found[name] for name in ('params', 'batch_stats', 'opt_state')},
    ),
  )
  leaves = jax.tree.leaves_with_path(tree)
  arrays = {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves}
  text = (folder / '_CHECKPOINT_METADATA').read_text()
  return arrays, json.loads(text)['custom_metadata']['dualformer']


def assert_same_run(workdir: pathlib.Path, alone: pathlib.Path) -> None:
  found, expected = map(training_command.scalars, (workdir, alone))
  losses = [step for name, step in found if name == 'train/loss']
  assert losses == list(range(1, NUM_STEPS + 1))
  for name, step in found:
    if (name, step) not in expected:
      assert name.startswith('train/')
    elif name in ('train/loss', 'train/gradient_norm', 'validation/loss'):
      np.testing.assert_allclose(
        found[name, step], expected[name, step], rtol=1e-5, err_msg=f'{step}'
      )
    elif name.startswith('validation/'):
      assert found[name, step] == expected[name, step]
  folder = pathlib.Path('checkpoints') / str(NUM_STEPS)
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == [folder.name]
  arrays, metadata = read(workdir / folder)
  others, other_metadata = read(alone / folder)
  assert arrays.keys() == others.keys()
  for name, array in arrays.items():
    # A hundredth of a step of Adam, which magnifies rounding errors of
    # gradients close to 0.
    np.testing.assert_allclose(
      array, others[name], rtol=1e-4, atol=2e-5, err_msg=name
    )
  for same in ('step', 'data_position', 'class_names'):
    assert metadata[same] == other_metadata[same]
  reports = [
    json.loads((w / 'report.json').read_text()) for w in (workdir, alone)
  ]
  for same in ('top1', 'top5', 'num_videos', 'failed_videos', 'per_class'):
    assert reports[0].get(same) == reports[1].get(same)


@pytest.mark.slow
def test_run_resumes_exactly_with_other_numbers_of_processes(launcher, alone):
  """A run of 2 processes along each axis in turn, which end in three ways.

  A single process completes it.
  """
  checkpoints = launcher.workdir('resumed') / 'checkpoints'

  def kill_one_of_two(axis: str, victim: int, step: int) -> Run:
    run = launcher.start(2, 'resumed', f'--config.mesh.{axis}=2')
    run.signal_after_step(step, victim, signal.SIGKILL)
    statuses = run.wait(SECONDS)
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] not in (0, -signal.SIGKILL)
    return run

  kill_one_of_two('fsdp', victim=1, step=5)

  # SIGTERM of one process stops both at the same step. Along `tensor`, both
  # read the same part of a batch.
  run = launcher.start(2, 'resumed', '--config.mesh.tensor=2')
  run.signal_after_step(5, 1, signal.SIGTERM)
  assert run.wait() == 2 * [128 + signal.SIGTERM], run.log(0)
  (folder,) = checkpoints.iterdir()
  assert 5 <= int(folder.name) < NUM_STEPS
  assert (folder / 'SHA256SUMS').is_file()
  # Only process 0 logs its progress.
  assert 'loop.py' not in run.log(1)

  run = kill_one_of_two('data', victim=0, step=int(folder.name) + 1)
  assert f'resumed {folder}\n' in run.log(0)

  # Only process 0 of each run has written metrics for TensorBoard.
  assert len(training_command.writers(launcher.workdir('resumed'))) == 3
  log = launcher.run_here('resumed')
  assert re.search(rf'resumed {checkpoints}/\d+\n', log)
  assert_same_run(launcher.workdir('resumed'), alone)


@pytest.mark.slow
def test_several_devices_train_as_one_does(launcher, alone):
  name = 'devices'
  flags = [f'--config.mesh.{axis}=2' for axis in ('data', 'fsdp', 'tensor')]
  run = launcher.start(1, name, *flags, num_devices=8)
  assert run.wait() == [0], run.log(0)
  assert_same_run(launcher.workdir(name), alone)


@pytest.mark.slow
def test_user_error_of_one_process_ends_all(launcher, tmp_path):
  run = launcher.start(
    2, 'mistake', of_last=(f'--config.dataset.data_dir={tmp_path}/absent',)
  )
  statuses = run.wait(SECONDS)
  assert statuses[1] == 2
  assert statuses[0] not in (0, -signal.SIGKILL)
  (line,) = [x for x in run.log(1).splitlines() if x.startswith('error: ')]
  assert line.startswith(f'error: {tmp_path}/absent/motion: no such dataset')
  assert 'Traceback' not in run.log(1)


# --- Finding the other processes


@pytest.mark.parametrize(
  ('arguments', 'environment', 'expected'),
  [
    ((None, None, None), {'JAX_PLATFORMS': 'cpu'}, None),
    (('a:1', 1, 0), {}, None),
    (
      ('a:1', 2, 1),
      {},
      {
        'coordinator_address': 'a:1',
        'num_processes': 2,
        'process_id': 1,
        'cluster_detection_method': 'deactivate',
      },
    ),
    # JAX finds the other processes, and takes a GPU by its local index.
    (
      (None, None, None),
      {'SLURM_NTASKS': '8', 'SLURM_STEP_NUM_NODES': '2'},
      {'coordinator_address': None},
    ),
    (
      (None, None, None),
      {'OMPI_COMM_WORLD_SIZE': '4', 'CUDA_VISIBLE_DEVICES': '0,1'},
      {'coordinator_address': None},
    ),
    # A single process takes all GPUs, ...
    ((None, None, None), {'SLURM_NTASKS': '1'}, None),
    # ... as does one process per node, or one that sees a single GPU.
    (
      (None, None, None),
      {'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '2'},
      {'coordinator_address': None, 'local_device_ids': []},
    ),
    (
      (None, None, None),
      {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_SIZE': '1'},
      {'coordinator_address': None, 'local_device_ids': []},
    ),
    (
      (None, None, None),
      {'SLURM_NTASKS': '8', 'CUDA_VISIBLE_DEVICES': '3'},
      {'coordinator_address': None, 'local_device_ids': []},
    ),
  ],
)
def test_options_of_jax(arguments, environment, expected):
  address, count, index = arguments
  found = processes._options(address, count, index, environment)
  assert found == expected


def test_address_from_the_environment():
  found = processes._options(None, 2, 0, {'JAX_COORDINATOR_ADDRESS': 'a:1'})
  assert found is not None
  assert found['coordinator_address'] == 'a:1'


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (('host:1', None, 0), 'must be given together'),
    ((None, 2, 0), 'must be given together'),
    (('host', 2, 0), "is 'host'; expected HOST:PORT"),
    (('host:1', 2, 2), '--process_id is 2; expected 0 to 1'),
  ],
)
def test_invalid_arguments_raise(arguments, expected):
  address, count, index = arguments
  with pytest.raises(UserError, match=re.escape(expected)):
    processes._options(address, count, index, {})
