"""Cuts uint8 clips from videos: frame selection, resizing and cropping."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import math
from typing import Any

import cv2
from jaxtyping import Float32, Int, UInt8
import numpy as np

from dualformer_jax import errors
from dualformer_jax.input_pipeline import (
  frame_sampling,
  video_container,
)
from dualformer_jax.input_pipeline.reencoded_video import Box, crop
from dualformer_jax.input_pipeline.video_reader import (
  Frame,
  Planes,
  Source,
  Transform,
  VideoError,
  VideoReader,
)

Video = Source | UInt8[np.ndarray, 't h w 3']

# Of a random crop: its share of the frame's area, and width over height.
_MIN_AREA = 0.08
_MAX_ASPECT = 4 / 3
_MAX_CROP_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How clips are made of a video.

  Attributes:
    num_frames: frames in a clip.
    frame_interval: distance between frames of a clip; dense sampling only.
    image_size: height and width of a clip, in pixels.
    sampling: 'dense' or 'uniform'; see frame_sampling.
    pixel_mean: RGB in 0..255; subtracted on the device.
    pixel_std: RGB; the difference is divided by it.
    num_clips: clips per video in testing; 1 with uniform sampling.
    num_crops: crops per clip in testing: 1 (the center) or 3.
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

  def clip_shape(self, yuv420: bool = False) -> tuple[int, ...]:
    """Returns the shape of an RGB clip, or of one as of to_yuv420."""
    size = self.image_size
    frame = (3 * size // 2, size) if yuv420 else (size, size, 3)
    return self.num_frames, *frame


@dataclasses.dataclass(frozen=True)
class ClipLocation:
  """The part of a video that a clip shows.

  Attributes:
    indices: of the clip's frames.
    interval: distance of the frames; None with uniform sampling.
    pixels: the crop.
    frame_size: height and width of the frame.
  """

  indices: Int[np.ndarray, ' t']
  interval: int | None
  pixels: Box
  frame_size: tuple[int, int]

  @property
  def frame_indices(self) -> Int[np.ndarray, ' t']:
    """Indices that continue past the last frame of a video that is looped."""
    if self.interval is None:
      return self.indices
    return self.indices[0] + np.arange(len(self.indices)) * self.interval

  @property
  def box(self) -> Float32[np.ndarray, 4]:
    """Top, left, height and width of the crop, as fractions of the frame."""
    return np.divide(self.pixels, self.frame_size * 2).astype(np.float32)


def eval_views(
  video: Video,
  preprocessing: Preprocessing,
  *,
  short_side: int | None = None,
) -> UInt8[np.ndarray, 'views frames size size 3']:
  """Returns all views of a video for validation, testing and prediction.

  Args:
    video: the file's content, its path, or its RGB frames.
    preprocessing: number and size of the views.
    short_side: size of the frames' short side before cropping; `image_size` by
      default.

  Returns:
    RGB, all clips of the first crop in temporal order, then of the next crop.

  Raises:
    VideoError: the video cannot be decoded, or has no frames.
  """
  p = preprocessing
  short_side = p.image_size if short_side is None else short_side
  with _open(video) as reader:
    indices = eval_frame_indices(p, len(reader))
    transform = functools.partial(resize_short_side, size=short_side)
    frames = reader.get_frames(indices, transform)
  if p.num_crops == 3:
    crops = three_crops(frames, p.image_size)
  else:
    crops = center_crop(frames, p.image_size)[None]
  return crops.reshape(-1, p.num_frames, p.image_size, p.image_size, 3)


def train_clips(
  video: Video,
  preprocessing: Preprocessing,
  rngs: Sequence[np.random.Generator],
  *,
  short_side: int = 256,
  random_crop: bool = True,
  start_multiple: int = 1,
  yuv420: bool = False,
  out: UInt8[np.ndarray, 'clips frames *frame'] | None = None,
) -> tuple[
  UInt8[np.ndarray, 'clips frames size size 3']
  | UInt8[np.ndarray, 'clips frames rows size'],
  list[ClipLocation],
]:
  """Draws random clips of a video, each with one random crop for its frames.

  The frames of all clips are decoded together. Flips are left to the device.

  Args:
    video: the file's content, its path, or its RGB frames.
    preprocessing: frames, interval and size; clips and crops are not used.
    rngs: one for each clip; draws its frames and its crop.
    short_side: size of the frames' short side before cropping.
    random_crop: False takes the center crop.
    start_multiple: clips start at multiples of this frame; dense sampling only.
    yuv420: returns YUV instead of RGB, with rows = 3 / 2 * size: see to_yuv420.
    out: array for the clips; a new one by default.

  Returns:
    The clips, and where in the video each of them is.

  Raises:
    VideoError: the video cannot be decoded, or has no frames.
  """
  p = preprocessing
  if out is None:
    out = np.empty((len(rngs), *p.clip_shape(yuv420)), np.uint8)
  with _open(video) as reader:
    indices = np.stack(
      [train_frame_indices(p, len(reader), r, start_multiple) for r in rngs]
    )
    # Where the clips have each frame: clip and time.
    places = collections.defaultdict(list)
    for clip, clip_indices in enumerate(indices.tolist()):
      for time, index in enumerate(clip_indices):
        places[index].append((clip, time))

    def draw_boxes(size: tuple[int, int]) -> list[Box]:
      if random_crop:
        return [_random_box(size, rng) for rng in rngs]
      return [_center_box(size, p.image_size) for _ in rngs]

    frame_size = reader.frame_size or (0, 0)
    decode: Any = reader.iter_frames
    boxes, parts, region = [], [], None  # of frames, of pictures
    as_stored = min(frame_size) == short_side
    if isinstance(reader, VideoReader) and as_stored:
      # Pictures are only the part of frames that has all crops.
      boxes = draw_boxes(frame_size)
      if yuv420:
        boxes, decode = [_even_box(box) for box in boxes], reader.iter_planes
      region = _even_hull(boxes)
      parts = [(b[0] - region[0], b[1] - region[1], *b[2:]) for b in boxes]
    for index, picture in decode(indices.ravel(), region):
      if not as_stored:
        picture = resize_short_side(picture, short_side)
      if not boxes:
        frame_size = picture.shape[:2]
        parts = boxes = draw_boxes(frame_size)
      for clip, time in places[index]:
        _resize_part_to(out[clip, time], picture, parts[clip])
  interval = p.frame_interval if p.sampling == 'dense' else None
  return out, [
    ClipLocation(clip_indices, interval, box, frame_size)
    for clip_indices, box in zip(indices, boxes, strict=True)
  ]


def train_frame_indices(
  preprocessing: Preprocessing,
  total: int,
  rng: np.random.Generator,
  start_multiple: int = 1,
) -> Int[np.ndarray, ' t']:
  """Draws the frames of a training clip of a video with `total` frames."""
  p = preprocessing
  if p.sampling == 'uniform':
    return frame_sampling.uniform_train_frames(total, p.num_frames, rng)
  return frame_sampling.train_frames(
    total, p.num_frames, p.frame_interval, rng, start_multiple
  )


def eval_frame_indices(
  preprocessing: Preprocessing, total: int
) -> Int[np.ndarray, ' t']:
  """Returns the frames of all test clips of a video, one clip after another."""
  p = preprocessing
  if p.sampling == 'uniform':
    indices = frame_sampling.uniform_eval_frames(total, p.num_frames)
  else:
    indices = frame_sampling.eval_frames(
      total, p.num_frames, p.frame_interval, p.num_clips
    )
  return indices.ravel()


def resize(
  frames: UInt8[np.ndarray, '*t h w 3'], height: int, width: int
) -> UInt8[np.ndarray, '*t h2 w2 3']:
  """Resizes frames (bilinear, without antialiasing)."""
  *times, old_height, old_width, _ = frames.shape
  if (old_height, old_width) == (height, width):
    return frames
  resized = np.empty((*times, height, width, 3), np.uint8)
  for index in np.ndindex(*times):
    resize_to(resized[index], frames[index])
  return resized


def resize_to(
  target: UInt8[np.ndarray, 'h2 w2 *c'], frame: UInt8[np.ndarray, 'h w *c']
) -> None:
  """Writes a resized frame or plane to `target`; see resize."""
  height, width = target.shape[:2]
  if frame.shape == target.shape:
    target[...] = frame
  else:
    cv2.resize(frame, (width, height), target, interpolation=cv2.INTER_LINEAR)


def resize_short_side(
  frames: UInt8[np.ndarray, '*t h w 3'], size: int
) -> UInt8[np.ndarray, '*t h2 w2 3']:
  """Resizes frames, keeping their aspect ratio, to a short side of `size`.

  Raises:
    VideoError: the frames are so narrow that the long side would be huge.
  """
  height, width = frames.shape[-3:-1]
  scale = size / min(height, width)
  new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
  if new_height * new_width > video_container.MAX_PIXELS:
    raise VideoError(
      f'has frames of {width}x{height} pixels, which are too narrow to be'
      f' resized to a short side of {size}'
    )
  return resize(frames, new_height, new_width)


def center_crop(
  frames: UInt8[np.ndarray, 't h w 3'], size: int
) -> UInt8[np.ndarray, 't size size 3']:
  """Returns the center square.

  Raises:
    ValueError: the frames are smaller than `size`.
  """
  top, left, _, _ = _center_box(frames.shape[1:3], size)
  return frames[:, top : top + size, left : left + size]


def three_crops(
  frames: UInt8[np.ndarray, 't h w 3'], size: int
) -> UInt8[np.ndarray, '3 t size size 3']:
  """Returns the left, right and center squares (top, bottom, center).

  The second offset is twice that of the center, as in the published
  implementation: one pixel from the border where the margin is odd.

  Raises:
    ValueError: the frames are smaller than `size`.
  """
  height, width = frames.shape[1:3]
  top, left, _, _ = _center_box((height, width), size)
  if width >= height:
    corners = [(top, 0), (top, 2 * left), (top, left)]
  else:
    corners = [(0, left), (2 * top, left), (top, left)]
  return np.stack([frames[:, y : y + size, x : x + size] for y, x in corners])


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
  """Draws a box of random area and aspect ratio.

  The area is uniform in 0.08..1 of the frame's, the aspect ratio log-uniform
  in 3/4..4/3. After ten draws that do not fit, the center square is taken
  (Szegedy et al., Going Deeper with Convolutions, arXiv 1409.4842).
  """
  height, width = size
  for _ in range(_MAX_CROP_ATTEMPTS):
    area = rng.uniform(_MIN_AREA, 1.0) * height * width
    aspect = _MAX_ASPECT ** rng.uniform(-1.0, 1.0)
    crop_width = round(math.sqrt(area * aspect))
    crop_height = round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      top = int(rng.integers(height - crop_height, endpoint=True))
      left = int(rng.integers(width - crop_width, endpoint=True))
      return top, left, crop_height, crop_width
  return _center_box(size, min(size))


def _center_box(frame_size: tuple[int, int], size: int) -> Box:
  height, width = frame_size
  if min(height, width) < size:
    raise ValueError(
      f'frames of {width}x{height} pixels are smaller than the crop of {size}'
    )
  return (height - size) // 2, (width - size) // 2, size, size


def _even_box(box: Box) -> Box:
  """Returns a box of even numbers, which has whole pixels of chroma."""
  top, left, height, width = (number - number % 2 for number in box)
  return top, left, max(2, height), max(2, width)


def _even_hull(boxes: list[Box]) -> Box:
  """Returns the smallest box of even numbers that has all boxes."""
  top, left, _, _ = (min(numbers) & ~1 for numbers in zip(*boxes, strict=True))
  bottom = max(box[0] + box[2] for box in boxes)
  right = max(box[1] + box[3] for box in boxes)
  return top, left, (bottom - top + 1) & ~1, (right - left + 1) & ~1


def to_yuv420(
  frame: UInt8[np.ndarray, 'size size 3'],
) -> UInt8[np.ndarray, 'rows size']:
  """Converts an RGB frame to YUV 4:2:0, BT.601 of limited range.

  The rows of luma are followed by both planes of chroma, blue and red, each of
  half the height and width and without gaps (I420). `size` is even.
  """
  return cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420)


def _resize_part_to(
  target: UInt8[np.ndarray, 'size size 3'] | UInt8[np.ndarray, 'rows size'],
  picture: Frame | Planes,
  box: Box,
) -> None:
  """Writes a resized part of a picture to `target`, RGB or as of to_yuv420."""
  part = crop(picture, box)
  size = target.shape[1]
  if isinstance(part, tuple):
    chroma = target[size:].reshape(2, size // 2, size // 2)
    for plane, out in zip(part, (target[:size], *chroma), strict=True):
      resize_to(out, plane)
  elif target.ndim == 2:
    target[...] = to_yuv420(resize(part, size, size))
  else:
    resize_to(target, part)


@dataclasses.dataclass(frozen=True)
class _FramesInMemory:
  """Frames with the methods of VideoReader that are used here."""

  frames: UInt8[np.ndarray, 't h w 3']
  frame_size = None

  def __len__(self) -> int:
    return len(self.frames)

  def get_frames(
    self, indices: Int[np.ndarray, ' n'], transform: Transform
  ) -> UInt8[np.ndarray, 'n h2 w2 3']:
    return np.stack([transform(self.frames[index]) for index in indices])

  def iter_frames(
    self, indices: Int[np.ndarray, ' n'], box: Box | None
  ) -> Iterator[tuple[int, Frame]]:
    assert box is None  # as frame_size is None
    return ((int(index), self.frames[index]) for index in np.unique(indices))


@contextlib.contextmanager
def _open(video: Video) -> Iterator[VideoReader | _FramesInMemory]:
  if isinstance(video, np.ndarray):
    if not video.size:
      raise VideoError('has no frames')
    yield _FramesInMemory(video)
  else:
    with VideoReader(video) as reader:
      yield reader
