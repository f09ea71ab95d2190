"""Attention to a short sequence, with its layers, agrees with float64."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import float64, interpreted_gpu
from tests.kernels.test_projections import draw, exact, with_gradients

HEAD = 32


def attend_add(x, k, v, branch_scale, norm, query, proj, dout):
  """Returns the output and gradients, in float64."""
  y, _ = float64.layer_norm(x, *norm)
  q, _ = float64.linear(y, *query)
  shape = len(x), -1, x.shape[-1]
  branch_scale = branch_scale[:, None, None]
  dbranch = branch_scale * dout.reshape(shape)
  q, k, v, dattended = (
    y[None] for y in (q.reshape(shape), k, v, dbranch @ proj[0].T)
  )
  heads = x.shape[-1] // HEAD
  attended, *gradients = (
    y[0] for y in float64.attention_and_gradients(q, k, v, dattended, heads)
  )
  branch, pullback = float64.linear(attended, *proj)
  out = x + (branch_scale * branch).reshape(x.shape)
  return out, *gradients, *pullback(dbranch)[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('batch', 'grid', 'channels', 'keys'),
  [(2, (2, 8, 8), 64, 136), (3, (1, 8, 8), 192, 200)],
)
def test_attend_add_and_gradients(batch, grid, channels, keys):
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  shape = batch, *grid, channels
  x, dout, means = draw(shape, shape, (*shape[:-1], 1), dtype='bfloat16')
  x += 3 * means
  k, v = draw(*[(batch, keys, channels)] * 2, dtype='bfloat16')
  scale, *biases = draw(*[channels] * 4)
  wq, wp = draw(*[(channels, channels)] * 2)
  norm, query = (1 + 0.3 * scale, biases[0]), (wq / channels**0.5, biases[1])
  proj = wp, biases[2]
  branch_scale = jnp.array([0.75, 1.5, 0])[:batch]
  q = jnp.zeros((batch, math.prod(grid), channels), 'bfloat16')
  with interpreted_gpu.interpreted('short_attention_gpu') as module:

    def run(x, q, k, v, proj):
      return module.attend_add(x, q, k, v, branch_scale, norm, query, proj)

    inferred = jax.jit(run)(x, q, k, v, proj)
    out, (dx, *gradients, dproj) = with_gradients(run, (x, q, k, v, proj), dout)
  expected = attend_add(
    *exact((x, k, v, branch_scale, norm, query, proj, dout))
  )
  np.testing.assert_array_equal(dx, dout)
  np.testing.assert_array_equal(inferred, out)
  actual = out, *gradients, *dproj
  for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
    error = np.abs(np.asarray(a, np.float64).reshape(e.shape) - e).max()
    # Queries, weights of keys and gradients of scores are bfloat16.
    assert error <= 2**-6 * np.abs(e).max(), index


def test_sizes_that_are_supported():
  module = importlib.import_module('dualformer_jax.kernels.short_attention_gpu')
  assert module.fits(8, 50176, 456, 64, 2)
  assert module.fits(8, 3136, 392, 256, 8)
  assert not module.fits(1, 50176, 456, 64, 2)
  assert not module.fits(8, 50176, 456, 64, 4)
  assert not module.fits(8, 50176, 100, 64, 2)
  assert not module.fits(8, 3136, 392, 384, 12)
