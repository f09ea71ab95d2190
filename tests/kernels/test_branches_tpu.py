"""Both branches of a block as kernels for TPUs agree with float64."""

import functools
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.inference import explain
from dualformer_jax.kernels import (
  attention_branch,
  attention_branch_tpu,
  dispatch,
  mlp,
  mlp_tpu,
  norm_pool_tpu,
  tiles_tpu,
)
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.models.dualformer import DualFormer
from tests import random_variables
from tests.kernels import float64
from tests.kernels.interpreted_tpu import tpu_fixture  # noqa: F401

pytestmark = pytest.mark.usefixtures('tpu')
DTYPES = pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
TOLERANCE = {'float32': 1e-5, 'bfloat16': 2**-6}


def draw(*shapes, dtype='float32'):
  """Returns arrays of numbers that bfloat16 has."""
  rng = np.random.default_rng(0)
  arrays = (jnp.asarray(rng.standard_normal(s), 'bfloat16') for s in shapes)
  return [x.astype(dtype) for x in arrays]


def exact(*arrays):
  return [np.asarray(x, np.float64) for x in arrays]


def gradients(function, operands, dy):
  """Returns the output and the gradients of all operands."""

  @jax.jit
  def run(operands, dy):
    vjp: Any = jax.vjp(function, *operands)
    return vjp[0], *vjp[1](dy)

  return run(operands, dy)


def assert_agrees(actual, expected, tolerance):
  for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
    error = np.abs(np.asarray(a, np.float64) - e).max()
    largest = np.abs(e).max()
    if largest < 1e-9:  # the gradient of the keys' bias is 0
      largest = max(np.abs(e).max() for e in expected)
    assert error < tolerance * largest, index


@DTYPES
@pytest.mark.parametrize(
  'batch, tokens, channels', [(3, 48, 64), (16, 6, 128), (8, 6, 96)]
)
def test_mlp_and_gradients(batch, tokens, channels, dtype):
  c, hidden = channels, 4 * channels
  x, dy = draw((batch, tokens, c), (batch, tokens, c), dtype=dtype)
  vectors = draw((batch,), (c,), (c,), (hidden,), (c,))
  scale, norm_scale, norm_bias, b1, b2 = vectors
  w1, w2 = (w / 8 for w in draw((c, hidden), (hidden, c)))
  assert mlp_tpu.fits(batch, tokens, c, hidden)
  actual = gradients(
    lambda x, *weights: mlp_tpu.mlp(x, scale, *weights),
    (x, norm_scale, norm_bias, w1, b1, w2, b2),
    dy,
  )

  x, dy, scale, norm_scale, norm_bias, w1, b1, w2, b2 = exact(
    x, dy, scale, norm_scale, norm_bias, w1, b1, w2, b2
  )
  normed, norm_pullback = float64.layer_norm(x, norm_scale, norm_bias)
  h, fc1_pullback = float64.linear(normed, w1, b1)
  activated, gelu_pullback = float64.gelu(h)
  y, fc2_pullback = float64.linear(activated, w2, b2)
  scale = scale[:, None, None]
  dactivated, dw2, db2 = fc2_pullback(dy * scale)
  dnormed, dw1, db1 = fc1_pullback(*gelu_pullback(dactivated))
  dx, *dnorm = norm_pullback(dnormed)
  expected = x + scale * y, dy + dx, *dnorm, dw1, db1, dw2, db2
  assert_agrees(actual, expected, TOLERANCE[dtype])


