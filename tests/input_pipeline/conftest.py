"""Fixtures of the tests of datasets and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import logging
import pathlib
import shutil
from typing import Any

import pytest

from dualformer_jax.input_pipeline import loader
from tests.input_pipeline import loaders


@pytest.fixture
def make_loader(
  prepared_datasets: pathlib.Path,
) -> Iterator[Callable[..., loader.TrainLoader]]:
  """Makes training loaders, and closes them after the test."""
  made = []

  def make(name: str = 'levels', **arguments: Any) -> loader.TrainLoader:
    dataset = loaders.open_dataset(prepared_datasets, name)
    made.append(loaders.train_loader(dataset, **arguments))
    return made[-1]

  yield make
  for iterator in made:
    iterator.close()


@pytest.fixture
def logged_warnings() -> Iterator[list[str]]:
  """Returns the list that the package's warnings are appended to."""
  messages = []

  class Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      messages.append(record.getMessage())

  handler = Keep(logging.WARNING)
  logging.getLogger('dualformer_jax').addHandler(handler)
  yield messages
  logging.getLogger('dualformer_jax').removeHandler(handler)


@pytest.fixture
def copied(
  prepared_datasets: pathlib.Path, tmp_path: pathlib.Path
) -> Callable[[str], pathlib.Path]:
  """Copies `levels` without its index; returns the folder of its version."""

  def copy(file_format: str = 'tfrecord') -> pathlib.Path:
    source = prepared_datasets / file_format / 'levels'
    without_index = shutil.ignore_patterns('*.npz')
    shutil.copytree(source, tmp_path / 'levels', ignore=without_index)
    return tmp_path / 'levels' / '1.0.0'

  return copy
