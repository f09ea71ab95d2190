"""Cuts a video that is read frame by frame into windows, by frame times."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Int, UInt8
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.inference.drawing import Frame
from dualformer_jax.input_pipeline import frame_sampling, transforms
from dualformer_jax.input_pipeline.transforms import Preprocessing

# Seconds after the video's first frame, and the frame shown from then on.
TimedFrame = tuple[float, Frame]

_MAX_BYTES = 2 << 30
# Times in files are rounded, to milliseconds in WebM.
_EPSILON = 1e-3


class WindowClip(NamedTuple):
  """The clip of a window, which is from `start` to `end` in seconds."""

  start: float
  end: float
  clip: UInt8[np.ndarray, 't size size 3']


def window_clips(
  frames: Iterable[TimedFrame],
  preprocessing: Preprocessing,
  fps: float,
  window: float | None = None,
  stride: float | None = None,
) -> Iterator[WindowClip]:
  """Yields the windows of a video.

  A window lasts `window` seconds; by default it has as many frames as a clip
  spans. Windows start every `stride` seconds, by default back to back. Windows
  in which no frame starts are skipped. If the last one ends before the video, a
  window that ends with the video is added. A video shorter than a window is one
  window, whose frames are repeated.

  Args:
    frames: frames in order.
    preprocessing: size and number of the frames of a clip.
    fps: average frames per second.
    window: length of a window in seconds.
    stride: seconds from the start of a window to the next.

  Raises:
    UserError: a window takes too much memory.
  """
  p = preprocessing
  length = p.num_frames * p.frame_interval
  if window is not None:
    length = max(1, round(window * fps))
  if length * p.image_size**2 * 3 > _MAX_BYTES:
    raise UserError(
      f'a window of {length / fps:g} s takes more than {_MAX_BYTES >> 30} GiB; '
      'choose a shorter --window'
    )
  step = window if stride is None else stride
  times: list[float] = []  # of the frames that windows to come may have
  recent: list[Frame] = []
  start: int | None = None  # index in them of the first frame of the window
  covered = 0  # frames before this index are in a window
  number = 0  # of the window

  def starts(index: int) -> bool:
    """Returns whether a window starts with a frame; sets its number."""
    nonlocal number
    if step is None:
      return index >= covered
    found = max(number, int((times[index] + _EPSILON) // step))
    begin = found * step - _EPSILON
    end = np.inf if window is None else begin + window
    if not begin <= times[index] < end:
      return False
    number = found
    return True

  def clip(index: int, end: float) -> WindowClip:
    if window is None:  # Frames are the unit of time.
      shown = range(len(times) - index)
      indices = _sample(p, shown, len(shown), length, 1)
    else:
      indices = _sample(p, times[index:], end, window, fps)
    chosen = [recent[index + i] for i in indices]
    return WindowClip(times[index], end, np.stack(chosen))

  def complete(time: float) -> Iterator[WindowClip]:
    """Yields the windows that end before a frame of this time."""
    nonlocal start, covered, number
    while start is not None and (
      len(times) - start == length
      if window is None
      else time >= number * (step or window) + window - _EPSILON
    ):
      yield clip(start, time)
      covered, number = len(times), number + 1
      later = range(start + 1, covered)
      start = next((index for index in later if starts(index)), None)

  for time, frame in frames:
    yield from complete(time)
    resized = transforms.resize_short_side(frame[None], p.image_size)
    # A copy, so that the whole frame can be freed.
    recent.append(transforms.center_crop(resized, p.image_size)[0].copy())
    times.append(time)
    if start is None and starts(len(times) - 1):
      start = len(times) - 1
    # The last window may reach back to before the next one.
    while start != 0 and (
      len(times) > length if window is None else times[0] < time - window
    ):
      del times[0], recent[0]
      covered -= 1
      start = None if start is None else start - 1
  if not times:
    return
  # The last frame is shown as long as the one before.
  gap = times[-1] - times[-2] if len(times) > 1 else 1 / fps
  end = round(times[-1] + (gap if gap > 0 else 1 / fps), 6)
  yield from complete(end)
  if start is not None and len(times) > covered:
    if window is None:
      start = max(0, len(times) - length)
    else:
      start = int(np.searchsorted(times, end - window - _EPSILON))
    yield clip(start, end)


def _sample(
  p: Preprocessing,
  times: Sequence[float],
  end: float,
  window: float,
  fps: float,
) -> Int[np.ndarray, ' num_frames']:
  """Returns the indices of the frames that are evenly spaced over a window."""
  duration = end - times[0]
  if p.sampling == 'uniform':
    count = max(1, round(duration * fps))
    [indices] = frame_sampling.uniform_eval_frames(count, p.num_frames)
    moments = times[0] + _EPSILON + indices / fps
  else:
    # A window that is shorter than `window` is a whole video, and is repeated.
    offsets = np.arange(p.num_frames) * window / p.num_frames
    moments = times[0] + (offsets + _EPSILON) % duration
  return np.searchsorted(times, moments, side='right') - 1
