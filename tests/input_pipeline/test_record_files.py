"""Record files: damage is found, and the TFRecord index is kept up to date."""

from __future__ import annotations

import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from dualformer_jax import files
from dualformer_jax.input_pipeline import record_files
from dualformer_jax.input_pipeline.dataset import PreparedDataset, RecordError
from tests import conftest, reference_arrays
from tests.input_pipeline.loaders import open_error, read_all

FORMATS = ('tfrecord', 'array_record')


def flip(path: pathlib.Path, position: int) -> None:
  content = bytearray(path.read_bytes())
  content[position] ^= 1
  path.write_bytes(content)


def cut(path: pathlib.Path, size: int) -> None:
  path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize('size', [0, 5, 1500, -1])
def test_truncated_tfrecord_file_raises(copied, size):
  folder = copied()
  path = folder / 'levels-train.tfrecord-00000-of-00003'
  cut(path, size)
  message = open_error(folder)
  assert str(path) in message
  assert 'ends within record' in message or 'has 0 records' in message
  assert message.count(str(path)) == 1


@pytest.mark.parametrize('size', [0, 5000, -1])
def test_truncated_array_record_file_raises(copied, size):
  folder = copied('array_record')
  path = folder / 'levels-train.array_record-00000-of-00003'
  cut(path, size)
  assert f'{path}: is damaged or truncated' in open_error(folder)


def test_shard_of_another_dataset_raises(copied):
  folder = copied()
  for file_format in FORMATS:
    shutil.rmtree(folder.parent, ignore_errors=True)
    copied(file_format)
    other, path = (
      folder / f'levels-{split}.{file_format}-00000-of-00003'
      for split in ('validation', 'train')
    )
    shutil.copy(other, path)
    assert 'records, expected' in open_error(folder)


def record_starts(path: pathlib.Path) -> list[int]:
  """Where each record starts, by the lengths that stand before them."""
  content = path.read_bytes()
  starts = [0]
  while starts[-1] < len(content):
    (length,) = struct.unpack_from('<Q', content, starts[-1])
    starts.append(starts[-1] + 12 + length + 4)
  return starts[:-1]


def test_damaged_record_leaves_the_others_readable(copied):
  folder = copied()
  path = folder / 'levels-train.tfrecord-00000-of-00003'
  first = read_all(folder)[1:]
  flip(path, 700)
  dataset = PreparedDataset('levels', 'train', str(folder.parents[1]))
  with pytest.raises(RecordError) as caught:
    dataset[0]
  assert "record 0 of split 'train'" in str(caught.value)
  assert f'{path}, at byte 0' in str(caught.value)
  assert [dataset[index] for index in range(1, 11)] == first


@pytest.mark.parametrize('position', [1, 9, 'second', 'last'])
def test_damaged_length_leaves_the_others_readable(copied, position):
  folder = copied()
  path = folder / 'levels-train.tfrecord-00000-of-00003'
  starts = record_starts(path)
  number = {'second': 1, 'last': len(starts) - 1}.get(position, 0)
  whole = read_all(folder)
  for index in folder.glob('*.index.npz'):
    index.unlink()
  flip(path, starts[number] + (position if isinstance(position, int) else 2))
  dataset = PreparedDataset('levels', 'train', str(folder.parents[1]))
  with pytest.raises(RecordError) as caught:
    dataset[number]
  assert f'{path}, at byte {starts[number]})' in str(caught.value)
  assert 'checksum of its length' in str(caught.value)
  for index in set(range(11)) - {number}:
    assert dataset[index] == whole[index]


def test_damaged_array_record_raises_with_its_position(copied):
  folder = copied('array_record')
  path = folder / 'levels-train.array_record-00000-of-00003'
  flip(path, path.read_bytes().find(b'video_id') + 300)
  dataset = PreparedDataset('levels', 'train', str(folder.parents[1]))
  failed = 0
  for index in range(11):
    try:
      dataset[index]
    except RecordError as error:
      assert '\n' not in str(error)
      assert f'{path}, record ' in str(error)
      failed += 1
  assert failed == 1


