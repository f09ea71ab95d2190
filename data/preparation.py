"""What the dataset definitions share: features, storage, the report.

`tfds build data/NAME` puts this folder on the import path, so a definition says
`import preparation`, wherever the command is given.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
import tempfile
from typing import Any, TypeVar

from absl import logging
import cv2
from jaxtyping import UInt8
import numpy as np
import tensorflow_datasets as tfds
from tqdm import auto as tqdm

from dualformer_jax import errors
from dualformer_jax.input_pipeline import decoding

# Training takes crops of a short side of 256: more would only be thrown away.
SHORT_SIDE = 256
# A record (a protocol buffer) holds less than 2 GiB.
MAX_BYTES = (2 << 30) - (1 << 20)
REPORT = 'report.json'

_Item = TypeVar('_Item')
_Result = TypeVar('_Result')


def features(
  class_names: Sequence[str] | None = None,
) -> tfds.features.FeaturesDict:
  """The features of every dataset.

  Args:
    class_names: by label; None where only the videos tell, then
      `builder.label.names` is set before any is written.
  """
  names = None if class_names is None else list(class_names)
  return tfds.features.FeaturesDict(
    {
      # The content of a video file.
      'video': tfds.features.Tensor(shape=(), dtype=np.object_),
      'label': tfds.features.ClassLabel(names=names),
      # Where the video came from; unique in the dataset.
      'video_id': tfds.features.Text(),
    }
  )


def reencode(path: str | os.PathLike[str]) -> bytes:
  """A video as it is stored by default: small, and cheap to seek in.

  H.264 in MP4 with every frame of the original, a keyframe every 16 and no
  B-frames, CRF 18, sides even, the short one at most 256 pixels; smaller videos
  are not enlarged.

  Raises:
    VideoError: the video cannot be decoded to its end, or has no frame.
  """
  info = decoding.probe(path)
  scale = min(1.0, SHORT_SIDE / min(info.height, info.width))

  def resize(
    frame: UInt8[np.ndarray, 'h w 3'],
  ) -> UInt8[np.ndarray, 'h2 w2 3']:
    if scale == 1.0:
      return frame
    height, width = (
      2 * round(side * scale / 2) for side in (info.height, info.width)
    )
    # Averages all pixels that become one: bilinear would skip some of them.
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)

  frames = map(resize, decoding.stream_frames(path))
  return decoding.encode_mp4(frames, fps=info.fps)


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
class Video:
  """A video that is to go into a dataset.

  Attributes:
    video_id: where it comes from, in a form to be read; unique.
    path: the file.
    label: name of its class.
    split: name of its split; '' where that is still to be chosen.
  """

  video_id: str
  path: pathlib.Path
  label: str
  split: str = ''


def _store(
  numbered: tuple[int, Video], scratch: pathlib.Path, verbatim: bool
) -> tuple[pathlib.Path | None, str]:
  """The file to put in the dataset, or None and why there is none."""
  number, video = numbered
  try:
    if not video.path.is_file():
      raise decoding.VideoError('is not a file, or a link that leads nowhere')
    if verbatim:
      decoding.probe(video.path)
      size = video.path.stat().st_size
      content = b''
    else:
      content = reencode(video.path)
      size = len(content)
    if size > MAX_BYTES:
      raise decoding.VideoError(f'takes {size} bytes, more than a record can')
  except decoding.VideoError as error:
    return None, error.reason
  except Exception as error:  # Whatever a stranger's file brings about.
    return None, ' '.join(f'{type(error).__name__}: {error}'.split())
  if verbatim:
    return video.path, ''
  path = scratch / str(number)
  path.write_bytes(content)
  return path, ''


@dataclasses.dataclass(frozen=True)
class _Stored:
  """What is remembered of an example once it is written."""

  split: str
  video_id: str
  label: int
  sha256: str
  num_bytes: int


class ReportingBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder that leaves a report beside what it writes.

  A definition passes the examples of each split through `reported`, and may add
  findings of its own to `findings`. The report is written where TFDS collects
  the files, before it gives the folder its final name: neither is ever there
  without the other. The same videos give the same report.

  Attributes:
    findings: goes into the report.
    scratch: a folder for what is needed until all is written.
  """

  findings: dict[str, Any]
  scratch: pathlib.Path
  _stored: list[_Stored]

  @property
  def label(self) -> tfds.features.ClassLabel:
    """The feature that knows the names of the classes."""
    by_name: Any = self.info.features
    return by_name['label']

  def _download_and_prepare(
    self,
    dl_manager: tfds.download.DownloadManager,
    download_config: tfds.download.DownloadConfig,
  ) -> None:
    self.findings = {}
    self._stored = []
    with tempfile.TemporaryDirectory(dir=self.data_path) as scratch:
      self.scratch = pathlib.Path(scratch)
      super()._download_and_prepare(dl_manager, download_config)
    report = self._report()
    (self.data_path / REPORT).write_text(
      json.dumps(report, indent=2, ensure_ascii=False) + '\n',
      encoding='utf-8',
    )
    for name, split in report['splits'].items():
      logging.info(
        '%s: %d videos, %.1f MB', name, split['videos'], split['bytes'] / 1e6
      )
    logging.info('Fingerprint %s', report['fingerprint'])

  def store(
    self, videos: Sequence[Video], *, verbatim: bool
  ) -> list[tuple[Video, pathlib.Path]]:
    """Decodes each video; those that cannot be are findings, not errors.

    Args:
      videos: what was found.
      verbatim: keep the files as they are, rather than `reencode` them.

    Returns:
      The good ones, in order, each with the file to put in the dataset.
    """
    stored = []
    undecodable = []
    progress = tqdm.tqdm(
      in_threads(
        functools.partial(_store, scratch=self.scratch, verbatim=verbatim),
        enumerate(videos),
      ),
      desc='Reading videos' if verbatim else 'Re-encoding videos',
      total=len(videos),
      unit=' videos',
      mininterval=1.0,
    )
    for video, (path, reason) in zip(videos, progress, strict=True):
      if path is not None:
        stored.append((video, path))
        continue
      logging.warning('Left out %s: %s', video.video_id, reason)
      undecodable.append({'video_id': video.video_id, 'reason': reason})
    self.findings.update(
      stored_as='verbatim' if verbatim else 'reencoded',
      found=len(videos),
      good=len(stored),
      undecodable=undecodable,
    )
    return stored

  def reported(
    self, split: str, examples: Iterable[tuple[str, dict[str, Any]]]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same examples; what TFDS takes of them is in the report."""
    for key, example in examples:
      video = example['video']
      self._stored.append(
        _Stored(
          split,
          example['video_id'],
          self.label.encode_example(example['label']),
          hashlib.sha256(video).hexdigest(),
          len(video),
        )
      )
      yield key, example

  def _report(self) -> dict[str, Any]:
    class_names = self.label.names
    splits: dict[str, Any] = {}
    content = hashlib.sha256()
    copies: dict[str, list[_Stored]] = collections.defaultdict(list)
    for stored in sorted(self._stored, key=lambda s: (s.split, s.video_id)):
      split = splits.setdefault(
        stored.split,
        {'videos': 0, 'bytes': 0, 'classes': dict.fromkeys(class_names, 0)},
      )
      split['videos'] += 1
      split['bytes'] += stored.num_bytes
      split['classes'][class_names[stored.label]] += 1
      copies[stored.sha256].append(stored)
      line = [stored.split, stored.video_id, stored.label, stored.sha256]
      content.update(json.dumps(line).encode() + b'\n')
    return {
      'dataset': self.info.full_name,
      'fingerprint': content.hexdigest(),
      'splits': splits,
      # A video to learn from must not be one to test on.
      'same_in_several_splits': [
        [stored.video_id for stored in same]
        for same in copies.values()
        if len({stored.split for stored in same}) > 1
      ],
      **self.findings,
    }


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
