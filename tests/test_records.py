"""Prepared datasets: what TFDS wrote is read by index, damage is told."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import decoding, records
from tests import conftest

CLASSES = ('first', 'second', 'third class')
FORMATS = ('tfrecord', 'array_record')


def read_all(
  folder: pathlib.Path, name: str, split: str
) -> list[records.Example]:
  dataset = records.PreparedDataset(name, split, str(folder))
  return [dataset[index] for index in range(len(dataset))]


@pytest.fixture
def copied(
  prepared_datasets: pathlib.Path, tmp_path: pathlib.Path
) -> Callable[[str], pathlib.Path]:
  """Copies the dataset `levels`, and gives the folder of its version."""

  def copy(file_format: str = 'tfrecord') -> pathlib.Path:
    source = prepared_datasets / file_format / 'levels'
    without_index = shutil.ignore_patterns('*.npz')
    shutil.copytree(source, tmp_path / 'levels', ignore=without_index)
    return tmp_path / 'levels' / '1.0.0'

  return copy


def error_of(folder: pathlib.Path, split: str = 'train') -> str:
  """What opening the dataset that was copied says."""
  with pytest.raises(errors.UserError) as caught:
    records.PreparedDataset('levels', split, str(folder.parents[1]))
  assert '\n' not in str(caught.value)
  return str(caught.value)


def flip(path: pathlib.Path, place: int) -> None:
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(content)


def cut(path: pathlib.Path, size: int) -> None:
  path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize('file_format', FORMATS)
def test_what_tfds_wrote_is_read(prepared_datasets, file_format):
  folder = prepared_datasets / file_format
  for split, count in (('train', 11), ('validation', 5)):
    dataset = records.PreparedDataset('levels', split, str(folder))
    assert len(dataset) == count
    assert dataset.class_names == CLASSES
    assert not dataset.multi_label
    seen = set()
    for place in range(count):
      example = dataset[place]
      index = int(example.video_id.removeprefix(f'{split}/'))
      seen.add(index)
      assert example.label == index % 3
      # As written by tests/levels_datasets.py: 20 + 17 index + frame.
      frames = decoding.decode_all(example.video)
      assert len(frames) == 12
      np.testing.assert_allclose(
        frames.mean((1, 2, 3)), 20 + 17 * index + np.arange(12), atol=1.5
      )
    assert seen == set(range(count))


@pytest.mark.parametrize('file_format', FORMATS)
def test_several_labels_are_read(prepared_datasets, file_format):
  folder = prepared_datasets / file_format
  dataset = records.PreparedDataset('levels_multi', 'train', str(folder))
  assert dataset.multi_label
  assert dataset.class_names == CLASSES
  for place in range(11):
    example = dataset[place]
    index = int(example.video_id.removeprefix('train/'))
    assert example.label == tuple(range(index % 4))


def test_the_order_is_that_of_the_files(prepared_datasets):
  folder = prepared_datasets / 'tfrecord' / 'levels' / '1.0.0'
  expected = []
  for path in sorted(folder.glob('levels-train.tfrecord-*')):
    # The name is the one value of a BytesList, before the video or last.
    expected += re.findall(rb'train/(?:10|[0-9])', path.read_bytes())
  found = [e.video_id for e in read_all(folder.parents[1], 'levels', 'train')]
  assert found == [name.decode() for name in expected]
  assert len(found) == 11


def test_a_report_that_is_not_ours_tells_of_no_near_copies(copied):
  folder = str(copied().parents[1])
  train, validation = (
    records.PreparedDataset('levels', split, folder)
    for split in ('train', 'validation')
  )
  report = train.folder / 'report.json'
  assert not report.exists()
  assert records.near_copies(train, validation) == []
  for text in (
    '{"near_copies": 3}',
    '{"near_copies": [3]}',
    '{"near_copies": [{"splits": 3, "videos": [["a", "b"]]}]}',
    '{"near_copies": [{"splits": ["train", "validation"], "videos": ["abc"]}]}',
    '{"near_copies": [{"splits": ["train", "validation"]}]}',
  ):
    report.write_text(text)
    assert records.near_copies(train, validation) == []


def test_a_folder_may_be_named_directly(prepared_datasets):
  folder = prepared_datasets / 'tfrecord' / 'levels' / '1.0.0'
  dataset = records.PreparedDataset(str(folder), 'train', '/nowhere')
  assert len(dataset) == 11
  assert dataset.folder == folder


def test_the_newest_version_is_taken(copied):
  folder = copied()
  for version in ('1.2.0', '1.10.0'):
    shutil.copytree(folder, folder.with_name(version))
  (folder.parent / 'incomplete.AB12CD_2.0.0').mkdir()
  dataset = records.PreparedDataset('levels', 'train', str(folder.parents[1]))
  assert dataset.folder.name == '1.10.0'


def test_configurations_are_named_after_a_slash(copied):
  folder = copied()
  config = folder.parent / 'small'
  config.mkdir()
  shutil.move(folder, config / '1.0.0')
  data_dir = str(folder.parents[1])
  assert len(records.PreparedDataset('levels/small', 'train', data_dir)) == 11
  # The only one need not be named.
  assert len(records.PreparedDataset('levels', 'train', data_dir)) == 11
  shutil.copytree(config, folder.parent / 'large')
  with pytest.raises(
    errors.UserError, match='name one of them: levels/large, levels/small$'
  ):
    records.PreparedDataset('levels', 'train', data_dir)


def test_the_fingerprint_tells_datasets_and_splits_apart(
  prepared_datasets, copied
):
  folder = prepared_datasets / 'tfrecord'
  found = {
    records.PreparedDataset(name, split, str(folder)).fingerprint
    for name in ('levels', 'levels_multi', 'flawed')
    for split in ('train', 'validation')
  }
  assert len(found) == 6
  moved = str(copied().parents[1])
  fingerprint = records.PreparedDataset('levels', 'train', moved).fingerprint
  assert fingerprint in found


@pytest.mark.parametrize('file_format', FORMATS)
def test_threads_and_other_processes_read_the_same(
  prepared_datasets, file_format
):
  folder = prepared_datasets / file_format
  dataset = records.PreparedDataset('levels', 'train', str(folder))
  expected = [dataset[index] for index in range(11)]
  order = np.random.default_rng(0).integers(11, size=300)
  with futures.ThreadPoolExecutor(8) as threads:
    found = list(threads.map(lambda i: dataset[int(i)], order))
  assert found == [expected[index] for index in order]
  sent = pickle.loads(pickle.dumps(dataset))
  assert [sent[index] for index in range(11)] == expected
  assert sent.class_names == CLASSES


def test_indices_are_checked(prepared_datasets):
  folder = prepared_datasets / 'tfrecord'
  dataset = records.PreparedDataset('levels', 'train', str(folder))
  assert dataset[np.int64(3)] == dataset[3]
  for index in (-1, 11):
    with pytest.raises(IndexError, match='not in 0..10'):
      dataset[index]


def test_neither_tensorflow_nor_tfds_is_needed(prepared_datasets):
  program = """
