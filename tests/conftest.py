"""Fixtures of several test files: real clips, small prepared datasets."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests import tfds_command

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


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
  tmp_path_factory: pytest.TempPathFactory,
) -> pathlib.Path:
  """Datasets that TFDS wrote, to be copied before they are changed.

  FORMAT/NAME with format tfrecord or array_record and names `levels`,
  `levels_multi` and `flawed`; see tests/levels_datasets.py.
  """
  folder = tmp_path_factory.mktemp('prepared')
  # On its own, as TensorFlow takes seconds to import, and warns.
  subprocess.run(
    [sys.executable, '-m', 'tests.levels_datasets', folder],
    cwd=REPOSITORY,
    check=True,
    capture_output=True,
    timeout=300,
  )
  return folder


@pytest.fixture(scope='session')
def motion_dataset(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The data_dir of a small `motion`: 48 videos in each of its splits."""
  folder = tmp_path_factory.mktemp('motion')
  done = tfds_command.tfds_build(
    'data/motion', '--max_examples_per_split=48', f'--data_dir={folder}'
  )
  assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture(scope='session')
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Where training processes keep what they compile, for those that follow."""
  return tmp_path_factory.mktemp('compilation_cache')
