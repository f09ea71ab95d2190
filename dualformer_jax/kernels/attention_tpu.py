"""Attention as a Pallas kernel for TPUs; scores stay in vector memory.

A head has 32 channels, and a TPU computes 128 lanes at a time. So a program
processes 128 channels together and masks those of the other heads; no head is
padded (docs/performance.md).
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels.tiles_tpu import LANES, dot

# Queries of a block at most; its scores have to fit into vector memory.
_MAX_QUERIES = 512


def fits(queries: int, channels: int, head: int) -> bool:
  """Returns whether `attention` supports arrays of these sizes."""
  return (
    LANES % head == 0 and channels % head == 0 and _query_block(queries) > 0
  )


def attention(
  q: Float[Array, 'g b l c'],
  k: Float[Array, 'g b m c'],
  v: Float[Array, 'g b m c'],
  head: int,
) -> Float[Array, 'g b l c']:
  """Returns softmax(q k^T / sqrt(head)) v for each head; softmax in float32.

  A block has all keys, so the backward pass needs only q, k and v. Heads of
  zeros fill the last 128 lanes.
  """
  channels = q.shape[-1]
  if channels > LANES and channels % LANES:
    pad = (*[(0, 0)] * 3, (0, -channels % LANES))
    q, k, v = (jnp.pad(x, pad) for x in (q, k, v))
  return _attention(q, k, v, head)[..., :channels]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, head):
  return _attention_fwd(q, k, v, head)[0]


def _attention_fwd(q, k, v, head):
  grid, query_spec, key_spec = _blocks(q, k)
  out = pl.pallas_call(
    functools.partial(_forward_kernel, head=head),
    grid=grid,
    in_specs=[query_spec, key_spec, key_spec],
    out_specs=query_spec,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    cost_estimate=_cost(q, k, head, products=2),
    compiler_params=pltpu.CompilerParams(dimension_semantics=_ANY_ORDER),
    name='attention',
  )(q, k, v)
  return out, (q, k, v)


def _attention_bwd(head, residuals, dout):
  q, k, v = residuals
  grid, query_spec, key_spec = _blocks(q, k)
  # Blocks of queries add to the same gradients of keys: run them in order.
  order = (*_ANY_ORDER[:-1], 'arbitrary')
  sums = k.dtype if grid[-1] == 1 else jnp.float32
  dq, dk, dv = pl.pallas_call(
    functools.partial(_backward_kernel, head=head),
    grid=grid,
    in_specs=[query_spec, key_spec, key_spec, query_spec],
    out_specs=[query_spec, key_spec, key_spec],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(k.shape, sums),
      jax.ShapeDtypeStruct(v.shape, sums),
    ],
    cost_estimate=_cost(q, k, head, products=5),
    compiler_params=pltpu.CompilerParams(dimension_semantics=order),
    name='attention_backward',
  )(q, k, v, dout)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype)


_attention.defvjp(_attention_fwd, _attention_bwd)

_ANY_ORDER = ('parallel',) * 4


def _query_block(queries: int) -> int:
  """Returns the queries of a block; 0 if there is no suitable number."""
  if queries <= _MAX_QUERIES:
    return queries
  sizes = (n for n in range(_MAX_QUERIES, 0, -8) if queries % n == 0)
  return next(sizes, 0)


def _blocks(
  q: Float[Array, 'g b l c'], k: Float[Array, 'g b m c']
) -> tuple[tuple[int, ...], pl.BlockSpec, pl.BlockSpec]:
  """Returns the grid, and the block specs of queries and of keys."""
  groups, batch, queries, channels = q.shape
  rows = _query_block(queries)
  lanes = min(LANES, channels)
  grid = (groups, batch, channels // lanes, queries // rows)
  query_spec = pl.BlockSpec(
    (1, 1, rows, lanes), lambda g, b, c, i: (g, b, i, c)
  )
  key_spec = pl.BlockSpec(
    (1, 1, k.shape[2], lanes), lambda g, b, c, i: (g, b, 0, c)
  )
  return grid, query_spec, key_spec


def _cost(q, k, head: int, products: int) -> pl.CostEstimate:
  scores = math.prod(q.shape[:3]) * (q.shape[3] // head) * k.shape[2]
  return pl.CostEstimate(
    flops=2 * products * scores * head,
    transcendentals=scores,
    # As many arrays of each kind are read or written; an approximation.
    bytes_accessed=products * (q.size + k.size) * q.dtype.itemsize,
  )


def _masks(lanes: int, head: int) -> list[Array]:
  """Returns a mask of lanes for each head, [1, lanes]."""
  owner = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1) // head
  return [owner == h for h in range(lanes // head)]


def _softmax(q, k, scale: float):
  """Returns the exponentials of scores [l, m] and their sums [l, 1]."""
  scores = dot(q, k, 1, 1) * scale
  weights = jnp.exp(scores - scores.max(-1, keepdims=True))
  return weights, weights.sum(-1, keepdims=True)


def attend(
  q: Float[Array, 'l c'],
  k: Float[Array, 'm c'],
  v: Float[Array, 'm c'],
  head: int,
) -> Float[Array, 'l c']:
  """Returns the attention of all heads of one block, in a kernel."""
  out = jnp.zeros(q.shape, jnp.float32)
  for mask in _masks(q.shape[1], head):
    weights, total = _softmax(jnp.where(mask, q, 0), k, head**-0.5)
    head_out = dot(weights.astype(v.dtype), v, 1, 0) / total
    out = jnp.where(mask, head_out, out)
  return out


def attend_backward(
  q: Float[Array, 'l c'],
  k: Float[Array, 'm c'],
  v: Float[Array, 'm c'],
  dout: Float[Array, 'l c'],
  head: int,
) -> tuple[Array, Array, Array, Array]:
  """Returns the output of `attend` and the gradients of q, k and v."""
  scale = head**-0.5
  out, dq = (jnp.zeros(q.shape, jnp.float32) for _ in range(2))
  dk, dv = (jnp.zeros(k.shape, jnp.float32) for _ in range(2))
  for mask in _masks(q.shape[1], head):
    weights, total = _softmax(jnp.where(mask, q, 0), k, scale)
    weights = weights * (1 / total)
    rounded = weights.astype(q.dtype)
    head_out = jnp.where(mask, dot(rounded, v, 1, 0), 0)
    out += head_out
    dv = jnp.where(mask, dot(rounded, dout, 0, 0), dv)
    dweights = dot(jnp.where(mask, dout, 0), v, 1, 1)
    # The sum of weights * dweights, over channels instead of keys.
    mean = (dout.astype(jnp.float32) * head_out).sum(-1, keepdims=True)
    dscores = (weights * (dweights - mean) * scale).astype(q.dtype)
    dq = jnp.where(mask, dot(dscores, k, 1, 0), dq)
    dk = jnp.where(mask, dot(dscores, q, 0, 0), dk)
  return out, dq, dk, dv


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, head: int):
  out = attend(q_ref[0, 0], k_ref[0, 0], v_ref[0, 0], head)
  out_ref[0, 0] = out.astype(out_ref.dtype)


def _backward_kernel(
  q_ref, k_ref, v_ref, dout_ref, dq_ref, dk_ref, dv_ref, *, head: int
):
  q, k, v, dout = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0], dout_ref[0, 0]
  scale = head**-0.5
  dq = jnp.zeros(q.shape, jnp.float32)
  dk = jnp.zeros(k.shape, jnp.float32)
  dv = jnp.zeros(k.shape, jnp.float32)
  for mask in _masks(q.shape[1], head):
    weights, total = _softmax(jnp.where(mask, q, 0), k, scale)
    weights = weights / total
    dv = jnp.where(mask, dot(weights.astype(q.dtype), dout, 0, 0), dv)
    dweights = dot(jnp.where(mask, dout, 0), v, 1, 1)
    mean = (weights * dweights).sum(-1, keepdims=True)
    dscores = (weights * (dweights - mean) * scale).astype(q.dtype)
    dq = jnp.where(mask, dot(dscores, k, 1, 0), dq)
    dk = jnp.where(mask, dot(dscores, q, 0, 0), dk)
  dq_ref[0, 0] = dq.astype(dq_ref.dtype)

  @pl.when(pl.program_id(3) == 0)
  def _():
    dk_ref[0, 0] = dk.astype(dk_ref.dtype)
    dv_ref[0, 0] = dv.astype(dv_ref.dtype)

  @pl.when(pl.program_id(3) > 0)
  def _():
    dk_ref[0, 0] += dk.astype(dk_ref.dtype)
    dv_ref[0, 0] += dv.astype(dv_ref.dtype)
