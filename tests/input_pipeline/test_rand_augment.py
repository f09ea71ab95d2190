"""RandAugment's draws and warps agree with independent computations."""

import math
from typing import Any

import numpy as np
import pytest

from dualformer_jax.input_pipeline import rand_augment

SIZE = 41


def draws(count, num_ops=1, magnitude=6):
  rng = np.random.default_rng(0)
  return [
    rand_augment.draw(rng, num_ops, magnitude, SIZE) for _ in range(count)
  ]


def test_all_fourteen_operations_are_equally_likely():
  drawn = draws(5600)
  colors = np.bincount([ops.color_ops[0] for ops in drawn], minlength=10)
  assert len(colors) == 10
  # 400 of each (a standard deviation is 19), and 5 geometric ones.
  assert np.abs(colors[1:] - 400).max() < 80
  assert abs(colors[0] - 2000) < 150
  # Each geometric operation goes both ways: ten matrices.
  matrices, counts = np.unique(
    [ops.matrix.ravel() for ops in drawn if not ops.color_ops[0]],
    axis=0,
    return_counts=True,
  )
  assert len(matrices) == 10
  assert np.abs(counts - 200).max() < 60


def test_magnitudes_are_fractions_with_both_signs():
  signs = np.concatenate([ops.magnitudes for ops in draws(1000, num_ops=3)])
  assert signs.shape == (3000,)
  assert set(signs) == {np.float32(-0.6), np.float32(0.6)}
  assert abs(np.mean(signs)) < 0.05


def test_each_operation_is_geometric_or_on_colors():
  for operations in draws(200):
    is_warped = not np.array_equal(operations.matrix, [[1, 0, 0], [0, 1, 0]])
    assert is_warped == (operations.color_ops[0] == 0)


def moved(name, magnitude, point):
  """Where the middle of a pixel, (x, y) from the top left corner's, goes."""
  return (rand_augment.affine_map(name, magnitude, SIZE) @ [*point, 1])[:2]


def test_operations_move_points_as_in_the_paper():
  middle = (20, 20)
  for name in ('rotate', 'shear_x', 'shear_y'):
    for magnitude in (-1.0, 0.4, 1.0):
      np.testing.assert_allclose(moved(name, magnitude, middle), middle)
  # 30 degrees: what is right of the middle goes down, as y points down.
  right = (30, 20)
  expected = (20 + 10 * math.cos(math.pi / 6), 20 + 10 * 0.5)
  np.testing.assert_allclose(moved('rotate', 1.0, right), expected)
  expected = (20 + 10 * math.cos(math.pi / 12), 20 - 10 * 0.2588190451)
  np.testing.assert_allclose(moved('rotate', -0.5, right), expected)
  np.testing.assert_allclose(moved('shear_x', 1.0, (5, 30)), (5 + 3, 30))
  np.testing.assert_allclose(moved('shear_y', -0.5, (5, 30)), (5, 30 + 2.25))
  np.testing.assert_allclose(
    moved('translate_x', 1.0, (0, 0)), (0.45 * SIZE, 0)
  )
  np.testing.assert_allclose(
    moved('translate_y', -0.2, (7, 7)), (7, 7 - 0.09 * SIZE)
  )


def bilinear(frame, x, y, fill):
  """Returns the color at a point, interpolated between pixel centers."""
  total = np.zeros(3)
  left, top = math.floor(x), math.floor(y)
  for column in (left, left + 1):
    for row in (top, top + 1):
      weight = (1 - abs(x - column)) * (1 - abs(y - row))
      is_inside = 0 <= row < len(frame) and 0 <= column < len(frame[0])
      total += weight * np.array(frame[row, column] if is_inside else fill)
  return total


@pytest.mark.parametrize('name', rand_augment.GEOMETRIC_OPS)
def test_warp_agrees_with_interpolation_at_the_source(name):
  rng = np.random.default_rng(0)
  # Smooth, as points are rounded to 1/32 of a pixel.
  row, column = np.arange(SIZE)[:, None, None], np.arange(SIZE)[:, None]
  period = rng.uniform(4, 9, (2, 2, 1, 1, 3))
  frames = 127 + 60 * np.sin(row / period[0]) + 60 * np.sin(column / period[1])
  frames = frames.astype(np.uint8)
  fill = (10.0, 200.0, 90.0)
  matrix = rand_augment.affine_map(name, 0.7, SIZE)
  found = rand_augment.warp(frames, matrix[:2], fill)
  back = np.linalg.inv(matrix)
  expected = np.zeros(frames.shape)
  for row in range(SIZE):
    for column in range(SIZE):
      x, y, _ = back @ [column, row, 1]
      for i in range(2):
        expected[i, row, column] = bilinear(frames[i], x, y, fill)
  error = np.abs(found - expected)
  # At the border a 32nd of a pixel is a 32nd of the way to the fill.
  assert error.mean() < 0.5
  assert error.max() < 8
  assert (found == fill).all(-1).any()


def test_operations_are_applied_in_the_order_drawn():
  class Drawn(np.random.Generator):
    """A source of randomness that wants translate_x, then rotate."""

    def integers(self, *args: Any, **kwargs: Any) -> Any:
      assert (args, kwargs) == ((14,), {'size': 2})
      return np.array([12, 9])

    def choice(self, *args: Any, **kwargs: Any) -> Any:
      assert (args, kwargs) == (((-1.0, 1.0),), {'size': 2})
      return np.ones(2)

  drawn = Drawn(np.random.PCG64())
  operations = rand_augment.draw(drawn, 2, 10, SIZE)
  np.testing.assert_array_equal(operations.color_ops, [0, 0])
  point = moved('rotate', 1.0, moved('translate_x', 1.0, (5, 9)))
  np.testing.assert_allclose(operations.matrix @ [5, 9, 1], point)


def test_identity_returns_the_frames():
  frames = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  (operations,) = draws(1, num_ops=0)
  assert operations.color_ops.shape == operations.magnitudes.shape == (0,)
  found = rand_augment.warp(frames, operations.matrix, (0, 0, 0))
  np.testing.assert_array_equal(found, frames)