def partition(x, grid, window):
  """Returns windows of tokens, [b, windows, tokens, c]."""
  axes = zip(grid, window, strict=True)
  sizes = [n for g, w in axes for n in (g // w, w)]
  x = x.reshape(len(x), *sizes, x.shape[-1]).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(len(x), -1, math.prod(window), x.shape[-1])


def reverse(x, grid, window):
  counts = [g // w for g, w in zip(grid, window, strict=True)]
  x = x.reshape(len(x), *counts, *window, x.shape[-1])
  x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
  return x.reshape(len(x), math.prod(grid), x.shape[-1])


@DTYPES
@pytest.mark.parametrize(
  'batch, grid, channels, window, num_keys',
  [
    (16, (2, 2, 6), 64, (2, 2, 3), 0),
    (8, (2, 2, 4), 256, None, 24),
  ],
)
def test_attention_and_gradients(
  batch, grid, channels, window, num_keys, dtype
):
  head, c, n = 32, channels, math.prod(grid)
  x, dy = draw((batch, n, c), (batch, n, c), dtype=dtype)
  keys = tuple(draw(*[(batch, num_keys, c)] * 2, dtype=dtype))
  keys = keys if num_keys else ()
  count = 2 if num_keys else 4  # linear layers
  (scale,) = draw((batch,))
  vectors = tuple(draw(*[(c,)] * (count + 2)))
  matrices = tuple(w / 8 for w in draw(*[(c, c)] * count))
  blocks = attention_branch_tpu.blocks(batch, grid, c, head, window, num_keys)
  assert blocks is not None
  y, dx, *rest = gradients(
    lambda x, keys, vectors, matrices: attention_branch_tpu.attention_branch(
      x, scale, keys, vectors, matrices, blocks, head
    ),
    (x, keys, vectors, matrices),
    dy,
  )
  actual = y, dx, *jax.tree.leaves(rest)

  x, dy, scale = exact(x, dy, scale)
  keys, vectors, matrices = (exact(*a) for a in (keys, vectors, matrices))
  normed, norm_pullback = float64.layer_norm(x, *vectors[:2])
  projections = [
    float64.linear(normed, w, b)
    for w, b in zip(matrices[:-1], vectors[2:-1], strict=True)
  ]
  qkv = [y for y, _ in projections]
  to_windows = functools.partial(partition, grid=grid, window=window)
  to_tokens = functools.partial(reverse, grid=grid, window=window)
  if num_keys:
    qkv = [y[:, None] for y in (*qkv, *keys)]
    to_windows, to_tokens = lambda y: y[:, None], lambda y: y[:, 0]
  else:
    qkv = [to_windows(y) for y in qkv]

  def attend(dout):
    q, k, v = qkv
    return float64.attention_and_gradients(q, k, v, dout, c // head)

  out = to_tokens(attend(np.zeros_like(qkv[0]))[0])
  branch, proj_pullback = float64.linear(out, matrices[-1], vectors[-1])
  scale = scale[:, None, None]
  dout, dproj, dproj_bias = proj_pullback(dy * scale)
  _, *dqkv = (to_tokens(d) for d in attend(to_windows(dout)))
  pulled = [
    pullback(d) for (_, pullback), d in zip(projections, dqkv, strict=False)
  ]
  dx, *dnorm = norm_pullback(np.sum([d for d, _, _ in pulled], axis=0))
  expected = (
    x + scale * branch,
    dy + dx,
    *(dqkv[1:] if num_keys else ()),
    *dnorm,
    *(dbias for _, _, dbias in pulled),
    dproj_bias,
    *(dkernel for _, dkernel, _ in pulled),
    dproj,
  )
  assert_agrees(actual, expected, TOLERANCE[dtype])


@DTYPES
def test_norm_pool_and_gradients(dtype):
  batch, grid, c = 16, (4, 4, 8), 64
  sizes = (2, 2, 4), (1, 4, 2)
  x, dx = draw(*[(batch, *grid, c)] * 2, dtype=dtype)
  scale, bias = draw((c,), (c,))
  kernels = tuple(draw(*[(*size, c) for size in sizes]))
  assert norm_pool_tpu.fits(batch, grid, c, sizes)
  counts = [tuple(n // k for n, k in zip(grid, s, strict=True)) for s in sizes]
  dlevels = tuple(draw(*[(batch, *count, c) for count in counts]))
  actual = gradients(
    norm_pool_tpu.norm_pool, (x, (scale, bias), kernels), (dx, dlevels)
  )

  normed, norm_pullback = float64.layer_norm(*exact(x, scale, bias))
  dnormed, levels, dkernels = np.zeros_like(normed), [], []
  for kernel, dlevel in zip(exact(*kernels), exact(*dlevels), strict=True):
    (i, j, k), (d, h, w) = kernel.shape[:3], dlevel.shape[1:4]
    blocks = normed.reshape(batch, d, i, h, j, w, k, c)
    levels.append(np.einsum('bdihjwkc,ijkc->bdhwc', blocks, kernel))
    dkernels.append(np.einsum('bdihjwkc,bdhwc->ijkc', blocks, dlevel))
    dnormed += np.einsum('bdhwc,ijkc->bdihjwkc', dlevel, kernel).reshape(
      normed.shape
    )
  pooled, *dnorm = norm_pullback(dnormed)
  expected = *exact(x), *levels, *exact(dx) + pooled, *dnorm, *dkernels
  assert_agrees(jax.tree.leaves(actual), expected, TOLERANCE[dtype])


def test_unsupported_sizes_and_devices_are_rejected():
  blocks = attention_branch_tpu.blocks
  grid, window = (16, 14, 14), (8, 7, 7)
  assert blocks(8, grid, 256, 32, window) is not None
  assert blocks(8, grid, 256, 32, None, 392) is not None
  assert blocks(0, grid, 256, 32, window) is None  # devices share clips
  assert blocks(4, grid, 256, 32, window) is None
  assert blocks(8, grid, 192, 32, window) is None  # half of 128 lanes
  assert blocks(8, (16, 12, 12), 256, 32, window) is None  # padded windows
  assert blocks(8, (16, 7, 7), 1024, 32, None, 784) is None  # too large
  assert mlp_tpu.fits(8, 784, 512, 2048)
  assert mlp_tpu.fits(2, 784, 512, 2048)
  assert not mlp_tpu.fits(2, 27, 512, 2048)
  assert not mlp_tpu.fits(8, 784, 2048, 8192)  # too large
  # Undone before the fixture `tpu`, which monkeypatch would not be.
  with mock.patch.object(dispatch, 'device_kind', lambda: 'TPU v4'):
    assert not tiles_tpu.is_supported()
    assert blocks(8, grid, 256, 32, window) is None
    assert not mlp_tpu.fits(8, 784, 512, 2048)


FIELDS: dict[str, Any] = dict(
  depths=(2,),
  embed_dims=(64,),
  num_heads=(2,),
  num_classes=5,
  num_frames=4,
  image_size=16,
  window=(2, 2, 2),
  fine_sizes=((2, 2, 2),),
  coarse_sizes=((2, 1, 1),),
  drop_path_rate=0.2,
)


@pytest.mark.slow
def test_model_agrees_with_reference():
  clips, weights = draw((8, 4, 16, 16, 3), (8, 5))
  variables = random_variables.draw(DualFormer(**FIELDS))

  def run(dtype, kernels, remat='none'):
    model: Any = DualFormer(**FIELDS, remat=remat, dtype=dtype, kernels=kernels)

    def loss(params):
      output, _ = model.apply(
        {**variables, 'params': params},
        clips,
        train=True,
        rngs={'dropout': jax.random.key(1)},
        mutable=['batch_stats'],
      )
      return jnp.sum(output.logits * weights)

    results = jax.jit(jax.value_and_grad(loss))(variables['params'])
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(results)]
    return np.concatenate(leaves)

  expected = run('float32', 'reference')

  for remat in ('elementwise', 'block'):
    difference = run('bfloat16', 'auto', remat) - expected
    # The reference in bfloat16 differs by 8e-3, but rounds other arrays.
    assert np.linalg.norm(difference) < 1.5e-2 * np.linalg.norm(expected)


def test_captured_layers_are_called():
  model: Any = DualFormer(**FIELDS, dtype='bfloat16')
  clips = jax.ShapeDtypeStruct((8, 4, 16, 16, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), clips)

  def attend(variables, clips):
    token = jnp.zeros(3, jnp.int32)
    return explain.global_attention(model, variables, clips, token, (0, 1))

  assert jax.eval_shape(attend, variables, clips).shape == (8, 2, 4, 4)


def run_branches(x, dy, scale):
  """Returns outputs and gradients of both branches, on all devices."""
  c = x.shape[-1]
  compute = Compute('bfloat16')
  vectors = draw((c,), (c,), (c,), (c,), (4 * c,))
  w1, w2, *square = (w / 8 for w in draw((c, 4 * c), (4 * c, c), *[(c, c)] * 4))
  norm = tuple(vectors[:2])
  layers = [(w, vectors[2]) for w in square]

  def both(x, norm, layers, fc1, fc2):
    window = attention_branch.find_branch(x.shape, 2, compute, (2, 2, 2))
    assert window is not None
    x = window(x, scale, norm, layers[:3], layers[3])
    return mlp.mlp_branch(x, scale, norm, fc1, fc2, compute)

  operands = x, norm, layers, (w1, vectors[4]), (w2, vectors[3])
  return gradients(both, operands, dy)


def draw_branches():
  x, dy = draw(*[(64, 2, 4, 4, 64)] * 2, dtype='bfloat16')
  return x, dy, draw((64,))[0]
