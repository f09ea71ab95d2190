"""Prints predictions: as lines for people, or as JSON."""

import json
import os
import sys
from typing import Any, NamedTuple

from tqdm import auto as tqdm

from dualformer_jax.inference import timeline
from dualformer_jax.inference.drawing import Predictions

_BAR_LENGTH = 30  # characters


class Prediction(NamedTuple):
  """The prediction for a video or one of its windows."""

  video: str
  predictions: Predictions = []
  window: timeline.Window | None = None  # None for the whole video
  error: str = ''  # why the video cannot be scored, in one line


class Printer:
  """Prints predictions to stdout and errors to stderr, and counts errors."""

  def __init__(self, as_json: bool):
    self.num_failed = 0
    self._as_json = as_json
    self._last_title = ''
    is_terminal = sys.stdout.isatty()
    is_utf8 = (sys.stdout.encoding or '').lower() in ('utf-8', 'utf8')
    self._bar = ('\u2588' if is_utf8 else '#') if is_terminal else ''
    is_colored = is_terminal and 'NO_COLOR' not in os.environ
    self._color = ('\x1b[36m', '\x1b[0m') if is_colored else ('', '')

  def print(self, prediction: Prediction) -> None:
    """Prints the classes of a video or a window, or the error."""
    video, window = prediction.video, prediction.window
    content: dict[str, Any] = {'predictions': prediction.predictions}
    if prediction.error:
      self.num_failed += 1
      content = {'error': prediction.error}
      line = _printable(f'error: {video}: {prediction.error}')
      tqdm.tqdm.write(line, sys.stderr)
    elif window:
      content = timeline.as_dict(window)
    if self._as_json:
      _write(json.dumps({'video': video, **content}))
    elif not prediction.error:
      if window is None or self._last_title != video:
        _write(_printable(video))
      self._last_title = video
      _write(_line(window) if window else self._table(prediction))

  def _table(self, prediction: Prediction) -> str:
    rows = [(_printable(label), p) for label, p in prediction.predictions]
    width = max(len(label) for label, _ in rows)
    lines = []
    for label, p in rows:
      bar = (self._bar * round(_BAR_LENGTH * p)).join(self._color)
      lines.append(f'  {p:.4f}  {label:{width}}  {bar}'.rstrip())
    return '\n'.join(lines)


def _line(window: timeline.Window) -> str:
  start, end = map(timeline.format_time, (window.start, window.end))
  classes = ', '.join(f'{label} {p:.2f}' for label, p in window.predictions)
  return f'  {start} - {end}  {_printable(classes)}'


def _write(line: str) -> None:
  """Writes a line to stdout, above a progress bar if there is one."""
  tqdm.tqdm.write(line)
  sys.stdout.flush()


def _printable(text: str) -> str:
  """Returns text without control characters that a terminal would obey."""
  return ''.join(c if c.isprintable() else '?' for c in text)
