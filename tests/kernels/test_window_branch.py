"""The attention branch of windows on Hopper GPUs agrees with float64."""

import functools
import importlib
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.kernels import attention_branch, dispatch
from dualformer_jax.kernels.attention import reference as reference_attention
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.kernels.layer_norm import reference as reference_norm
from dualformer_jax.models import attention
from tests.kernels import float64, interpreted_gpu, test_projections

NAMES = (
  'x',
  'norm scale',
  'norm bias',
  *(f'{layer} {name}' for layer in 'qkv' for name in ('kernel', 'bias')),
  'proj kernel',
  'proj bias',
)
HEAD = 32


def draw(batch, grid, channels):
  """Returns tokens, their gradient, factors of clips, and weights."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  shape = batch, *grid, channels
  x = (normal(*shape) + 3 * normal(batch, *grid, 1)).astype('bfloat16')
  dout = normal(*shape).astype('bfloat16')
  scale = jnp.array([1.5, 0, 0.75])[:batch]
  norm = 1 + 0.3 * normal(channels), normal(channels)
  layers = [
    (normal(channels, channels) * channels**-0.5, normal(channels))
    for _ in range(4)
  ]
  return x, dout, scale, norm, tuple(layers[:3]), layers[3]


def formula(window, x, dout, scale, norm, projections, proj):
  """Returns the output and the gradients, in float64."""
  channels = x.shape[-1]

  def split(y):
    tokens = test_projections.to_windows(y, window[1:])
    return tokens.reshape(1, -1, np.prod(window), channels)

  def join(y):
    return test_projections.to_grid(
      y.reshape(-1, channels), window[1:], x.shape[1:4]
    )

  normed, norm_pullback = float64.layer_norm(x, *norm)
  outputs = [float64.linear(normed, *layer) for layer in projections]
  qkv = [split(y) for y, _ in outputs]
  attend = functools.partial(
    float64.attention_and_gradients, *qkv, num_heads=channels // HEAD
  )
  attended = join(attend(np.zeros_like(qkv[0]))[0])
  branch, proj_pullback = float64.linear(attended, *proj)
  scale = scale[:, None, None, None, None]
  dattended, *dproj = proj_pullback(scale * dout)
  dqkv = attend(split(dattended))[1:]
  pulled = [
    pullback(join(d)) for (_, pullback), d in zip(outputs, dqkv, strict=True)
  ]
  dx, *dnorm = norm_pullback(np.sum([d for d, _, _ in pulled], axis=0))
  weights = [d for _, *layer in pulled for d in layer]
  return x + scale * branch, dout + dx, *dnorm, *weights, *dproj


def check(batch, grid, channels, window, programs=132):
  """Asserts that the output and all gradients agree with float64."""
  x, dout, scale, *weights = draw(batch, grid, channels)

  @jax.jit
  def run(x, dout, weights):
    def branch(x, weights):
      return module.window_branch(window, x, scale, *weights)

    out, vjp = jax.vjp(branch, x, weights)
    return out, *jax.tree.leaves(vjp(dout))

  with interpreted_gpu.interpreted('window_branch_gpu') as module:
    backward = importlib.import_module(module.backward.__module__)
    with mock.patch.object(module, '_MIN_WINDOWS', 1):
      assert module.fits(batch, grid, channels, HEAD, window)
    with mock.patch.object(backward, '_PROGRAMS', programs):
      actual = run(x, dout, weights)
  operands = x, dout, scale, *weights
  expected = formula(
    window, *jax.tree.map(lambda a: np.asarray(a, np.float64), operands)
  )
  for name, a, e in zip(('out', *NAMES), actual, expected, strict=True):
    error = np.abs(np.asarray(a, np.float64) - e).max()
    # The gradient of the bias of keys is 0.
    largest = max(np.abs(e).max(), 1e-9)
    # Rounding to bfloat16, of two numbers that are subtracted in the middle.
    assert error <= 2**-6 * largest, name


needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11),
  reason='this version of JAX has no interpreter of GPU kernels',
)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
  ('batch', 'grid', 'channels', 'window', 'programs'),
  [
    # Drop path is zero for the second clip. Programs have three windows each.
    (3, (8, 6, 3), 64, (8, 3, 3), 2),
    (1, (16, 2, 4), 96, (8, 2, 4), 132),
  ],
)
def test_branch_and_gradients(batch, grid, channels, window, programs):
  check(batch, grid, channels, window, programs)


@needs_interpreter
@pytest.mark.slow
def test_branch_of_two_warpgroups_and_gradients():
  interpreted_gpu.run('windows', 64)


def test_unsupported_sizes_are_rejected():
  module = importlib.import_module('dualformer_jax.kernels.window_branch_gpu')
  grid, window = (16, 56, 56), (8, 7, 7)
  assert module.fits(8, grid, 64, 32, window)
  assert module.fits(4, (16, 28, 28), 128, 32, window)
  assert not module.fits(3, (16, 28, 28), 128, 32, window)  # few windows
  assert not module.fits(0, grid, 64, 32, window)  # devices share clips
  assert not module.fits(8, grid, 64, 32, None)
  assert not module.fits(8, grid, 64, 64, window)
  assert not module.fits(8, grid, 256, 32, window)  # too large
  assert not module.fits(8, (16, 48, 48), 64, 32, window)  # padded
  assert not module.fits(8, grid, 64, 32, (4, 7, 7))
  assert not module.fits(8, grid, 64, 32, (8, 2, 2))  # less than a tile
  assert not module.fits(8, grid, 64, 32, (8, 8, 8))  # too large


@pytest.mark.parametrize(
  ('kernels', 'dtype', 'device', 'is_found'),
  [
    ('experimental', 'bfloat16', 'NVIDIA H200', True),
    ('experimental', 'bfloat16', 'NVIDIA A100-SXM4-80GB', False),
    ('experimental', 'float32', 'NVIDIA H200', False),
    ('auto', 'bfloat16', 'NVIDIA H200', False),
  ],
)
def test_branch_is_found(monkeypatch, kernels, dtype, device, is_found):
  interpreted_gpu.pretend(monkeypatch, device)
  compute = Compute(dtype, kernels)
  find = functools.partial(
    attention_branch.find_branch, (8, 16, 56, 56, 64), 2, compute
  )
  assert bool(find((8, 7, 7))) == is_found
  assert find(num_keys=392) is None


def plain_branch(window, x, branch_scale, norm, projections, proj):
  """Stands in for the kernels, on any platform."""
  windows, channels = window[1:], x.shape[-1]
  y = reference_norm(x, *norm)
  qkv = [
    test_projections.to_windows(y @ kernel + bias, windows).reshape(
      1, -1, np.prod(window), channels
    )
    for kernel, bias in projections
  ]
  y = reference_attention(*qkv, num_heads=2).reshape(-1, channels)
  y = test_projections.to_grid(y @ proj[0] + proj[1], windows, x.shape[1:4])
  return x + branch_scale[:, None, None, None, None] * y


def find_plain(shape, num_heads, compute, window=None, num_keys=0):
  """Stands in for `find_branch`."""
  module = types.SimpleNamespace(
    fits=lambda *sizes: sizes[-1] is not None, window_branch=plain_branch
  )
  with (
    mock.patch.object(attention_branch, 'hopper_kernels', lambda *_: module),
    mock.patch.object(dispatch, 'platform', lambda: 'gpu'),
  ):
    return attention_branch.find_branch(
      shape, num_heads, compute, window, num_keys
    )


@pytest.mark.slow
def test_block_with_branch_equals_separate_operations():
  window = 8, 2, 4
  expected = test_projections.run_block(window)
  with mock.patch.object(attention, 'find_branch', find_plain):
    actual = test_projections.run_block(window)
  for a, e in zip(map(np.asarray, actual), expected, strict=True):
    assert np.abs(a - e).max() < 1e-5 * np.abs(e).max()
