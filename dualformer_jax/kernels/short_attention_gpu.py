"""Attention to a short sequence of keys, with the layers before and after it.

Pallas kernels for Hopper GPUs. Besides the output, the forward pass stores the
output of attention and the logarithm of the sum of exponentials, which the
backward pass reads (FlashAttention, arXiv 2205.14135). One backward kernel
computes the gradient of queries, token by token, another one those of keys and
values, which are sums over tokens.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import (
  short_attention_gpu_keys,
  short_attention_gpu_tokens,
)
from dualformer_jax.kernels.mlp import Weights

_HEAD = short_attention_gpu_tokens.HEAD
# Of queries, so that exponentials and logarithms have base 2.
_FACTOR = _HEAD**-0.5 / math.log(2)


def fits(batch: int, tokens: int, keys: int, channels: int, heads: int) -> bool:
  """Returns whether the kernels support these sizes.

  Args:
    batch: clips of a device.
    tokens: tokens of a clip.
    keys: keys of a clip.
    channels: channels of tokens.
    heads: attention heads.
  """
  return (
    channels == heads * _HEAD
    and short_attention_gpu_tokens.fits(batch, tokens, keys, channels)
    and keys >= short_attention_gpu_keys.KEYS
  )


@jax.custom_vjp
def attend_add(
  x: Float[Array, 'b d h w c'],
  q: Float[Array, 'b l c'],
  k: Float[Array, 'b m c'],
  v: Float[Array, 'b m c'],
  branch_scale: Float[Array, 'b'],
  norm: Weights,
  query: Weights,
  proj: Weights,
) -> Float[Array, 'b d h w c']:
  """Returns x + branch_scale * proj(attention(q, k, v)).

  The kernels compute the queries. `q` only gets their gradient: what computes
  it is not run. `x` has the gradient of the residual stream alone, weights of
  `norm` and `query` and `branch_scale` have none.

  Args:
    x: tokens, bfloat16.
    q: query(norm(x)).
    k: keys.
    v: values.
    branch_scale: factor of each clip.
    norm: scale and bias of LayerNorm.
    query: weights of the linear layer of queries.
    proj: weights of the linear layer of the output of attention.
  """
  del q
  return _forward(False, x, k, v, branch_scale, norm, query, proj)[0]


def _attend_add_fwd(x, q, k, v, branch_scale, norm, query, proj):
  del q
  return _forward(True, x, k, v, branch_scale, norm, query, proj)


def _forward(saves, x, k, v, branch_scale, norm, query, proj):
  """Returns the output and, if `saves`, residuals of the backward pass."""
  norm_scale, norm_bias = norm
  kernel, bias = query
  folded = (norm_scale[:, None] * kernel * _FACTOR).astype(x.dtype)
  # Products of float32 matrices may be less accurate than sums.
  bias = (bias + jnp.sum(norm_bias[:, None] * kernel, axis=0)) * _FACTOR
  tokens = x.reshape(len(x), -1, x.shape[-1])
  scale = branch_scale.astype(jnp.float32)
  proj_kernel, proj_bias = proj
  matrix = proj_kernel.astype(x.dtype)
  out, *saved = short_attention_gpu_tokens.forward(
    saves, tokens, k, v, scale, (folded, bias), (matrix, proj_bias)
  )
  residuals = x, k, v, scale, (folded, bias), matrix, saved
  return out.reshape(x.shape), residuals


def _attend_add_bwd(residuals, dout):
  x, k, v, scale, query, matrix, (attended, log_sums) = residuals
  shape = len(x), -1, x.shape[-1]
  dq, q, dy, deltas, sums = short_attention_gpu_tokens.query_gradients(
    x.reshape(shape),
    k,
    v,
    dout.reshape(shape),
    scale,
    attended,
    log_sums,
    query,
    matrix.T,
  )
  dk, dv = short_attention_gpu_keys.key_gradients(k, v, q, dy, log_sums, deltas)
  # Clip by clip, so that scaled gradients are not stored.
  dkernel = jnp.einsum(
    'bnc,bno->bco',
    attended.reshape(shape),
    dout.reshape(shape),
    preferred_element_type=jnp.float32,
  )
  dkernel = jnp.sum(scale[:, None, None] * dkernel, axis=0)
  dproj = dkernel, sums.sum(0)
  return dout, dq.reshape(shape), dk, dv, None, None, None, dproj


attend_add.defvjp(_attend_add_fwd, _attend_add_bwd)
