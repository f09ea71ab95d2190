"""LayerNorm with linear layers of windows, and its gradients, agree with float64."""

import importlib
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import float64

WINDOW = 2, 4  # rows and columns


def to_windows(x):
  return rearrange(
    x,
    'b (i wd) (j wh) (k ww) c -> b (i j k) (wh ww wd) c',
    wd=8,
    wh=WINDOW[0],
    ww=WINDOW[1],
  )


def from_windows(x, grid):
  return rearrange(
    x,
    'b (i j k) (wh ww wd) c -> b (i wd) (j wh) (k ww) c',
    wd=8,
    wh=WINDOW[0],
    ww=WINDOW[1],
    i=grid[0] // 8,
    j=grid[1] // WINDOW[0],
  )


def draw(shape, dtype):
  """Returns x, the weights of the norm and of two layers, and gradients."""
  normal = np.random.default_rng(0).standard_normal
  channels = shape[-1]
  x = normal(shape) + 3 * normal((*shape[:-1], 1))
  norm = 1 + 0.3 * normal(channels), 0.2 * normal(channels)
  layers = [
    (normal((channels, channels)) * channels**-0.5, normal(channels))
    for _ in range(2)
  ]
  dx, *dys = (normal(shape) for _ in range(3))

  def cast(dtype, *arrays):
    return [jnp.asarray(a, dtype) for a in arrays]

  kernels, biases = (tuple(cast('float32', *w)) for w in zip(*layers, strict=True))
  x, dx, *dys = cast(dtype, x, dx, *(to_windows(dy) for dy in dys))
  return (x, *cast('float32', *norm), kernels, biases), (dx, dys)


def formula(arguments, gradients):
  """Returns outputs and gradients, in float64."""
  x, scale, bias, kernels, biases, dx, dys = jax.tree.map(
    lambda a: np.asarray(a, np.float64), (*arguments, *gradients)
  )
  y, norm_pullback = float64.layer_norm(x, scale, bias)
  outputs, dkernels, dbiases, dnorm = [], [], [], 0
  for kernel, layer_bias, dy in zip(kernels, biases, dys, strict=True):
    output, pullback = float64.linear(y, kernel, layer_bias)
    dinput, dkernel, dbias = pullback(from_windows(dy, x.shape[1:4]))
    outputs.append(to_windows(output))
    dkernels.append(dkernel)
    dbiases.append(dbias)
    dnorm = dnorm + dinput
  dinput, *dweights = norm_pullback(dnorm)
  return x, *outputs, dx + dinput, *dweights, *dkernels, *dbiases


@pytest.fixture(name='module')
def _module(monkeypatch):
  """The kernels for Hopper, interpreted."""
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  plgpu = importlib.import_module('jax.experimental.pallas.mosaic_gpu')
  module = importlib.import_module('dualformer_jax.kernels.projections_gpu')

  def add_product(total, a, b):
    return total + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

  # The interpreter cannot add to products.
  hopper = importlib.import_module('dualformer_jax.kernels.hopper')
  monkeypatch.setattr(hopper, 'add_product', add_product)
  with plgpu.force_gpu_interpret_mode():
    yield module


@pytest.mark.slow
@pytest.mark.parametrize('channels', [64, 256])
def test_gpu_kernels_and_gradients(module, channels):
  shape = 1, 16, 4, 8, channels
  assert module.fits(1, shape[1:4], channels, (8, *WINDOW))
  arguments, gradients = draw(shape, 'bfloat16')
  (x, ys), vjp = jax.vjp(
    lambda *a: module.norm_project(WINDOW, *a), *arguments
  )
  dx, dscale, dbias, dkernels, dbiases = vjp(gradients)
  actual: Any = x, *ys, dx, dscale, dbias, *dkernels, *dbiases
  expected = formula(arguments, gradients)
  for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
    error = np.abs(np.asarray(a, np.float64) - e).max()
    assert error <= 2**-7 * np.abs(e).max(), index


def test_gpu_kernels_reject_unsupported_sizes():
  module = importlib.import_module('dualformer_jax.kernels.projections_gpu')
  window = 8, 7, 7
  assert module.fits(8, (16, 56, 56), 64, window)
  assert module.fits(1, (16, 14, 14), 256, window)
  assert not module.fits(8, (16, 7, 7), 512, window)
  assert not module.fits(8, (16, 56, 56), 96, window)
  assert not module.fits(8, (16, 32, 32), 64, window)
  assert not module.fits(8, (4, 56, 56), 64, (4, 7, 7))
  assert not module.fits(1, (8, 7, 7), 64, window)
  assert not module.fits(0, (16, 56, 56), 64, window)
