"""Which frames of a video make up a clip: indices, from counts alone.

Dense sampling takes frames a fixed interval apart, from an offset on; videos
that are too short are looped. Uniform sampling takes one frame of each of as
many equal segments as a clip has frames.
"""

from __future__ import annotations

from jaxtyping import Int
import numpy as np


def test_frames(
  total: int, clip_len: int, interval: int, num_clips: int
) -> Int[np.ndarray, 'clips frames']:
  """Clips evenly spread over the video, for validation and testing.

  Args:
    total: number of frames in the video, at least 1.
    clip_len: number of frames in a clip.
    interval: from one frame of a clip to the next.
    num_clips: number of clips.

  Raises:
    ValueError: an argument is less than 1.
  """
  _check_positive(total, clip_len, interval, num_clips)
  span = clip_len * interval
  offsets = np.zeros(num_clips, np.int64)
  if total >= span:
    step = (total - span + 1) / num_clips
    offsets = (np.arange(num_clips) * step + step / 2).astype(np.int64)
  return _frames_from(offsets, total, clip_len, interval)


def train_frames(
  total: int,
  clip_len: int,
  interval: int,
  num_clips: int,
  rng: np.random.Generator,
) -> Int[np.ndarray, 'clips frames']:
  """Clips at random, one in each of `num_clips` parts of the video.

  Takes the arguments of test_frames, and the source of randomness.

  Raises:
    ValueError: an argument is less than 1.
  """
  _check_positive(total, clip_len, interval, num_clips)
  span = clip_len * interval
  places = total - span + 1  # Where a clip may start without looping.
  step = places // num_clips
  if step > 0:
    offsets = np.arange(num_clips) * step + rng.integers(step, size=num_clips)
  elif total > max(num_clips, span):
    offsets = np.sort(rng.integers(places, size=num_clips))
  elif step == 0:
    offsets = np.around(np.arange(num_clips) * (places / num_clips))
  else:
    offsets = np.zeros(num_clips)
  return _frames_from(offsets.astype(np.int64), total, clip_len, interval)


def uniform_test_frames(
  total: int, clip_len: int
) -> Int[np.ndarray, '1 frames']:
  """The middle frame of each of `clip_len` segments of the video.

  Raises:
    ValueError: an argument is less than 1.
  """
  starts, ends = _segments(total, clip_len)
  return ((starts + ends) // 2)[None]


def uniform_train_frames(
  total: int, clip_len: int, rng: np.random.Generator
) -> Int[np.ndarray, '1 frames']:
  """A random frame of each of `clip_len` segments of the video.

  Raises:
    ValueError: an argument is less than 1.
  """
  starts, ends = _segments(total, clip_len)
  return rng.integers(starts, ends, endpoint=True)[None]


def _frames_from(
  offsets: Int[np.ndarray, ' clips'], total: int, clip_len: int, interval: int
) -> Int[np.ndarray, 'clips frames']:
  return (offsets[:, None] + np.arange(clip_len) * interval) % total


def _segments(
  total: int, clip_len: int
) -> tuple[Int[np.ndarray, ' frames'], Int[np.ndarray, ' frames']]:
  """First and last frame of each segment; neighbours share one."""
  _check_positive(total, clip_len)
  bounds = np.arange(clip_len + 1) * ((total - 1) / clip_len)
  bounds = np.around(bounds).astype(np.int64)
  return bounds[:-1], bounds[1:]


def _check_positive(*numbers: int) -> None:
  if min(numbers) < 1:
    raise ValueError(f'expected numbers of 1 or more, got {numbers}')
