"""What all dataset definitions share: features, storage, the report.

`tfds build data/NAME` puts this folder on the import path, so a definition says
`import preparation`, wherever the command is given.
"""

from __future__ import annotations

import collections
from collections.abc import (
  Callable,
  Iterable,
  Iterator,
  Sequence,
)
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
from typing import Any, TypeVar

from absl import logging
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import auto as tqdm

from dualformer_jax import errors
from dualformer_jax.input_pipeline import (
  decoding,
  near_copies,
  records,
  storing,
)

Video = storing.Video
REPORT = 'report.json'
SUMMARY = 'summary.txt'
MISSING = 'missing.txt'
VIDEO_FILES = decoding.SUFFIXES
FRAME_FILES = frozenset({'.jpg', '.jpeg', '.png'})

_Item = TypeVar('_Item')
_Result = TypeVar('_Result')


@dataclasses.dataclass(eq=False)
class StorageConfig(tfds.core.BuilderConfig):
  """How the videos are kept; see storing.Storage for what the fields mean."""

  form: str = 'reencoded'
  crf: int = 20
  jpeg_quality: int = 90
  short_side: int = 256

  @property
  def storage(self) -> storing.Storage:
    """The fields of it that say how videos are kept."""
    fields = dataclasses.fields(storing.Storage)
    return storing.Storage(**{f.name: getattr(self, f.name) for f in fields})


_FORMS = {
  'reencoded': 'H.264, a keyframe every 16 frames, short side at most 256.',
  'verbatim': 'The files as they are.',
  'jpeg': 'A JPEG file for each frame, short side at most 256.',
}


def storage_configs(
  kind: type[StorageConfig] = StorageConfig,
  **variants: dict[str, Any],
) -> dict[str, StorageConfig]:
  """The configurations of a dataset by name, the default one first.

  Args:
    kind: what they are made of.
    **variants: fields by the name of the variant. Without any, the names are
      those of the forms of storage; with some, `VARIANT` (re-encoded),
      `VARIANT_verbatim` and `VARIANT_jpeg`.
  """
  if not variants:
    return {
      form: kind(name=form, description=text, form=form)
      for form, text in _FORMS.items()
    }
  configs = {}
  for form, text in _FORMS.items():
    for variant, fields in variants.items():
      name = variant if form == 'reencoded' else f'{variant}_{form}'
      configs[name] = kind(name=name, description=text, form=form, **fields)
  return configs


def features(
  class_names: Sequence[str] | None = None, *, multi_label: bool = False
) -> tfds.features.FeaturesDict:
  """The features of every dataset.

  Args:
    class_names: by label; None where only the files tell, then
      `builder.label.names` is set before any is written.
    multi_label: whether a video may have several labels.
  """
  names = None if class_names is None else list(class_names)
  label: Any = tfds.features.ClassLabel(names=names)
  return tfds.features.FeaturesDict(
    {
      # The content of a video file.
      'video': tfds.features.Tensor(shape=(), dtype=np.object_),
      'label': tfds.features.Sequence(label) if multi_label else label,
      # Where the video came from; unique in the dataset.
      'video_id': tfds.features.Text(),
    }
  )


