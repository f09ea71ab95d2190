"""Linear layers around attention, and their gradients, agree with float64."""

import functools
import importlib
import types
from unittest import mock

from einops import rearrange
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.kernels import projections
from dualformer_jax.kernels.attention import attention as attend
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.kernels.layer_norm import reference
from dualformer_jax.kernels.pooling import reference as pooling_reference
from dualformer_jax.kernels.pooling import split_blocks
from dualformer_jax.models import attention
from dualformer_jax.models.dualformer import Block
from tests import random_variables
from tests.kernels import float64, interpreted_gpu


def to_windows(x, window):
  """Returns tokens in the order of the kernels, [n, c]."""
  if window is None:
    return x.reshape(-1, x.shape[-1])
  h, w = window
  pattern = 'b (i wd) (j wh) (k ww) c -> (b i j k wh ww wd) c'
  return rearrange(x, pattern, wd=8, wh=h, ww=w)


def to_grid(x, window, grid):
  if window is None:
    return x.reshape(-1, *grid, x.shape[-1])
  (d, h, w), (wh, ww) = grid, window
  sizes = {'wd': 8, 'wh': wh, 'ww': ww, 'i': d // 8, 'j': h // wh, 'k': w // ww}
  pattern = '(b i j k wh ww wd) c -> b (i wd) (j wh) (k ww) c'
  return rearrange(x, pattern, **sizes)


SHAPE = 2, 16, 4, 8


def draw(*shapes, dtype='float32'):
  """Returns random arrays, of the values of `dtype`."""
  rng = np.random.default_rng(len(shapes))
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def norm_project(window, x, scale, bias, kernels, biases, dx, dys):
  """Returns outputs and gradients, in float64."""
  y, norm_pullback = float64.layer_norm(x, scale, bias)
  outputs, dkernels, dbiases, dnorm = [], [], [], np.zeros_like(x)
  if window is None:
    outputs.append(to_windows(y, None))
    dnorm += dys[0].reshape(x.shape)
    dys = dys[1:]
  for kernel, layer_bias, dy in zip(kernels, biases, dys, strict=True):
    output, pullback = float64.linear(y, kernel, layer_bias)
    dinput, dkernel, dbias = pullback(to_grid(dy, window, x.shape[1:4]))
    outputs.append(to_windows(output, window))
    dkernels.append(dkernel)
    dbiases.append(dbias)
    dnorm += dinput
  dinput, *dweights = norm_pullback(dnorm)
  return x, *outputs, dx + dinput, *dweights, *dkernels, *dbiases


def project_add(window, x, y, branch_scale, kernel, bias, dout):
  """Returns the output and gradients, in float64."""
  branch_scale = branch_scale[:, None, None, None, None]
  grid = to_grid(y, window, x.shape[1:4])
  output, pullback = float64.linear(grid, kernel, bias)
  dy, *dweights = pullback(branch_scale * dout)
  return x + branch_scale * output, dout, to_windows(dy, window), *dweights


def assert_agree(actual, expected):
  for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
    error = np.abs(np.asarray(a, np.float64) - e).max()
    assert error <= 2**-7 * np.abs(e).max(), index


def with_gradients(function, operands, gradients):
  """Returns the outputs, and the gradients of the operands."""

  @jax.jit
  def run(operands, gradients):
    outputs, vjp = jax.vjp(function, *operands)
    return outputs, vjp(gradients)

  return run(operands, gradients)


def exact(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.fixture(name='module')
def _module():
  """The kernels for Hopper, interpreted."""
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  with interpreted_gpu.interpreted('projections_gpu') as module:
    yield module


CASES = pytest.mark.parametrize(
  ('window', 'channels'),
  [((2, 4), 64), ((4, 2), 96), (None, 128), ((4, 2), 384), (None, 384)],
)


@pytest.mark.slow
@CASES
def test_norm_project_and_gradients(module, window, channels):
  shape = *SHAPE, channels
  x, dx, means = draw(shape, shape, (*SHAPE, 1), dtype='bfloat16')
  x += 3 * means
  scale, bias, *layers = draw(*[channels] * 4, *[(channels, channels)] * 2)
  weights = 1 + 0.3 * scale, bias, tuple(layers[2:]), tuple(layers[:2])
  dys = draw(*[(x.size // channels, channels)] * (2 + (window is None)))
  dys = [dy.astype('bfloat16') for dy in dys]
  (x_out, ys), (*gradients, dkernels, dbiases) = with_gradients(
    functools.partial(module.norm_project, window), (x, *weights), (dx, dys)
  )
  actual = x_out, *ys, *gradients, *dkernels, *dbiases
  assert_agree(actual, norm_project(window, *exact((x, *weights, dx, dys))))


@pytest.mark.slow
@CASES
def test_project_add_and_gradients(module, window, channels):
  shape = *SHAPE, channels
  x, dout = draw(shape, shape, dtype='bfloat16')
  (y,) = draw((x.size // channels, channels), dtype='bfloat16')
  kernel, bias = draw((channels, channels), channels)
  operands = x, y, jnp.array([0.75, 1.5]), kernel, bias
  out, (dx, dy, _, dkernel, dbias) = with_gradients(
    functools.partial(module.project_add, window), operands, dout
  )
  expected = project_add(window, *exact((*operands, dout)))
  assert_agree((out, dx, dy, dkernel, dbias), expected)


def test_gpu_kernels_reject_unsupported_sizes():
  module = importlib.import_module('dualformer_jax.kernels.windows_gpu')
  window = 8, 7, 7
  assert module.fits(8, (16, 56, 56), 64, window)
  assert module.fits(1, (16, 14, 14), 256, window)
  assert module.fits(8, (16, 14, 14), 512, window)
  assert not module.fits(8, (16, 7, 7), 768, window)
  assert not module.fits(8, (16, 32, 32), 64, window)
  assert not module.fits(8, (4, 56, 56), 64, (4, 7, 7))
  assert not module.fits(1, (8, 7, 7), 64, window)
  assert not module.fits(0, (16, 56, 56), 64, window)
  assert module.fits(8, (4, 32, 32), 64, None)
  assert not module.fits(1, (1, 9, 9), 64, None)


def plain_norm_project(window, x, scale, bias, kernels, biases):
  """Stands in for the kernels, on any platform."""
  y = reference(x, scale, bias)
  outputs = [] if window else [to_windows(y, None)]
  layers = zip(kernels, biases, strict=True)
  outputs += [to_windows(y @ kernel + b, window) for kernel, b in layers]
  return x, outputs


def plain_project_add(window, x, y, branch_scale, kernel, bias):
  """Stands in for the kernels, on any platform."""
  y = to_grid(y @ kernel + bias, window, x.shape[1:4])
  return x + branch_scale[:, None, None, None, None] * y


def plain_norm_pool_project(_, x, scale, bias, kernels, biases, pooling):
  """Stands in for the kernels, on any platform."""
  x, (y, *outputs) = plain_norm_project(None, x, scale, bias, kernels, biases)
  levels = [
    pooling_reference(split_blocks(y.reshape(x.shape), k.shape[:3]), k)
    for k in pooling
  ]
  return x, outputs, levels


def plain_attend_add(x, q, k, v, branch_scale, norm, query, layer):
  """Stands in for the kernels, on any platform."""
  del norm, query
  y = attend(q[None], k[None], v[None], 2, Compute())[0]
  return plain_project_add(None, x, y, branch_scale, *layer)


def find_plain(shape, window, compute, pooling=(), *_):
  """Stands in for `find_projections`."""
  attention = types.SimpleNamespace(attend_add=plain_attend_add)
  module = types.SimpleNamespace(
    norm_pool_project=plain_norm_pool_project,
    norm_project=plain_norm_project,
    project_add=plain_project_add,
  )
  return projections.FusedProjections(
    module, compute, window, pooling, attention if pooling else None
  )


def run_block(window):
  """Returns the output of a block of 8 clips and all gradients."""
  block = Block(
    16, 2, (8, 4, 4), window, (4, 2, 2), (2, 2, 2), 'elementwise', Compute()
  )
  x, dout = draw((8, 8, 4, 4, 16), (8, 8, 4, 4, 16))
  scales = jnp.linspace(0.5, 1.5, 16).reshape(2, 8)
  init = functools.partial(block.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), x)
  variables = random_variables.draw_like(shapes)

  @jax.jit
  def run(params, x, dout):
    def apply(params, x):
      return block.apply({**variables, 'params': params}, x, False, scales)

    out, vjp = jax.vjp(apply, params, x)
    return out, vjp(dout)

  return jax.tree.leaves(run(variables['params'], x, dout))


def block_errors(window):
  """Returns the relative differences of a block with and without fusion."""
  expected = run_block(window)
  with mock.patch.object(attention, 'find_projections', find_plain):
    actual = run_block(window)
  return [
    float(np.abs(a - e).max() / np.abs(e).max())
    for a, e in zip(map(np.asarray, actual), expected, strict=True)
  ]


@pytest.mark.slow
@pytest.mark.parametrize('window', [(8, 2, 4), None])
def test_block_with_fused_projections_equals_separate_operations(window):
  assert np.max(block_errors(window)) < 1e-5


@pytest.mark.parametrize(
  ('kernels', 'dtype', 'device', 'channels', 'is_found'),
  [
    ('experimental', 'bfloat16', 'NVIDIA H200', 64, True),
    ('experimental', 'bfloat16', 'NVIDIA H200', 48, False),
    ('experimental', 'bfloat16', 'NVIDIA A100-SXM4-80GB', 64, False),
    ('experimental', 'float32', 'NVIDIA H200', 64, False),
    ('auto', 'bfloat16', 'NVIDIA H200', 64, False),
  ],
)
def test_gpu_kernels_are_found(
  monkeypatch, kernels, dtype, device, channels, is_found
):
  interpreted_gpu.pretend(monkeypatch, device)
  for window in ((8, 7, 7), None):
    found = projections.find_projections(
      (8, 16, 14, 14, channels), window, Compute(dtype, kernels)
    )
    assert bool(found) == is_found
