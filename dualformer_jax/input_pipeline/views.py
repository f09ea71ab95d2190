"""From a video to uint8 clips of the model's size: resizes and crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

import cv2
from jaxtyping import Int, UInt8
import numpy as np

from dualformer_jax import errors
from dualformer_jax.input_pipeline import decoding, frame_sampling

Video = decoding.Source | UInt8[np.ndarray, 't h w 3']

# Of a random crop: its share of the frame's area, its width over its height.
_MIN_AREA = 0.08
_MAX_ASPECT = 4 / 3
_TRIES = 10


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How a video is made into what the model takes.

  Attributes:
    num_frames: frames in a clip.
    frame_interval: from one frame of a clip to the next; dense sampling only.
    image_size: height and width of a clip, in pixels.
    sampling: 'dense' or 'uniform'; see frame_sampling.
    pixel_mean: subtracted from R, G, B in 0..255, when the model is fed.
    pixel_std: R, G, B are then divided by it.
    num_clips: clips of a video in testing; uniform sampling has one.
    num_crops: crops of each clip in testing: 1 (the centre) or 3.
  """

  num_frames: int
  frame_interval: int
  image_size: int
  sampling: str = 'dense'
  pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
  pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
  num_clips: int = 1
  num_crops: int = 1

  def __post_init__(self):
    if self.sampling not in ('dense', 'uniform'):
      raise errors.UserError(
        f"sampling must be 'dense' or 'uniform', got {self.sampling!r}"
      )
    if self.num_crops not in (1, 3):
      raise errors.UserError(f'num_crops must be 1 or 3, got {self.num_crops}')
    if self.sampling == 'uniform' and self.num_clips != 1:
      raise errors.UserError(
        f'num_clips must be 1 with uniform sampling, got {self.num_clips}'
      )


@dataclasses.dataclass(frozen=True)
class Place:
  """Where in its video a clip was cut.

  Attributes:
    times: number of each frame, not looped: of a video that is too short they
      go on after its last frame.
    box: top, left, height and width of the crop, as shares of the frame.
  """

  times: Int[np.ndarray, ' t']
  box: tuple[float, float, float, float]


def test_views(
  video: Video,
  preprocessing: Preprocessing,
  *,
  short_side: int | None = None,
) -> UInt8[np.ndarray, 'views frames size size 3']:
  """All views of a video for validation, testing and prediction.

  Args:
    video: the file's content, its path, or its RGB frames.
    preprocessing: what views to take.
    short_side: what the frames' short side is resized to before the crops;
      `image_size` when not given.

  Returns:
    RGB, crop by crop, the clips of a crop in the order of time.

  Raises:
    VideoError: the video cannot be decoded, or has no frame.
  """
  p = preprocessing
  short_side = p.image_size if short_side is None else short_side
  pick = functools.partial(_pick_test_frames, p)
  frames = _picked_frames(video, pick, short_side)
  if p.num_crops == 3:
    crops = three_crops(frames, p.image_size)
  else:
    crops = center_crop(frames, p.image_size)[None]
  return crops.reshape(-1, p.num_frames, p.image_size, p.image_size, 3)


def train_clip(
  video: Video,
  preprocessing: Preprocessing,
  rng: np.random.Generator | Sequence[np.random.Generator],
  *,
  short_side: int = 256,
  random_crop: bool = True,
  places: list[Place] | None = None,
) -> UInt8[np.ndarray, '*clips frames size size 3']:
  """One clip at random, cropped at random, the same crop in all its frames.

  The flip is left to the accelerator.

  Args:
    video: the file's content, its path, or its RGB frames.
    preprocessing: frames, interval and size; clips and crops are not used.
    rng: decides on frames and crop. Of a sequence each makes a clip, the same
      as it would alone; the frames of all are decoded in one go.
    short_side: what the frames' short side is resized to before the crop.
    random_crop: False takes the centre instead.
    places: where to note where each clip was cut.

  Raises:
    VideoError: the video cannot be decoded, or has no frame.
  """
  p = preprocessing
  rngs = [rng] if isinstance(rng, np.random.Generator) else list(rng)

  picked: list[Int[np.ndarray, ' t']] = []

  def pick(total: int) -> Int[np.ndarray, ' t']:
    picked[:] = [pick_train_frames(p, r, total) for r in rngs]
    return np.concatenate(picked)

  clips = []
  parts = np.split(_picked_frames(video, pick, short_side), len(rngs))
  for part, frames, r in zip(parts, picked, rngs, strict=True):
    height, width = part.shape[1:3]
    if random_crop:
      box = _draw_crop(height, width, r)
    else:
      box = _center_box(part, p.image_size)
    clips.append(_resize(_crop(part, *box), p.image_size, p.image_size))
    if places is not None:
      top, left, box_height, box_width = box
      shares = (
        top / height, left / width, box_height / height, box_width / width
      )  # fmt: skip
      places.append(Place(unlooped(p, frames), shares))
  return clips[0] if isinstance(rng, np.random.Generator) else np.stack(clips)


def unlooped(
  p: Preprocessing, frames: Int[np.ndarray, ' t']
) -> Int[np.ndarray, ' t']:
  """Undoes the looping of one clip's frames, if they were taken densely."""
  if p.sampling == 'uniform':
    return frames
  return frames[0] + np.arange(len(frames)) * p.frame_interval


def resize_short_side(
  frames: UInt8[np.ndarray, 't h w 3'], size: int
) -> UInt8[np.ndarray, 't h2 w2 3']:
  """Resizes (bilinear, without antialiasing) so that the short side is `size`.

  Raises:
    VideoError: the frames are so narrow that the long side would be huge.
  """
  height, width = frames.shape[1:3]
  height, width = _size_with_short_side(height, width, size)
  return _resize(frames, height, width)


