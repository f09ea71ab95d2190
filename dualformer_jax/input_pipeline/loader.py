"""Batches of clips for one host: read ahead, and resumable.

All hosts see one global stream of videos, and each decodes its own rows of
every global batch. The stream does not depend on the number of hosts,
threads or processes, nor on interruptions.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
import contextlib
import dataclasses
import logging
from typing import Any

import cv2
import grain
from jaxtyping import Float32, Int32, UInt8
import numpy as np

from dualformer_jax import errors
from dualformer_jax.input_pipeline import transforms
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.process_pool import ProcessPool
from dualformer_jax.input_pipeline.shared_arrays import SharedArrays, open_array
from dualformer_jax.input_pipeline.stored_labels import StoredLabels
from dualformer_jax.input_pipeline.train_stream import (
  VIDEO_FAILURES,
  Failure,
  Row,
  TrainOptions,
  TrainStream,
)

Batch = dict[str, Any]
_LOG = logging.getLogger(__name__)
_Video = futures.Future[tuple[list[Row], list[Failure]]]
# The clips, which are being written, and the videos that they come from.
_PendingBatch = tuple[UInt8[np.ndarray, 'rows *clip'], list[_Video]]
# Views, label, name and failure of a video; None and '' where it has none.
_EvalVideo = tuple[np.ndarray | None, Any, str, str]
# In a process that reads videos: the stream, and the shape of a batch's clips.
_reader: tuple[TrainStream, tuple[int, ...]]


class TrainLoader(Iterator[Batch]):
  """Endless batches of random clips.

  Each epoch has every video `repeats` times, in a new order, unless
  `class_balanced`. A batch may contain the end of one epoch and the start of
  the next. A video that cannot be decoded is logged and replaced by the next
  readable one of the stream. Reading begins with the first call of next().

  Batches are dicts with `clips`, uint8 [rows, frames, size, size, 3] or, with
  `yuv420`, [rows, frames, 3 / 2 * size, size]; `labels`,
  int32 [rows], or float32 [rows, classes] for datasets with several labels; and
  `video_ids`, a list of str. With RandAugment also `color_ops`, int32, and
  `magnitudes`, float32, both [rows, operations]: see rand_augment.Operations.
  With token labels also `token_values`, float32, and `token_classes`, int32,
  both [rows, frames / 2, height, width, top], and `token_boxes`, float32
  [rows, 4]: see stored_labels and transforms.ClipLocation.
  """

  def __init__(
    self,
    dataset: PreparedDataset,
    preprocessing: transforms.Preprocessing,
    options: TrainOptions,
    batch_size: int,
    rows: Sequence[int],
    *,
    num_threads: int = 16,
    num_processes: int = 0,
    prefetch: int = 2,
    token_labels: StoredLabels | None = None,
  ):
    """Checks the arguments.

    Args:
      dataset: the videos.
      preprocessing: frames, interval and size of the clips.
      options: which clips to draw.
      batch_size: number of clips of a global batch.
      rows: this host's rows of every global batch, in order.
      num_threads: threads that read and decode, one video each.
      num_processes: processes that do this instead; 0 for threads.
      prefetch: number of batches to read ahead; more if there are more readers.
      token_labels: stored labels of the same videos; cropped as the clips are.

    Raises:
      UserError: the rows do not fit `repeats`; or (from next()) no video can
        be read.
    """
    repeats = options.repeats
    if len(rows) % repeats or any(
      row != rows[i - i % repeats] + i % repeats for i, row in enumerate(rows)
    ):
      raise errors.UserError(
        f'repeats is {repeats}, but the {len(rows)} rows of this host are not'
        ' runs of that many; choose a batch_size that is a multiple of repeats'
        ' on each device'
      )
    self._source = dataset, preprocessing, options, token_labels
    self._stream = TrainStream(*self._source)
    self._batch_size, self._rows = batch_size, rows
    self._num_threads = num_threads
    self._num_processes = num_processes
    videos_per_batch = len(rows) // repeats
    readers = num_processes or num_threads
    self._ahead = max(prefetch, -(-readers // videos_per_batch))
    self._position = 0  # of the next batch
    self._arrays = SharedArrays((len(rows), *self._stream.clip_shape))
    self._pool: futures.Executor | None = None
    self._pending = collections.deque[_PendingBatch]()
    self._failed = set[str]()  # names of videos that cannot be read

  def __next__(self) -> Batch:
    try:
      return self._next_batch()
    except BrokenProcessPool as error:
      self.close()
      raise errors.UserError(
        'a process that reads videos was killed: the host may be short of'
        ' memory, then set a lower dataset.reader_processes; or a video crashes'
        ' the decoder. What it printed before is above'
      ) from error

  def _next_batch(self) -> Batch:
    if self._pool is None:
      self._pool = self._start_pool()
    while len(self._pending) <= self._ahead:
      position = self._position + self._batch_size * len(self._pending)
      self._pending.append(self._begin_batch(self._pool, position))
    clips, videos = self._pending.popleft()
    rows: list[Row] = []
    for video in videos:
      rows_of_video, failures = video.result()
      rows += rows_of_video
      self._log_failures(failures)
    self._position += self._batch_size
    fields = {name: [row[name] for row in rows] for name in rows[0]}
    labels = _labels(fields.pop('labels'), self._stream.dataset)
    video_ids = fields.pop('video_ids')
    arrays = {name: np.stack(values) for name, values in fields.items()}
    return {'clips': clips, **arrays, 'labels': labels, 'video_ids': video_ids}

  def _start_pool(self) -> futures.Executor:
    if self._num_processes:
      return ProcessPool(
        self._num_processes, _start_reader, (*self._source, self._arrays.shape)
      )
    cv2.setNumThreads(0)  # OpenCV's threads would contend with the loader's.
    return futures.ThreadPoolExecutor(self._num_threads, 'reader')

  def _begin_batch(self, pool: futures.Executor, start: int) -> _PendingBatch:
    """Submits the videos of the batch at a position of the stream."""
    clips, path = self._arrays.take()
    repeats = self._stream.options.repeats
    videos = []
    for first in range(0, len(clips), repeats):
      position = start + self._rows[first]
      if self._num_processes:
        video = pool.submit(_read_in_process, position, path, first)
      else:
        out = clips[first : first + repeats]
        video = pool.submit(self._stream.read, position, out)
      videos.append(video)
    return clips, videos

  def _log_failures(self, failures: list[Failure]) -> None:
    for name, reason in failures:
      if name not in self._failed:
        self._failed.add(name)
        _LOG.warning(
          'Video %s cannot be read and is replaced by the next one (%d so far):'
          ' %s',
          name,
          len(self._failed),
          reason,
        )

  def get_state(self) -> dict[str, Any]:
    """Returns the state after the last batch, of JSON types.

    It is the same on all hosts, and for any number of them.
    """
    return {
      'position': self._position,
      'seed': self._stream.options.seed,
      'dataset': self._stream.dataset.fingerprint,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from a state of get_state.

    Raises:
      UserError: the state is malformed, or of another dataset or seed.
    """
    current = self.get_state()
    if set(state) != set(current) or not isinstance(state['position'], int):
      raise errors.UserError(f'the state of the data is malformed: {state}')
    if state['dataset'] != current['dataset']:
      raise errors.UserError(
        f'{self._stream.dataset.folder}: is not the dataset that this run began'
        f' with (got {current["dataset"]}, expected {state["dataset"]});'
        ' restore that one, or begin in a new workdir'
      )
    if state['seed'] != current['seed']:
      raise errors.UserError(
        f'seed is {current["seed"]}, but this run began with {state["seed"]};'
        ' use that one, or begin in a new workdir'
      )
    self.close()
    self._position = state['position']

  def close(self) -> None:
    """Stops reading ahead; the next batch starts it again."""
    if isinstance(self._pool, ProcessPool):
      self._pool.kill()
      # Killed processes may have been writing.
      self._arrays = SharedArrays(self._arrays.shape)
    elif self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
    self._pool = None
    self._pending.clear()


