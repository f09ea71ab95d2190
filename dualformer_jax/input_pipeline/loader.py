"""Batches of clips for one host: shuffled, read ahead, resumable.

All hosts see one global stream of videos, and each decodes its own rows of
every global batch. What the stream holds depends on the seed alone: not on the
number of hosts or threads, nor on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import threading
from typing import Any

from absl import logging
import cv2
import grain
from jaxtyping import Float32, Int32, UInt8
import numpy as np

from dualformer_jax import errors
from dualformer_jax.input_pipeline import (
  decoding,
  rand_augment,
  records,
  stored_labels,
  views,
)

# So many videos in a row that cannot be read are no accident.
_MAX_FAILURES_IN_A_ROW = 1000
_FAILURES = (decoding.VideoError, records.RecordError)

Batch = dict[str, Any]


def train_loader(
  dataset: records.PreparedDataset,
  preprocessing: views.Preprocessing,
  *,
  batch_size: int,
  seed: int,
  rows: Sequence[int] | None = None,
  num_threads: int = 16,
  prefetch: int = 2,
  short_side: int = 256,
  random_crop: bool = True,
  repeats: int = 1,
  rand_augment_ops: int = 0,
  rand_augment_magnitude: int = 9,
  class_balanced: bool = False,
  token_labels: stored_labels.StoredLabels | None = None,
) -> TrainIterator:
  """Endless batches of random clips, every video once in each epoch.

  An epoch is `len(dataset)` videos; each has an order of its own, and a batch
  may hold the end of one and the start of the next. With repeated augmentation
  (Hoffer et al., arXiv 1901.09335) `repeats` rows in a row are clips of one
  video, which is read once.

  A video that cannot be decoded is logged, and replaced by the next one in the
  stream's order that can.

  Args:
    dataset: the videos.
    preprocessing: of clips; see views.train_clip.
    batch_size: number of clips in a global batch.
    seed: decides on order, frames, crops and operations; 0 to 2**32 - 1.
    rows: of every global batch that this host reads, in order, as
      sharding.host_rows has them; all of them unless given.
    num_threads: that read and decode, one video each.
    prefetch: number of batches to read ahead; more if there are more threads.
    short_side: what the frames' short side is resized to before the crop.
    random_crop: False takes the centre instead.
    repeats: clips of each video; rows of a host come in runs of that many.
    rand_augment_ops: operations of RandAugment for each clip, of which the
      geometric ones are done here; 0 for none.
    rand_augment_magnitude: of these operations, 0..10.
    class_balanced: every class as often as any other: of each class in turn,
      in an order of its own, the videos one after the other. An epoch is then
      as many videos, but not every one once.
    token_labels: of the same videos, to be cut as the clips are.

  Returns:
    An iterator over dicts of `clips`, uint8 [rows, frames, size, size, 3],
    `labels`, int32 [rows] or with several labels float32 [rows, classes], and
    `video_ids`, a list of str; with RandAugment also `color_ops`, int32, and
    `magnitudes`, float32, both [rows, operations]: see
    rand_augment.Operations; and with token labels `token_values`, float32,
    `token_classes`, int32, both [rows, frames / 2, i, j, top], and
    `token_boxes`, float32 [rows, 4]: see stored_labels and views.Place. It has
    get_state and set_state.

  Raises:
    UserError: an argument is out of range, or (from the iterator) no video can
      be read.
  """
  own = _Rows.of_host(batch_size, rows)
  if min(num_threads, prefetch) < 1:
    raise errors.UserError(
      'num_threads and prefetch must be 1 or more, got'
      f' {num_threads} and {prefetch}'
    )
  if not 0 <= seed < 2**32:
    raise errors.UserError(f'seed must be in 0..2**32-1, got {seed}')
  if repeats < 1 or not own.has_runs_of(repeats):
    raise errors.UserError(
      f'repeats is {repeats}, but this host has {own.count} clips of a batch'
      ' which do not lie in runs of that many; choose a batch_size that is a'
      ' multiple of repeats for each device, and repeats of 1 or more'
    )
  # Threads of OpenCV's own would only contend with those here.
  cv2.setNumThreads(0)
  stream = _TrainStream(
    dataset,
    preprocessing,
    own,
    seed,
    short_side,
    random_crop,
    repeats,
    rand_augment_ops,
    rand_augment_magnitude,
    class_balanced,
    token_labels,
  )
  return TrainIterator(stream, num_threads, prefetch)


def test_loader(
  dataset: records.PreparedDataset,
  preprocessing: views.Preprocessing,
  *,
  batch_size: int,
  rows: Sequence[int] | None = None,
  num_threads: int = 16,
  short_side: int | None = None,
) -> TestBatches:
  """All views of every video, once, in the dataset's order.

  Args:
    dataset: the videos.
    preprocessing: of views; see views.test_views.
    batch_size: number of videos in a global batch.
    rows: of every global batch that this host reads; see train_loader.
    num_threads: that read and decode, one video each; as many videos are read
      ahead.
    short_side: what the frames' short side is resized to before the crops;
      `image_size` when not given.

  Returns:
    An iterable, with the number of batches (the same on all hosts) as its
    length, over dicts of `views`, uint8 [rows, views, frames, size, size, 3],
    `labels` as of train_loader, `mask`, bool [rows], False where a row holds no
    video or one that cannot be decoded, `video_ids`, a list of str, empty where
    there is no video, and `failed`, a list of (video id, reason) of videos that
    cannot be decoded.

  Raises:
    UserError: an argument is out of range.
  """
  own = _Rows.of_host(batch_size, rows)
  if num_threads < 1:
    raise errors.UserError(f'num_threads must be 1 or more, got {num_threads}')
  cv2.setNumThreads(0)
  return TestBatches(dataset, preprocessing, own, num_threads, short_side)


@dataclasses.dataclass(frozen=True)
class _Rows:
  """The rows of every global batch that are this host's.

  Attributes:
    batch_size: of the global batch.
    indices: which rows, in order.
  """

  batch_size: int
  indices: tuple[int, ...]

  @classmethod
  def of_host(cls, batch_size: int, indices: Sequence[int] | None) -> _Rows:
    if batch_size < 1:
      raise errors.UserError(f'batch_size must be 1 or more, got {batch_size}')
    everything = range(batch_size)
    return cls(batch_size, tuple(everything if indices is None else indices))

  @property
  def count(self) -> int:
    return len(self.indices)

  def has_runs_of(self, length: int) -> bool:
    """Whether they are runs of so many rows that follow one another."""
    return self.count % length == 0 and all(
      self.indices[i] == self.indices[i - i % length] + i % length
      for i in range(self.count)
    )

  def position(self, index: int) -> int:
    """The place in the global stream of this host's row of that number."""
    batch, row = divmod(index, self.count)
    return batch * self.batch_size + self.indices[row]


