"""Token labels that were stored once for a whole dataset, by index.

Beside a prepared dataset, a folder holds for each of its videos the highest
scores of every token of the whole frame, at times all along the video. Files
are ArrayRecord, a record for each video, in the dataset's order.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import struct
from typing import Any

from array_record.python import array_record_data_source
from array_record.python.array_record_module import (  # pyright: ignore
  ArrayRecordWriter,
)
from jaxtyping import Float32, Int, UInt16
import numpy as np

from dualformer_jax import errors
from dualformer_jax.input_pipeline import frame_sampling, records, views

# Videos in a file: what is done again after an interruption, at most.
VIDEOS_PER_FILE = 256
# More clips of a long video are spread evenly, for the memory's sake.
_MAX_CLIPS = 64
_META = 'token_labels.json'
_FORMAT = 1
_HEADER = struct.Struct('<4I')


@dataclasses.dataclass(frozen=True)
class VideoLabels:
  """The highest scores of the tokens of one video.

  Attributes:
    times: the first frame of each frame of tokens, in rising order within each
      clip that was scored; looped videos go on after their last frame.
    values: the scores; classes that are not named have none.
    classes: of which classes they are.
  """

  times: Int[np.ndarray, ' n']
  values: Float32[np.ndarray, 'n rows columns top']
  classes: UInt16[np.ndarray, 'n rows columns top']

  def to_bytes(self) -> bytes:
    """The record that stands for it."""
    return b''.join(
      [
        _HEADER.pack(*self.values.shape),
        self.times.astype('<i4').tobytes(),
        self.values.astype('<f4').tobytes(),
        self.classes.astype('<u2').tobytes(),
      ]
    )

  @classmethod
  def from_bytes(cls, record: bytes) -> VideoLabels:
    """The inverse of to_bytes.

    Raises:
      ValueError: the record is malformed.
    """
    shape = _HEADER.unpack_from(record)
    count = int(np.prod(shape, dtype=np.int64))
    sizes = [_HEADER.size, 4 * shape[0], 4 * count, 2 * count]
    if len(record) != sum(sizes):
      raise ValueError(f'{len(record)} bytes, expected {sum(sizes)}')
    ends = np.cumsum(sizes)
    return cls(
      np.frombuffer(record[ends[0] : ends[1]], '<i4'),
      np.frombuffer(record[ends[1] : ends[2]], '<f4').reshape(shape),
      np.frombuffer(record[ends[2] :], '<u2').reshape(shape),
    )


class StoredLabels:
  """The token labels of the videos of a split, by index."""

  def __init__(self, folder: str, dataset: records.PreparedDataset):
    """Opens the folder, and checks that it is of this split.

    Raises:
      UserError: it is absent, incomplete, or of another dataset.
    """
    self.folder = pathlib.Path(folder).expanduser()
    meta = read_meta(self.folder)
    if meta is None or not meta.get('complete'):
      state = 'was begun but not finished' if meta else 'holds no token labels'
      raise errors.UserError(
        f'{folder}: {state}; make them with: python -m'
        ' dualformer_jax.token_labels --checkpoint=TEACHER --config=CONFIG'
      )
    if meta['dataset'] != dataset.fingerprint:
      raise errors.UserError(
        f'{folder}: is of another dataset or split than {dataset.folder},'
        f' {dataset.split!r}; make token labels of this one'
      )
    paths = [
      str(path_of(self.folder, i)) for i in range(number_of_files(len(dataset)))
    ]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
      raise errors.UserError(
        f'{missing[0]}: is missing; copy the whole folder again'
      )
    self._source = array_record_data_source.ArrayRecordDataSource(paths)
    if len(self._source) != len(dataset):
      raise errors.UserError(
        f'{folder}: holds {len(self._source)} videos, the dataset'
        f' {len(dataset)}; copy the whole folder again'
      )

  def at(
    self, index: int, times: Int[np.ndarray, ' d']
  ) -> tuple[
    Float32[np.ndarray, 'd rows columns top'],
    Int[np.ndarray, 'd rows columns top'],
  ]:
    """The scores and classes of a video that are nearest to some times.

    Args:
      index: of the video.
      times: the first frame of each frame of a clip's tokens.

    Raises:
      RecordError: there are none, or they cannot be read.
    """
    try:
      labels = VideoLabels.from_bytes(self._source[index])
      if not len(labels.times):
        raise ValueError('the video could not be read when they were made')
    except (ValueError, RuntimeError, OSError, struct.error) as error:
      raise records.RecordError(
        f'token labels of video {index} in {self.folder} cannot be read: '
        f'{error}'
      ) from error
    distance: Any = np.abs(times[:, None] - labels.times)
    nearest = distance.argmin(axis=1)
    return labels.values[nearest], labels.classes[nearest].astype(np.int32)


def clips_of(
  p: views.Preprocessing, total: int
) -> Int[np.ndarray, 'clips frames']:
  """Clips that cover a video of `total` frames, not looped, to be scored."""
  if p.sampling == 'uniform':
    return frame_sampling.uniform_test_frames(total, p.num_frames)
  span = p.num_frames * p.frame_interval
  count = max(1, min(_MAX_CLIPS, -(-total // span)))
  starts = np.linspace(0, max(0, total - span), count).astype(np.int64)
  return starts[:, None] + np.arange(p.num_frames) * p.frame_interval


def number_of_files(videos: int) -> int:
  """How many files hold the labels of so many videos."""
  return -(-videos // VIDEOS_PER_FILE)


def path_of(folder: pathlib.Path, number: int) -> pathlib.Path:
  """The file of that number."""
  return folder / f'token_labels-{number:05d}.array_record'


def write_file(
  folder: pathlib.Path, number: int, labels: Sequence[VideoLabels]
) -> None:
  """Writes a file, which appears whole or not at all."""
  path = path_of(folder, number)
  partial = path.with_suffix('.partial')
  writer = ArrayRecordWriter(str(partial), 'group_size:1')
  for video in labels:
    writer.write(video.to_bytes())
  writer.close()
  partial.replace(path)


def read_meta(folder: pathlib.Path) -> dict[str, Any] | None:
  """What a folder of token labels says of itself; None if it is none.

  Raises:
    UserError: it is damaged, or of another version.
  """
  try:
    meta = json.loads((folder / _META).read_text('utf-8'))
    if meta['format'] != _FORMAT or not isinstance(meta['dataset'], str):
      raise ValueError(f'format {meta["format"]}, expected {_FORMAT}')
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f'{folder / _META}: is damaged or of another version ({error})'
    ) from error
  return meta


def write_meta(folder: pathlib.Path, meta: dict[str, Any]) -> None:
  """Says what the folder holds; see read_meta."""
  partial = folder / f'.{_META}.partial'
  partial.write_text(json.dumps({'format': _FORMAT, **meta}, indent=2))
  partial.replace(folder / _META)
