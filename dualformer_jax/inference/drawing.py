"""Draws heat maps, token values, labels and text, and encodes pictures."""

from collections.abc import Sequence
import io
from typing import IO
import unicodedata

import cv2
from jaxtyping import Float, Shaped, UInt8
import numpy as np
from PIL import Image

Frame = UInt8[np.ndarray, 'h w 3']
Frames = UInt8[np.ndarray, 't h w 3']
Predictions = list[tuple[str, float]]

COLORMAPS = {
  name.removeprefix('COLORMAP_').lower(): value
  for name, value in sorted(vars(cv2).items())
  if name.startswith('COLORMAP_')
}

WHITE = (255, 255, 255)
# Neighbors are easy to distinguish, also for the color-blind.
PALETTE = np.frombuffer(
  bytes.fromhex(
    '0072b2 e69f00 009e73 d55e00 cc79a7 56b4e9 968200 785ef0 825032 5a5a5a'
  ),
  np.uint8,
).reshape(-1, 3)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_CAPITAL_HEIGHT = 22  # pixels, at scale 1
_LEGEND_LINE = 16  # pixels


def colorize(heat: Float[np.ndarray, 't h w'], colormap: str) -> Frames:
  """Returns RGB colors of values between 0 and 1; see COLORMAPS."""
  levels = np.rint(255 * heat).astype(np.uint8)
  colors = [cv2.applyColorMap(x, COLORMAPS[colormap]) for x in levels]
  return np.stack(colors)[..., ::-1]


def blend(frames: Frames, colors: Frames, opacity: float) -> Frames:
  """Returns frames covered by colors of an opacity between 0 and 1."""
  alpha = np.float32(opacity)
  return np.rint((1 - alpha) * frames + alpha * colors).astype(np.uint8)


def draw_heat(
  frames: Frames,
  heat: Float[np.ndarray, 't y x'],
  colormap: str,
  opacity: float,
) -> Frames:
  """Returns frames covered by heat between 0 and 1, resized to the frames."""
  height, width = frames.shape[1:3]
  heat = np.stack([cv2.resize(values, (width, height)) for values in heat])
  return blend(frames, colorize(heat, colormap), opacity)


def token_pixels(
  tokens: Shaped[np.ndarray, 'd y x *c'], frames: Frames
) -> Shaped[np.ndarray, 't h w *c']:
  """Returns, for each pixel of the frames, the value of its token."""
  indices = [
    np.arange(length) * grid // length
    for length, grid in zip(frames.shape, tokens.shape[:3], strict=False)
  ]
  return tokens[np.ix_(*indices)]


def outline_token(
  frames: Frames, token: tuple[int, int, int], grid: tuple[int, ...]
) -> None:
  """Draws a white frame around a token of a grid, in place."""
  is_token = np.zeros(grid, bool)
  is_token[token] = True
  for frame, pixels in zip(frames, token_pixels(is_token, frames), strict=True):
    if pixels.any():
      ys, xs = map(np.ndarray.tolist, np.nonzero(pixels))
      cv2.rectangle(frame, (xs[0], ys[0]), (xs[-1], ys[-1]), WHITE)


def draw_legend(
  texts: Sequence[str], width: int
) -> UInt8[np.ndarray, 'h width 3']:
  """Returns a picture with a line for each text and its color of PALETTE."""
  image = np.zeros((_LEGEND_LINE * len(texts), width, 3), np.uint8)
  for i, text in enumerate(texts):
    top = _LEGEND_LINE * i
    image[top + 2 : top + 14, 2:14] = PALETTE[i]
    text = fit_text(text, 0.4, width - 18)
    draw_text(image, text, (18, top + 12), 0.4, WHITE)
  return image


def draw_predictions(frame: Frame, predictions: Predictions) -> Frame:
  """Returns a copy of a frame with a line of text for each class.

  A bar behind each line is as long as the class is probable. Classes for which
  the frame is too small are left out.
  """
  frame = frame.copy()
  height, width = frame.shape[:2]
  line = max(12, min(height, width) // 22)
  scale = 0.6 * line / _CAPITAL_HEIGHT
  predictions = predictions[: height // line]
  texts = [
    fit_text(f'{probability:.2f} {name}', scale, width - line)
    for name, probability in predictions
  ]
  longest = max((text_width(text, scale) for text in texts), default=0)
  panel = min(width, max(line + longest, width // 3))
  frame[: line * len(texts), :panel] //= 3
  for i, text in enumerate(texts):
    length = round(predictions[i][1] * panel)
    bar = frame[line * i + 1 : line * (i + 1), :length]
    bar //= 2
    bar += PALETTE[0] // 2
    position = (line // 2, line * (i + 1) - line // 5)
    draw_text(frame, text, position, scale, WHITE)
  return frame


def draw_text(
  image: Frame,
  text: str,
  position: tuple[int, int],
  scale: float,
  color: tuple[int, int, int] = (0, 0, 0),
) -> None:
  """Draws text in place; `position` is x and y of its lower left corner."""
  cv2.putText(image, text, position, _FONT, scale, color, 1, cv2.LINE_AA)


def text_width(text: str, scale: float) -> int:
  """Returns the width in pixels of text that `draw_text` draws."""
  return cv2.getTextSize(text, _FONT, scale, 1)[0][0]


def fit_text(text: str, scale: float, width: int) -> str:
  """Returns text in the letters that OpenCV has, cut to a width in pixels."""
  if int(cv2.__version__.split('.')[0]) < 5:  # it has the letters of ASCII
    text = ''.join(
      c if c.isascii() else '?'
      for c in unicodedata.normalize('NFKD', text)
      if not unicodedata.combining(c)
    )
  text = unicodedata.normalize('NFC', text)
  text = ''.join(c if c.isprintable() else '?' for c in text)
  if text_width(text, scale) <= width:
    return text
  while text and text_width(text + '...', scale) > width:
    text = text[:-1]
  return text + '...'


def encode_png(image: Frame) -> bytes:
  """Returns the content of a PNG file."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return file.getvalue()


def write_gif(file: IO[bytes], frames: Frames, fps: float) -> None:
  """Writes a GIF file that repeats forever."""
  # k-means makes the palettes of smooth heat maps more exact.
  first, *others = (
    Image.fromarray(frame).quantize(256, kmeans=1) for frame in frames
  )
  # GIF counts in hundredths of a second.
  times = np.rint(np.arange(len(frames) + 1) * 100 / fps).astype(int)
  first.save(
    file,
    'GIF',
    save_all=True,
    append_images=others,
    duration=(10 * np.diff(times)).tolist(),
    loop=0,
  )
