"""Predictions over time: as JSON, CSV and a chart, and drawn on frames."""

import collections
from collections.abc import Iterable, Iterator, Sequence
import csv
import io
import itertools
import json
from typing import NamedTuple

from jaxtyping import UInt8
import numpy as np

from dualformer_jax.inference import drawing
from dualformer_jax.inference.drawing import Frame, Predictions
from dualformer_jax.progress import format_duration

# The kinds of files that `encode` makes.
SUFFIXES = ('.json', '.csv', '.png')

# Sizes of the chart in pixels.
_WIDTH, _ROW, _GAP, _MARGIN = 1280, 40, 8, 16
_MAX_LABEL_WIDTH = 400
_TEXT_SCALE, _TICK_SCALE = 0.6, 0.5
_MAX_TICKS = 12
_TICK_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


class Window(NamedTuple):
  """Predictions for the part of a video from `start` to `end`, in seconds."""

  start: float
  end: float
  predictions: Predictions


def encode(suffix: str, video: str, windows: Sequence[Window]) -> bytes:
  """Returns a file, of one of SUFFIXES, with the windows of a video."""
  if suffix == '.png':
    return drawing.encode_png(draw_chart(video, windows))
  if suffix == '.json':
    content = {'video': video, 'windows': list(map(as_dict, windows))}
    return (json.dumps(content, indent=1) + '\n').encode()
  text = io.StringIO(newline='')
  writer = csv.writer(text)
  numbers = range(1, len(windows[0].predictions) + 1)
  columns = [(f'class_{n}', f'probability_{n}') for n in numbers]
  writer.writerow(['start', 'end', *itertools.chain(*columns)])
  for window in windows:
    times = (f'{window.start:.3f}', f'{window.end:.3f}')
    writer.writerow([*times, *itertools.chain(*window.predictions)])
  return text.getvalue().encode()


def as_dict(window: Window) -> dict[str, object]:
  """Returns a window for JSON, with times rounded to milliseconds."""
  start, end = round(window.start, 3), round(window.end, 3)
  return {'start': start, 'end': end, 'predictions': window.predictions}


def format_time(seconds: float) -> str:
  """Returns a time as [H:]MM:SS.S."""
  minutes, rest = divmod(round(seconds, 1), 60)
  hours, minutes = divmod(int(minutes), 60)
  text = f'{minutes:02d}:{rest:04.1f}'
  return f'{hours}:{text}' if hours else text


def display_spans(windows: Sequence[Window]) -> list[tuple[float, float]]:
  """Returns the start and end of each window, cut where the next one starts."""
  next_starts = [*(window.start for window in windows[1:]), np.inf]
  return [
    (window.start, min(window.end, next_start))
    for window, next_start in zip(windows, next_starts, strict=True)
  ]


def draw_chart(
  title: str, windows: Sequence[Window]
) -> UInt8[np.ndarray, 'h w 3']:
  """Draws probabilities over time as an RGB picture, 1280 pixels wide.

  The first row has the color of the most probable class of each window. Below,
  each class has a row, filled in proportion to its probability. The classes
  with the largest sum of probability over time are shown.
  """
  spans = display_spans(windows)
  end = spans[-1][1]
  totals: dict[str, float] = collections.defaultdict(float)
  for window, (start, stop) in zip(windows, spans, strict=True):
    for name, probability in window.predictions:
      totals[name] += probability * (stop - start)
  names = sorted(totals, key=lambda name: -totals[name])[: len(drawing.PALETTE)]

  labels = [
    drawing.fit_text(name, _TEXT_SCALE, _MAX_LABEL_WIDTH)
    for name in ['top class', *names]
  ]
  left = 2 * _MARGIN + max(drawing.text_width(x, _TEXT_SCALE) for x in labels)
  width = _WIDTH - left - _MARGIN
  scale = width / end  # pixels per second
  tops = [3 * _MARGIN + i * (_ROW + _GAP) for i in range(len(labels))]
  bottom = tops[-1] + _ROW
  image = np.full((bottom + 3 * _MARGIN, _WIDTH, 3), 255, np.uint8)
  title = drawing.fit_text(title, _TEXT_SCALE, _WIDTH - left)
  drawing.draw_text(image, title, (left, 2 * _MARGIN), _TEXT_SCALE)
  for label, top in zip(labels, tops, strict=True):
    drawing.draw_text(image, label, (_MARGIN, top + _ROW - 12), _TEXT_SCALE)
    image[top : top + _ROW, left : left + width] = 240

  for window, (start, stop) in zip(windows, spans, strict=True):
    first = left + int(start * scale)
    # A window covers at least one column, however short it is.
    last = left + max(int(stop * scale), int(start * scale) + 1)
    for rank, (name, probability) in enumerate(window.predictions):
      if name not in names:
        continue
      row = names.index(name)
      base = tops[row + 1] + _ROW
      filled = base - round(probability * _ROW)
      image[filled:base, first:last] = drawing.PALETTE[row]
      if rank == 0:
        image[tops[0] : tops[0] + _ROW, first:last] = drawing.PALETTE[row]

  step = next(
    (s for s in _TICK_SECONDS if end / s <= _MAX_TICKS), end / _MAX_TICKS
  )
  for second in np.arange(0, end, step):
    x = left + int(second * scale)
    image[bottom : bottom + 6, x] = 0
    text = format_duration(second)
    x = min(x, _WIDTH - drawing.text_width(text, _TICK_SCALE))
    y = bottom + 2 * _MARGIN - 4
    drawing.draw_text(image, text, (x, y), _TICK_SCALE)
  return image


def label_frames(
  frames: Iterable[tuple[float, Frame]], windows: Sequence[Window]
) -> Iterator[tuple[float, Frame]]:
  """Draws on each frame the predictions of the window with nearest middle."""
  middles = np.array([(window.start + window.end) / 2 for window in windows])
  # From each of these times on, the next window is the nearest.
  changes = (middles[1:] + middles[:-1]) / 2
  for time, frame in frames:
    nearest = int(np.searchsorted(changes, time, side='right'))
    yield time, drawing.draw_predictions(frame, windows[nearest].predictions)
