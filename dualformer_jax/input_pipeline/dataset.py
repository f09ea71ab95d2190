"""Datasets prepared with `tfds build`: videos and labels by index.

Reads TFRecord and ArrayRecord files without TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import operator
import os
import pathlib
import re
from typing import Any, SupportsIndex

from google.protobuf import message
from jaxtyping import Int64
import numpy as np

from dualformer_jax import errors, progress
from dualformer_jax.input_pipeline import object_store, record_files

# Field of report.json: pairs of similar videos in different splits.
NEAR_DUPLICATES = 'near_copies'
_READ_THREADS = 16
_FORMATS = ('tfrecord', 'array_record')


class RecordError(errors.UserError):
  """A record that cannot be read; the message identifies it in one line."""


@dataclasses.dataclass(frozen=True)
class Example:
  """A stored video.

  Attributes:
    video: content of a video file.
    label: the class; a tuple of classes in datasets with several labels.
    video_id: the video's name, unique in its dataset.
  """

  video: bytes
  label: int | tuple[int, ...]
  video_id: str


class PreparedDataset:
  """A random-access source of the videos of a split.

  Can be shared by threads, and pickled.

  Attributes:
    folder: folder of the dataset's version.
    split: name of the split.
    class_names: names of the classes, in the order of the labels.
    multi_label: whether a video may have several labels.
    fingerprint: identifies dataset, version and split, wherever the files are.
  """

  folder: pathlib.Path
  split: str
  class_names: tuple[str, ...]
  multi_label: bool
  fingerprint: str

  def __init__(
    self,
    name_or_folder: str,
    split: str,
    data_dir: str,
    cache: object_store.DiskCache | None = None,
  ):
    """Finds the dataset and checks that its files exist.

    Args:
      name_or_folder: name of the dataset, with `/CONFIG` where it has several
        configurations, of which the latest version is read; or the folder of
        a version, which may be a URL of an object store.
      split: name of the split, such as 'train'.
      data_dir: the `--data_dir` of `tfds build`, or a URL that it was copied
        to; not used for a folder.
      cache: where to keep records of an object store.

    Raises:
      UserError: the dataset or the split does not exist, is incomplete, or has
        no videos.
    """
    store = None
    if object_store.is_url(name_or_folder):
      local = object_store.local_folder(name_or_folder)
      store = object_store.ObjectStore(name_or_folder, local)
      name_or_folder = str(local)
    elif object_store.is_url(data_dir):
      local = object_store.local_folder(data_dir)
      name = name_or_folder.partition('/')[0]
      url = f'{data_dir.rstrip("/")}/{name}'
      store = object_store.ObjectStore(url, local / name)
      data_dir = str(local)
    try:
      self._open(name_or_folder, split, data_dir, store, cache)
    except errors.UserError as error:
      if store is None:
        raise
      # The message is about copies of the store's files.
      message = str(error).replace(str(store.metadata), store.url)
      raise errors.UserError(message) from error

  def _open(
    self,
    name_or_folder: str,
    split: str,
    data_dir: str,
    store: object_store.ObjectStore | None,
    cache: object_store.DiskCache | None,
  ) -> None:
    self.folder, how_to_make = _find_folder(name_or_folder, data_dir)
    self.split = split
    self.class_names, self.multi_label = _read_classes(self.folder)
    with _metadata(self.folder / 'dataset_info.json', json.loads) as info:
      name, version = info['name'], info['version']
      splits = {s['name']: s for s in info['splits']}
      file_format = info.get('fileFormat', 'tfrecord')
      split_info = splits.get(split, {})
      lengths = [int(n) for n in split_info.get('shardLengths', ())]
    folder = self.folder.relative_to(store.metadata) if store else self.folder
    prefix, count = folder / f'{name}-{split}.{file_format}', len(lengths)
    paths = [f'{prefix}-{i:05d}-of-{count:05d}' for i in range(count)]
    if split not in splits:
      raise errors.UserError(
        f'{self.folder}: has no split {split!r}; expected one of'
        f' {", ".join(map(repr, splits)) or "none"}'
      )
    if not sum(lengths):
      raise errors.UserError(
        f'{self.folder}: split {split!r} has no videos; see report.json there'
      )
    if file_format not in _FORMATS:
      raise errors.UserError(
        f'{self.folder}: has the format {file_format!r}, expected'
        f' {" or ".join(_FORMATS)}; remove it and {how_to_make}'
      )
    exists = store.sizes.__contains__ if store else os.path.isfile
    if missing := [path for path in paths if not exists(path)]:
      raise errors.UserError(
        f'{self.folder}: {len(missing)} of {len(paths)} files of split'
        f' {split!r} are missing, such as {os.path.basename(missing[0])}; copy'
        f' the whole folder again, or remove it and {how_to_make}'
      )
    if file_format == 'tfrecord':
      index_path = self.folder / f'{name}-{split}.index.npz'
      self._records = record_files.TFRecordFiles(
        paths, lengths, index_path, store, cache
      )
    elif store is not None:
      raise errors.UserError(
        f'{self.folder}: has ArrayRecord files, which are read from local disks'
        ' only; prepare the dataset as TFRecord, the default'
      )
    else:
      self._records = record_files.ArrayRecordFiles(paths, lengths)
    self._length = sum(lengths)
    num_bytes = split_info.get('numBytes')
    identity = [name, version, split, lengths, num_bytes, self.class_names]
    digest = hashlib.sha256(json.dumps(identity).encode())
    self.fingerprint = digest.hexdigest()[:16]
    _example_proto()  # Imported here rather than by the loader's threads.

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: SupportsIndex) -> Example:
    """Reads a video.

    Raises:
      IndexError: the index is out of range.
      RecordError: the record is damaged or cannot be read.
      StoreError: the object store cannot be read.
    """
    i = operator.index(index)
    if not 0 <= i < self._length:
      raise IndexError(f'index {i} is not in 0..{self._length - 1}')
    try:
      return self._parse(self._records.read(i))
    except object_store.StoreError:
      raise
    except (*record_files.READ_FAILURES, message.DecodeError) as error:
      raise RecordError(
        f'record {i} of split {self.split!r} cannot be read'
        f' ({self._records.where(i)}): {record_files.one_line(error)}'
      ) from error

  def labels(self) -> Int64[np.ndarray, ' n']:
    """Returns the class of each video; -1 where its record cannot be read.

    Only for datasets of one label for each video. Reads the whole split the
    first time, and saves the labels next to it.
    """
    path = self.folder / f'{self.split}.labels.npz'
    saved = record_files.load_arrays(path, 'fingerprint', 'labels')
    if saved and str(saved[0]) == self.fingerprint:
      return saved[1]

    def read_label(index: int) -> Any:
      try:
        return self[index].label
      except RecordError:
        return -1

    with futures.ThreadPoolExecutor(_READ_THREADS) as threads:
      found = progress.track(
        threads.map(read_label, range(len(self))),
        f'Reading the labels of {self.folder} once',
        len(self),
        'videos',
      )
      labels = np.fromiter(found, np.int64, len(self))
    record_files.save_arrays(
      path, fingerprint=np.array(self.fingerprint), labels=labels
    )
    return labels

  def read_report(self, name: str, default: Any) -> Any:
    """Returns a field of report.json, which data/'s builders write."""
    try:
      report = json.loads((self.folder / 'report.json').read_text('utf-8'))
      return report[name]
    except (OSError, ValueError, KeyError, TypeError):
      return default

  def _parse(self, record: bytes) -> Example:
    features = _example_proto().FromString(record).features.feature
    [video] = features['video'].bytes_list.value
    [video_id] = features['video_id'].bytes_list.value
    labels = tuple(features['label'].int64_list.value)
    if not all(0 <= label < len(self.class_names) for label in labels):
      raise ValueError(
        f'labels {labels}, expected 0 to {len(self.class_names) - 1}'
      )
    if self.multi_label:
      return Example(video, labels, video_id.decode())
    [label] = labels
    return Example(video, label, video_id.decode())


