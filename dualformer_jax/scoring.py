"""Scores many videos, or the windows of long ones, batch by batch."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int, UInt8
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding, frame_sampling, views
from dualformer_jax.timeline import Window

if TYPE_CHECKING:
  from dualformer_jax.recognizer import Recognizer

_MAX_WINDOW_BYTES = 2 << 30


@dataclasses.dataclass
class Result:
  """What is known of a video.

  Attributes:
    name: its path.
    error: why it cannot be scored, in one line; '' if it can.
    num_views: how many views it has, once it is decoded.
    probabilities: of the classes, of each view that is scored.
    features: of each view that is scored.
    tokens: features of each token of the middle view, where asked for.
  """

  name: str
  error: str = ''
  num_views: int = 0
  probabilities: list[np.ndarray] = dataclasses.field(default_factory=list)
  features: list[np.ndarray] = dataclasses.field(default_factory=list)
  tokens: Float[np.ndarray, 'd h w c'] | None = None


def score_videos(
  recognizer: Recognizer,
  videos: Iterable[tuple[str, str]],
  *,
  batch_size: int,
  num_threads: int = 4,
  with_tokens: bool = False,
) -> Iterator[Result]:
  """Yields the videos in their order, each as soon as it is scored.

  Args:
    recognizer: the model.
    videos: name of each, and '' or why it is not to be scored.
    batch_size: views scored at a time, of any videos.
    num_threads: videos decoded at a time; about as many wait, decoded.
    with_tokens: whether to fill in `tokens`.
  """
  waiting: collections.deque[Result] = collections.deque()
  queue: collections.deque[tuple[Result, np.ndarray]] = collections.deque()

  def decode(video: tuple[str, str]) -> np.ndarray | None:
    name, error = video
    return None if error else recognizer.views(name)

  def score_batch() -> None:
    batch = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
    scores = _score(recognizer, [view for _, view in batch], batch_size)
    for (result, _), *score in zip(batch, *scores, strict=True):
      result.probabilities.append(score[0])
      result.features.append(score[1])

  def scored() -> Iterator[Result]:
    while waiting and waiting[0].num_views == len(waiting[0].features):
      yield waiting.popleft()

  for video, future in _ahead(decode, videos, num_threads):
    result = Result(*video)
    waiting.append(result)
    decoded = None
    try:
      decoded = future.result()
    except UserError as error:
      result.error = getattr(error, 'reason', str(error))
    if decoded is not None:
      result.num_views = len(decoded)
      queue.extend((result, view) for view in decoded)
      if with_tokens:
        # The last crop is that in the middle.
        clips = decoded[-recognizer.preprocessing.num_clips :]
        middle = recognizer.normalize(clips[len(clips) // 2][None])
        result.tokens = recognizer.tokens(middle)[0]
    while len(queue) >= batch_size:
      score_batch()
    yield from scored()
  while queue:
    score_batch()
  yield from scored()


def score_windows(
  recognizer: Recognizer,
  frames: Iterable[decoding.Frame],
  fps: float,
  *,
  window: float | None = None,
  stride: float | None = None,
  batch_size: int = 1,
  top_k: int = 5,
) -> Iterator[Window]:
  """Yields the windows of a video that is read once, frame by frame.

  Args:
    recognizer: the model.
    frames: of the video, RGB.
    fps: frames per second.
    window: seconds that one lasts; None for as many frames as a clip spans.
    stride: seconds from one to the next; None for as many as one lasts.
    batch_size: windows scored at a time.
    top_k: how many classes to tell of.

  Raises:
    UserError: while iterating, after the windows before, where the video cannot
      be decoded; or windows take too much memory.
  """
  p = recognizer.preprocessing
  length = p.num_frames * p.frame_interval
  if window is not None:
    length = max(1, round(window * fps))
  step = length if stride is None else max(1, round(stride * fps))
  if length * p.image_size**2 * 3 > _MAX_WINDOW_BYTES:
    raise UserError(
      f'a window of {length / fps:g} s is {length} frames, which take more than'
      f' {_MAX_WINDOW_BYTES >> 30} GiB; choose a shorter --window'
    )
  clips = window_clips(frames, p, length, step)

  def take(_) -> tuple[list[Any], UserError | None]:
    taken = []
    try:
      for clip in itertools.islice(clips, batch_size):
        taken.append(clip)
    except UserError as error:
      return taken, error
    return taken, None

  # Without end, but the batch that is not full is the last.
  for _, future in _ahead(take, itertools.count(), 1):
    batch, error = future.result()
    if batch:
      starts, counts, pixels = zip(*batch, strict=True)
      probabilities, _ = _score(recognizer, list(pixels), batch_size)
      for row, start, count in zip(probabilities, starts, counts, strict=True):
        predictions = recognizer.top(row, top_k)
        yield Window(start / fps, (start + count) / fps, predictions)
    if error is not None:
      raise error
    if len(batch) < batch_size:
      return


def window_clips(
  frames: Iterable[decoding.Frame],
  preprocessing: views.Preprocessing,
  length: int,
  stride: int,
) -> Iterator[tuple[int, int, UInt8[np.ndarray, 't size size 3']]]:
  """The clip of each window that slides over a video.

  Windows begin every `stride` frames. The last one ends with the video, if that
  goes on after the others. A video that is shorter than a window is one.

  Args:
    frames: of the video, RGB; no more than `length` are kept, at the model's
      size.
    preprocessing: how many frames a clip has, and of what size.
    length: of a window, in frames.
    stride: from one window's first frame to that of the next.

  Yields:
    The window's first frame, its number of frames, and a clip: the middle
    square of frames spread evenly over the window.
  """
  recent: collections.deque[np.ndarray] = collections.deque(maxlen=length)
  size = preprocessing.image_size
  count = start = covered = 0

  def window() -> tuple[int, int, np.ndarray]:
    picked = _spread(preprocessing, len(recent), length)
    clip = np.stack([recent[index] for index in picked])
    return count - len(recent), len(recent), clip

  for frame in frames:
    resized = views.resize_short_side(frame[None], size)
    # A copy, lest the whole frame is kept.
    recent.append(views.center_crop(resized, size)[0].copy())
    count += 1
    if count == start + length:
      yield window()
      start, covered = start + stride, count
  if count > max(start, covered):
    yield window()


def _spread(
  p: views.Preprocessing, count: int, length: int
) -> Int[np.ndarray, ' t']:
  """Which of a window's `count` frames make its clip; too few are looped."""
  if p.sampling == 'uniform':
    return frame_sampling.uniform_test_frames(count, p.num_frames)[0]
  return np.arange(p.num_frames) * length // p.num_frames % count


def _score(
  recognizer: Recognizer, clips: list[np.ndarray], batch_size: int
) -> tuple[Float[np.ndarray, 'b k'], Float[np.ndarray, 'b c']]:
  """Scores up to a batch of clips, as a whole one: one shape to compile."""
  padding = clips[:1] * (batch_size - len(clips))
  probabilities, features = recognizer.score(np.stack(clips + padding))
  return probabilities[: len(clips)], features[: len(clips)]


def _ahead(
  function: Callable[[Any], Any], items: Iterable[Any], num_threads: int
) -> Iterator[tuple[Any, futures.Future[Any]]]:
  """Yields items and calls of a function that run ahead, in threads."""
  with futures.ThreadPoolExecutor(num_threads) as pool:
    pending = collections.deque()
    for item in items:
      pending.append((item, pool.submit(function, item)))
      if len(pending) > num_threads:
        yield pending.popleft()
    while pending:
      yield pending.popleft()
