"""Prepared datasets: examples by index, and errors for what is missing."""

from __future__ import annotations

from concurrent import futures
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline.dataset import (
  PreparedDataset,
  near_duplicates,
)
from tests import conftest
from tests.input_pipeline import videos
from tests.input_pipeline.loaders import open_error, read_all

CLASSES = ('first', 'second', 'third class')
FORMATS = ('tfrecord', 'array_record')


@pytest.mark.parametrize('file_format', FORMATS)
def test_examples_are_those_that_tfds_wrote(prepared_datasets, file_format):
  folder = prepared_datasets / file_format
  for split, count in (('train', 11), ('validation', 5)):
    dataset = PreparedDataset('levels', split, str(folder))
    assert len(dataset) == count
    assert dataset.class_names == CLASSES
    assert not dataset.multi_label
    seen = set()
    for position in range(count):
      example = dataset[position]
      index = int(example.video_id.removeprefix(f'{split}/'))
      seen.add(index)
      assert example.label == index % 3
      # As written by tests/levels_datasets.py: 20 + 17 index + frame.
      frames = videos.decode_all(example.video)
      assert len(frames) == 12
      np.testing.assert_allclose(
        frames.mean((1, 2, 3)), 20 + 17 * index + np.arange(12), atol=1.5
      )
    assert seen == set(range(count))


@pytest.mark.parametrize('file_format', FORMATS)
def test_several_labels_are_tuples(prepared_datasets, file_format):
  folder = prepared_datasets / file_format
  dataset = PreparedDataset('levels_multi', 'train', str(folder))
  assert dataset.multi_label
  assert dataset.class_names == CLASSES
  for position in range(11):
    example = dataset[position]
    index = int(example.video_id.removeprefix('train/'))
    assert example.label == tuple(range(index % 4))


def test_order_is_that_of_the_files(prepared_datasets):
  folder = prepared_datasets / 'tfrecord' / 'levels' / '1.0.0'
  expected = []
  for path in sorted(folder.glob('levels-train.tfrecord-*')):
    # The name is the one value of a BytesList, before the video or last.
    expected += re.findall(rb'train/(?:10|[0-9])', path.read_bytes())
  found = [e.video_id for e in read_all(folder)]
  assert found == [name.decode() for name in expected]
  assert len(found) == 11


def test_malformed_report_has_no_near_duplicates(copied):
  folder = str(copied().parents[1])
  train, validation = (
    PreparedDataset('levels', split, folder)
    for split in ('train', 'validation')
  )
  report = train.folder / 'report.json'
  assert not report.exists()
  assert near_duplicates(train, validation) == []
  for text in (
    '{"near_copies": 3}',
    '{"near_copies": [3]}',
    '{"near_copies": [{"splits": 3, "videos": [["a", "b"]]}]}',
    '{"near_copies": [{"splits": ["train", "validation"], "videos": ["abc"]}]}',
    '{"near_copies": [{"splits": ["train", "validation"]}]}',
  ):
    report.write_text(text)
    assert near_duplicates(train, validation) == []


def test_folder_of_a_version_is_found(prepared_datasets):
  folder = prepared_datasets / 'tfrecord' / 'levels' / '1.0.0'
  dataset = PreparedDataset(str(folder), 'train', '/nowhere')
  assert len(dataset) == 11
  assert dataset.folder == folder


def test_latest_version_is_found(copied):
  folder = copied()
  for version in ('1.2.0', '1.10.0'):
    shutil.copytree(folder, folder.with_name(version))
  (folder.parent / 'incomplete.AB12CD_2.0.0').mkdir()
  dataset = PreparedDataset('levels', 'train', str(folder.parents[1]))
  assert dataset.folder.name == '1.10.0'


def test_configurations_follow_a_slash(copied):
  folder = copied()
  config = folder.parent / 'small'
  config.mkdir()
  shutil.move(folder, config / '1.0.0')
  data_dir = str(folder.parents[1])
  assert len(PreparedDataset('levels/small', 'train', data_dir)) == 11
  # The only one need not be named.
  assert len(PreparedDataset('levels', 'train', data_dir)) == 11
  shutil.copytree(config, folder.parent / 'large')
  with pytest.raises(
    errors.UserError, match='expected one of: levels/large, levels/small$'
  ):
    PreparedDataset('levels', 'train', data_dir)


def test_fingerprints_differ_between_datasets_and_splits(
  prepared_datasets, copied
):
  folder = prepared_datasets / 'tfrecord'
  found = {
    PreparedDataset(name, split, str(folder)).fingerprint
    for name in ('levels', 'levels_multi', 'flawed')
    for split in ('train', 'validation')
  }
  assert len(found) == 6
  moved = str(copied().parents[1])
  fingerprint = PreparedDataset('levels', 'train', moved).fingerprint
  assert fingerprint in found


