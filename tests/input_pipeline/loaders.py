"""Datasets and loaders for the tests, from the small prepared datasets."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import pathlib
import shutil
import threading
import time
from typing import Any

import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import loader, transforms
from dualformer_jax.input_pipeline.dataset import Example, PreparedDataset

PREPROCESSING = transforms.Preprocessing(4, 2, 24, num_clips=2, num_crops=3)
# Of the dataset `flawed`, in tests/levels_datasets.py.
BROKEN = {'train/3', 'train/4', 'train/8'}
_OPTIONS = {field.name for field in dataclasses.fields(loader.TrainOptions)}


def open_dataset(
  folder: pathlib.Path, name: str = 'levels', split: str = 'train'
) -> PreparedDataset:
  """Opens a dataset of the fixture `prepared_datasets`."""
  return PreparedDataset(name, split, str(folder / 'tfrecord'))


def read_all(folder: pathlib.Path, split: str = 'train') -> list[Example]:
  """Returns all examples of a split; `folder` is a version's."""
  dataset = PreparedDataset(str(folder), split, '')
  return [dataset[index] for index in range(len(dataset))]


def open_error(folder: pathlib.Path, split: str = 'train') -> str:
  """Returns the error of opening `levels`, whose version is in `folder`."""
  with pytest.raises(errors.UserError) as caught:
    PreparedDataset('levels', split, str(folder.parents[1]))
  assert '\n' not in str(caught.value)
  return str(caught.value)


def copy_with_damage(
  folder: pathlib.Path, target: pathlib.Path
) -> pathlib.Path:
  """Copies `levels`, with one damaged record in each split."""
  shutil.copytree(
    folder / 'tfrecord' / 'levels',
    target / 'tfrecord' / 'levels',
    ignore=shutil.ignore_patterns('*.npz'),
  )
  for split in ('train', 'validation'):
    (path,) = target.rglob(f'*{split}.tfrecord-00000*')
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
  return target


def train_loader(
  dataset: PreparedDataset, **arguments: Any
) -> loader.TrainLoader:
  """Makes a small training loader.

  Args:
    dataset: the videos.
    **arguments: fields of TrainOptions, batch_size, rows, and arguments of
      loader.TrainLoader.
  """
  arguments = {
    'batch_size': 4,
    'seed': 7,
    'num_threads': 2,
    'prefetch': 1,
    'short_side': 30,
  } | arguments
  batch_size = arguments.pop('batch_size')
  rows = arguments.pop('rows', range(batch_size))
  options = {n: arguments.pop(n) for n in _OPTIONS & arguments.keys()}
  return loader.TrainLoader(
    dataset,
    PREPROCESSING,
    loader.TrainOptions(**options),
    batch_size,
    rows,
    **arguments,
  )


def take(iterator: Iterator[Any], count: int) -> list[Any]:
  """Returns the next batches."""
  return [next(iterator) for _ in range(count)]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
  """Asserts that two batches are equal."""
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)


def rows_of(batch_size: int, host: int, hosts: int) -> range:
  """Returns a host's rows of a batch that is split in order."""
  count = batch_size // hosts
  return range(host * count, (host + 1) * count)


def ids(batches: list[dict[str, Any]]) -> list[str]:
  """Returns the names of the videos of some batches."""
  return [name for batch in batches for name in batch['video_ids']]


def wait_for_threads() -> list[str]:
  """Waits for readers to end, and returns those that do not."""
  names = ['unknown']
  end = time.monotonic() + 10
  while names and time.monotonic() < end:
    time.sleep(0.02)
    names = [
      thread.name
      for thread in threading.enumerate()
      if 'grain' in thread.name or 'reader' in thread.name
    ]
  return names
