"""What a model says in the course of a video: as files, and drawn on frames."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
import csv
import dataclasses
import io
import itertools
import json
import unicodedata

import cv2
from jaxtyping import UInt8
import numpy as np

from dualformer_jax.input_pipeline import decoding

Frame = decoding.Frame
Predictions = list[tuple[str, float]]

# The kinds of files that `encode` makes.
SUFFIXES = ('.json', '.csv', '.png')

# Of the picture, in pixels.
_WIDTH, _ROW, _GAP, _MARGIN = 1280, 40, 8, 16
_MAX_LABEL = 400
_MAX_CLASSES = 10
_MAX_TICKS = 12
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_CAPITAL = 22  # height of a capital letter of that font at scale 1
# RGB; neighbours are easy to tell apart, also for the colour-blind.
_COLORS = (
  (0, 114, 178),
  (230, 159, 0),
  (0, 158, 115),
  (213, 94, 0),
  (204, 121, 167),
  (86, 180, 233),
  (150, 130, 0),
  (120, 94, 240),
  (130, 80, 50),
  (90, 90, 90),
)
_NICE_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


@dataclasses.dataclass(frozen=True)
class Window:
  """What a model says of a part of a video.

  Attributes:
    start: seconds from the first frame to that of the window.
    end: to the first frame after it.
    predictions: the most probable classes and their probabilities.
  """

  start: float
  end: float
  predictions: Predictions


def encode(suffix: str, video: str, windows: Sequence[Window]) -> bytes:
  """The content of a file that tells of the windows of a video.

  Args:
    suffix: one of SUFFIXES.
    video: its name.
    windows: in the order of time, one at least.
  """
  if suffix == '.png':
    bgr = cv2.cvtColor(picture(video, windows), cv2.COLOR_RGB2BGR)
    return cv2.imencode('.png', bgr)[1].tobytes()
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
  """A window as JSON has it; times to the millisecond."""
  return {
    'start': round(window.start, 3),
    'end': round(window.end, 3),
    'predictions': window.predictions,
  }


def clock(seconds: float, digits: int = 1) -> str:
  """A time as [hours:]minutes:seconds."""
  minutes, rest = divmod(round(seconds, digits), 60)
  hours, minutes = divmod(int(minutes), 60)
  width = 3 + digits if digits else 2
  text = f'{minutes:02d}:{rest:0{width}.{digits}f}'
  return f'{hours}:{text}' if hours else text


def picture(
  title: str, windows: Sequence[Window]
) -> UInt8[np.ndarray, 'h w 3']:
  """Draws classes over time, RGB: a row for each, as high as it is probable.

  The row on top has, at each time, the colour of the most probable class. The
  classes are those that are probable for longest, ten at most.
  """
  # Where windows overlap, each is shown until the next one starts.
  starts = [window.start for window in windows]
  ends = [
    min(window.end, after)
    for window, after in zip(windows, [*starts[1:], np.inf], strict=True)
  ]
  weights: dict[str, float] = collections.defaultdict(float)
  for window, start, end in zip(windows, starts, ends, strict=True):
    for name, probability in window.predictions:
      weights[name] += probability * (end - start)
  names = sorted(weights, key=lambda name: -weights[name])[:_MAX_CLASSES]

  labels = [_fitting(name, 0.6, _MAX_LABEL) for name in ['top class', *names]]
  left = 2 * _MARGIN + max(_text_width(label, 0.6) for label in labels)
  width = _WIDTH - left - _MARGIN
  scale = width / ends[-1]
  tops = [3 * _MARGIN + i * (_ROW + _GAP) for i in range(len(labels))]
  bottom = tops[-1] + _ROW
  image = np.full((bottom + 3 * _MARGIN, _WIDTH, 3), 255, np.uint8)
  _text(image, _fitting(title, 0.6, _WIDTH - left), (left, 2 * _MARGIN), 0.6)
  for label, top in zip(labels, tops, strict=True):
    _text(image, label, (_MARGIN, top + _ROW - 12), 0.6)
    image[top : top + _ROW, left : left + width] = 240

  for window, start, end in zip(windows, starts, ends, strict=True):
    first = left + int(start * scale)
    # Very many windows are narrower than a pixel.
    last = left + max(int(end * scale), int(start * scale) + 1)
    for rank, (name, probability) in enumerate(window.predictions):
      if name in names:
        row = names.index(name)
        base = tops[row + 1] + _ROW
        image[base - round(probability * _ROW) : base, first:last] = _COLORS[
          row
        ]
        if rank == 0:
          image[tops[0] : tops[0] + _ROW, first:last] = _COLORS[row]

  step = next(
    (s for s in _NICE_SECONDS if ends[-1] / s <= _MAX_TICKS),
    ends[-1] / _MAX_TICKS,
  )
  for second in np.arange(0, ends[-1], step):
    x = left + int(second * scale)
    image[bottom : bottom + 6, x] = 0
    text = clock(second, 0)
    place = min(x, _WIDTH - _text_width(text, 0.5))
    _text(image, text, (place, bottom + 2 * _MARGIN - 4), 0.5)
  return image


def labelled(
  frames: Iterable[Frame], fps: float, windows: Sequence[Window]
) -> Iterator[Frame]:
  """The frames of a video, each with the predictions of its window on it.

  Where windows overlap or leave gaps it is the one whose middle is nearest.
  """
  middles = [(window.start + window.end) / 2 for window in windows]
  place = 0
  for index, frame in enumerate(frames):
    time = (index + 0.5) / fps
    while place + 1 < len(windows) and (
      abs(middles[place + 1] - time) <= abs(middles[place] - time)
    ):
      place += 1
    yield label(frame, windows[place].predictions)


def label(frame: Frame, predictions: Predictions) -> Frame:
  """Returns a copy with as many lines of predictions as it has place for.

  Behind each line is a bar, as long as the class is probable.
  """
  frame = frame.copy()
  height, width = frame.shape[:2]
  line = max(12, min(height, width) // 22)
  scale = 0.6 * line / _CAPITAL
  texts = [
    _fitting(f'{probability:.2f} {name}', scale, width - line)
    for name, probability in predictions[: height // line]
  ]
  if not texts:
    return frame
  longest = max(_text_width(text, scale) for text in texts)
  panel = min(width, max(line + longest, width // 3))
  frame[: line * len(texts), :panel] //= 3
  for i, text in enumerate(texts):
    name, probability = predictions[i]
    bar = frame[line * i + 1 : line * (i + 1), : round(probability * panel)]
    bar //= 2
    bar += np.array(_COLORS[0], np.uint8) // 2
    _text(frame, text, (line // 2, line * (i + 1) - line // 5), scale, 255)
  return frame


def _text(
  image: Frame,
  text: str,
  place: tuple[int, int],
  scale: float,
  brightness: int = 0,
) -> None:
  color = (brightness,) * 3
  cv2.putText(image, text, place, _FONT, scale, color, 1, cv2.LINE_AA)


def _text_width(text: str, scale: float) -> int:
  return cv2.getTextSize(text, _FONT, scale, 1)[0][0]


def _fitting(text: str, scale: float, width: int) -> str:
  """The text in letters that OpenCV has, cut to a width in pixels."""
  letters = unicodedata.normalize('NFKD', text)
  text = ''.join(
    c if c.isascii() and c.isprintable() else '?'
    for c in letters
    if not unicodedata.combining(c)
  )
  if _text_width(text, scale) <= width:
    return text
  while text and _text_width(text + '...', scale) > width:
    text = text[:-1]
  return text + '...'
