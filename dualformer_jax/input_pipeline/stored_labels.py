"""Token labels of a whole dataset, computed once and read by index.

A folder next to a prepared dataset has, for each video, the highest scores of
every token of the whole frame, for clips spread over the video. The files are
ArrayRecord with a record per video, in the dataset's order.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import struct
from typing import Any

from array_record.python import array_record_data_source
from array_record.python.array_record_module import (  # pyright: ignore
  ArrayRecordWriter,
)
from jaxtyping import Float32, Int, UInt16
import numpy as np

from dualformer_jax import errors, files
from dualformer_jax.input_pipeline import frame_sampling, transforms
from dualformer_jax.input_pipeline.dataset import PreparedDataset, RecordError

# An interruption loses the labels of fewer videos than this.
VIDEOS_PER_FILE = 256
# Limits memory; the clips of longer videos have gaps between them.
_MAX_CLIPS = 64
_META = 'token_labels.json'
_FORMAT = 1
_HEADER = struct.Struct('<4I')


@dataclasses.dataclass(frozen=True)
class VideoLabels:
  """The highest scores of the tokens of one video.

  Attributes:
    frame_indices: first video frame of each frame of tokens, rising within
      each scored clip. Where a short video is looped, they continue past its
      last frame.
    values: the scores; other classes have none.
    classes: the classes that the scores are of.
  """

  frame_indices: Int[np.ndarray, ' n']
  values: Float32[np.ndarray, 'n rows columns top']
  classes: UInt16[np.ndarray, 'n rows columns top']

  def to_bytes(self) -> bytes:
    """Returns the record that from_bytes reads."""
    values, classes = self.values.astype('<f4'), self.classes.astype('<u2')
    arrays = (self.frame_indices.astype('<i4'), values, classes)
    header = _HEADER.pack(*self.values.shape)
    return header + b''.join(array.tobytes() for array in arrays)

  @classmethod
  def from_bytes(cls, record: bytes) -> VideoLabels:
    """Parses a record that to_bytes made.

    Raises:
      ValueError: the record is malformed.
    """
    shape = _HEADER.unpack_from(record)
    count = int(np.prod(shape, dtype=np.int64))
    start = _HEADER.size + 4 * shape[0]
    return cls(
      np.frombuffer(record, '<i4', shape[0], _HEADER.size),
      np.frombuffer(record, '<f4', count, start).reshape(shape),
      np.frombuffer(record, '<u2', count, start + 4 * count).reshape(shape),
    )


class StoredLabels:
  """The token labels of the videos of a split, by index."""

  def __init__(self, folder: str, dataset: PreparedDataset):
    """Opens a folder and checks that it belongs to a split.

    Args:
      folder: a folder that dualformer_jax.token_labels wrote.
      dataset: the split of the labeled videos.

    Raises:
      UserError: the folder is absent, incomplete, or of another dataset.
    """
    self.folder = pathlib.Path(folder).expanduser()
    meta = read_meta(self.folder)
    if meta is None or not meta.get('complete'):
      state = 'is incomplete' if meta else 'has no token labels'
      raise errors.UserError(
        f'{folder}: {state}; compute them with: python -m'
        ' dualformer_jax.token_labels --checkpoint=TEACHER --config=CONFIG'
      )
    if meta['dataset'] != dataset.fingerprint:
      raise errors.UserError(
        f'{folder}: belongs to another dataset or split than {dataset.folder},'
        f' {dataset.split!r}; compute token labels of this one'
      )
    paths = file_paths(self.folder, len(dataset))
    if missing := [path for path in paths if not path.is_file()]:
      raise errors.UserError(
        f'{missing[0]}: is missing; copy the whole folder again'
      )
    self._source = array_record_data_source.ArrayRecordDataSource(paths)
    if len(self._source) != len(dataset):
      raise errors.UserError(
        f'{folder}: has {len(self._source)} videos, expected {len(dataset)};'
        ' copy the whole folder again'
      )

  def at(
    self, index: int, frame_indices: Int[np.ndarray, ' d']
  ) -> tuple[
    Float32[np.ndarray, 'd rows columns top'],
    Int[np.ndarray, 'd rows columns top'],
  ]:
    """Returns the scores and classes nearest in time to a clip's tokens.

    Args:
      index: index of the video.
      frame_indices: first video frame of each frame of the clip's tokens.

    Raises:
      RecordError: the video has no labels, or they cannot be read.
    """
    try:
      labels = VideoLabels.from_bytes(self._source[index])
      if not len(labels.frame_indices):
        raise ValueError('the video could not be decoded')
    except (ValueError, RuntimeError, OSError, struct.error) as error:
      raise RecordError(
        f'token labels of video {index} in {self.folder} cannot be read: '
        f'{error}'
      ) from error
    distance: Any = np.abs(frame_indices[:, None] - labels.frame_indices)
    nearest = distance.argmin(axis=1)
    return labels.values[nearest], labels.classes[nearest].astype(np.int32)


def label_clip_indices(
  p: transforms.Preprocessing, total: int
) -> Int[np.ndarray, 'clips frames']:
  """Returns the frames of clips that cover a video of `total` frames.

  Indices past the last frame stand for a looped video.
  """
  if p.sampling == 'uniform':
    return frame_sampling.uniform_eval_frames(total, p.num_frames)
  span = p.num_frames * p.frame_interval
  count = max(1, min(_MAX_CLIPS, -(-total // span)))
  starts = np.linspace(0, max(0, total - span), count).astype(np.int64)
  return starts[:, None] + np.arange(p.num_frames) * p.frame_interval


def file_paths(folder: pathlib.Path, num_videos: int) -> list[pathlib.Path]:
  """Returns the paths of the files for a number of videos, in order."""
  numbers = range(-(-num_videos // VIDEOS_PER_FILE))
  return [folder / f'token_labels-{i:05d}.array_record' for i in numbers]


def write_file(path: pathlib.Path, labels: Sequence[VideoLabels]) -> None:
  """Writes a file atomically."""
  partial = path.with_suffix('.partial')
  writer = ArrayRecordWriter(str(partial), 'group_size:1')
  for video in labels:
    writer.write(video.to_bytes())
  writer.close()
  partial.replace(path)


def read_meta(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the metadata of a folder of token labels; None if it has none.

  Raises:
    UserError: the metadata is damaged, or of another version.
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
  """Writes the metadata of a folder; see read_meta."""
  with files.atomic_write(folder / _META) as file:
    file.write(json.dumps({'format': _FORMAT, **meta}, indent=2).encode())
