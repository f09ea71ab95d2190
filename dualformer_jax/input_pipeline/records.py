"""Prepared datasets: videos and labels by index, from what `tfds build` wrote.

Reads TFRecord and ArrayRecord files without TensorFlow or TFDS. A TFRecord file
is made random-access by an index of record offsets, found in one scan of the
record headers and kept beside the files.
"""

from __future__ import annotations

import bisect
from concurrent import futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import pathlib
import re
import struct
import tempfile
import time
from typing import Any, BinaryIO, Protocol, SupportsIndex
import zipfile

from absl import logging
from array_record.python import array_record_data_source
from google.protobuf import (
  descriptor_pb2,
  descriptor_pool,
  message,
  message_factory,
)
import google_crc32c
from jaxtyping import Int64
import numpy as np

from dualformer_jax import errors

# A TFRecord: length, its checksum, the data, their checksum.
_HEADER = struct.Struct('<QI')
_FOOTER = struct.Struct('<I')
_SCAN_THREADS = 16
_SECONDS_BETWEEN_LINES = 10
# What reading and parsing a record may raise; ArrayRecord's is a RuntimeError.
_READ_FAILURES = (
  OSError,
  ValueError,
  IndexError,
  RuntimeError,
  struct.error,
  message.DecodeError,
)


# In the report beside a dataset: the videos of two splits that are alike.
NEAR_COPIES = 'near_copies'


class RecordError(errors.UserError):
  """A record that cannot be read; the message names it in one line."""


@dataclasses.dataclass(frozen=True)
class Example:
  """A video as stored.

  Attributes:
    video: the content of a video file.
    label: the class; all classes, where there may be several.
    video_id: the video's name, unique in its dataset.
  """

  video: bytes
  label: int | tuple[int, ...]
  video_id: str


