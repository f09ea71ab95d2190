"""Scores many videos, or the windows of long ones, batch by batch."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import itertools
from typing import Any

from jaxtyping import Float, UInt8
import numpy as np

from dualformer_jax.errors import UserError, error_reason
from dualformer_jax.inference import windows
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.inference.sources import Source
from dualformer_jax.inference.timeline import Window
from dualformer_jax.inference.windows import TimedFrame, WindowClip


@dataclasses.dataclass
class VideoScores:
  """Scores of a video: probabilities [k] and features [c] of each view."""

  name: str
  error: str = ''  # why the video cannot be scored, in one line
  num_views: int = 0
  probabilities: list[np.ndarray] = dataclasses.field(default_factory=list)
  features: list[np.ndarray] = dataclasses.field(default_factory=list)
  tokens: Float[np.ndarray, 'd h w c'] | None = None  # of the middle view


def score_videos(
  recognizer: Recognizer,
  videos: Iterable[Source],
  *,
  batch_size: int,
  num_threads: int = 4,
  with_tokens: bool = False,
) -> Iterator[VideoScores]:
  """Yields the scores of each video, in order, as soon as they are complete.

  A batch has views of several videos. `num_threads` videos are decoded at the
  same time.
  """
  waiting: collections.deque[VideoScores] = collections.deque()
  queue: collections.deque[tuple[VideoScores, np.ndarray]] = collections.deque()

  def decode(video: Source) -> UInt8[np.ndarray, 'v t h w 3']:
    if video.error:
      raise UserError(video.error)
    return recognizer.views(video.name)

  def complete(min_views: int) -> Iterator[VideoScores]:
    while len(queue) >= min_views:
      batch = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
      scores = _score(recognizer, [view for _, view in batch], batch_size)
      for (video, _), row, features in zip(batch, *scores, strict=True):
        video.probabilities.append(row)
        video.features.append(features)
    while waiting and waiting[0].num_views == len(waiting[0].features):
      yield waiting.popleft()

  for source, future in _prefetch(decode, videos, num_threads):
    video = VideoScores(source.name)
    waiting.append(video)
    try:
      views = future.result()
    except UserError as error:
      video.error = error_reason(error)
    else:
      video.num_views = len(views)
      queue.extend((video, view) for view in views)
      if with_tokens:
        # The middle crop is the last one.
        clips = views[-recognizer.preprocessing.num_clips :]
        middle = recognizer.normalize(clips[len(clips) // 2][None])
        video.tokens = recognizer.tokens(middle)[0]
    yield from complete(batch_size)
  yield from complete(1)


def score_windows(
  recognizer: Recognizer,
  frames: Iterable[TimedFrame],
  fps: float,
  *,
  window: float | None = None,
  stride: float | None = None,
  batch_size: int = 1,
  top_k: int = 5,
) -> Iterator[Window]:
  """Yields predictions for windows of a video that is read frame by frame.

  For the arguments see windows.window_clips.

  Raises:
    UserError: a window takes too much memory; or the video cannot be decoded,
      after the windows before the damage.
  """
  clips = windows.window_clips(
    frames, recognizer.preprocessing, fps, window, stride
  )

  def next_batch(_: int) -> tuple[list[WindowClip], UserError | None]:
    batch = []
    try:
      batch.extend(itertools.islice(clips, batch_size))
    except UserError as error:  # after the clips before the damage
      return batch, error
    return batch, None

  # The next batch is decoded while one is scored. One that is not full is the
  # last.
  for _, future in _prefetch(next_batch, itertools.count(), 1):
    batch, error = future.result()
    if batch:
      pixels = [window.clip for window in batch]
      probabilities, _ = _score(recognizer, pixels, batch_size)
      for row, scored in zip(probabilities, batch, strict=True):
        yield Window(scored.start, scored.end, recognizer.top(row, top_k))
    if error is not None:
      raise error
    if len(batch) < batch_size:
      return


def _score(
  recognizer: Recognizer, clips: list[np.ndarray], batch_size: int
) -> tuple[Float[np.ndarray, 'b k'], Float[np.ndarray, 'b c']]:
  """Scores clips, padded to a full batch so that one shape is compiled."""
  padding = clips[:1] * (batch_size - len(clips))
  probabilities, features = recognizer.score(np.stack(clips + padding))
  return probabilities[: len(clips)], features[: len(clips)]


def _prefetch(
  function: Callable[[Any], Any], items: Iterable[Any], num_threads: int
) -> Iterator[tuple[Any, futures.Future[Any]]]:
  """Yields each item with the future of `function(item)`, run in threads."""
  with futures.ThreadPoolExecutor(num_threads) as pool:
    pending = collections.deque()
    for item in items:
      pending.append((item, pool.submit(function, item)))
      if len(pending) > num_threads:
        yield pending.popleft()
    while pending:
      yield pending.popleft()