def _start_reader(
  dataset: PreparedDataset,
  preprocessing: transforms.Preprocessing,
  options: TrainOptions,
  token_labels: StoredLabels | None,
  shape: tuple[int, ...],
) -> None:
  """Prepares a process for _read_in_process."""
  global _reader
  cv2.setNumThreads(0)
  _reader = TrainStream(dataset, preprocessing, options, token_labels), shape


def _read_in_process(
  position: int, path: str, first: int
) -> tuple[list[Row], list[Failure]]:
  """Reads clips into an array of the parent process, from row `first` on."""
  stream, shape = _reader
  clips = open_array(path, shape)
  return stream.read(position, clips[first : first + stream.options.repeats])


@dataclasses.dataclass(frozen=True)
class EvalLoader:
  """All views of every video, once, in the dataset's order.

  An iterable over dicts with `views`, uint8 [rows, views, frames, size, size,
  3]; `labels` as of TrainLoader; `mask`, bool [rows], False where a row has no
  video or one that cannot be decoded; `video_ids`, a list of str, empty where
  there is no video; and `failed`, a list of (video id, reason) of the videos
  that cannot be decoded. Its length is the number of batches, the same on all
  hosts.

  Attributes:
    dataset: the videos.
    preprocessing: number and size of the views; see transforms.eval_views.
    batch_size: number of videos of a global batch.
    rows: this host's rows of every global batch, in order.
    num_threads: threads that read and decode, one video each. As many videos
      are read ahead.
    short_side: size of the frames' short side before cropping; `image_size` by
      default.
    videos: the videos to read, all by default.
    cut_views: returns the views of a video, given its content and its index;
      transforms.eval_views by default.
  """

  dataset: PreparedDataset
  preprocessing: transforms.Preprocessing
  batch_size: int
  rows: Sequence[int]
  num_threads: int = 16
  short_side: int | None = None
  videos: range | None = None
  cut_views: Callable[[bytes, int], np.ndarray] | None = None

  def __len__(self) -> int:
    return -(-len(self._videos) // self.batch_size)

  @property
  def _videos(self) -> range:
    return range(len(self.dataset)) if self.videos is None else self.videos

  def __iter__(self) -> Iterator[Batch]:
    cv2.setNumThreads(0)  # OpenCV's threads would contend with the loader's.
    options = grain.ReadOptions(
      num_threads=self.num_threads, prefetch_buffer_size=self.num_threads
    )
    videos = grain.MapDataset.range(len(self) * len(self.rows)).map(self._read)
    videos = videos.to_iter_dataset(options)
    batches = iter(videos.batch(len(self.rows), batch_fn=self._collate))
    with contextlib.closing(batches):  # ends the threads
      yield from batches

  def _read(self, index: int) -> _EvalVideo:
    """Returns this host's n-th video; an empty row after the last one."""
    batch, row = divmod(index, len(self.rows))
    position = batch * self.batch_size + self.rows[row]
    if position >= len(self._videos):
      return None, None, '', ''
    position = self._videos[position]
    views, label, name, failure = None, None, f'record {position}', ''
    try:
      example = self.dataset[position]
      name, label = example.video_id, example.label
      if self.cut_views is not None:
        views = self.cut_views(example.video, position)
      else:
        views = transforms.eval_views(
          example.video, self.preprocessing, short_side=self.short_side
        )
    except VIDEO_FAILURES as error:
      failure = errors.error_reason(error)
    return views, label, name, failure

  def _collate(self, videos: Sequence[_EvalVideo]) -> Batch:
    p = self.preprocessing
    shape = (p.num_clips * p.num_crops, p.num_frames)
    blank = np.zeros((*shape, p.image_size, p.image_size, 3), np.uint8)
    views, labels, names, failures = map(list, zip(*videos, strict=True))
    return {
      'views': np.stack([blank if v is None else v for v in views]),
      'labels': _labels(labels, self.dataset),
      'mask': np.array([v is not None for v in views]),
      'video_ids': names,
      'failed': [pair for pair in zip(names, failures, strict=True) if pair[1]],
    }


def _labels(
  labels: list[Any], dataset: PreparedDataset
) -> Int32[np.ndarray, ' rows'] | Float32[np.ndarray, 'rows classes']:
  """Returns class indices, or multi-hot labels; 0 where there is no label."""
  if not dataset.multi_label:
    return np.array([label or 0 for label in labels], np.int32)
  result = np.zeros((len(labels), len(dataset.class_names)), np.float32)
  for row, label in zip(result, labels, strict=True):
    row[list(label or ())] = 1.0
  return result
