"""Linear layers agree with float64, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.kernels.linear import linear


@pytest.mark.parametrize('shape', [(392, 64, 96), (392, 96, 64), (15, 8, 3)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kernels', ['auto', 'reference'])
def test_linear_and_gradients(kernels, dtype, shape):
  tokens, inputs, outputs = shape
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  x, dy = draw(2, tokens, inputs), draw(2, tokens, outputs)
  kernel, bias = draw(inputs, outputs), draw(outputs)
  compute = Compute(dtype, kernels)

  @jax.jit
  def run(x, kernel, bias, dy):
    vjp: Any = jax.vjp(
      lambda x, kernel, bias: linear(x, kernel, bias, compute), x, kernel, bias
    )
    return vjp[0], *vjp[1](dy)

  y, dx, dkernel, dbias = run(
    x, kernel.astype(jnp.float32), bias.astype(jnp.float32), dy
  )
  assert y.dtype == dx.dtype == dtype
  assert dkernel.dtype == dbias.dtype == 'float32'
  x, dy, kernel, bias = (
    np.asarray(a, np.float64) for a in (x, dy, kernel, bias)
  )
  digits = 1e-5 if dtype == 'float32' else 2**-8
  # Sums over tokens are float32; the plain implementation rounds the result.
  sums = 1e-5 if kernels == 'auto' else digits
  for name, actual, expected, tolerance in (
    ('y', y, x @ kernel + bias, digits),
    ('dx', dx, dy @ kernel.T, digits),
    ('dkernel', dkernel, np.einsum('bni,bno->io', x, dy), sums),
    ('dbias', dbias, dy.sum((0, 1)), 2 * digits),
  ):
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert error < tolerance * np.abs(expected).max(), name
