"""RandAugment (Cubuk et al., arXiv 1909.13719): draws and geometric operations.

The geometric operations of a clip become one warp on the host. Color operations
are only drawn here; training/augment.py applies them on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math

import cv2
from jaxtyping import Float32, Float64, Int32, UInt8
import numpy as np

GEOMETRIC_OPS = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
# Batches have indices into this list; 0 is no operation.
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
# At the highest magnitude.
_MAX_ANGLE = math.radians(30)
_MAX_SHEAR = 0.3
_MAX_SHIFT = 0.45  # of the frame's side


@dataclasses.dataclass(frozen=True)
class Operations:
  """The operations drawn for a clip.

  Attributes:
    color_ops: indices into COLOR_OPS in the order of application; 0 for a
      geometric operation.
    magnitudes: magnitude of each operation, -1..1; the sign is the direction.
    matrix: affine map of all geometric operations, from source pixels (x, y, 1)
      to target pixels.
  """

  color_ops: Int32[np.ndarray, ' ops']
  magnitudes: Float32[np.ndarray, ' ops']
  matrix: Float64[np.ndarray, '2 3']


def draw(
  rng: np.random.Generator, num_ops: int, magnitude: int, size: int
) -> Operations:
  """Draws operations for a clip, uniformly and with replacement.

  Args:
    rng: draws operations and signs.
    num_ops: number of operations.
    magnitude: magnitude of all operations, 0..10.
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
  """Returns the map of an operation from source to target pixels (x, y, 1).

  Rotations and shears keep the center of the frame in place.

  Args:
    name: one of GEOMETRIC_OPS.
    magnitude: -1..1, of at most 30 degrees (clockwise), a shear of 0.3, or a
      translation by 0.45 of the side.
    size: height and width of the frames, in pixels.
  """
  matrix = np.eye(3)
  axis = int(name.endswith('_y'))
  if name.startswith('translate'):
    matrix[axis, 2] = _MAX_SHIFT * magnitude * size
    return matrix
  if name == 'rotate':
    angle = _MAX_ANGLE * magnitude
    cos, sin = math.cos(angle), math.sin(angle)
    matrix[:2, :2] = [[cos, -sin], [sin, cos]]
  else:
    matrix[axis, 1 - axis] = _MAX_SHEAR * magnitude
  center = np.full(2, (size - 1) / 2)
  matrix[:2, 2] = center - matrix[:2, :2] @ center
  return matrix


def warp(
  frames: UInt8[np.ndarray, 't h w 3'],
  matrix: Float64[np.ndarray, '2 3'],
  fill: Sequence[float],
) -> UInt8[np.ndarray, 't h w 3']:
  """Applies the same affine map to all frames (bilinear).

  Args:
    frames: RGB.
    matrix: see Operations.
    fill: RGB of pixels from outside of the frames.
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
