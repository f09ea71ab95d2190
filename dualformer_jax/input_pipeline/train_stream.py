"""The endless stream of training clips, by position.

The clip at a position depends on the dataset, the preprocessing and the options
of a recipe alone: not on hosts, threads, batches or interruptions.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import grain
from jaxtyping import UInt8
import numpy as np

from dualformer_jax import errors
from dualformer_jax.input_pipeline import rand_augment, transforms
from dualformer_jax.input_pipeline.dataset import (
  Example,
  PreparedDataset,
  RecordError,
)
from dualformer_jax.input_pipeline.stored_labels import StoredLabels
from dualformer_jax.input_pipeline.video_reader import VideoError

# What a row of a batch has besides the clip; see loader.TrainLoader.
Row = dict[str, Any]
# Name of a video that cannot be read, and the reason.
Failure = tuple[str, str]
# What a video that cannot be read raises.
VIDEO_FAILURES = (VideoError, RecordError)
# So many unreadable videos in a row mean that something else is wrong.
_MAX_FAILURES_IN_A_ROW = 1000


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """Which clips a training stream has.

  Attributes:
    seed: seed of order, frames, crops and operations; 0 to 2**32 - 1.
    short_side: size of the frames' short side before cropping.
    random_crop: whether to take random crops; otherwise the center crop.
    start_multiple: clips of dense sampling start at multiples of this frame.
    yuv420: clips are YUV instead of RGB: see transforms.to_yuv420.
    repeats: clips of each video, which are consecutive in the stream (repeated
      augmentation, Hoffer et al., arXiv 1901.09335).
    class_balanced: draws every class equally often: one video of each class
      in turn. An epoch then does not have every video once.
    rand_augment_ops: operations of RandAugment per clip; 0 for none.
    rand_augment_magnitude: magnitude of these operations, 0..10.
  """

  seed: int
  short_side: int = 256
  random_crop: bool = True
  start_multiple: int = 1
  yuv420: bool = False
  repeats: int = 1
  class_balanced: bool = False
  rand_augment_ops: int = 0
  rand_augment_magnitude: int = 9


class TrainStream:
  """Training clips by position.

  Attributes:
    dataset: the videos.
    options: see TrainOptions.
    clip_shape: shape of a clip.
  """

  def __init__(
    self,
    dataset: PreparedDataset,
    preprocessing: transforms.Preprocessing,
    options: TrainOptions,
    token_labels: StoredLabels | None = None,
  ):
    self.dataset = dataset
    self.options = options
    self.clip_shape = preprocessing.clip_shape(options.yuv420)
    self._preprocessing = preprocessing
    self._token_labels = token_labels
    self._order = _video_order(dataset, options)
    self._order[0]  # Initializes what the loader's threads share.

  def read(
    self, position: int, out: UInt8[np.ndarray, 'repeats t *frame']
  ) -> tuple[list[Row], list[Failure]]:
    """Reads `repeats` consecutive clips, the first at `position`.

    Args:
      position: in the stream.
      out: where to write the clips.

    Returns:
      What their rows of a batch have besides the clips, and the videos that
      cannot be read and are replaced by the next.

    Raises:
      UserError: a clip's video and those after it cannot be read.
    """
    repeats = self.options.repeats
    positions = range(position, position + repeats)
    rows, failures = [], []
    # All of one video, unless the state of other `repeats` was restored.
    for video, group in itertools.groupby(positions, lambda p: p // repeats):
      group = list(group)
      part = out[len(rows) : len(rows) + len(group)]
      rows += self._read_video(video, group, part, failures)
    return rows, failures

  def _read_video(
    self,
    number: int,
    positions: list[int],
    out: UInt8[np.ndarray, 'n t *frame'],
    failures: list[Failure],
  ) -> list[Row]:
    """Reads clips of the stream's n-th video, or of the next readable one."""
    failed = dict[str, Exception]()
    # Twice the length, so that all videos of an order are tried.
    for attempt in range(min(_MAX_FAILURES_IN_A_ROW, 2 * len(self.dataset))):
      index = int(self._order[number + attempt])
      name = f'record {index}'
      try:
        example = self.dataset[index]
        name = example.video_id
        return self._cut(example, index, positions, out)
      except VIDEO_FAILURES as error:
        failed[name] = error
        failures.append((name, errors.error_reason(error)))
    name, error = failed.popitem()
    raise errors.UserError(
      f'{self.dataset.folder}: {len(failed) + 1} videos of split'
      f' {self.dataset.split!r} cannot be read, and none replaces them; the'
      f' last one is {name} ({error})'
    ) from error

  def _cut(
    self,
    example: Example,
    index: int,
    positions: list[int],
    out: UInt8[np.ndarray, 'n t *frame'],
  ) -> list[Row]:
    """Cuts a clip of a video for each position."""
    p, options = self._preprocessing, self.options
    rngs = [np.random.default_rng((options.seed, i)) for i in positions]
    warped = options.rand_augment_ops > 0  # in RGB
    clips, locations = transforms.train_clips(
      example.video,
      p,
      rngs,
      short_side=options.short_side,
      random_crop=options.random_crop,
      start_multiple=options.start_multiple,
      yuv420=options.yuv420 and not warped,
      out=None if warped else out,
    )
    rows = []
    for clip, location, rng, target in zip(
      clips, locations, rngs, out, strict=True
    ):
      row: Row = {'labels': example.label, 'video_ids': example.video_id}
      if warped:
        operations = rand_augment.draw(
          rng,
          options.rand_augment_ops,
          options.rand_augment_magnitude,
          p.image_size,
        )
        clip = rand_augment.warp(clip, operations.matrix, p.pixel_mean)
        if options.yuv420:
          clip = [transforms.to_yuv420(frame) for frame in clip]
        target[...] = clip
        row['color_ops'] = operations.color_ops
        row['magnitudes'] = operations.magnitudes
      if self._token_labels is not None:
        # A token covers two frames.
        row['token_values'], row['token_classes'] = self._token_labels.at(
          index, location.frame_indices[::2]
        )
        row['token_boxes'] = location.box
      rows.append(row)
    return rows


def _video_order(dataset: PreparedDataset, options: TrainOptions) -> Any:
  """Returns the dataset's index of each video of the endless stream."""
  seed = options.seed
  if not options.class_balanced:
    return grain.MapDataset.range(len(dataset)).shuffle(seed).repeat()
  if dataset.multi_label:
    raise errors.UserError(
      'class_balanced=True needs videos with one label each, but those of'
      f' {dataset.folder} may have several; set it to False'
    )
  labels = dataset.labels()
  orders = [
    grain.MapDataset.source(members.tolist()).shuffle(seed).repeat()
    for label in range(len(dataset.class_names))
    if len(members := np.flatnonzero(labels == label))
  ]

  def pick(number: int) -> int:
    """Returns a video of each class in turn, the classes in random order."""
    turn, index = divmod(number, len(orders))
    classes = np.random.default_rng((seed, turn)).permutation(len(orders))
    return int(orders[classes[index]][turn])

  return grain.MapDataset.range(2**62).map(pick)
