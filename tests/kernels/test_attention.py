"""Attention kernels agree with float64, and the fastest one is selected."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.kernels import attention, attention_tpu, dispatch
from dualformer_jax.models.dualformer import DualFormer
from tests import reference_arrays
from tests.kernels import float64
from tests.kernels.interpreted_tpu import tpu_fixture  # noqa: F401


def draw(groups, batch, queries, keys, channels, dtype):
  """Returns q, k, v and the gradient of the output."""
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.standard_normal((groups, batch, length, channels)), dtype)
    for length in (queries, keys, keys, queries)
  ]


def assert_agrees(function, operands, num_heads, tolerance):
  """Compares the output and gradients of `function` with float64."""
  q, k, v, dout = operands

  @jax.jit
  def run(q, k, v, dout):
    vjp: Any = jax.vjp(function, q, k, v)
    return vjp[0], *vjp[1](dout)

  expected = float64.attention_and_gradients(q, k, v, dout, num_heads)
  names = ('out', 'dq', 'dk', 'dv')
  for name, actual, exact in zip(
    names, run(q, k, v, dout), expected, strict=True
  ):
    assert actual.dtype == q.dtype
    error = np.abs(np.asarray(actual, np.float64) - exact).max()
    assert error < tolerance * np.abs(exact).max(), name


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kernels', ['auto', 'reference'])
def test_attention_and_gradients(monkeypatch, kernels, dtype, groups):
  monkeypatch.setattr(attention, '_block_bytes', lambda: 40_000)
  operands = draw(groups, 2, 48, 48, 3 * 16, dtype)
  q, k = (x.reshape(groups, 2, 48, 3, 16) for x in operands[:2])
  assert attention._steps(q, k)[0] > 1
  compute = dispatch.Compute(dtype, kernels)

  def run(q, k, v):
    return attention.attention(q, k, v, 3, compute)

  assert_agrees(run, operands, 3, 1e-5 if dtype == 'float32' else 2**-6)


@pytest.mark.parametrize(
  'groups, batch, queries, keys, channels, head',
  [
    (3, 2, 56, 56, 64, 32),  # windows, fewer channels than lanes
    (1, 2, 1024, 24, 128, 32),  # blocks of queries with the same keys
    (2, 1, 16, 24, 256, 64),  # more channels than lanes
    (2, 2, 16, 24, 192, 32),  # half of the lanes at the end
  ],
)
@pytest.mark.usefixtures('tpu')
def test_tpu_kernel_and_gradients(groups, batch, queries, keys, channels, head):
  assert attention_tpu.fits(queries, channels, head)

  def run(q, k, v):
    return attention_tpu.attention(q, k, v, head)

  operands = draw(groups, batch, queries, keys, channels, 'float32')
  assert_agrees(run, operands, channels // head, 1e-5)


def test_tpu_kernel_rejects_unsupported_sizes():
  assert not attention_tpu.fits(392, 96, 48)  # heads across lane boundaries
  assert attention_tpu.fits(392, 192, 32)
  assert not attention_tpu.fits(1031, 128, 32)  # a prime number of queries
  assert attention_tpu.fits(50176, 64, 32)


@pytest.mark.parametrize('keys', [392, 456])
def test_cudnn_attention_and_gradients(keys):
  if jax.default_backend() != 'gpu':
    pytest.skip('cuDNN ATTENTION WAS NOT TESTED: there is no GPU')
  compute = dispatch.Compute('bfloat16')

  def run(q, k, v):
    return attention.attention(q, k, v, 2, compute)

  assert_agrees(run, draw(2, 2, 392, keys, 64, 'bfloat16'), 2, 2**-6)


@pytest.fixture(name='cudnn')
def _cudnn(monkeypatch):
  """Pretends that there is a GPU, and computes cuDNN's attention with XLA."""
  real = jax.nn.dot_product_attention

  def attend(*qkv):
    return real(*qkv, implementation='xla')

  def named(function, name):
    function.__name__ = name
    return jax.jit(function)

  forward = named(lambda *qkv: attend(*qkv), 'cudnn_forward')
  backward = named(
    lambda qkv, dout: jax.vjp(attend, *qkv)[1](dout), 'cudnn_backward'
  )
  substitute = jax.custom_vjp(forward)
  substitute.defvjp(lambda *qkv: (forward(*qkv), qkv), backward)

  def dot_product_attention(q, k, v, *, implementation):
    assert implementation == 'cudnn'
    return substitute(q, k, v)

  monkeypatch.setattr(dispatch, 'platform', lambda: 'gpu')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', dot_product_attention)


@pytest.mark.usefixtures('cudnn')
def test_gpu_attention_passes_groups_and_heads_to_cudnn():
  compute = dispatch.Compute('bfloat16')

  def run(q, k, v):
    return attention.attention(q, k, v, 2, compute)

  operands = draw(3, 2, 24, 16, 64, 'bfloat16')
  assert_agrees(run, operands, 2, 2**-5)
  assert 'cudnn_forward' in jax.jit(run).lower(*operands[:3]).as_text()


def test_gpu_attention_without_cudnn_is_blocked(monkeypatch):
  def dot_product_attention(*_, **__):
    raise RuntimeError('cuDNN is not detected.')

  monkeypatch.setattr(dispatch, 'platform', lambda: 'gpu')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', dot_product_attention)
  compute = dispatch.Compute('bfloat16')

  def run(q, k, v):
    return attention.attention(q, k, v, 2, compute)

  assert_agrees(run, draw(3, 2, 24, 16, 64, 'bfloat16'), 2, 2**-6)


@pytest.mark.slow
@pytest.mark.usefixtures('cudnn')
def test_cudnn_attention_runs_once_forward_and_once_backward():
  fields = reference_arrays.MODELS['micro'] | {'num_heads': (1, 1, 2, 4)}
  model = DualFormer(**fields, dtype='bfloat16')
  clips = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), clips)

  def score(params, batch_stats, clips):
    output, _ = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      clips,
      train=True,
      rngs={'dropout': jax.random.key(0)},
      mutable=['batch_stats'],
    )
    return output.logits.sum()

  lowered = jax.jit(jax.grad(score)).lower(
    variables['params'], variables['batch_stats'], clips
  )
  calls = re.findall(r'call @cudnn_(forward|backward)', lowered.as_text())
  blocks = sum(model.depths)
  assert calls.count('backward') == blocks
  assert calls.count('forward') == blocks
