"""The MLP branch and its gradients agree with float64."""

import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.kernels import mlp
from dualformer_jax.kernels.dispatch import Compute
from tests.kernels import interpreted_gpu

NAMES = ('out', 'x', 'norm scale', 'norm bias', 'w1', 'b1', 'w2', 'b2')


def draw(batch, tokens, channels, dtype, hidden=None):
  """Returns x, branch_scale, weights, and the gradient of the output."""
  rng = np.random.default_rng(0)
  normal = rng.standard_normal
  hidden = hidden or 4 * channels
  x = normal((batch, tokens, channels)) + 3 * normal((batch, tokens, 1))
  branch_scale = np.linspace(0.75, 1.5, batch)
  weights = (
    1 + 0.3 * normal(channels),
    0.2 * normal(channels),
    normal((channels, hidden)) * channels**-0.5,
    0.5 * normal(hidden),
    normal((hidden, channels)) * hidden**-0.5,
    0.5 * normal(channels),
  )
  dout = normal(x.shape)
  cast = functools.partial(jnp.asarray, dtype=dtype)
  weights = [jnp.asarray(w, jnp.float32) for w in weights]
  branch_scale = jnp.asarray(branch_scale, jnp.float32)
  return [cast(x), branch_scale, *weights], cast(dout)


def formula(x, branch_scale, norm_scale, norm_bias, w1, b1, w2, b2):
  mean = x.mean(-1, keepdims=True)
  var = jnp.square(x - mean).mean(-1, keepdims=True)
  y = (x - mean) * jax.lax.rsqrt(var + 1e-5) * norm_scale + norm_bias
  y = y @ w1 + b1
  y = 0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))
  return x + branch_scale[:, None, None] * (y @ w2 + b2)


def run(function, arguments, dout):
  """Returns the output and all gradients but that of `branch_scale`."""

  @jax.jit
  def both(arguments, dout):
    vjp: Any = jax.vjp(function, *arguments)
    return vjp[0], *vjp[1](dout)

  out, dx, _, *gradients = both(arguments, dout)
  return [out, dx, *gradients]


def assert_agrees(function, arguments, dout, tolerance):
  actual = run(function, arguments, dout)
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
    expected = run(formula, exact, jnp.asarray(dout, jnp.float64))
    expected = [np.asarray(e) for e in expected]
  assert actual[0].dtype == actual[1].dtype == dout.dtype
  for name, value, e in zip(NAMES, actual, expected, strict=True):
    error = np.abs(np.asarray(value, np.float64) - e).max()
    assert error <= tolerance * np.abs(e).max(), name


def branch(compute):
  """Returns mlp_branch with the arguments of `formula`."""

  def function(x, branch_scale, *w):
    y = mlp.mlp_branch(
      x.reshape(len(x), 2, 3, -1, x.shape[-1]),
      jax.lax.stop_gradient(branch_scale),
      w[:2],
      w[2:4],
      w[4:],
      compute,
    )
    return y.reshape(x.shape)

  return function


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kernels', ['auto', 'reference'])
def test_branch_and_gradients(kernels, dtype):
  arguments, dout = draw(2, 30, 16, dtype)
  tolerance = 1e-5 if dtype == 'float32' else 2**-5
  function = branch(Compute(dtype, kernels))
  assert_agrees(function, arguments, dout, tolerance)


def test_without_drop_path_the_branch_is_added():
  arguments, _ = draw(2, 30, 16, 'float32')
  x: Any = arguments[0]
  w: Any = tuple(arguments[2:])
  y = branch(Compute())(x, jnp.ones(2), *w)
  x = x.reshape(2, 2, 3, 5, 16)
  actual = mlp.mlp_branch(x, None, w[:2], w[2:4], w[4:], Compute())
  np.testing.assert_allclose(actual.reshape(y.shape), y, atol=1e-6)


needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11),
  reason='this version of JAX has no interpreter of GPU kernels',
)


@needs_interpreter
@pytest.mark.parametrize(
  'channels',
  [
    64,
    *(
      pytest.param(channels, marks=pytest.mark.slow)
      for channels in (96, 128, 192, 256)
    ),
  ],
)
def test_gpu_kernels_and_gradients(channels):
  interpreted_gpu.mlp(channels)


@needs_interpreter
@pytest.mark.slow
def test_gpu_kernels_of_two_warpgroups_and_gradients():
  interpreted_gpu.run('mlp', 384, 512)


def test_gpu_kernels_reject_unsupported_sizes():
  mlp_gpu = importlib.import_module('dualformer_jax.kernels.mlp_gpu')
  assert mlp_gpu.fits(8, 16 * 56 * 56, 64, 256)
  assert mlp_gpu.fits(1, 16 * 14 * 14, 256, 1024)
  assert not mlp_gpu.fits(1, 16 * 14 * 14 + 1, 256, 1024)
  assert mlp_gpu.fits(2, 16 * 14 * 14, 384, 1536)
  assert not mlp_gpu.fits(1, 128, 768, 3072)
  assert not mlp_gpu.fits(1, 128, 64, 96)
  assert not mlp_gpu.fits(0, 128, 64, 256)


def test_gelu_of_gpu_kernels_is_exact():
  hopper = importlib.import_module('dualformer_jax.kernels.hopper')
  x = np.linspace(-8, 8, 4001)
  y, slope = (np.asarray(v) for v in hopper.gelu(jnp.asarray(x, 'float32')))
  cdf = np.array([0.5 * (1 + math.erf(v * 0.5**0.5)) for v in x])
  density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
  np.testing.assert_allclose(y, x * cdf, rtol=5e-7, atol=5e-7)
  np.testing.assert_allclose(slope, cdf + x * density, atol=5e-7)


class ChosenError(Exception):
  """Raised by a stand-in for the kernels."""


@pytest.mark.parametrize(
  ('kernels', 'dtype', 'device', 'tokens', 'is_chosen'),
  [
    ('auto', 'bfloat16', 'NVIDIA H200', 96, False),
    ('experimental', 'bfloat16', 'NVIDIA H100 80GB HBM3', 96, True),
    ('experimental', 'bfloat16', 'NVIDIA H200', 96, True),
    ('experimental', 'bfloat16', 'NVIDIA A100-SXM4-80GB', 96, False),
    ('experimental', 'bfloat16', 'NVIDIA B200', 96, False),
    ('experimental', 'float32', 'NVIDIA H200', 96, False),
    ('experimental', 'bfloat16', 'NVIDIA H200', 90, False),
  ],
)
def test_gpu_kernels_are_chosen(
  monkeypatch, kernels, dtype, device, tokens, is_chosen
):
  module = importlib.import_module('dualformer_jax.kernels.mlp_gpu')

  def chosen(*_):
    raise ChosenError

  monkeypatch.setattr(module, 'mlp', chosen)
  interpreted_gpu.pretend(monkeypatch, device)
  arguments, _ = draw(4, tokens, 64, dtype)
  function = branch(Compute(dtype, kernels))
  if is_chosen:
    with pytest.raises(ChosenError):
      function(*arguments)
  else:
    assert function(*arguments).dtype == dtype
