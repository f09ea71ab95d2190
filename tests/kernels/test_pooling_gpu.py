"""Norm, pooling and projection in one pass agree with float64."""

import functools
import importlib

import jax
import numpy as np
import pytest

from dualformer_jax.kernels.pooling import split_blocks
from tests.kernels import float64, interpreted_gpu
from tests.kernels.test_projections import (
  assert_agree,
  draw,
  exact,
  with_gradients,
)


def pooled(x, kernels, dlevels):
  """Returns the levels, and the gradients of x and of the kernels."""
  levels, dkernels, dx = [], [], np.zeros_like(x)
  for kernel, dlevel in zip(kernels, dlevels, strict=True):
    blocks = split_blocks(x, kernel.shape[:3])
    weights = kernel[:, None, :, None]
    of_blocks = dlevel[:, :, None, :, None, :, None]
    levels.append((blocks * weights).sum((2, 4, 6)))
    dkernels.append((blocks * of_blocks).sum((0, 1, 3, 5)))
    dx += (of_blocks * weights).reshape(x.shape)
  return levels, dx, dkernels


def norm_pool_project(operands, gradients):
  """Returns outputs and gradients, in float64."""
  x, scale, bias, kernel, layer_bias, pooling = operands
  dx, dy, dlevels = gradients
  y, norm_pullback = float64.layer_norm(x, scale, bias)
  output, pullback = float64.linear(y, kernel, layer_bias)
  dinput, *dlayer = pullback(dy.reshape(x.shape))
  levels, dnorm, dpooling = pooled(y, pooling, dlevels)
  dinput, *dweights = norm_pullback(dinput + dnorm)
  outputs = x, output.reshape(dy.shape), *levels
  return *outputs, dx + dinput, *dweights, *dlayer, *dpooling


@pytest.mark.slow
@pytest.mark.parametrize(
  ('shape', 'sizes'),
  [
    # Tiles of 128 tokens cross frames, programs are part of a block.
    ((2, 4, 12, 8, 64), ((2, 2, 2), (1, 3, 2))),
    ((2, 8, 16, 16, 96), ((2, 8, 4), (1, 4, 4))),
    # Kernels for the norm alone, and for 128 of the channels at a time.
    ((4, 2, 8, 8, 384), ((2, 2, 2),)),
  ],
)
def test_norm_pool_project_and_gradients(shape, sizes):
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  batch, *grid, channels = shape
  x, dx, means = draw(shape, shape, (*shape[:-1], 1), dtype='bfloat16')
  x += 3 * means
  scale, bias, layer_bias, kernel = draw(*[channels] * 3, (channels, channels))
  pooling = tuple(draw(*[(*size, channels) for size in sizes]))
  weights = 1 + 0.3 * scale, bias, (kernel,), (layer_bias,), pooling
  (dy,) = draw((x.size // channels, channels), dtype='bfloat16')
  dlevels = draw(
    *[
      (batch, *np.floor_divide(grid, size).tolist(), channels) for size in sizes
    ]
  )
  with interpreted_gpu.interpreted('projections_gpu') as module:
    plan = module.find_pooling(batch, tuple(grid), channels, sizes)
    outputs, gradients = with_gradients(
      functools.partial(module.norm_pool_project, plan),
      (x, *weights),
      (dx, [dy], dlevels),
    )
  x_out, (y,), levels = outputs
  *gradients, (dkernel,), (dbias,), dpooling = gradients
  actual = x_out, y, *levels, *gradients, dkernel, dbias, *dpooling
  operands = x, 1 + 0.3 * scale, bias, kernel, layer_bias, pooling
  expected = norm_pool_project(exact(operands), exact((dx, dy, dlevels)))
  assert_agree(actual, expected)


def test_sizes_that_are_pooled():
  module = importlib.import_module('dualformer_jax.kernels.pooling_plan')
  # All global blocks of the published models that pool.
  for side, sizes in (
    (56, ((2, 8, 8), (1, 7, 7))),
    (28, ((2, 4, 4), (1, 7, 7))),
    (14, ((2, 2, 2),)),
  ):
    grid = 16, side, side
    plan = module.find_plan(grid, sizes)
    for batch, rows in ((1, 64), (8, 128)):
      if batch * 16 * side**2 % rows == 0:
        assert module.fits(plan, grid, batch, rows)
  assert module.find_plan((16, 14, 14), ()) is None
  assert module.find_plan((16, 14, 14), ((2, 4, 4),)) is None