import sys

class NotInstalled:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in ('tensorflow', 'tensorflow_datasets'):
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
from dualformer_jax.input_pipeline import loader, records
for file_format in ('tfrecord', 'array_record'):
  dataset = records.PreparedDataset(
    'levels', 'train', f'{sys.argv[1]}/{file_format}'
  )
  assert {dataset[i].video_id for i in range(11)} == {
    f'train/{i}' for i in range(11)
  }
unwanted = {'tensorflow', 'tensorflow_datasets', 'torch', 'flax'}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""
  result = subprocess.run(
    [sys.executable, '-c', program, prepared_datasets],
    cwd=conftest.REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr


def test_what_is_missing_is_told_with_the_command_to_make_it(copied):
  folder = copied()
  data_dir = folder.parents[1]
  command = (
    f'tfds build data/NAME --manual_dir=VIDEOS --data_dir={data_dir}'
    ' (see data/NAME/README.md)'
  )
  with pytest.raises(errors.UserError) as caught:
    records.PreparedDataset('k400', 'train', str(data_dir))
  assert str(caught.value) == (
    f'{data_dir}/k400: no such dataset; prepare it with:'
    f' {command.replace("NAME", "k400")}'
  )
  command = command.replace('NAME', 'levels')
  shard = 'levels-train.tfrecord-00001-of-00003'
  os.rename(folder / shard, folder / 'elsewhere')
  message = error_of(folder)
  assert '1 of 3 files' in message
  assert shard in message
  assert command in message
  os.remove(folder / 'dataset_info.json')
  message = error_of(folder)
  assert 'dataset_info.json is missing' in message
  assert command in message
  folder.rename(folder.with_name('incomplete.AB12CD_1.0.0'))
  message = error_of(folder)
  assert 'begun but not finished' in message
  assert command in message


def test_a_split_that_does_not_exist_is_told(copied):
  assert "no split 'test', only 'train', 'validation'" in error_of(
    copied(), 'test'
  )


def test_a_split_without_videos_is_told(copied):
  folder = copied()
  path = folder / 'dataset_info.json'
  info = json.loads(path.read_text())
  info['splits'][0]['shardLengths'] = []
  path.write_text(json.dumps(info))
  assert "split 'train' holds no videos" in error_of(folder)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('dataset_info.json', '{"name": ', 'damaged'),
    ('dataset_info.json', '[1, 2]', 'damaged'),
    ('dataset_info.json', '{"name": 3, "version": 4}', 'damaged'),
    ('features.json', '', 'damaged'),
    ('features.json', '{"featuresDict": {"features": {}}}', 'no dataset of'),
    ('label.labels.txt', 'one\ntwo\n', '2 names, expected 3'),
  ],
)
def test_damaged_descriptions_are_told(copied, name, content, message):
  folder = copied()
  (folder / name).write_text(content)
  found = error_of(folder)
  assert message in found
  assert str(folder) in found