@pytest.mark.parametrize('file_format', FORMATS)
def test_threads_and_pickled_copies_read_the_same(
  prepared_datasets, file_format
):
  folder = prepared_datasets / file_format
  dataset = PreparedDataset('levels', 'train', str(folder))
  expected = [dataset[index] for index in range(11)]
  order = np.random.default_rng(0).integers(11, size=300)
  with futures.ThreadPoolExecutor(8) as threads:
    found = list(threads.map(lambda i: dataset[int(i)], order))
  assert found == [expected[index] for index in order]
  sent = pickle.loads(pickle.dumps(dataset))
  assert [sent[index] for index in range(11)] == expected
  assert sent.class_names == CLASSES


def test_index_out_of_range_raises(prepared_datasets):
  folder = prepared_datasets / 'tfrecord'
  dataset = PreparedDataset('levels', 'train', str(folder))
  assert dataset[np.int64(3)] == dataset[3]
  for index in (-1, 11):
    with pytest.raises(IndexError, match='not in 0..10'):
      dataset[index]


@pytest.mark.slow
def test_tensorflow_is_not_needed(prepared_datasets):
  program = """
import sys

class NotInstalled:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] == 'tensorflow':
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
from dualformer_jax.input_pipeline import loader
from dualformer_jax.input_pipeline.dataset import PreparedDataset
for file_format in ('tfrecord', 'array_record'):
  dataset = PreparedDataset(
    'levels', 'train', f'{sys.argv[1]}/{file_format}'
  )
  assert {dataset[i].video_id for i in range(11)} == {
    f'train/{i}' for i in range(11)
  }
unwanted = {'tensorflow', 'torch', 'flax'}
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


def test_missing_files_raise_with_the_command_to_prepare_them(copied):
  folder = copied()
  data_dir = folder.parents[1]
  command = (
    f'tfds build data/NAME --manual_dir=VIDEOS --data_dir={data_dir}'
    ' (see data/NAME/README.md)'
  )
  with pytest.raises(errors.UserError) as caught:
    PreparedDataset('k400', 'train', str(data_dir))
  assert str(caught.value) == (
    f'{data_dir}/k400: no such dataset; prepare it with:'
    f' {command.replace("NAME", "k400")}'
  )
  with pytest.raises(errors.UserError, match='data/motion --data_dir='):
    PreparedDataset('motion', 'train', str(data_dir))  # its videos are rendered
  command = command.replace('NAME', 'levels')
  shard = 'levels-train.tfrecord-00001-of-00003'
  os.rename(folder / shard, folder / 'elsewhere')
  message = open_error(folder)
  assert '1 of 3 files' in message
  assert shard in message
  assert command in message
  os.remove(folder / 'dataset_info.json')
  message = open_error(folder)
  assert 'dataset_info.json is missing' in message
  assert command in message
  folder.rename(folder.with_name('incomplete.AB12CD_1.0.0'))
  message = open_error(folder)
  assert 'started but not finished' in message
  assert command in message


def test_unknown_split_raises(copied):
  assert "no split 'test'; expected one of 'train', 'validation'" in open_error(
    copied(), 'test'
  )


def test_split_without_videos_raises(copied):
  folder = copied()
  path = folder / 'dataset_info.json'
  info = json.loads(path.read_text())
  info['splits'][0]['shardLengths'] = []
  path.write_text(json.dumps(info))
  assert "split 'train' has no videos" in open_error(folder)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('dataset_info.json', '{"name": ', 'damaged'),
    ('dataset_info.json', '[1, 2]', 'damaged'),
    ('dataset_info.json', '{"name": 3, "version": 4}', 'damaged'),
    ('features.json', '', 'damaged'),
    ('features.json', '{"featuresDict": {"features": {}}}', 'not a dataset of'),
    ('label.labels.txt', 'one\ntwo\n', '2 names, expected 3'),
  ],
)
def test_damaged_metadata_raises(copied, name, content, message):
  folder = copied()
  (folder / name).write_text(content)
  found = open_error(folder)
  assert message in found
  assert str(folder) in found


def test_unknown_file_format_raises(copied):
  folder = copied()
  path = folder / 'dataset_info.json'
  path.write_text(path.read_text().replace('"tfrecord"', '"riegeli"'))
  for shard in list(folder.glob('*.tfrecord-*')):
    shard.rename(str(shard).replace('tfrecord', 'riegeli'))
  assert "format 'riegeli', expected tfrecord or array_record" in open_error(
    folder
  )