class PreparedDataset:
  """A split of a dataset that `tfds build` prepared, by index.

  Can be shared by threads, and sent to other processes.

  Attributes:
    folder: that the dataset is in.
    split: the split's name.
    class_names: in the order of the labels.
    multi_label: whether a video may have several labels.
    fingerprint: differs between datasets, versions and splits; the same
      wherever the files are.
  """

  folder: pathlib.Path
  split: str
  class_names: tuple[str, ...]
  multi_label: bool
  fingerprint: str

  def __init__(self, name_or_folder: str, split: str, data_dir: str):
    """Finds the dataset, and checks that its files are there.

    Args:
      name_or_folder: the dataset's name, with `/CONFIG` where it has several;
        its newest version is taken. Or the folder of a version.
      split: 'train', say.
      data_dir: the `--data_dir` of `tfds build`; not needed for a folder.

    Raises:
      UserError: the dataset or the split does not exist, is incomplete, or is
        none of videos.
    """
    self.folder, how_to_make = _find_folder(name_or_folder, data_dir)
    info = _read_json(self.folder / 'dataset_info.json')
    self.split = split
    self.class_names, self.multi_label = _read_classes(self.folder)
    with _malformed(self.folder / 'dataset_info.json'):
      name, version = info['name'], info['version']
      if pathlib.Path(name).name != name:
        raise ValueError(f'its name is {name!r}')
      splits = {s['name']: s for s in info['splits']}
      file_format = info.get('fileFormat', 'tfrecord')
      lengths = [int(n) for n in splits.get(split, {}).get('shardLengths', ())]
      num_bytes = splits.get(split, {}).get('numBytes')
    if split not in splits:
      raise errors.UserError(
        f'{self.folder}: has no split {split!r}, only'
        f' {", ".join(map(repr, splits)) or "none at all"}'
      )
    if not sum(lengths):
      raise errors.UserError(
        f'{self.folder}: split {split!r} holds no videos; see the report that'
        ' was made with it'
      )
    template = splits[split].get(
      'filepathTemplate', '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    )
    paths = []
    for number in range(len(lengths)):
      values = {
        'DATASET': name,
        'SPLIT': split,
        'FILEFORMAT': file_format,
        'SHARD_INDEX': f'{number:05d}',
        'NUM_SHARDS': f'{len(lengths):05d}',
        'SHARD_X_OF_Y': f'{number:05d}-of-{len(lengths):05d}',
      }
      with _malformed(self.folder / 'dataset_info.json'):
        paths.append(str(self.folder / template.format(**values)))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
      raise errors.UserError(
        f'{self.folder}: {len(missing)} of {len(paths)} files of split'
        f' {split!r} are missing, {os.path.basename(missing[0])} for one; copy'
        f' the whole folder again, or remove it and {how_to_make}'
      )
    if file_format == 'tfrecord':
      index = self.folder / f'{name}-{split}.index.npz'
      self._records: _Records = _TFRecords(paths, lengths, index)
    elif file_format == 'array_record':
      self._records = _ArrayRecords(paths, lengths)
    else:
      raise errors.UserError(
        f'{self.folder}: is in the format {file_format!r}, expected tfrecord or'
        f' array_record; remove it and {how_to_make}'
      )
    self._length = sum(lengths)
    identity = [name, version, split, lengths, num_bytes, self.class_names]
    digest = hashlib.sha256(json.dumps(identity).encode())
    self.fingerprint = digest.hexdigest()[:16]

  def __len__(self) -> int:
    return self._length

  def content_fingerprint(self) -> str:
    """Of all videos in all splits, as the report beside them says; or ''."""
    return str(self._from_report('fingerprint', ''))

  def _from_report(self, name: str, otherwise: Any) -> Any:
    """What the report beside the videos says, if there is one and it does."""
    try:
      report = json.loads((self.folder / 'report.json').read_text('utf-8'))
      return report[name]
    except (OSError, ValueError, KeyError, TypeError):
      return otherwise

  def __getitem__(self, index: SupportsIndex) -> Example:
    """Reads one video.

    Raises:
      IndexError: there is no such index.
      RecordError: the record is damaged, or cannot be read.
    """
    place = operator.index(index)
    if not 0 <= place < self._length:
      raise IndexError(f'index {place} is not in 0..{self._length - 1}')
    try:
      return self._parse(self._records.read(place))
    except _READ_FAILURES as error:
      reason = ' '.join(str(error).split()) or type(error).__name__
      raise RecordError(
        f'record {place} of split {self.split!r} cannot be read'
        f' ({self._records.where(place)}): {reason}'
      ) from error

  def labels(self) -> Int64[np.ndarray, ' n']:
    """The class of each video, -1 where its record cannot be read.

    Reads the whole split the first time, and keeps what it found beside it.

    Raises:
      ValueError: the videos may have several classes.
    """
    if self.multi_label:
      raise ValueError(f'the videos of {self.folder} may have several classes')
    path = self.folder / f'{self.split}.labels.npz'
    kept = _load_labels(path, self.fingerprint, len(self))
    if kept is not None:
      return kept

    def label(index: int) -> int:
      try:
        found = self[index].label
      except RecordError:
        return -1
      assert isinstance(found, int)
      return found

    labels = np.empty(len(self), np.int64)
    start = last_line = time.monotonic()
    with futures.ThreadPoolExecutor(_SCAN_THREADS) as threads:
      for index, found in enumerate(threads.map(label, range(len(self)))):
        labels[index] = found
        now = time.monotonic()
        if now - last_line > _SECONDS_BETWEEN_LINES:
          last_line = now
          rate = (index + 1) / (now - start)
          logging.info(
            'Reading the labels of %s, once: %d of %d, %.0f/s, %.0f s left',
            self.folder,
            index + 1,
            len(self),
            rate,
            (len(self) - index - 1) / rate,
          )
    _save_arrays(path, fingerprint=np.array(self.fingerprint), labels=labels)
    return labels

  def _parse(self, record: bytes) -> Example:
    features = _example_class().FromString(record).features.feature
    video = _only(features['video'].bytes_list.value, 'video')
    video_id = _only(features['video_id'].bytes_list.value, 'video_id')
    labels = tuple(features['label'].int64_list.value)
    if not all(0 <= label < len(self.class_names) for label in labels):
      raise ValueError(
        f'labels {labels}, expected 0 to {len(self.class_names) - 1}'
      )
    return Example(
      video,
      labels if self.multi_label else _only(labels, 'label'),
      video_id.decode(),
    )


def near_copies(
  train: PreparedDataset, test: PreparedDataset
) -> list[tuple[str, str]]:
  """Videos of one split that are videos of the other again, or nearly so.

  Encoded anew, of another size, a little cut: what was learnt from one says
  nothing when it is tested on the other. They were looked for when the dataset
  was prepared, so that this takes no time; nothing is known of the splits of
  two datasets.

  Returns:
    The video of `train` and that of `test`, by their ids.
  """
  if train.folder != test.folder:
    return []
  wanted = (train.split, test.split)
  with contextlib.suppress(KeyError, TypeError, ValueError):  # Not ours.
    for found in train._from_report(NEAR_COPIES, []):
      pairs = [(str(a), str(b)) for a, b in found['videos']]
      if tuple(found['splits']) == wanted:
        return pairs
      if tuple(found['splits']) == wanted[::-1]:
        return [(b, a) for a, b in pairs]
  return []


def _only(values: Any, name: str) -> Any:
  if len(values) != 1:
    raise ValueError(f'{len(values)} values of {name!r}, expected one')
  return values[0]


def _find_folder(
  name_or_folder: str, data_dir: str
) -> tuple[pathlib.Path, str]:
  """The folder of a dataset's newest version, and how to make it anew.

  A name without a configuration means the only one that was prepared.
  """
  folder = pathlib.Path(name_or_folder).expanduser()
  if (folder / 'dataset_info.json').is_file():
    return folder, 'prepare it anew with tfds build'
  folder = pathlib.Path(data_dir).expanduser() / folder
  name, _, config = name_or_folder.partition('/')
  how_to_make = (
    f'prepare it with: tfds build data/{name} --manual_dir=VIDEOS'
    f'{config and f" --config={config}"} --data_dir={data_dir} (see'
    f' data/{name}/README.md)'
  )
  if not folder.is_dir():
    raise errors.UserError(f'{folder}: no such dataset; {how_to_make}')
  versions = {
    tuple(map(int, path.name.split('.'))): path
    for path in folder.iterdir()
    if re.fullmatch(r'\d+\.\d+\.\d+', path.name)
  }
  if versions:
    newest = versions[max(versions)]
    if not (newest / 'dataset_info.json').is_file():
      raise errors.UserError(
        f'{newest}: is incomplete, dataset_info.json is missing; remove the'
        f' folder and {how_to_make}'
      )
    return newest, how_to_make
  configs = {
    f'{name_or_folder}/{info.parent.parent.name}'
    for info in folder.glob('*/*.*.*/dataset_info.json')
  }
  if len(configs) == 1:
    return _find_folder(configs.pop(), data_dir)
  if configs:
    raise errors.UserError(
      f'{folder}: has several configurations, name one of them:'
      f' {", ".join(sorted(configs))}'
    )
  raise errors.UserError(f'{folder}: was begun but not finished; {how_to_make}')


@contextlib.contextmanager
def _malformed(path: pathlib.Path):
  """Turns what malformed content leads to into a UserError that names it."""
  try:
    yield
  except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
    raise errors.UserError(
      f'{path}: is damaged or not of a prepared dataset'
      f' ({type(error).__name__}: {error}); make the dataset anew'
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  with _malformed(path):
    content = json.loads(path.read_text('utf-8'))
    if not isinstance(content, dict):
      raise TypeError(f'a {type(content).__name__}, expected a dict')
    return content


def _read_classes(folder: pathlib.Path) -> tuple[tuple[str, ...], bool]:
  """The names of the classes, and whether a video may have several."""
  path = folder / 'features.json'
  content = _read_json(path)
  with _malformed(path):
    features = content['featuresDict']['features']
  missing = [n for n in ('video', 'label', 'video_id') if n not in features]
  if missing:
    raise errors.UserError(
      f'{folder}: is no dataset of videos: it has no feature'
      f' {", ".join(map(repr, missing))}'
    )
  with _malformed(path):
    label = features['label']
    multi_label = 'sequence' in label
    if multi_label:
      label = label['sequence']['feature']
    num_classes = int(label['classLabel']['numClasses'])
  names_path = folder / 'label.labels.txt'
  if not names_path.exists():
    return tuple(map(str, range(num_classes))), multi_label
  with _malformed(names_path):
    lines = names_path.read_text('utf-8').split('\n')
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != num_classes:
      raise ValueError(f'{len(names)} names, expected {num_classes}')
  return names, multi_label


class _Records(Protocol):
  """The records of all shards, one after the other."""

  def read(self, index: int) -> bytes: ...

  def where(self, index: int) -> str:
    """The file of a record and its place in it, to be read by people."""
    ...


class _ArrayRecords:
  """ArrayRecord files, which have an index of their own."""

  def __init__(self, paths: list[str], lengths: list[int]):
    with futures.ThreadPoolExecutor(_SCAN_THREADS) as threads:
      found = threads.map(self._count, paths)
      for path, length, count in zip(paths, lengths, found, strict=True):
        _check_count(path, count, length)
    self._source = array_record_data_source.ArrayRecordDataSource(paths)
    self._paths = paths
    self._firsts = [0, *itertools.accumulate(lengths)]

  def _count(self, path: str) -> int:
    with _unreadable_shard(path):
      source = array_record_data_source.ArrayRecordDataSource([path])
      with source:
        return len(source)

  def read(self, index: int) -> bytes:
    return self._source[index]

  def where(self, index: int) -> str:
    shard = bisect.bisect_right(self._firsts, index) - 1
    return f'{self._paths[shard]}, record {index - self._firsts[shard]}'


class _TFRecords:
  """TFRecord files and an index of where each record starts.

  Attributes:
    paths: of the shards.
    lengths: number of records in each.
    starts: place of each record in its shard, in bytes, and then of the end of
      the shard; all shards one after the other.
  """

  def __init__(
    self, paths: list[str], lengths: list[int], index_path: pathlib.Path
  ):
    self.paths = paths
    # Index of the first record of each shard, and the number of all.
    self._firsts = [0, *itertools.accumulate(lengths)]
    stats = [os.stat(path) for path in paths]
    state = np.array([[s.st_size, s.st_mtime_ns] for s in stats], np.int64)
    starts = _load_index(index_path, state, self._firsts)
    if starts is None:
      with futures.ThreadPoolExecutor(_SCAN_THREADS) as threads:
        starts = list(threads.map(_scan, paths))
      for path, length, found in zip(paths, lengths, starts, strict=True):
        _check_count(path, len(found) - 1, length)
      starts = np.concatenate(starts)
      _save_arrays(index_path, state=state, starts=starts)
    self.starts = starts

  def _place(self, index: int) -> tuple[str, int, int]:
    """The file of a record, and where it starts and ends in it."""
    shard = bisect.bisect_right(self._firsts, index) - 1
    # Each shard before this one has one more entry than records: its end.
    start, end = map(int, self.starts[index + shard : index + shard + 2])
    return self.paths[shard], start, end

  def where(self, index: int) -> str:
    path, start, _ = self._place(index)
    return f'{path}, at byte {start}'

  def read(self, index: int) -> bytes:
    path, start, end = self._place(index)
    # Opened for each record: thousands of shards may not all stay open.
    with open(path, 'rb', buffering=0) as file:
      file.seek(start)
      data = b''
      while len(data) < end - start:
        more = file.read(end - start - len(data))
        if not more:
          raise ValueError('the file ends within it')
        data = data + more if data else more
    length = _parse_header(data)
    body = data[_HEADER.size : -_FOOTER.size]
    if length != len(body):
      raise ValueError('its length differs from the index')
    if _FOOTER.unpack(data[-_FOOTER.size :])[0] != _masked_crc(body):
      raise ValueError('its checksum is wrong')
    return body


def _masked_crc(data: bytes) -> int:
  """The checksum of TFRecord files (tensorflow/core/lib/hash/crc32c.h)."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _parse_header(data: bytes) -> int:
  length, crc = _HEADER.unpack_from(data)
  if crc != _masked_crc(data[:8]):
    raise ValueError('the checksum of its length is wrong')
  return length


def _scan(path: str) -> Int64[np.ndarray, ' n']:
  """The place of each record, then the file's size, from the headers alone."""
  starts = [0]
  with _unreadable_shard(path), open(path, 'rb', buffering=0) as file:
    size = os.fstat(file.fileno()).st_size
    while starts[-1] < size:
      file.seek(starts[-1])
      header = file.read(_HEADER.size)
      if len(header) < _HEADER.size:
        raise ValueError(f'ends within record {len(starts) - 1}')
      try:
        length = _parse_header(header)
      except ValueError:
        # The next record tells where this one, which is damaged, ends.
        end = _next_header(file, starts[-1] + _HEADER.size, size)
      else:
        end = starts[-1] + len(header) + length + _FOOTER.size
      if end > size:
        raise ValueError(f'ends within record {len(starts) - 1}')
      starts.append(end)
  return np.array(starts, np.int64)


def _next_header(file: BinaryIO, start: int, size: int) -> int:
  """Where the next record of a file begins after `start`; else its end."""
  file.seek(start)
  rest = file.read(size - start)
  for place in range(_FOOTER.size, len(rest) - _HEADER.size):
    length, crc = _HEADER.unpack_from(rest, place)
    if length <= len(
      rest
    ) - place - _HEADER.size - _FOOTER.size and crc == _masked_crc(
      rest[place : place + 8]
    ):
      return start + place
  return size


@contextlib.contextmanager
def _unreadable_shard(path: str):
  try:
    yield
  except errors.UserError:
    raise
  except _READ_FAILURES as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise errors.UserError(
      f'{path}: is damaged or cut short: {reason}; copy it again, or make the'
      ' dataset anew'
    ) from error


def _check_count(path: str, found: int, expected: int) -> None:
  if found != expected:
    raise errors.UserError(
      f'{path}: holds {found} records, and dataset_info.json says {expected};'
      ' copy the whole folder again, or make the dataset anew'
    )


def _load_index(
  path: pathlib.Path, state: Int64[np.ndarray, 'shards 2'], firsts: list[int]
) -> Int64[np.ndarray, ' n'] | None:
  """The kept index; None where there is none that fits the files."""
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as content:
      kept_state, starts = content['state'], content['starts']
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  num_shards = len(state)
  if not np.array_equal(kept_state, state) or starts.dtype != np.int64:
    return None
  if starts.shape != (firsts[-1] + num_shards,):
    return None
  # Where each shard begins and ends in it.
  first = np.array(firsts[:-1]) + np.arange(num_shards)
  last = np.array(firsts[1:]) + np.arange(num_shards)
  rises = np.diff(starts) >= _HEADER.size + _FOOTER.size
  rises[last[:-1]] = True  # From the end of a shard to the start of the next.
  if not (
    rises.all()
    and not starts[first].any()
    and np.array_equal(starts[last], state[:, 0])
  ):
    return None
  return starts


def _load_labels(
  path: pathlib.Path, fingerprint: str, count: int
) -> Int64[np.ndarray, ' n'] | None:
  """The kept labels; None where there are none that fit."""
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as content:
      kept, labels = str(content['fingerprint']), content['labels']
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  fits = labels.dtype == np.int64 and labels.shape == (count,)
  return labels if kept == fingerprint and fits else None


def _save_arrays(path: pathlib.Path, **arrays: Any) -> None:
  """Keeps arrays in a file, unless the folder cannot be written to.

  Moved into place whole: other processes may do the same at the same time.
  """
  name = None
  try:
    with tempfile.NamedTemporaryFile(
      dir=path.parent, prefix=f'.{path.name}.', delete=False
    ) as file:
      name = file.name
      np.savez(file, **arrays)
    os.chmod(name, 0o644)
    os.replace(name, path)
  except OSError:
    if name is not None:
      with contextlib.suppress(OSError):
        os.unlink(name)


@functools.cache
def _example_class() -> Any:
  """tf.train.Example, from its definition (tensorflow/core/example/*.proto).

  TFDS brings one as well, but imports hundreds of modules with it.
  """
  proto = descriptor_pb2.FileDescriptorProto(
    name='dualformer_jax/example.proto', package='dualformer_jax'
  )
  kinds = descriptor_pb2.FieldDescriptorProto

  def add(name: str, *fields: tuple[str, int, int, bool, str]) -> Any:
    result = proto.message_type.add(name=name)
    for field, number, kind, repeated, type_name in fields:
      result.field.add(
        name=field,
        number=number,
        type=kind,
        label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
        type_name=f'.dualformer_jax.{type_name}' if type_name else None,
      )
    return result

  add('BytesList', ('value', 1, kinds.TYPE_BYTES, True, ''))
  # Repeated numbers may be packed; the parser takes either form.
  add('Int64List', ('value', 1, kinds.TYPE_INT64, True, ''))
  add(
    'Feature',
    ('bytes_list', 1, kinds.TYPE_MESSAGE, False, 'BytesList'),
    ('int64_list', 3, kinds.TYPE_MESSAGE, False, 'Int64List'),
  )
  features = add(
    'Features',
    ('feature', 1, kinds.TYPE_MESSAGE, True, 'Features.FeatureEntry'),
  )
  entry = features.nested_type.add(name='FeatureEntry')
  entry.options.map_entry = True
  for field in add(
    'Entry',
    ('key', 1, kinds.TYPE_STRING, False, ''),
    ('value', 2, kinds.TYPE_MESSAGE, False, 'Feature'),
  ).field:
    entry.field.append(field)
  add('Example', ('features', 1, kinds.TYPE_MESSAGE, False, 'Features'))
  pool = descriptor_pool.DescriptorPool()
  pool.Add(proto)
  return message_factory.GetMessageClass(
    pool.FindMessageTypeByName('dualformer_jax.Example')
  )
