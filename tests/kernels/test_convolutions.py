"""Depthwise convolution and pooling agree with XLA's general convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.kernels import dispatch
from dualformer_jax.kernels.depthwise_conv import depthwise_conv
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.kernels.pooling import pool


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
  y, vjp = jax.vjp(function, *operands)
  expected_y, expected_vjp = jax.vjp(expected, *operands)
  rng = np.random.default_rng(1)
  dy = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
  for actual, e in zip(
    (y, *vjp(dy)), (expected_y, *expected_vjp(dy)), strict=True
  ):
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