def near_duplicates(
  train: PreparedDataset, test: PreparedDataset
) -> list[tuple[str, str]]:
  """Returns pairs of similar videos in two splits of a dataset.

  Near-duplicates (re-encoded, resized, trimmed) inflate test accuracy.
  Preparing a dataset finds them, so this only reads report.json. Nothing is
  known about splits of different datasets.

  Returns:
    Pairs of video ids: of `train`, and of `test`.
  """
  if train.folder != test.folder:
    return []
  splits = (train.split, test.split)
  # report.json may be another program's.
  with contextlib.suppress(KeyError, TypeError, ValueError):
    for entry in train.read_report(NEAR_DUPLICATES, []):
      pairs = [(str(a), str(b)) for a, b in entry['videos']]
      if tuple(entry['splits']) == splits:
        return pairs
      if tuple(entry['splits']) == splits[::-1]:
        return [(b, a) for a, b in pairs]
  return []


@functools.cache
def _example_proto() -> Any:
  """Returns tf.train.Example; imported late, as TFDS takes a while."""
  from tensorflow_datasets.proto import tf_example_pb2

  proto: Any = tf_example_pb2  # Type checkers do not see generated classes.
  return proto.Example


def _find_folder(
  name_or_folder: str, data_dir: str
) -> tuple[pathlib.Path, str]:
  """Returns the folder of the latest version, and how to prepare it again.

  A name without a configuration finds the only one that was prepared.
  """
  folder = pathlib.Path(name_or_folder).expanduser()
  if (folder / 'dataset_info.json').is_file():
    return folder, 'prepare it again with tfds build'
  folder = pathlib.Path(data_dir).expanduser() / folder
  name, _, config = name_or_folder.partition('/')
  videos = '' if name == 'motion' else ' --manual_dir=VIDEOS'  # or rendered
  how_to_make = (
    f'prepare it with: tfds build data/{name}{videos}'
    f'{config and f" --config={config}"} --data_dir={data_dir} (see'
    f' data/{name}/README.md)'
  )
  if not folder.is_dir():
    builders = pathlib.Path(__file__).parents[2] / 'data'
    known = [f.name for f in (*folder.parent.glob('*'), *builders.glob('*'))]
    nearest = difflib.get_close_matches(name, known, 1)
    if nearest and nearest[0] != name:
      how_to_make = f'did you mean {nearest[0]!r}?'
    raise errors.UserError(f'{folder}: no such dataset; {how_to_make}')
  versions = {
    tuple(map(int, path.name.split('.'))): path
    for path in folder.iterdir()
    if re.fullmatch(r'\d+\.\d+\.\d+', path.name)
  }
  if versions:
    latest = versions[max(versions)]
    if not (latest / 'dataset_info.json').is_file():
      raise errors.UserError(
        f'{latest}: is incomplete, dataset_info.json is missing; remove the'
        f' folder and {how_to_make}'
      )
    return latest, how_to_make
  configs = {
    f'{name_or_folder}/{info.parent.parent.name}'
    for info in folder.glob('*/*.*.*/dataset_info.json')
  }
  if len(configs) == 1:
    return _find_folder(configs.pop(), data_dir)
  if configs:
    raise errors.UserError(
      f'{folder}: has several configurations; expected one of:'
      f' {", ".join(sorted(configs))}'
    )
  raise errors.UserError(
    f'{folder}: its preparation was started but not finished; {how_to_make}'
  )