def resize_to(
  frames: UInt8[np.ndarray, 't h w 3'], size: int
) -> UInt8[np.ndarray, 't size size 3']:
  """Squeezes frames to a square, all that they show."""
  return _resize(frames, size, size)


def center_crop(
  frames: UInt8[np.ndarray, 't h w 3'], size: int
) -> UInt8[np.ndarray, 't size size 3']:
  """The square in the middle.

  Raises:
    ValueError: the frames are smaller than `size`.
  """
  return _crop(frames, *_center_box(frames, size))


def three_crops(
  frames: UInt8[np.ndarray, 't h w 3'], size: int
) -> UInt8[np.ndarray, '3 t size size 3']:
  """Left, right and middle square; top, bottom and middle when portrait.

  The second one starts at twice the middle one's offset, as in the published
  implementation: one pixel short of the border where the rest is odd.

  Raises:
    ValueError: the frames are smaller than `size`.
  """
  height, width = _check_covers(frames, size)
  top, left = (height - size) // 2, (width - size) // 2
  if width >= height:
    corners = [(top, 0), (top, 2 * left), (top, left)]
  else:
    corners = [(0, left), (2 * top, left), (top, left)]
  return np.stack([_crop(frames, y, x, size, size) for y, x in corners])


def random_resized_crop(
  frames: UInt8[np.ndarray, 't h w 3'], size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, 't size size 3']:
  """A part of random area and aspect ratio, resized to a square.

  The area is uniform in 0.08..1 of the frame's, the aspect ratio log-uniform
  in 3/4..4/3; after ten draws that do not fit, the middle square is taken
  (Szegedy et al., Going Deeper with Convolutions, arXiv 1409.4842).
  """
  height, width = frames.shape[1:3]
  box = _draw_crop(height, width, rng)
  return _resize(_crop(frames, *box), size, size)


def _draw_crop(
  height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Top, left, height and width of a random crop."""
  for _ in range(_TRIES):
    area = rng.uniform(_MIN_AREA, 1.0) * height * width
    aspect = _MAX_ASPECT ** rng.uniform(-1.0, 1.0)
    crop_width = round(math.sqrt(area * aspect))
    crop_height = round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      top = int(rng.integers(height - crop_height, endpoint=True))
      left = int(rng.integers(width - crop_width, endpoint=True))
      return top, left, crop_height, crop_width
  side = min(height, width)
  return (height - side) // 2, (width - side) // 2, side, side


def _center_box(
  frames: UInt8[np.ndarray, 't h w 3'], size: int
) -> tuple[int, int, int, int]:
  height, width = _check_covers(frames, size)
  return (height - size) // 2, (width - size) // 2, size, size


def _pick_test_frames(p: Preprocessing, total: int) -> Int[np.ndarray, ' t']:
  if p.sampling == 'uniform':
    indices = frame_sampling.uniform_test_frames(total, p.num_frames)
  else:
    indices = frame_sampling.test_frames(
      total, p.num_frames, p.frame_interval, p.num_clips
    )
  return indices.ravel()


def pick_train_frames(
  p: Preprocessing, rng: np.random.Generator, total: int
) -> Int[np.ndarray, ' t']:
  """Which frames `train_clip` takes of a video that has `total`."""
  if p.sampling == 'uniform':
    indices = frame_sampling.uniform_train_frames(total, p.num_frames, rng)
  else:
    indices = frame_sampling.train_frames(
      total, p.num_frames, p.frame_interval, 1, rng
    )
  return indices.ravel()


def _picked_frames(
  video: Video,
  pick: Callable[[int], Int[np.ndarray, ' t']],
  short_side: int,
) -> UInt8[np.ndarray, 'picked h2 w2 3']:
  """The frames picked, given how many there are; their short side resized."""
  if isinstance(video, np.ndarray):
    if not video.size:
      raise decoding.VideoError('holds no frames')
    return resize_short_side(video[pick(len(video))], short_side)
  # Frame by frame, lest large videos stand in memory at their full size.
  return decoding.decode_frames(
    video, pick, lambda frame: resize_short_side(frame[None], short_side)[0]
  )


def _size_with_short_side(
  height: int, width: int, size: int
) -> tuple[int, int]:
  scale = size / min(height, width)
  new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
  if new_height * new_width > decoding.MAX_PIXELS:
    raise decoding.VideoError(
      f'has frames of {width}x{height} pixels, which are too narrow to be'
      f' resized to a short side of {size}'
    )
  return new_height, new_width


def _resize(
  frames: UInt8[np.ndarray, 't h w 3'], height: int, width: int
) -> UInt8[np.ndarray, 't h2 w2 3']:
  if frames.shape[1:3] == (height, width):
    return frames
  resized = np.empty((len(frames), height, width, 3), np.uint8)
  for frame, target in zip(frames, resized, strict=True):
    cv2.resize(frame, (width, height), target, interpolation=cv2.INTER_LINEAR)
  return resized


def _crop(
  frames: UInt8[np.ndarray, 't h w 3'],
  top: int,
  left: int,
  height: int,
  width: int,
) -> UInt8[np.ndarray, 't h2 w2 3']:
  return frames[:, top : top + height, left : left + width]


def _check_covers(
  frames: UInt8[np.ndarray, 't h w 3'], size: int
) -> tuple[int, int]:
  height, width = frames.shape[1:3]
  if min(height, width) < size:
    raise ValueError(
      f'frames of {width}x{height} pixels are smaller than the crop of {size}'
    )
  return height, width
