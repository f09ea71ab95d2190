"""Patches selected by a product are those of the plain implementation."""

from typing import Any

import jax
import numpy as np
import pytest

from dualformer_jax.kernels import patches
from dualformer_jax.kernels.dispatch import Compute


@pytest.mark.parametrize(
  'shape', [(2, 4, 8, 128, 3), (1, 5, 9, 132, 3), (1, 2, 8, 16, 3)]
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_patches_on_tpus_agree_with_default(dtype, shape):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(shape).astype(np.float32)
  kernel = rng.standard_normal((2, 4, 4, 3, 8)).astype(np.float32)
  bias = rng.standard_normal(8).astype(np.float32)
  compute = Compute(dtype, 'reference')

  def run(function):
    def apply(x, kernel, bias):
      return function(x.astype(dtype), kernel, bias, compute)

    y, pullback = jax.vjp(jax.jit(apply), x, kernel, bias)
    dy: Any = np.random.default_rng(1).standard_normal(y.shape)
    return y, *jax.jit(pullback)(dy.astype(y.dtype))

  for actual, expected in zip(
    run(patches._tpu), run(patches._default), strict=True
  ):
    actual, expected = np.float64(actual), np.float64(expected)
    error = np.abs(actual - expected).max()
    tolerance = 1e-5 if dtype == 'float32' else 2**-6
    assert error < tolerance * np.abs(expected).max()
