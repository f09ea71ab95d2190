"""LayerNorm agrees with float64, forward and backward."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.kernels.layer_norm import layer_norm, reference
from tests.kernels import interpreted_gpu
from tests.kernels.test_projections import with_gradients


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kernels', ['auto', 'reference'])
def test_layer_norm_and_gradients(kernels, dtype):
  rng = np.random.default_rng(0)
  # With means far from zero, a variance computed from squares loses its digits.
  means = 30 * rng.standard_normal((2, 3, 5, 1))
  x = means + rng.standard_normal((2, 3, 5, 48))
  x = np.asarray(jnp.asarray(x, dtype), np.float64)
  scale, bias = rng.standard_normal((2, 48))
  dy = np.asarray(jnp.asarray(rng.standard_normal(x.shape), dtype), np.float64)

  centered = x - x.mean(-1, keepdims=True)
  inverse = (np.square(centered).mean(-1, keepdims=True) + 1e-5) ** -0.5
  normalized = centered * inverse
  y = normalized * scale + bias
  # The Jacobian of each token.
  channels = x.shape[-1]
  center = np.eye(channels) - 1 / channels
  outer = normalized[..., :, None] * normalized[..., None, :] / channels
  jacobian = inverse[..., None] * (center - outer) * scale[:, None]
  expected = {
    'x': np.einsum('abco,abcoi->abci', dy, jacobian),
    'scale': (dy * normalized).sum((0, 1, 2)),
    'bias': dy.sum((0, 1, 2)),
  }

  compute = Compute(dtype, kernels)

  @jax.jit
  def run(dy, x, scale, bias):
    vjp: Any = jax.vjp(
      lambda x, scale, bias: layer_norm(x, scale, bias, compute),
      x,
      scale,
      bias,
    )
    return vjp[0], vjp[1](dy)

  weights = (jnp.asarray(a, jnp.float32) for a in (scale, bias))
  actual, gradients = run(
    jnp.asarray(dy, dtype), jnp.asarray(x, dtype), *weights
  )
  digits = 2e-6 if dtype == 'float32' else 1e-2
  assert actual.dtype == dtype
  np.testing.assert_allclose(actual, y, atol=20 * digits * np.abs(y).max())
  for (name, value), gradient in zip(expected.items(), gradients, strict=True):
    assert gradient.shape == value.shape, name
    error = np.abs(np.asarray(gradient, np.float64) - value).max()
    assert error <= 10 * digits * np.abs(value).max(), name


@pytest.mark.parametrize('channels', [64, 96])
def test_gpu_kernels_and_gradients(channels):
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  rng = np.random.default_rng(0)
  x = 30 * rng.standard_normal((128, 1)) + rng.standard_normal((128, channels))
  scale, bias, dy = (
    rng.standard_normal(s) for s in (channels, channels, x.shape)
  )
  x, dy = (jnp.asarray(a, 'bfloat16') for a in (x, dy))
  scale, bias = (jnp.asarray(a, 'float32') for a in (scale, bias))

  with jax.enable_x64(True):
    *exact, exact_dy = (jnp.asarray(a, 'float64') for a in (x, scale, bias, dy))
    expected = with_gradients(reference, exact, exact_dy)
    expected = [np.asarray(e) for e in jax.tree.leaves(expected)]
  with interpreted_gpu.interpreted('layer_norm_gpu') as module:
    assert module.fits(128, channels)
    actual = with_gradients(module.layer_norm, (x, scale, bias), dy)
  tolerances = (2**-8, 2**-8, 1e-5, 1e-5)  # sums over tokens are float32
  for a, e, tolerance in zip(
    jax.tree.leaves(actual), expected, tolerances, strict=True
  ):
    error = np.abs(np.asarray(a, np.float64) - e).max()
    assert error <= tolerance * np.abs(e).max()


def test_gpu_kernels_reject_unsupported_sizes():
  module = importlib.import_module('dualformer_jax.kernels.layer_norm_gpu')
  assert module.fits(8 * 456, 512)
  assert not module.fits(456, 512)
  assert not module.fits(128, 1024)
