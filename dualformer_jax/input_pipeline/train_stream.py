"""The endless stream of training clips, by position.

The clip at a position depends on the dataset, the preprocessing and the options
of a recipe alone: not on hosts, threads, batches or interruptions.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from absl import logging
import grain
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

# A training clip: a row of a batch, see loader.TrainLoader.
Clip = dict[str, Any]
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

  def __post_init__(self):
    if not 0 <= self.seed < 2**32:
      raise errors.UserError(f'seed must be in 0..2**32-1, got {self.seed}')
    if self.repeats < 1:
      raise errors.UserError(f'repeats must be 1 or more, got {self.repeats}')


class TrainStream:
  """Training clips by position.

  Attributes:
    dataset: the videos.
    options: see TrainOptions.
    failed: reason by name, of videos that could not be read so far.
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
    self.failed: dict[str, str] = {}
    self._preprocessing = preprocessing
    self._token_labels = token_labels
    self._order = _video_order(dataset, options)
    self._order[0]  # Initializes what the loader's threads share.

  def clips(self, position: int) -> list[Clip]:
    """Returns `repeats` consecutive clips, the first at `position`.

    Raises:
      UserError: a clip's video and those after it cannot be read.
    """
    repeats = self.options.repeats
    positions = range(position, position + repeats)
    # All of one video, unless the state of other `repeats` was restored.
    videos = itertools.groupby(positions, lambda p: p // repeats)
    return [
      clip
      for video, group in videos
      for clip in self._clips_of_video(video, list(group))
    ]

  def _clips_of_video(self, number: int, positions: list[int]) -> list[Clip]:
    """Returns clips of the stream's n-th video, or of the next readable one."""
    name = error = None
    # Twice the length, so that all videos of an order are tried.
    for attempt in range(min(_MAX_FAILURES_IN_A_ROW, 2 * len(self.dataset))):
      index = int(self._order[number + attempt])
      name = f'record {index}'
      try:
        example = self.dataset[index]
        name = example.video_id
        return self._cut(example, index, positions)
      except VIDEO_FAILURES as caught:
        error = caught
        self._log_failure(name, caught)
    raise errors.UserError(
      f'{self.dataset.folder}: {len(self.failed)} videos of split'
      f' {self.dataset.split!r} cannot be read, and none replaces them; the'
      f' last one is {name} ({error})'
    ) from error

  def _cut(
    self, example: Example, index: int, positions: list[int]
  ) -> list[Clip]:
    """Returns a clip of a video for each position."""
    p, options = self._preprocessing, self.options
    rngs = [np.random.default_rng((options.seed, i)) for i in positions]
    warped = options.rand_augment_ops > 0  # in RGB
    all_pixels, locations = transforms.train_clips(
      example.video,
      p,
      rngs,
      short_side=options.short_side,
      random_crop=options.random_crop,
      start_multiple=options.start_multiple,
      yuv420=options.yuv420 and not warped,
    )
    clips = []
    for pixels, location, rng in zip(all_pixels, locations, rngs, strict=True):
      clip: Clip = {'labels': example.label, 'video_ids': example.video_id}
      if warped:
        operations = rand_augment.draw(
          rng,
          options.rand_augment_ops,
          options.rand_augment_magnitude,
          p.image_size,
        )
        pixels = rand_augment.warp(pixels, operations.matrix, p.pixel_mean)
        if options.yuv420:
          pixels = np.stack([transforms.to_yuv420(frame) for frame in pixels])
        clip['color_ops'] = operations.color_ops
        clip['magnitudes'] = operations.magnitudes
      if self._token_labels is not None:
        # A token covers two frames.
        clip['token_values'], clip['token_classes'] = self._token_labels.at(
          index, location.frame_indices[::2]
        )
        clip['token_boxes'] = np.array(location.box, np.float32)
      clips.append({'clips': pixels, **clip})
    return clips

  def _log_failure(self, name: str, error: errors.UserError) -> None:
    is_new = name not in self.failed
    self.failed[name] = errors.error_reason(error)
    if is_new:
      logging.warning(
        'Video %s cannot be read and is replaced by the next one (%d so far):'
        ' %s',
        name,
        len(self.failed),
        self.failed[name],
      )


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