@dataclasses.dataclass(frozen=True)
class _Clip:
  pixels: UInt8[np.ndarray, '*shape 3']
  label: int | tuple[int, ...]
  video_id: str
  operations: rand_augment.Operations | None
  tokens: dict[str, np.ndarray]


class _TrainStream:
  """The global stream of training clips, by position."""

  def __init__(
    self,
    dataset: records.PreparedDataset,
    preprocessing: views.Preprocessing,
    rows: _Rows,
    seed: int,
    short_side: int,
    random_crop: bool,
    repeats: int,
    rand_augment_ops: int,
    rand_augment_magnitude: int,
    class_balanced: bool,
    token_labels: stored_labels.StoredLabels | None,
  ):
    self.dataset = dataset
    self.rows = rows
    self.seed = seed
    self.repeats = repeats
    self.failed: dict[str, str] = {}
    self._preprocessing = preprocessing
    self._short_side = short_side
    self._random_crop = random_crop
    self._rand_augment_ops = rand_augment_ops
    self._rand_augment_magnitude = rand_augment_magnitude
    self._token_labels = token_labels
    self._order: Any = _order(dataset, seed, class_balanced)
    self._order[0]  # Grain sets up what threads then share.
    self._lock = threading.Lock()

  def clips(self, position: int) -> list[_Clip]:
    """The clips at a place in the stream and after it, as many as `repeats`.

    Raises:
      UserError: neither a clip's video nor those that follow can be read.
    """
    positions = range(position, position + self.repeats)
    # Of one video, unless a state of other `repeats` was set.
    videos = itertools.groupby(positions, lambda place: place // self.repeats)
    return [
      clip
      for video, places in videos
      for clip in self._clips_of(video, list(places))
    ]

  def _clips_of(self, video: int, positions: list[int]) -> list[_Clip]:
    """Clips of the stream's video of that number, each for its place."""
    name = error = None
    for attempt in range(_MAX_FAILURES_IN_A_ROW):
      index = int(self._order[video + attempt])
      name = f'record {index}'
      try:
        example = self.dataset[index]
        name = example.video_id
        rngs = [np.random.default_rng((self.seed, p)) for p in positions]
        cuts: list[views.Place] = []
        clips = views.train_clip(
          example.video,
          self._preprocessing,
          rngs,
          short_side=self._short_side,
          random_crop=self._random_crop,
          places=cuts,
        )
        return [
          self._augmented(pixels, rng, example, self._tokens(index, cut))
          for pixels, rng, cut in zip(clips, rngs, cuts, strict=True)
        ]
      except _FAILURES as caught:
        error = caught
        self._note(name, caught)
      if attempt + 1 >= 2 * len(self.dataset):  # Each has been tried.
        break
    raise errors.UserError(
      f'{self.dataset.folder}: {len(self.failed)} videos of split'
      f' {self.dataset.split!r} cannot be read and no other was found, the last'
      f' one {name} ({error})'
    ) from error

  def _augmented(
    self,
    pixels: UInt8[np.ndarray, 't h w 3'],
    rng: np.random.Generator,
    example: records.Example,
    tokens: dict[str, np.ndarray],
  ) -> _Clip:
    operations = None
    if self._rand_augment_ops:
      p = self._preprocessing
      operations = rand_augment.draw(
        rng, self._rand_augment_ops, self._rand_augment_magnitude, p.image_size
      )
      pixels = rand_augment.warp(pixels, operations.matrix, p.pixel_mean)
    return _Clip(pixels, example.label, example.video_id, operations, tokens)

  def _tokens(self, index: int, cut: views.Place) -> dict[str, np.ndarray]:
    if self._token_labels is None:
      return {}
    # A token stands for two frames.
    values, classes = self._token_labels.at(index, cut.times[::2])
    return {
      'token_values': values,
      'token_classes': classes,
      'token_boxes': np.array(cut.box, np.float32),
    }

  def _note(self, name: str, error: errors.UserError) -> None:
    with self._lock:
      is_new = name not in self.failed
      self.failed[name] = _reason(error)
      number = len(self.failed)
    if is_new:
      logging.warning(
        'Video %s cannot be read, the next one takes its place (%d so far): %s',
        name,
        number,
        _reason(error),
      )


def _order(
  dataset: records.PreparedDataset, seed: int, class_balanced: bool
) -> Any:
  """The number of the video at each place of the endless stream."""
  videos = grain.MapDataset.range(len(dataset))
  if not class_balanced:
    return videos.shuffle(seed).repeat()
  if dataset.multi_label:
    raise errors.UserError(
      'class_balanced=True is for videos with one label each, but those of'
      f' {dataset.folder} may have several; set it to False'
    )
  labels = dataset.labels()
  orders = [
    grain.MapDataset.source(members.tolist()).shuffle(seed).repeat()
    for label in range(len(dataset.class_names))
    if len(members := np.flatnonzero(labels == label))
  ]
  return _BalancedOrder(orders, seed)


@dataclasses.dataclass(frozen=True)
class _BalancedOrder:
  """Round by round, a video of every class, the classes in an order at random.

  Attributes:
    orders: of each class that has videos: their numbers, endless.
    seed: decides on the order of the classes in each round.
  """

  orders: list[Any]
  seed: int

  def __getitem__(self, place: int) -> int:
    turn, index = divmod(place, len(self.orders))
    classes = np.random.default_rng((self.seed, turn)).permutation(
      len(self.orders)
    )
    return int(self.orders[classes[index]][turn])


@dataclasses.dataclass(frozen=True)
class _HostClips:
  """This host's clips of a stream from a position on, as Grain reads them.

  Those of one video are read together.
  """

  stream: _TrainStream
  start: int

  def __len__(self) -> int:
    return 2**62

  def __getitem__(self, index: int) -> list[_Clip]:
    row = index * self.stream.repeats
    return self.stream.clips(self.start + self.stream.rows.position(row))


class TrainIterator(Iterator[Batch]):
  """Batches of training clips; see train_loader.

  Nothing is read before the first batch is asked for.
  """

  def __init__(self, stream: _TrainStream, num_threads: int, prefetch: int):
    self._stream = stream
    self._videos_per_batch = stream.rows.count // stream.repeats
    self._options = grain.ReadOptions(
      num_threads=num_threads,
      prefetch_buffer_size=max(prefetch * self._videos_per_batch, num_threads),
    )
    self._position = 0
    self._batches: Any = None

  @property
  def failed(self) -> dict[str, str]:
    """Videos that could not be decoded on this host so far, and why."""
    return dict(self._stream.failed)

  def __next__(self) -> Batch:
    if self._batches is None:
      clips = grain.MapDataset.source(_HostClips(self._stream, self._position))
      batches = clips.to_iter_dataset(self._options).batch(
        self._videos_per_batch, batch_fn=self._stack
      )
      # In a thread of its own, as copying clips into a batch takes a while.
      self._batches = iter(
        grain.experimental.ThreadPrefetchIterDataset(
          batches, prefetch_buffer_size=1
        )
      )
    batch = next(self._batches)
    self._position += self._stream.rows.batch_size
    return batch

  def _stack(self, videos: Sequence[list[_Clip]]) -> Batch:
    clips = list(itertools.chain.from_iterable(videos))
    batch: Batch = {
      'clips': np.stack([clip.pixels for clip in clips]),
      'labels': _labels([clip.label for clip in clips], self._stream.dataset),
      'video_ids': [clip.video_id for clip in clips],
    }
    drawn = [clip.operations for clip in clips if clip.operations]
    if drawn:
      batch['color_ops'] = np.stack([ops.color_ops for ops in drawn])
      batch['magnitudes'] = np.stack([ops.magnitudes for ops in drawn])
    for name in clips[0].tokens:
      batch[name] = np.stack([clip.tokens[name] for clip in clips])
    return batch

  def get_state(self) -> dict[str, Any]:
    """What set_state needs to go on after the last batch returned.

    The same on all hosts, and for any number of them; of JSON's types.
    """
    return {
      'position': self._position,
      'seed': self._stream.seed,
      'dataset': self._stream.dataset.fingerprint,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from where the state was taken.

    Raises:
      UserError: the state is of another dataset or seed.
    """
    own = self.get_state()
    if set(state) != set(own) or not isinstance(state['position'], int):
      raise errors.UserError(f'position in the data is malformed: {state}')
    if state['dataset'] != own['dataset']:
      raise errors.UserError(
        f'{self._stream.dataset.folder}: is not the dataset that this run began'
        f' with ({own["dataset"]}, expected {state["dataset"]}); restore that'
        ' one, or begin in a new workdir'
      )
    if state['seed'] != own['seed']:
      raise errors.UserError(
        f'seed is {own["seed"]}, but this run began with {state["seed"]}; keep'
        ' that one, or begin in a new workdir'
      )
    self.close()
    self._position = state['position']

  def close(self) -> None:
    """Ends the threads; the next batch starts them again."""
    if self._batches is not None:
      self._batches.close()
      self._batches = None


@dataclasses.dataclass(frozen=True)
class _TestVideo:
  """A row of a test batch; views are None where there is nothing to score."""

  views: UInt8[np.ndarray, 'views frames size size 3'] | None
  label: int | tuple[int, ...] | None
  video_id: str
  failure: str


@dataclasses.dataclass(frozen=True)
class TestBatches:
  """Batches of test views; see test_loader."""

  dataset: records.PreparedDataset
  preprocessing: views.Preprocessing
  rows: _Rows
  num_threads: int
  short_side: int | None

  def __len__(self) -> int:
    return -(-len(self.dataset) // self.rows.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    options = grain.ReadOptions(
      num_threads=self.num_threads, prefetch_buffer_size=self.num_threads
    )
    videos = grain.MapDataset.source(_HostVideos(self))
    iterator: Any = iter(videos.to_iter_dataset(options))
    try:
      for _ in range(len(self)):
        yield self._stack([next(iterator) for _ in range(self.rows.count)])
    finally:
      iterator.close()

  def video(self, position: int) -> _TestVideo:
    """The video at a place in the dataset; an empty row after the last."""
    if position >= len(self.dataset):
      return _TestVideo(None, None, '', '')
    name, label = f'record {position}', None
    try:
      example = self.dataset[position]
      name, label = example.video_id, example.label
      all_views = views.test_views(
        example.video, self.preprocessing, short_side=self.short_side
      )
    except _FAILURES as error:
      return _TestVideo(None, label, name, _reason(error))
    return _TestVideo(all_views, label, name, '')

  def _stack(self, videos: list[_TestVideo]) -> Batch:
    p = self.preprocessing
    shape = (p.num_clips * p.num_crops, p.num_frames)
    blank = np.zeros((*shape, p.image_size, p.image_size, 3), np.uint8)
    return {
      'views': np.stack(
        [blank if v.views is None else v.views for v in videos]
      ),
      'labels': _labels([v.label for v in videos], self.dataset),
      'mask': np.array([v.views is not None for v in videos]),
      'video_ids': [v.video_id for v in videos],
      'failed': [(v.video_id, v.failure) for v in videos if v.failure],
    }


@dataclasses.dataclass(frozen=True)
class _HostVideos:
  """This host's videos, as Grain reads them."""

  batches: TestBatches

  def __len__(self) -> int:
    return len(self.batches) * self.batches.rows.count

  def __getitem__(self, index: int) -> _TestVideo:
    return self.batches.video(self.batches.rows.position(index))


def _labels(
  labels: list[Any], dataset: records.PreparedDataset
) -> Int32[np.ndarray, ' rows'] | Float32[np.ndarray, 'rows classes']:
  """Class numbers, or with several labels ones where a class is named."""
  if not dataset.multi_label:
    return np.array(
      [0 if label is None else label for label in labels], 'int32'
    )
  result = np.zeros((len(labels), len(dataset.class_names)), np.float32)
  for row, label in zip(result, labels, strict=True):
    row[list(label or ())] = 1.0
  return result


def _reason(error: errors.UserError) -> str:
  return getattr(error, 'reason', str(error))