def test_removed_file_raises_for_its_records(copied):
  folder = copied()
  dataset = PreparedDataset('levels', 'train', str(folder.parents[1]))
  os.remove(folder / 'levels-train.tfrecord-00000-of-00003')
  with pytest.raises(RecordError, match='No such file'):
    dataset[0]
  assert dataset[10].video_id.startswith('train/')


def test_index_is_saved_and_used(copied, monkeypatch):
  folder = copied()
  expected = read_all(folder)
  assert (folder / 'levels-train.index.npz').is_file()

  def fail(path: str) -> None:
    raise AssertionError(f'{path} was read again')

  monkeypatch.setattr(record_files, '_scan', fail)
  assert read_all(folder) == expected


@pytest.mark.parametrize(
  'spoil',
  [
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(b'nonsense'),
    lambda path: cut(path, 300),
    lambda path: flip(path, 400),
    lambda path: np.savez(path, starts=np.zeros(14, np.int64)),
    lambda path: np.savez(
      path, state=np.array([None]), starts=np.array([None]), allow_pickle=True
    ),
  ],
  ids=['empty', 'text', 'cut', 'flip', 'keys', 'pickle'],
)
def test_unusable_index_is_rebuilt(copied, spoil):
  folder = copied()
  expected = read_all(folder)
  path = folder / 'levels-train.index.npz'
  good = reference_arrays.load(path)
  spoil(path)
  assert read_all(folder) == expected
  for name, array in reference_arrays.load(path).items():
    np.testing.assert_array_equal(array, good[name])


def test_changed_file_is_indexed_again(copied, prepared_datasets):
  folder = copied()
  read_all(folder)
  # As many records, of other lengths, some of them broken videos.
  other = prepared_datasets / 'tfrecord' / 'flawed' / '1.0.0'
  for number in range(3):
    ending = f'train.tfrecord-0000{number}-of-00003'
    shutil.copy(other / f'flawed-{ending}', folder / f'levels-{ending}')
  found = read_all(folder)
  sizes = {e.video_id: len(e.video) for e in found}
  assert sizes['train/3'] == sizes['train/4'] == sizes['train/8'] == 500


def test_file_rewritten_at_the_same_size_is_indexed_again(copied):
  folder = copied()
  expected = read_all(folder)
  path = folder / 'levels-train.tfrecord-00000-of-00003'
  content = path.read_bytes()
  # The records of the shard in reverse order.
  starts = [0]
  while starts[-1] < len(content):
    length = int.from_bytes(content[starts[-1] :][:8], 'little')
    starts.append(starts[-1] + length + 16)
  parts = [content[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
  path.write_bytes(b''.join(reversed(parts)))
  later = time.time() + 10
  os.utime(path, (later, later))
  found = read_all(folder)
  count = len(parts)
  assert found == [*reversed(expected[:count]), *expected[count:]]


def test_read_only_folder_is_read_without_an_index(copied, monkeypatch):
  folder = copied()

  def refuse(*args, **kwargs) -> None:
    raise PermissionError(13, 'Permission denied')

  # A user with all rights may write to any folder.
  monkeypatch.setattr(files, 'atomic_write', refuse)
  assert len(read_all(folder)) == 11
  assert not list(folder.glob('*.npz'))


@pytest.mark.slow
def test_processes_can_index_at_the_same_time(copied):
  folder = copied()
  program = """
import sys
from dualformer_jax.input_pipeline.dataset import PreparedDataset
for _ in range(30):
  dataset = PreparedDataset('levels', 'train', sys.argv[1])
  assert len({dataset[i].video_id for i in range(11)}) == 11
  (dataset.folder / 'levels-train.index.npz').unlink(missing_ok=True)
"""
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', program, folder.parents[1]],
      cwd=conftest.REPOSITORY,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(3)
  ]
  for process in processes:
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
  assert not list(folder.glob('.*'))
