"""Fixtures of several test files: real clips, small prepared datasets."""

from __future__ import annotations

import fcntl
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jaxtyping
import pytest

from dualformer_jax import command_line
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from tests import tfds_command, xla_flags

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# As in scripts/test.sh: runs in this process and in others are to agree to the
# bit.
os.environ.setdefault('XLA_FLAGS', xla_flags.fast_compilation(0))
# JAX's tracing makes many objects that live: searching them for cycles as often
# as Python does by default is a tenth of the tests' time.
gc.set_threshold(100_000, 50, 1000)
# A shell starts background processes with SIGINT ignored, which the commands
# that tests start and interrupt would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Begins with the files that have slow tests, so that none runs last alone.

  Within a file, the order stays.
  """
  slow_files = {i.path for i in items if i.get_closest_marker('slow')}
  items.sort(key=lambda item: item.path not in slow_files)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
  """Leaves checks of shapes and types, which take time, to the fast tests.

  Not a fixture, as those of modules are made before those of tests.
  """
  is_slow = item.get_closest_marker('slow') is not None
  jaxtyping.config.update('jaxtyping_disable', is_slow)


@pytest.fixture(autouse=True)
def _keep_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
  """Leaves SIGINT to pytest where a test runs a command in its process."""
  monkeypatch.setattr(command_line.stop_signals, 'install', lambda: None)


@pytest.fixture(scope='session')
def clips_dir() -> pathlib.Path:
  """The folder of real clips, which are not part of the repository.

  It is what DUALFORMER_CLIPS names, or shared/clips beside the repository.
  """
  named = os.environ.get('DUALFORMER_CLIPS')
  folder = pathlib.Path(named or REPOSITORY.parent / 'shared' / 'clips')
  if folder.is_dir():
    return folder
  if named:
    pytest.fail(f'DUALFORMER_CLIPS names {folder}, which is no folder')
  return pytest.skip(
    f'NOT TESTED ON REAL VIDEO: {folder} does not exist; set DUALFORMER_CLIPS'
    ' to the folder of clips'
  )


@pytest.fixture(scope='session')
def prepared_datasets(
  tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> pathlib.Path:
  """Datasets that TFDS wrote, to be copied before they are changed.

  FORMAT/NAME with format tfrecord or array_record and names `levels`,
  `levels_multi` and `flawed`; and motion/motion. See tests/levels_datasets.py.
  One of the processes that run tests makes them.
  """
  # pytest-xdist's processes have their folders side by side.
  root = tmp_path_factory.getbasetemp()
  root = root if worker_id == 'master' else root.parent
  folder, unfinished = root / 'prepared', root / 'unfinished'
  with open(root / 'prepared.lock', 'wb') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # Until the file is closed.
    if not folder.exists():
      shutil.rmtree(unfinished, ignore_errors=True)
      # In a process, as TensorFlow takes seconds to import, and warns.
      subprocess.run(
        [sys.executable, '-m', 'tests.levels_datasets', unfinished],
        cwd=REPOSITORY,
        env=os.environ | tfds_command.WITHOUT_KERAS,
        check=True,
        capture_output=True,
        timeout=300,
      )
      # An index comes to lie beside the files; not while others copy them.
      for info in unfinished.rglob('dataset_info.json'):
        for split in ('train', 'validation'):
          PreparedDataset(str(info.parent), split, '')
      unfinished.rename(folder)
  return folder


@pytest.fixture(scope='session')
def motion_dataset(prepared_datasets: pathlib.Path) -> pathlib.Path:
  """The data_dir of a small `motion`: 48 videos in each of its splits.

  To be copied before it is changed.
  """
  return prepared_datasets / 'motion'


@pytest.fixture(scope='session')
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Where training processes keep what they compile, for those that follow."""
  return tmp_path_factory.mktemp('compilation_cache')