@contextlib.contextmanager
def _metadata(path: pathlib.Path, parse: Callable[[str], Any]) -> Iterator[Any]:
  """Parses a file; whatever is malformed, here or in the block, is reported."""
  try:
    yield parse(path.read_text('utf-8'))
  except errors.UserError:
    raise
  except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
    raise errors.UserError(
      f'{path}: is damaged, or not of a prepared dataset'
      f' ({type(error).__name__}: {error}); prepare the dataset again'
    ) from error


def _read_classes(folder: pathlib.Path) -> tuple[tuple[str, ...], bool]:
  """Returns the names of the classes, and whether videos may have several."""
  with _metadata(folder / 'features.json', json.loads) as content:
    features = content['featuresDict']['features']
    missing = [n for n in ('video', 'label', 'video_id') if n not in features]
    if missing:
      raise errors.UserError(
        f'{folder}: is not a dataset of videos; it lacks the features'
        f' {", ".join(map(repr, missing))}'
      )
    label = features['label']
    multi_label = 'sequence' in label
    if multi_label:
      label = label['sequence']['feature']
    num_classes = int(label['classLabel']['numClasses'])
  path = folder / 'label.labels.txt'
  if not path.exists():
    return tuple(map(str, range(num_classes))), multi_label
  with _metadata(path, lambda text: text.split('\n')) as lines:
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != num_classes:
      raise ValueError(f'{len(names)} names, expected {num_classes}')
  return names, multi_label