def test_other_file_formats_are_told(copied):
  folder = copied()
  path = folder / 'dataset_info.json'
  path.write_text(path.read_text().replace('"tfrecord"', '"riegeli"'))
  for shard in list(folder.glob('*.tfrecord-*')):
    shard.rename(str(shard).replace('tfrecord', 'riegeli'))
  assert "format 'riegeli', expected tfrecord or array_record" in error_of(
    folder
  )


@pytest.mark.parametrize('size', [0, 5, 1500, -1])
def test_a_tfrecord_file_that_was_cut_short_is_told(copied, size):
  folder = copied()
  path = folder / 'levels-train.tfrecord-00000-of-00003'
  cut(path, size)
  message = error_of(folder)
  assert str(path) in message
  assert 'ends within record' in message or 'holds 0 records' in message


@pytest.mark.parametrize('size', [0, 5000, -1])
def test_an_array_record_file_that_was_cut_short_is_told(copied, size):
  folder = copied('array_record')
  path = folder / 'levels-train.array_record-00000-of-00003'
  cut(path, size)
  assert f'{path}: is damaged or cut short' in error_of(folder)


def test_a_shard_of_another_dataset_is_told(copied):
  folder = copied()
  for file_format in FORMATS:
    shutil.rmtree(folder.parent, ignore_errors=True)
    copied(file_format)
    other, path = (
      folder / f'levels-{split}.{file_format}-00000-of-00003'
      for split in ('validation', 'train')
    )
    shutil.copy(other, path)
    assert 'records, and dataset_info.json says' in error_of(folder)


def record_starts(path: pathlib.Path) -> list[int]:
  """Where each record starts, by the lengths that stand before them."""
  content = path.read_bytes()
  starts = [0]
  while starts[-1] < len(content):
    (length,) = struct.unpack_from('<Q', content, starts[-1])
    starts.append(starts[-1] + 12 + length + 4)
  return starts[:-1]


def test_a_damaged_record_is_an_error_of_that_record_only(copied):
  folder = copied()
  path = folder / 'levels-train.tfrecord-00000-of-00003'
  first = read_all(folder.parents[1], 'levels', 'train')[1:]
  flip(path, 700)
  dataset = records.PreparedDataset('levels', 'train', str(folder.parents[1]))
  with pytest.raises(records.RecordError) as caught:
    dataset[0]
  assert "record 0 of split 'train'" in str(caught.value)
  assert f'{path}, at byte 0' in str(caught.value)
  assert [dataset[index] for index in range(1, 11)] == first


@pytest.mark.parametrize('place', [1, 9, 'second', 'last'])
def test_a_damaged_length_is_an_error_of_that_record_only(copied, place):
  folder = copied()
  path = folder / 'levels-train.tfrecord-00000-of-00003'
  starts = record_starts(path)
  number = {'second': 1, 'last': len(starts) - 1}.get(place, 0)
  whole = read_all(folder.parents[1], 'levels', 'train')
  for index in folder.glob('*.index.npz'):
    index.unlink()
  flip(path, starts[number] + (place if isinstance(place, int) else 2))
  dataset = records.PreparedDataset('levels', 'train', str(folder.parents[1]))
  with pytest.raises(records.RecordError) as caught:
    dataset[number]
  assert f'{path}, at byte {starts[number]})' in str(caught.value)
  assert 'checksum of its length' in str(caught.value)
  for index in set(range(11)) - {number}:
    assert dataset[index] == whole[index]


