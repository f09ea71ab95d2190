"""A test input that is the same on every machine, and small when compressed."""

from jaxtyping import UInt8
import numpy as np

_BLOCK = 16  # pixels of the same color in a row, and in a column


def golden_views(
  views: int, frames: int, height: int, width: int, channels: int
) -> UInt8[np.ndarray, 'views frames height width channels']:
  """Returns views of blocks whose colors change smoothly."""
  v, t, y, x, c = np.ogrid[
    :views, :frames, : -(-height // _BLOCK), : -(-width // _BLOCK), :channels
  ]
  phase = 0.7 * v + 0.2 * t + 2.1 * c
  waves = np.sin(0.43 * x + phase) + np.cos(0.36 * y - phase)
  colors = (127.5 + 63 * waves).astype(np.uint8)
  blocks = colors.repeat(_BLOCK, axis=2).repeat(_BLOCK, axis=3)
  return blocks[:, :, :height, :width]
