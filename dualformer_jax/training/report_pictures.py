"""Pictures of a report, drawn with OpenCV."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
from jaxtyping import Float, Int, UInt8
import numpy as np

Color = tuple[int, int, int]
Picture = UInt8[np.ndarray, 'h w 3']

_WHITE, _BLACK, _GRAY = (255, 255, 255), (30, 30, 30), (200, 200, 200)
_DARK_GRAY = (130, 130, 130)
# For what is right and what is wrong; also told apart by the colour-blind.
_BLUE, _ORANGE = (8, 69, 148), (200, 80, 0)
_FONT, _TEXT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.42
_MATRIX_SIZE, _MAX_CELL = 800, 44  # pixels
_MIN_NAMED_CELL, _MIN_COUNTED_CELL = 12, 24
_MAX_NAME = 20  # characters beside the matrix


def draw_confusion(
  confusion: Int[np.ndarray, 'k k'], class_names: Sequence[str]
) -> Picture:
  """Draws how many videos of each class (row) were taken for which, RGB.

  The colour is the square root of the share of a row, lest rare mistakes be
  invisible: blue on the diagonal, orange elsewhere. Few classes have their
  names and counts written out, many have the numbers of some.
  """
  k = len(confusion)
  cell = min(_MAX_CELL, max(1, _MATRIX_SIZE // k))
  shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
  strength = np.sqrt(shares)[..., None]
  if cell < _MIN_NAMED_CELL:
    strength = np.where(shares[..., None] > 0, np.maximum(strength, 0.4), 0)
  full = np.where(np.eye(k, dtype=bool)[..., None], _BLUE, _ORANGE)
  colors = (255 + strength * (full - 255.0)).round().astype(np.uint8)
  matrix = colors.repeat(cell, axis=0).repeat(cell, axis=1)

  if cell >= _MIN_NAMED_CELL:
    ticks = {i: _short(name) for i, name in enumerate(class_names)}
  else:
    step = next(n for n in (10, 20, 50, 100, 200, 500, k) if n * cell >= 40)
    ticks = {i: str(i) for i in range(0, k, step)}
  margin = 40 + max(_text_width(text) for text in ticks.values())
  size = k * cell
  picture = np.full((margin + size + 12, margin + size + 12, 3), 255, np.uint8)
  picture[margin : margin + size, margin : margin + size] = matrix
  if cell >= _MIN_NAMED_CELL:
    for place in range(0, size + 1, cell):
      picture[margin : margin + size, margin + place] = _GRAY
      picture[margin + place, margin : margin + size] = _GRAY
  if cell >= _MIN_COUNTED_CELL:
    for row, column in zip(*np.nonzero(confusion), strict=True):
      is_dark = strength[row, column, 0] > 0.6
      _write(
        picture,
        str(confusion[row, column]),
        (margin + (column + 0.5) * cell, margin + (row + 0.5) * cell),
        color=_WHITE if is_dark else _BLACK,
        max_width=cell - 4,
      )
  cv2.rectangle(
    picture, (margin, margin), (margin + size, margin + size), _BLACK
  )
  for i, text in ticks.items():
    place = margin + (i + 0.5) * cell
    away = margin - 6 - _text_width(text) / 2
    _write(picture, text, (away, place))
    _write(picture, text, (place, away), turned=True)
  middle = margin + size / 2
  _write(picture, 'predicted class', (middle, 12))
  _write(picture, 'true class', (12, middle), turned=True)
  return picture


def draw_reliability(
  counts: Int[np.ndarray, ' bins'],
  confidence: Float[np.ndarray, ' bins'],
  accuracy: Float[np.ndarray, ' bins'],
) -> Picture:
  """Draws the accuracy of each bin of confidence, and its videos below, RGB.

  Args:
    counts: number of videos in each of the equally wide bins.
    confidence: their mean confidence, 0..1.
    accuracy: their accuracy, 0..1.
  """
  left, top, size, low, strip = 70, 20, 400, 90, 80
  picture = np.full(
    (top + size + low + strip + 50, left + size + 30, 3), 255, np.uint8
  )
  bottom, base = top + size, top + size + low + strip

  def across(value: float) -> int:
    return round(left + value * size)

  def up(value: float) -> int:
    return round(bottom - value * size)

  for i, count in enumerate(counts):
    if not count:
      continue
    x = (across(i / len(counts)), across((i + 1) / len(counts)) - 2)
    cv2.rectangle(picture, (x[0], up(accuracy[i])), (x[1], bottom), _BLUE, -1)
    y = up(confidence[i])
    cv2.rectangle(picture, (x[0], y - 1), (x[1], y + 1), _ORANGE, -1)
    y = min(base - 1, base - round(strip * count / counts.max()))
    cv2.rectangle(picture, (x[0], y), (x[1], base), _DARK_GRAY, -1)
  cv2.line(picture, (left, bottom), (left + size, top), _BLACK, 1, cv2.LINE_AA)
  cv2.rectangle(picture, (left, top), (left + size, bottom), _BLACK)
  cv2.line(picture, (left, base), (left + size, base), _BLACK)
  for tenth in range(0, 11, 2):
    text = f'{tenth / 10:.1f}'
    for y in (bottom, base):
      _write(picture, text, (across(tenth / 10), y + 14))
    _write(picture, text, (left - 20, up(tenth / 10)))
  _write(picture, 'confidence', (left + size / 2, bottom + 34))
  _write(
    picture,
    f'videos by confidence, at most {counts.max()} in a bar',
    (left + size / 2, bottom + low - 14),
  )
  _write(picture, 'accuracy', (16, top + size / 2), turned=True)
  return picture


def _short(name: str) -> str:
  """A name as OpenCV's font can write it, beside the matrix."""
  name = ''.join(c if ' ' <= c <= '~' else '?' for c in name)
  return name if len(name) <= _MAX_NAME else f'{name[: _MAX_NAME - 2]}..'


def _text_width(text: str) -> int:
  return cv2.getTextSize(text, _FONT, _TEXT_SCALE, 1)[0][0]


def _write(
  picture: Picture,
  text: str,
  center: tuple[float, float],
  *,
  color: Color = _BLACK,
  max_width: int = 1000,
  turned: bool = False,
) -> None:
  """Writes text around a point (x, y); `turned` reads from below."""
  scale = _TEXT_SCALE * min(1.0, max_width / max(1, _text_width(text)))
  (width, height), _ = cv2.getTextSize(text, _FONT, scale, 1)
  if turned:
    patch = np.full((height + 8, width + 4, 3), 255, np.uint8)
    _write(patch, text, (width / 2 + 2, height / 2 + 4), color=color)
    patch = np.rot90(patch)
    y = max(0, round(center[1] - len(patch) / 2))
    x = max(0, round(center[0] - patch.shape[1] / 2))
    part = picture[y : y + len(patch), x : x + patch.shape[1]]
    # Neighbours may overlap.
    np.minimum(part, patch[: part.shape[0], : part.shape[1]], out=part)
    return
  place = (round(center[0] - width / 2), round(center[1] + height / 2))
  cv2.putText(picture, text, place, _FONT, scale, color, 1, cv2.LINE_AA)
