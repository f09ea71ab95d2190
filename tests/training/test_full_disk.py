"""A full or read-only disk ends training in one line; then it resumes."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time
import types

import clu
import pytest

from dualformer_jax.errors import UserError
from dualformer_jax.training import logging
from tests import training_command

FLAGS = (
  *training_command.TINY,
  '--config.num_epochs=2',
  '--config.validation.every_epochs=2',
  '--config.checkpoint.every_steps=5',
  '--config.log_every_steps=1',
)


@pytest.fixture(name='disk')
def _disk(tmp_path):
  """A file system with room for one checkpoint, about 400 KB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=700k', 'tmpfs', folder],
    capture_output=True,
    check=False,
  )
  if mounted.returncode:
    pytest.skip('NOT TESTED ON A FULL DISK: file systems cannot be mounted')
  yield folder
  # Lazily: this process may have some file there open yet.
  subprocess.run(['umount', '--lazy', folder], check=True)


def remount(disk: pathlib.Path, option: str) -> None:
  command = ['mount', '-o', f'remount,{option}', 'tmpfs', disk]
  subprocess.run(command, check=True, capture_output=True)


@pytest.mark.slow
def test_run_resumes_when_there_is_room(
  disk, motion_dataset, compilation_cache, tmp_path
):
  flags = (*FLAGS, f'--config.dataset.data_dir={motion_dataset}')
  workdir = disk / 'run'
  remount(disk, 'ro')
  start = time.monotonic()
  done = training_command.run_here(*flags, workdir=workdir)
  (line,) = done.stderr.splitlines()
  assert line == (
    f'error: {workdir}/report.json cannot be written: Read-only file system'
  )
  assert done.returncode == 2
  assert time.monotonic() - start < 60

  remount(disk, 'rw')
  done = training_command.run(
    *flags, workdir=workdir, cache=compilation_cache, with_tensorflow=True
  )
  assert done.returncode == 2
  assert 'Traceback' not in done.stderr
  line = done.stderr.splitlines()[-1]
  assert line.startswith('error: ')
  assert str(workdir) in line
  assert line.endswith('cannot be written: No space left on device')
  saved = [p.name for p in (workdir / 'checkpoints').iterdir()]
  steps = [int(name) for name in saved if name.isdigit()]
  assert steps

  remount(disk, 'size=8m')
  done = training_command.run_here(*flags, workdir=workdir)
  assert done.returncode == 0, done.stderr
  assert f'resumed {workdir}/checkpoints/{max(steps)}' in done.stderr
  assert (workdir / 'report.json').exists()


def test_tensorboard_error_names_folder_and_cause(tmp_path, monkeypatch):
  class TensorFlowError(Exception):
    error_code = 8  # as tf.errors.ResourceExhaustedError has it

  class Writer:
    def __init__(self, folder):
      pass

    def write_scalars(self, step, scalars):
      raise TensorFlowError(
        '{{function_node __wrapped__FlushSummaryWriter_device_CPU:0}} '
        '/run/events.v2; No space left on device\n\tFailed to flush 5 events'
      )

  # Not imported, as that takes seconds: it imports TensorFlow.
  writers = types.SimpleNamespace(SummaryWriter=Writer)
  monkeypatch.setitem(sys.modules, 'clu.metric_writers', writers)
  monkeypatch.setattr(clu, 'metric_writers', writers, raising=False)
  writer = logging.MetricWriter(tmp_path, 0)
  with pytest.raises(UserError) as error:
    writer.write(1, 'train', {'loss': 1.0})
  expected = 'cannot be written: No space left on device'
  assert str(error.value) == f'metrics in {tmp_path} {expected}'
