"""Depthwise convolution and pooling agree with XLA's general convolution."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.kernels import dispatch
from dualformer_jax.kernels.depthwise_conv import (
  depthwise_conv,
  positional_conv,
)
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.kernels.pooling import pool
from tests.kernels import interpreted_gpu
from tests.kernels.test_projections import with_gradients


def convolution(x, kernel, strides, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel[:, :, :, None],
    strides,
    padding,
    dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
    feature_group_count=x.shape[-1],
  )


def assert_agree(function, expected, *operands):
  """Compares outputs and gradients of two functions."""
  shape = jax.eval_shape(expected, *operands).shape
  rng = np.random.default_rng(1)
  dy = jnp.asarray(rng.standard_normal(shape), jnp.float32)
  results = (with_gradients(f, operands, dy) for f in (function, expected))
  for actual, e in zip(*map(jax.tree.leaves, results), strict=True):
    e = np.asarray(e)
    np.testing.assert_allclose(actual, e, rtol=0, atol=1e-5 * np.abs(e).max())


def draw(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


PLATFORMS = [
  ('auto', 'cpu'),
  ('auto', 'gpu'),
  ('auto', 'tpu'),
  ('reference', 'cpu'),
]


@pytest.mark.parametrize(('kernels', 'platform'), PLATFORMS)
def test_depthwise_conv_and_gradients(monkeypatch, kernels, platform):
  monkeypatch.setattr(dispatch, 'platform', lambda: platform)
  compute = Compute('float32', kernels)
  assert_agree(
    lambda x, kernel: depthwise_conv(x, kernel, compute),
    lambda x, kernel: convolution(x, kernel, (1, 1, 1), 'SAME'),
    *draw((2, 4, 5, 6, 3), (3, 3, 3, 3)),
  )


@pytest.mark.parametrize('kernels', ['auto', 'reference'])
def test_pooling_and_gradients(kernels):
  compute = Compute('float32', kernels)
  # The last row and the last two columns are no whole blocks.
  assert_agree(
    lambda x, kernel, bias: pool(x, kernel, bias, compute),
    lambda x, kernel, bias: convolution(x, kernel, (2, 2, 3), 'VALID') + bias,
    *draw((2, 4, 5, 8, 3), (2, 2, 3, 3), (3,)),
  )


def positional_formula(x, kernel, bias):
  """Returns the output, and the function from its gradient to those of all."""
  d, h, w = x.shape[1:4]

  def shifted(x, i, j, k):
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])
    return x[:, i : i + d, j : j + h, k : k + w]

  def convolve(x, kernel):
    offsets = np.ndindex(3, 3, 3)
    return x + sum(shifted(x, *offset) * kernel[offset] for offset in offsets)

  def pullback(dy):
    dkernel = np.zeros_like(kernel)
    for offset in np.ndindex(3, 3, 3):
      dkernel[offset] = (shifted(x, *offset) * dy).sum((0, 1, 2, 3))
    dx = convolve(dy, kernel[::-1, ::-1, ::-1])
    return dx, dkernel, dy.sum((0, 1, 2, 3))

  return convolve(x, kernel) + bias, pullback


def assert_equals_formula(function, shape, dtype):
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
  kernel = jnp.asarray(0.3 * rng.standard_normal((3, 3, 3, shape[-1])), dtype)
  kernel = kernel.astype('float32')
  bias = jnp.asarray(rng.standard_normal(shape[-1]), 'float32')
  y, gradients = with_gradients(function, (x, kernel, bias), dy)
  exact = [np.asarray(a, np.float64) for a in (x, kernel, bias)]
  expected, pullback = positional_formula(*exact)
  expected = expected, *pullback(np.asarray(dy, np.float64))
  digits = 2**-8 if dtype == 'bfloat16' else 1e-6
  tolerances = digits, digits, 1e-6, 1e-6  # sums over tokens are float32
  for a, e, tolerance in zip(
    (y, *gradients), expected, tolerances, strict=True
  ):
    error = np.abs(np.asarray(a, np.float64) - e).max()
    assert error <= tolerance * np.abs(e).max()


@pytest.mark.parametrize('kernels', ['auto', 'reference'])
def test_positional_conv_and_gradients(kernels):
  compute = Compute('float32', kernels)
  assert_equals_formula(
    functools.partial(positional_conv, compute=compute),
    (2, 3, 4, 5, 3),
    'float32',
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('shape', 'programs'),
  [
    ((1, 2, 15, 21, 64), 1),  # three tiles by three
    ((2, 6, 5, 7, 64), 1),  # more frames than the ring has
    ((1, 4, 4, 24, 96), 6),  # two programs for the frames of a tile
  ],
)
def test_gpu_kernels_of_positional_conv(monkeypatch, shape, programs):
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  with interpreted_gpu.interpreted('depthwise_conv_gpu') as module:
    monkeypatch.setattr(module, '_PROGRAMS', programs)
    assert module.fits(*shape[1:])
    assert_equals_formula(module.positional_conv, shape, 'bfloat16')


def test_gpu_kernels_reject_unsupported_sizes():
  module = importlib.import_module('dualformer_jax.kernels.depthwise_conv_gpu')
  for channels in (64, 96, 128, 1024):
    assert module.fits(16, 56, 56, channels)
  assert module.fits(16, 7, 7, 512)
  assert not module.fits(16, 7, 7, 96)
  assert not module.fits(16, 11, 11, 64)
  assert not module.fits(16, 56, 56, 80)


class ChosenError(Exception):
  """Raised by a stand-in for the kernels."""


@pytest.mark.parametrize(
  ('kernels', 'dtype', 'device', 'columns', 'is_chosen'),
  [
    ('experimental', 'bfloat16', 'NVIDIA H200', 8, True),
    ('experimental', 'bfloat16', 'NVIDIA H200', 11, False),
    ('experimental', 'bfloat16', 'NVIDIA A100-SXM4-80GB', 8, False),
    ('experimental', 'float32', 'NVIDIA H200', 8, False),
    ('auto', 'bfloat16', 'NVIDIA H200', 8, False),
  ],
)
def test_gpu_kernels_are_chosen(
  monkeypatch, kernels, dtype, device, columns, is_chosen
):
  module = importlib.import_module('dualformer_jax.kernels.depthwise_conv_gpu')

  def chosen(*_):
    raise ChosenError

  monkeypatch.setattr(module, 'positional_conv', chosen)
  interpreted_gpu.pretend(monkeypatch, device)
  compute = Compute(dtype, kernels)
  x, kernel, bias = draw((1, 2, 8, columns, 64), (3, 3, 3, 64), (64,))
  x = x.astype(dtype)
  if is_chosen:
    with pytest.raises(ChosenError):
      positional_conv(x, kernel, bias, compute)
  else:
    assert positional_conv(x, kernel, bias, compute).dtype == dtype