def in_threads(
  function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
  """`function` of each item, in order, a thread a core, a few items ahead."""
  threads = os.cpu_count() or 1
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  waiting: collections.deque[concurrent.futures.Future[_Result]]
  waiting = collections.deque()
  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > 4 * threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Entry:
  """What the report knows of a video that is in the dataset."""

  split: str
  video_id: str
  labels: tuple[int, ...]
  kept: storing.Stored


class ReportingBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder that leaves a report beside what it writes.

  The report is written where TFDS collects the files, before it gives the
  folder its final name: neither is ever there without the other. The same
  videos give the same report.

  Attributes:
    findings: goes into the report; a definition may add to it.
  """

  CONFIGS: dict[str, StorageConfig] = {}
  findings: dict[str, Any]
  _entries: list[_Entry]
  _beam: dict[str, Any]

  @classmethod
  def get_builder_config(
    cls, name: str, version: str | tfds.core.Version | None = None
  ) -> StorageConfig | None:
    """Finds a configuration in CONFIGS.

    BUILDER_CONFIGS has the default one alone: `tfds build` would build all that
    stand there.
    """
    del version
    return cls.CONFIGS.get(name)

  @property
  def label(self) -> tfds.features.ClassLabel:
    """The feature that knows the names of the classes."""
    by_name: Any = self.info.features
    label = by_name['label']
    return label.feature if hasattr(label, 'feature') else label

  def download_and_prepare(self, **options: Any) -> None:  # pyright: ignore
    """As TFDS has it; what an interrupted build left is taken up or removed.

    Raises:
      UserError: another process is preparing the same dataset.
    """
    folder = pathlib.Path(self._videos_folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_here(folder.with_name(f'{folder.name}.lock')):
      version = str(self.version)
      for left in folder.parent.glob(f'incomplete.*_{version}'):
        shutil.rmtree(left)
      super().download_and_prepare(**options)
      shutil.rmtree(folder, ignore_errors=True)

  @property
  def _videos_folder(self) -> pathlib.Path:
    """Keeps the videos that are done, until the dataset is."""
    folder = pathlib.Path(self._data_dir_root) / self.name
    if self.builder_config:
      folder = folder / self.builder_config.name
    return folder / f'.{self.version}-videos'

  def _download_and_prepare(
    self,
    dl_manager: tfds.download.DownloadManager,
    download_config: tfds.download.DownloadConfig,
  ) -> None:
    self.findings = {}
    self._entries = []
    self._beam = {
      'runner': download_config.beam_runner,
      'options': download_config.beam_options,
    }
    super()._download_and_prepare(dl_manager, download_config)
    report = self._report()
    folder = pathlib.Path(self.data_path)
    write_text(
      folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + '\n'
    )
    summary = _summary(report)
    write_text(folder / SUMMARY, summary)
    for line in summary.splitlines():
      logging.info('%s', line)

  def _example_writer(self) -> writer.ExampleWriter:
    # On Beam's workers this file cannot be imported, nor is it needed: what the
    # records hold is the same.
    if any(self._beam.values()):
      return super()._example_writer()
    file_format = self.info.file_format
    assert file_format is not None  # TFDS has set it by now.
    return _OrderedWriter(file_format)

  def store(
    self, videos: Sequence[Video], storage: storing.Storage
  ) -> list[tuple[Video, storing.Stored]]:
    """Decodes each video; those that cannot be are findings, not errors.

    In processes on this machine or, where Beam's options are given, on Beam's
    workers.

    Args:
      videos: what was found.
      storage: how to keep them.

    Returns:
      The good ones, in order, each with what was stored.
    """
    verb = 'Reading' if storage.form == 'verbatim' else 'Re-encoding'
    if any(self._beam.values()):
      logging.info('%s %d videos on Beam', verb, len(videos))
      self._store_on_beam(videos, storage)
    good = []
    undecodable = []
    progress = tqdm.tqdm(
      storing.store_all(
        videos, storage, self._videos_folder, len(os.sched_getaffinity(0))
      ),
      desc=f'{verb} videos',
      total=len(videos),
      unit=' videos',
      mininterval=1.0,
    )
    for video, stored in zip(videos, progress, strict=True):
      if not stored.reason:
        good.append((video, stored))
        continue
      logging.warning('Left out %s: %s', video.video_id, stored.reason)
      undecodable.append({'video_id': video.video_id, 'reason': stored.reason})
    self.findings.update(
      stored_as=dataclasses.asdict(storage),
      found=len(videos),
      good=len(good),
      undecodable=undecodable,
    )
    return good

  def _store_on_beam(
    self, videos: Sequence[Video], storage: storing.Storage
  ) -> None:
    """Leaves every outcome in the folder, where it is then found done."""
    import apache_beam as beam  # Takes seconds, and is seldom needed.

    with beam.Pipeline(**self._beam) as pipeline:
      _ = (
        pipeline
        | beam.Create(list(videos))
        | beam.Reshuffle()
        | beam.Map(storing.store, storage, os.fspath(self._videos_folder))
      )

  def examples(
    self,
    split: str,
    stored: Sequence[tuple[Video, storing.Stored]],
    storage: storing.Storage,
  ) -> Any:
    """What TFDS writes: the good videos of a split, which the report then has.

    Returns:
      An iterator, or a Beam transform where Beam's options are given.
    """
    for video, kept in stored:
      self._add(split, video.video_id, video.labels, kept)
    folder = os.fspath(self._videos_folder)
    videos = [video for video, _ in stored]
    if not any(self._beam.values()):
      return (storing.example(video, storage, folder) for video in videos)
    import apache_beam as beam

    return (
      beam.Create(videos)
      | beam.Reshuffle()
      | beam.Map(storing.example, storage, folder)
    )

  def reported(
    self, split: str, examples: Iterable[tuple[str, dict[str, Any]]]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Examples that were not stored before; the report then has them, too."""
    for key, example in examples:
      video = example['video']
      kept = storing.Stored('', hashlib.sha256(video).hexdigest(), len(video))
      self._add(split, example['video_id'], [example['label']], kept)
      yield key, example

  def _add(
    self,
    split: str,
    video_id: str,
    labels: Iterable[str | int],
    kept: storing.Stored,
  ) -> None:
    numbers = tuple(int(self.label.encode_example(label)) for label in labels)
    self._entries.append(_Entry(split, video_id, numbers, kept))

  def _report(self) -> dict[str, Any]:
    class_names = self.label.names
    splits: dict[str, Any] = {}
    content = hashlib.sha256()
    entries = sorted(self._entries, key=lambda e: (e.split, e.video_id))
    for entry in entries:
      split = splits.setdefault(
        entry.split,
        {'videos': 0, 'bytes': 0, 'classes': dict.fromkeys(class_names, 0)},
      )
      split['videos'] += 1
      split['bytes'] += entry.kept.num_bytes
      for label in entry.labels:
        split['classes'][class_names[label]] += 1
      line = [entry.split, entry.video_id, entry.labels, entry.kept.sha256]
      content.update(json.dumps(line).encode() + b'\n')
    return {
      'dataset': self.info.full_name,
      'fingerprint': content.hexdigest(),
      'splits': splits,
      records.NEAR_COPIES: _near_copies(entries),
      **self.findings,
    }


def _near_copies(entries: Sequence[_Entry]) -> list[dict[str, Any]]:
  """The videos of a split that are near copies of videos of another.

  A video to learn from must not be one to test on.
  """
  splits: dict[str, list[_Entry]] = collections.defaultdict(list)
  for entry in entries:
    splits[entry.split].append(entry)
  found = []
  # Copies in `train` are told of those in the others.
  names = sorted(splits, key=lambda name: (name != 'train', name))
  for a, b in itertools.combinations(names, 2):
    same = {entry.kept.sha256: entry for entry in splits[a]}
    copies = {
      entry.video_id: same[entry.kept.sha256].video_id
      for entry in splits[b]
      if entry.kept.sha256 in same
    }
    left = [entry for entry in splits[b] if entry.video_id not in copies]
    for place, other in near_copies.find(
      [entry.kept.signature for entry in splits[a]],
      [entry.kept.signature for entry in left],
    ):
      copies[left[other].video_id] = splits[a][place].video_id
    if copies:
      videos = [[copies[video], video] for video in sorted(copies)]
      found.append({'splits': [a, b], 'videos': videos})
  return found


class _OrderedWriter(writer.ExampleWriter):
  """Writes the features of each record in one order.

  As they come, it differs from run to run.
  """

  def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
    pb2: Any = tf_example_pb2  # Its classes are made when it is imported.
    return super().write(
      path,
      (
        (
          key,
          pb2.Example.FromString(record).SerializeToString(deterministic=True),
        )
        for key, record in examples
      ),
    )


def manual_folder(
  dl_manager: tfds.download.DownloadManager, name: str
) -> pathlib.Path:
  """The folder that was given as --manual_dir.

  Raises:
    UserError: there is none, or it is empty.
  """
  try:
    return pathlib.Path(dl_manager.manual_dir)
  except AssertionError:
    raise errors.UserError(
      'the folder of videos is absent or empty: give it as --manual_dir=VIDEOS;'
      f' data/{name}/README.md says what must lie there'
    ) from None


def count(items: Iterable[str]) -> dict[str, int]:
  """How many there are of each, in the order of their names."""
  return dict(sorted(collections.Counter(items).items()))


def _summary(report: dict[str, Any]) -> str:
  """The report in some lines to be read."""
  lines = [f'{report["dataset"]}, fingerprint {report["fingerprint"]}']
  listed, missing = report.get('listed', {}), report.get('missing_videos', {})
  for name, split in report['splits'].items():
    counts = split['classes'].values()
    line = (
      f'{name}: {split["videos"]} videos, {split["bytes"] / 1e6:.1f} MB,'
      f' {sum(count > 0 for count in counts)} of {len(counts)} classes'
    )
    if name in listed:
      line += (
        f'; {listed[name]} are listed, {missing.get(name, 0)} of them missing'
      )
    lines.append(line)
  for split, classes in report.get('missing', {}).items():
    worst = sorted(classes.items(), key=lambda item: -item[1])[:5]
    text = ', '.join(f'{name} {count}' for name, count in worst)
    lines.append(f'missing in {split}, by class: {text}')
  bad = report.get('undecodable', [])
  if 'found' in report:
    lines.append(f'{len(bad)} of {report["found"]} videos cannot be decoded')
  lines += [f'  {b["video_id"]}: {b["reason"]}' for b in bad[:20]]
  if len(bad) > 20:
    lines.append(f'  and {len(bad) - 20} more, see {REPORT}')
  for copies in report[records.NEAR_COPIES]:
    first, second = copies['splits']
    lines.append(
      f'{len(copies["videos"])} videos of {second} are in {first} as well, the'
      ' same or nearly so: how they are classified says little of new videos'
    )
    lines += [f'  {b} is like {a}' for a, b in copies['videos'][:20]]
    if len(copies['videos']) > 20:
      lines.append(f'  and {len(copies["videos"]) - 20} more, see {REPORT}')
  lines += report.get('notes', [])
  return '\n'.join(lines) + '\n'


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8, whatever bytes the names of files are made of."""
  path.write_text(text, encoding='utf-8', errors='backslashreplace')


@contextlib.contextmanager
def _only_here(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock; it ends with the process, however that ends."""
  with open(path, 'wb') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UserError(
        f'{path.parent}: another process is preparing this dataset; wait until'
        ' it is done'
      ) from None
    yield
    path.unlink(missing_ok=True)


def _print_user_errors_in_one_line() -> None:
  """`tfds build` lets errors through: a user's mistake needs no traceback."""
  previous = sys.excepthook

  def hook(kind: type[BaseException], error: BaseException, traceback: Any):
    if isinstance(error, errors.UserError):
      print(f'error: {error}', file=sys.stderr)
    else:
      previous(kind, error, traceback)

  sys.excepthook = hook


_print_user_errors_in_one_line()
