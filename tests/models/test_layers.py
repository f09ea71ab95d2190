"""BatchNorm and GELU agree with PyTorch's definitions."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dualformer_jax.distributed import sharding
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.kernels.mlp import gelu
from dualformer_jax.models import layers
from dualformer_jax.planning import program


def test_batch_norm_updates_running_statistics_like_pytorch():
  rng = np.random.default_rng(0)
  x = (3 * rng.standard_normal((2, 2, 3, 3, 4)) + 1).astype(np.float32)
  layer = layers.BatchNorm('float32')
  x = jnp.asarray(x)
  variables = layer.init(jax.random.key(0), x, train=True)
  np.testing.assert_array_equal(variables['batch_stats']['mean'], 0)
  y, updates = layer.apply(variables, x, train=True, mutable=['batch_stats'])
  flat = np.asarray(x, np.float64).reshape(-1, 4)
  expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
  np.testing.assert_allclose(y.reshape(-1, 4), expected, atol=1e-5)
  statistics: Any = updates['batch_stats']
  np.testing.assert_allclose(statistics['mean'], 0.1 * flat.mean(0), rtol=1e-5)
  np.testing.assert_allclose(
    statistics['var'], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5
  )
  assert statistics['num_batches_tracked'] == 1


class CoarseLevel(nn.Module):
  """The coarse level of the pyramid, with or without BatchNorm."""

  is_normalized: bool

  @nn.compact
  def __call__(self, x):
    y = layers.DepthwisePooling((1, 7, 7), Compute())(x)
    if self.is_normalized:
      y = layers.BatchNorm('float32')(y, train=False)
    return layers.DepthwisePooling((4, 2, 2), Compute())(nn.relu(y))


def test_batch_norm_in_inference_adds_no_memory_traffic():
  x = jnp.zeros((1, 16, 56, 56, 64))
  mesh = sharding.make_mesh(
    {'data': 1, 'fsdp': 1, 'tensor': 1}, 1, devices=jax.devices()[:1]
  )

  def bytes_accessed(is_normalized):
    level = CoarseLevel(is_normalized)
    variables = jax.eval_shape(level.init, jax.random.key(0), x)
    compiled = jax.jit(level.apply).lower(variables, x).compile()
    return program.read(compiled.as_text() or '', mesh).bytes_accessed

  # Only vectors of channels are added, not a pass over 1024 tokens.
  assert 0 < bytes_accessed(True) - bytes_accessed(False) <= 10 * 4 * 64
  assert bytes_accessed(False) >= x.nbytes


def test_gelu_is_exact():
  x = jnp.linspace(-6, 6, 1001)
  exact = nn.gelu(np.asarray(x, np.float32), approximate=False)
  np.testing.assert_allclose(gelu(x), exact, atol=1e-6)


def test_gelu_in_bfloat16_is_rounded_once():
  x = jnp.linspace(-3, 3, 1001, dtype=jnp.bfloat16)
  exact = np.asarray(x, np.float64)
  cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in exact])
  pdf = np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
  y, pullback = jax.jit(lambda x: jax.vjp(gelu, x))(x)
  (slope,) = pullback(jnp.ones_like(x))
  for actual, expected in ((y, exact * cdf), (slope, cdf + exact * pdf)):
    assert actual.dtype == jnp.bfloat16
    # Half of the distance between bfloat16 numbers, and the float32 error.
    np.testing.assert_allclose(
      np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-6
    )
