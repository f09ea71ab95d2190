"""Heat and other values of tokens, drawn over the frames of a clip."""

import cv2
from jaxtyping import Float, Shaped, UInt8
import numpy as np

from dualformer_jax.input_pipeline import decoding
from dualformer_jax.input_pipeline.views import Preprocessing

COLORMAPS = {
  name.removeprefix('COLORMAP_').lower(): value
  for name, value in sorted(vars(cv2).items())
  if name.startswith('COLORMAP_')
}


def colors(
  heat: Float[np.ndarray, 't h w'], colormap: str = 'turbo'
) -> UInt8[np.ndarray, 't h w 3']:
  """Returns the colours, RGB, of values from 0 to 1.

  Args:
    heat: the values.
    colormap: one of COLORMAPS.
  """
  levels = np.rint(255 * heat).astype(np.uint8)
  return np.stack(
    [cv2.applyColorMap(x, COLORMAPS[colormap])[..., ::-1] for x in levels]
  )


def blend(
  pictures: UInt8[np.ndarray, 't h w 3'],
  colors: UInt8[np.ndarray, 't h w 3'],
  opacity: float = 0.5,
) -> UInt8[np.ndarray, 't h w 3']:
  """Returns the pictures with colours over them; opacity is from 0 to 1."""
  share = np.float32(opacity)
  mixed = [
    (1 - share) * picture + share * color
    for picture, color in zip(pictures, colors, strict=True)
  ]
  return np.rint(mixed).astype(np.uint8)


def draw_heat(
  pictures: UInt8[np.ndarray, 't h w 3'],
  heat: Float[np.ndarray, 't y x'],
  colormap: str = 'turbo',
  opacity: float = 0.5,
) -> UInt8[np.ndarray, 't h w 3']:
  """Returns the pictures with heat over them, which may have another size."""
  height, width = pictures.shape[1:3]
  heat = np.stack([cv2.resize(frame, (width, height)) for frame in heat])
  return blend(pictures, colors(heat, colormap), opacity)


def draw_cells(
  tokens: Shaped[np.ndarray, 'd y x *c'], pictures: UInt8[np.ndarray, 't h w 3']
) -> Shaped[np.ndarray, 't h w *c']:
  """Returns the value of the token at each pixel."""
  places = [
    np.arange(length) * cells // length
    for length, cells in zip(pictures.shape, tokens.shape[:3], strict=False)
  ]
  return tokens[np.ix_(*places)]


def clip_fps(video: str, preprocessing: Preprocessing) -> float:
  """Returns the frames per second at which a clip is as fast as the video."""
  rate = decoding.frame_rate(video)
  if preprocessing.sampling == 'dense':
    return rate / preprocessing.frame_interval
  seconds = decoding.duration(video)
  return min(rate, preprocessing.num_frames / seconds) if seconds else rate
