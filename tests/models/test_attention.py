"""Local window and global pyramid attention agree with float64."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.models import attention
from tests.kernels import float64

KERNELS = pytest.mark.parametrize('kernels', ['auto', 'reference'])


def attend(layer, x):
  """Calls an attention layer as a block does."""
  return layer.attend(layer.project(x))


def assert_close(actual, expected):
  """Compares relative to the largest expected value."""
  error = np.abs(np.asarray(actual) - expected).max()
  assert error < 1e-4 * np.abs(expected).max()


@KERNELS
@pytest.mark.parametrize(
  'grid, window',
  [
    ((10, 20, 20), (8, 7, 7)),
    ((8, 7, 7), (8, 7, 7)),
    ((3, 9, 16), (8, 7, 7)),
    ((4, 6, 5), (4, 4, 4)),
  ],
)
def test_padding_of_windows_gets_no_attention(grid, window, kernels):
  channels, heads = 8, 2
  layer = attention.LocalWindowAttention(
    channels, heads, grid, window, Compute('float32', kernels)
  )
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, *grid, channels)).astype(np.float32)
  variables = jax.jit(nn.init(attend, layer))(jax.random.key(1), x)
  variables = jax.tree.map(
    lambda p: rng.standard_normal(p.shape).astype(np.float32), variables
  )
  actual = jax.jit(nn.apply(attend, layer))(variables, x)

  p = jax.tree.map(np.float64, variables['params'])
  qkv = np.einsum('bdhwc,csne->bdhwsne', x, p['qkv']['kernel'])
  qkv += p['qkv']['bias']
  mixed = np.zeros((*x.shape[:-1], heads, channels // heads))
  starts = [range(0, g, w) for g, w in zip(grid, window, strict=True)]
  for b, n, *start in itertools.product(range(2), range(heads), *starts):
    index = (b, *(slice(s, s + w) for s, w in zip(start, window, strict=True)))
    tokens = qkv[index]
    q, k, v = (tokens[..., i, n, :].reshape(-1, 4) for i in range(3))
    mixed[(*index, n)] = float64.attention(q, k, v).reshape(
      *tokens.shape[:3], 4
    )
  expected = np.einsum('bdhwne,nec->bdhwc', mixed, p['proj']['kernel'])
  expected += p['proj']['bias']
  assert_close(actual, expected)


def pool(x, kernel, bias):
  """Pools x [d, h, w, c] by a depthwise convolution with stride = kernel."""
  sizes = kernel.shape[:3]
  grid = [g // s for g, s in zip(x.shape[:3], sizes, strict=True)]
  out = np.zeros((*grid, x.shape[-1]))
  for index in itertools.product(*map(range, grid)):
    block = tuple(
      slice(i * s, (i + 1) * s) for i, s in zip(index, sizes, strict=True)
    )
    out[index] = (x[block] * kernel).sum((0, 1, 2)) + bias
  return out


@KERNELS
def test_global_attention_uses_the_pooled_pyramid(kernels):
  # The fine level drops a row: 9 is no multiple of 9 // 4 = 2.
  grid, channels, heads = (4, 9, 12), 8, 2
  layer = attention.GlobalPyramidAttention(
    channels, heads, grid, (2, 4, 4), (2, 3, 3), Compute('float32', kernels)
  )
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, *grid, channels)).astype(np.float32)
  variables = jax.jit(nn.init(attend, layer))(jax.random.key(1), x)
  variables = jax.tree.map(
    lambda v: rng.uniform(0.5, 1.5, v.shape).astype(v.dtype), variables
  )
  actual = jax.jit(nn.apply(attend, layer))(variables, x)

  p = jax.tree.map(np.float64, variables['params'])
  statistics = jax.tree.map(np.float64, variables['batch_stats'])['lr_1']
  assert p['sr']['kernel'].shape[:3] == (2, 2, 3)
  assert p['lr_0']['kernel'].shape[:3] == (1, 3, 4)
  assert p['lr_3']['kernel'].shape[:3] == (2, 1, 1)
  fine = pool(x[0], p['sr']['kernel'], p['sr']['bias'])
  coarse = pool(x[0], p['lr_0']['kernel'], p['lr_0']['bias'])
  coarse = (coarse - statistics['mean']) / np.sqrt(statistics['var'] + 1e-5)
  coarse = np.maximum(coarse * p['lr_1']['scale'] + p['lr_1']['bias'], 0)
  coarse = pool(coarse, p['lr_3']['kernel'], p['lr_3']['bias'])
  keys = np.concatenate([y.reshape(-1, channels) for y in (fine, coarse)])
  keys = keys - keys.mean(-1, keepdims=True)
  keys = keys / np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-5)
  keys = keys * p['norm']['scale'] + p['norm']['bias']
  q = np.einsum('lc,cne->lne', x[0].reshape(-1, channels), p['q']['kernel'])
  q += p['q']['bias']
  kv = np.einsum('mc,csne->msne', keys, p['kv']['kernel']) + p['kv']['bias']
  mixed = np.stack(
    [
      float64.attention(q[:, n], kv[:, 0, n], kv[:, 1, n]) for n in range(heads)
    ],
    axis=1,
  )
  expected = np.einsum('lne,nec->lc', mixed, p['proj']['kernel'])
  expected = (expected + p['proj']['bias']).reshape(x.shape)
  assert_close(actual, expected)


@pytest.mark.parametrize(
  'grid, coarse_size, first, second',
  [
    ((16, 56, 56), (4, 4, 4), (1, 7, 7), (4, 2, 2)),  # published, stage 0
    ((16, 28, 28), (4, 4, 4), (1, 7, 7), (4, 1, 1)),  # published, stage 1
    ((8, 56, 56), (4, 4, 4), (1, 7, 7), (2, 2, 2)),  # 16 frames
    ((16, 112, 112), (4, 4, 4), (1, 7, 7), (4, 4, 4)),  # 448 pixels
    ((16, 64, 64), (4, 4, 4), (1, 4, 4), (4, 4, 4)),  # 256 pixels
    ((16, 44, 48), (4, 4, 4), (1, 1, 6), (4, 11, 2)),
    ((2, 3, 4), (4, 4, 4), (1, 1, 1), (1, 1, 1)),
  ],
)
def test_coarse_kernels(grid, coarse_size, first, second):
  assert attention.coarse_kernels(grid, coarse_size) == (first, second)
