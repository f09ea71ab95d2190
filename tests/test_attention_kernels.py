"""Kernels for TPUs compute attention; those for GPUs are asked for."""

import itertools
import re
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.models import attention, dualformer, tpu_attention
from tests import reference_arrays


def attend(q, k, v, head):
  """Attention in float64 by the formula: [l, c], [m, c], [m, c] -> [l, c]."""
  results = []
  for start in range(0, q.shape[1], head):
    own = slice(start, start + head)
    scores = q[:, own] @ k[:, own].T / np.sqrt(head)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    results.append(weights / weights.sum(-1, keepdims=True) @ v[:, own])
  return np.concatenate(results, axis=1)


@pytest.mark.parametrize(
  'groups, batch, queries, keys, channels, head',
  [
    (3, 2, 56, 56, 64, 32),  # windows, fewer channels than lanes
    (1, 2, 1024, 24, 128, 32),  # queries in blocks, which share their keys
    (2, 1, 16, 24, 256, 64),  # more channels than lanes
  ],
)
def test_it_is_attention_with_its_gradients(
  groups, batch, queries, keys, channels, head
):
  rng = np.random.default_rng(0)
  lengths = queries, keys, keys, queries
  q, k, v, dout = (
    rng.standard_normal((groups, batch, length, channels)) for length in lengths
  )
  assert tpu_attention.fits(queries, channels, head)

  def run(q, k, v):
    return tpu_attention.attention(q, k, v, head, True)

  operands = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  vjp: Any = jax.vjp(run, *operands)
  out, pullback = vjp
  gradients = pullback(jnp.asarray(dout, jnp.float32))
  for g in range(groups):
    for b in range(batch):
      expected = attend(q[g, b], k[g, b], v[g, b], head)
      np.testing.assert_allclose(out[g, b], expected, rtol=0, atol=1e-5)
  # Gradients along a random direction, by central differences in float64.
  step = 1e-6
  for index, gradient in enumerate(gradients):
    direction = rng.standard_normal(operands[index].shape)
    values = []
    for sign in (1, -1):
      moved: list[Any] = [q, k, v]
      moved[index] = moved[index] + sign * step * direction
      values.append(
        sum(
          np.vdot(attend(*(x[g, b] for x in moved), head=head), dout[g, b])
          for g in range(groups)
          for b in range(batch)
        )
      )
    slope = (values[0] - values[1]) / (2 * step)
    assert np.isclose(np.vdot(gradient, direction), slope, rtol=1e-4)


def test_what_it_cannot_take_is_told():
  assert not tpu_attention.fits(392, 96, 48)  # heads that share no lanes evenly
  assert not tpu_attention.fits(392, 160, 32)
  assert not tpu_attention.fits(1031, 128, 32)  # a prime number of queries
  assert tpu_attention.fits(50176, 64, 32)


@pytest.mark.parametrize('keys', [392, 456])
def test_on_a_gpu_it_is_attention_with_its_gradients(keys):
  if jax.default_backend() != 'gpu':
    pytest.skip('there is no GPU: ITS ATTENTION WAS NOT TESTED')
  rng = np.random.default_rng(0)
  lengths = 392, keys, keys, 392
  q, k, v, dout = (
    jnp.asarray(rng.standard_normal((2, 2, length, 64)), jnp.bfloat16)
    for length in lengths
  )
  vjp: Any = jax.vjp(lambda q, k, v: attention.attention(q, k, v, 2), q, k, v)
  out, pullback = vjp
  actual = [np.asarray(x, np.float64) for x in (out, *pullback(dout))]
  expected = [np.zeros(x.shape) for x in actual]
  exact = [np.asarray(x, np.float64) for x in (q, k, v, dout)]
  for g, b, start in itertools.product(range(2), range(2), (0, 32)):
    own = g, b, slice(None), slice(start, start + 32)
    q64, k64, v64, dout64 = (x[own] for x in exact)
    scores = np.exp(q64 @ k64.T / np.sqrt(32))
    weights = scores / scores.sum(-1, keepdims=True)
    dweights = dout64 @ v64.T
    mean = (dweights * weights).sum(-1, keepdims=True)
    dscores = weights * (dweights - mean) / np.sqrt(32)
    expected[0][own] = weights @ v64
    expected[1][own] = dscores @ k64
    expected[2][own] = dscores.T @ q64
    expected[3][own] = weights.T @ dout64
  for x, y in zip(actual, expected, strict=True):
    # bfloat16 has 8 bits.
    assert np.linalg.norm(x - y) < 1e-2 * np.linalg.norm(y)


def test_gpus_run_the_attention_of_cudnn_once_each_way(monkeypatch):
  # As if an A100 with cuDNN 9.10 were here: nothing is run, only lowered.
  versions = type('Versions', (), {'cudnn_get_version': lambda: 91000})
  monkeypatch.setattr(fused_attention_stablehlo, 'cuda_versions', versions)
  monkeypatch.setattr(
    fused_attention_stablehlo,
    'check_compute_capability',
    lambda capability: float(capability) <= 8,
  )
  monkeypatch.setattr(
    fused_attention_stablehlo,
    'is_cuda_compute_capability_equal',
    lambda capability: capability == '8.0',
  )
  for module in (attention, dualformer):
    monkeypatch.setattr(module, 'platform', lambda: 'gpu')
  fields = reference_arrays.MODELS['micro'] | {'num_heads': (1, 1, 2, 4)}
  model = dualformer.DualFormer(**fields, dtype='bfloat16')
  clips = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), clips)

  def score(params, rest, clips):
    output, _ = model.apply(
      {'params': params, **rest},
      clips,
      train=True,
      rngs={'dropout': jax.random.key(0)},
      mutable=['batch_stats'],
    )
    return output.logits.sum()

  rest = {'batch_stats': variables['batch_stats']}
  traced = jax.jit(jax.grad(score)).trace(variables['params'], rest, clips)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  calls = re.findall(r'custom_call @__cudnn\$(\w+)', text)
  blocks = sum(model.depths)
  assert calls.count('fmhaSoftmax') == blocks
  assert calls.count('fmhaSoftmaxBackward') == blocks
