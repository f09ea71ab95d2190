"""RandAugment (Cubuk et al., arXiv 1909.13719): the draws, and the host's part.

Of the operations drawn for a clip, the geometric ones become one warp, which is
done here; those on colours are left to the accelerator, and are only numbers
here.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math

import cv2
from jaxtyping import Float32, Float64, Int32, UInt8
import numpy as np

GEOMETRIC_OPS = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
# Batches hold their places in this list; the first stands for no operation.
COLOR_OPS = (
  'identity',
  'autocontrast',
  'equalize',
  'invert',
  'posterize',
  'solarize',
  'color',
  'contrast',
  'brightness',
  'sharpness',
)
MAX_MAGNITUDE = 10
# What the highest magnitude stands for.
_MAX_ANGLE = math.radians(30)
_MAX_SHEAR = 0.3
_MAX_SHIFT = 0.45  # of the frame's side


@dataclasses.dataclass(frozen=True)
class Operations:
  """What was drawn for a clip.

  Attributes:
    color_ops: places in COLOR_OPS, in the order to be done; 0 where a geometric
      one was drawn.
    magnitudes: of each, -1..1; the sign matters where there are two directions.
    matrix: all geometric ones as one affine map, from where a pixel (x, y, 1)
      is to where it goes.
  """

  color_ops: Int32[np.ndarray, ' ops']
  magnitudes: Float32[np.ndarray, ' ops']
  matrix: Float64[np.ndarray, '2 3']


def draw(
  rng: np.random.Generator, num_ops: int, magnitude: int, size: int
) -> Operations:
  """Draws operations for a clip, each as likely as any other, with repetitions.

  Args:
    rng: decides on operations and signs.
    num_ops: how many.
    magnitude: of all, 0..10.
    size: height and width of the clip, in pixels.
  """
  colors = COLOR_OPS[1:]
  drawn = rng.integers(len(colors) + len(GEOMETRIC_OPS), size=num_ops)
  signs = rng.choice((-1.0, 1.0), size=num_ops)
  magnitudes = (signs * magnitude / MAX_MAGNITUDE).astype(np.float32)
  matrix = np.eye(3)
  for op, signed in zip(drawn, magnitudes, strict=True):
    if op >= len(colors):
      name = GEOMETRIC_OPS[op - len(colors)]
      matrix = affine_map(name, float(signed), size) @ matrix
  color_ops = np.where(drawn < len(colors), drawn + 1, 0).astype(np.int32)
  return Operations(color_ops, magnitudes, matrix[:2])


def affine_map(
  name: str, magnitude: float, size: int
) -> Float64[np.ndarray, '3 3']:
  """A geometric operation, from where a pixel (x, y, 1) is to where it goes.

  Args:
    name: one of GEOMETRIC_OPS.
    magnitude: -1..1: up to 30 degrees (clockwise), a shear of 0.3, or 0.45 of
      the side.
    size: height and width of the frames; their centre stays where it is, but in
      translations.
  """
  matrix = np.eye(3)
  if name == 'rotate':
    angle = _MAX_ANGLE * magnitude
    cos, sin = math.cos(angle), math.sin(angle)
    matrix[:2, :2] = [[cos, -sin], [sin, cos]]
  elif name == 'shear_x':
    matrix[0, 1] = _MAX_SHEAR * magnitude
  elif name == 'shear_y':
    matrix[1, 0] = _MAX_SHEAR * magnitude
  else:
    axis = ('translate_x', 'translate_y').index(name)
    matrix[axis, 2] = _MAX_SHIFT * magnitude * size
    return matrix
  center = np.full(2, (size - 1) / 2)
  matrix[:2, 2] = center - matrix[:2, :2] @ center
  return matrix


def warp(
  frames: UInt8[np.ndarray, 't h w 3'],
  matrix: Float64[np.ndarray, '2 3'],
  fill: Sequence[float],
) -> UInt8[np.ndarray, 't h w 3']:
  """Maps all frames alike (bilinear).

  Args:
    frames: RGB.
    matrix: as in Operations.
    fill: RGB of what lies outside of the frames.
  """
  if np.array_equal(matrix, np.eye(2, 3)):
    return frames
  height, width = frames.shape[1:3]
  warped = np.empty_like(frames, order='C')
  for frame, target in zip(frames, warped, strict=True):
    cv2.warpAffine(
      frame,
      matrix,
      (width, height),
      target,
      flags=cv2.INTER_LINEAR,
      borderMode=cv2.BORDER_CONSTANT,
      borderValue=tuple(fill),
    )
  return warped