def test_a_damaged_array_record_is_an_error_of_the_record(copied):
  folder = copied('array_record')
  path = folder / 'levels-train.array_record-00000-of-00003'
  flip(path, path.read_bytes().find(b'video_id') + 300)
  dataset = records.PreparedDataset('levels', 'train', str(folder.parents[1]))
  failed = 0
  for index in range(11):
    try:
      dataset[index]
    except records.RecordError as error:
      assert '\n' not in str(error)
      assert f'{path}, record ' in str(error)
      failed += 1
  assert failed == 1


def test_a_file_that_vanishes_is_an_error_of_its_records(copied):
  folder = copied()
  dataset = records.PreparedDataset('levels', 'train', str(folder.parents[1]))
  os.remove(folder / 'levels-train.tfrecord-00000-of-00003')
  with pytest.raises(records.RecordError, match='No such file'):
    dataset[0]
  assert dataset[10].video_id.startswith('train/')


def test_the_index_is_kept_and_used(copied, monkeypatch):
  folder = copied()
  expected = read_all(folder.parents[1], 'levels', 'train')
  assert (folder / 'levels-train.index.npz').is_file()

  def fail(path: str) -> None:
    raise AssertionError(f'{path} was read again')

  monkeypatch.setattr(records, '_scan', fail)
  assert read_all(folder.parents[1], 'levels', 'train') == expected


@pytest.mark.parametrize(
  'spoil',
  [
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(b'nonsense'),
    lambda path: cut(path, 300),
    lambda path: flip(path, 400),
    lambda path: np.savez(path, starts=np.zeros(14, np.int64)),
    lambda path: np.savez(
      path, **{**np.load(path), 'starts': np.arange(14) * 100}
    ),
    lambda path: np.savez(
      path, state=np.array([None]), starts=np.array([None]), allow_pickle=True
    ),
  ],
  ids=['empty', 'text', 'cut', 'flip', 'keys', 'numbers', 'pickle'],
)
def test_an_index_that_is_no_use_is_made_again(copied, spoil):
  folder = copied()
  expected = read_all(folder.parents[1], 'levels', 'train')
  path = folder / 'levels-train.index.npz'
  good = dict(np.load(path))
  spoil(path)
  assert read_all(folder.parents[1], 'levels', 'train') == expected
  for name, array in dict(np.load(path)).items():
    np.testing.assert_array_equal(array, good[name])


def test_a_changed_file_is_indexed_again(copied, prepared_datasets):
  folder = copied()
  read_all(folder.parents[1], 'levels', 'train')
  # As many records, of other lengths, some of them broken videos.
  other = prepared_datasets / 'tfrecord' / 'flawed' / '1.0.0'
  for number in range(3):
    ending = f'train.tfrecord-0000{number}-of-00003'
    shutil.copy(other / f'flawed-{ending}', folder / f'levels-{ending}')
  found = read_all(folder.parents[1], 'levels', 'train')
  sizes = {e.video_id: len(e.video) for e in found}
  assert sizes['train/3'] == sizes['train/4'] == sizes['train/8'] == 500


def test_a_file_rewritten_at_the_same_size_is_indexed_again(copied):
  folder = copied()
  expected = read_all(folder.parents[1], 'levels', 'train')
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
  found = read_all(folder.parents[1], 'levels', 'train')
  count = len(parts)
  assert found == [*reversed(expected[:count]), *expected[count:]]


def test_a_folder_that_cannot_be_written_to_is_read(copied, monkeypatch):
  folder = copied()

  def refuse(*args, **kwargs) -> None:
    raise PermissionError(13, 'Permission denied')

  # A user with all rights may write to any folder.
  monkeypatch.setattr(records.tempfile, 'NamedTemporaryFile', refuse)
  assert len(read_all(folder.parents[1], 'levels', 'train')) == 11
  assert not list(folder.glob('*.npz'))


def test_many_processes_may_index_at_the_same_time(copied):
  folder = copied()
  program = """
import sys
from dualformer_jax.input_pipeline import records
for _ in range(30):
  dataset = records.PreparedDataset('levels', 'train', sys.argv[1])
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
    for _ in range(4)
  ]
  for process in processes:
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
  assert not list(folder.glob('.*'))
