"""Indices of the frames of a clip.

Dense sampling takes `clip_len` frames that are `interval` frames apart, and
loops videos that are too short. Uniform sampling divides the video into as many
equal segments as a clip has frames, and takes one frame of each. `total` is the
number of frames in the video. All arguments are 1 or more.
"""

from __future__ import annotations

from jaxtyping import Int
import numpy as np


def eval_frames(
  total: int, clip_len: int, interval: int, num_clips: int
) -> Int[np.ndarray, 'clips frames']:
  """Samples clips evenly spread over a video, for validation and testing."""
  # 0 if the clips are looped.
  step = max(0, total - clip_len * interval + 1) / num_clips
  offsets = (np.arange(num_clips) * step + step / 2).astype(np.int64)
  return (offsets[:, None] + np.arange(clip_len) * interval) % total


def train_frames(
  total: int,
  clip_len: int,
  interval: int,
  rng: np.random.Generator,
  start_multiple: int = 1,
) -> Int[np.ndarray, ' frames']:
  """Samples a random clip, which starts at a multiple of `start_multiple`."""
  num_starts = total - clip_len * interval + 1  # Of clips that are not looped.
  offset = 0
  if num_starts > 0:
    offset = start_multiple * rng.integers(-(-num_starts // start_multiple))
  return (offset + np.arange(clip_len) * interval) % total


def uniform_eval_frames(
  total: int, clip_len: int
) -> Int[np.ndarray, '1 frames']:
  """Samples the middle frame of each segment of a video."""
  starts, ends = _segments(total, clip_len)
  return ((starts + ends) // 2)[None]


def uniform_train_frames(
  total: int, clip_len: int, rng: np.random.Generator
) -> Int[np.ndarray, ' frames']:
  """Samples a random frame of each segment of a video."""
  starts, ends = _segments(total, clip_len)
  return rng.integers(starts, ends, endpoint=True)


def _segments(
  total: int, clip_len: int
) -> tuple[Int[np.ndarray, ' frames'], Int[np.ndarray, ' frames']]:
  """Returns first and last frames of segments; neighbors share a frame."""
  bounds = np.linspace(0, total - 1, clip_len + 1).round().astype(np.int64)
  return bounds[:-1], bounds[1:]
