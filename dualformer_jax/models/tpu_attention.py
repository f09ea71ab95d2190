"""Attention as one kernel on TPUs: scores never go to the chip's memory.

A head has few channels, and a TPU computes 128 lanes at a time. So a kernel
takes heads together, 128 channels, and gives each head its own by masking:
arrays stay as dense as they come out of a linear layer, and no head is padded.
"""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

_LANES = 128
# Rows of scores that a kernel makes at a time, at most.
_MOST_QUERIES = 512


def fits(queries: int, channels: int, head: int) -> bool:
  """Whether `attention` takes arrays of these sizes."""
  return (
    _LANES % head == 0
    and (channels % _LANES == 0 or channels < _LANES)
    and _query_block(queries) > 0
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attention(
  q: Float[Array, 'g b l c'],
  k: Float[Array, 'g b m c'],
  v: Float[Array, 'g b m c'],
  head: int,
  interpret: bool = False,
) -> Float[Array, 'g b l c']:
  """Returns softmax(q k^T / sqrt(head)) v for each head; softmax in float32.

  Args:
    q: queries: groups, batch, tokens, channels of all heads.
    k: keys.
    v: values.
    head: channels of a head.
    interpret: runs without a TPU, to be tested.

  All scores of a query are there at a time, so that the backward pass needs
  nothing but q, k and v.
  """
  return _attention_fwd(q, k, v, head, interpret)[0]


def _attention_fwd(q, k, v, head, interpret):
  grid, of_queries, of_keys = _blocks(q, k)
  out = pl.pallas_call(
    functools.partial(_forward_kernel, head=head),
    grid=grid,
    in_specs=[of_queries, of_keys, of_keys],
    out_specs=of_queries,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    cost_estimate=_cost(q, k, head, products=2),
    compiler_params=pltpu.CompilerParams(dimension_semantics=_ANY_ORDER),
    interpret=interpret,
    name='attention',
  )(q, k, v)
  return checkpoint_name(out, 'attention'), (q, k, v)


def _attention_bwd(head, interpret, residuals, dout):
  q, k, v = residuals
  grid, of_queries, of_keys = _blocks(q, k)
  # Keys get a share from each block of queries: these come one after another.
  order = (*_ANY_ORDER[:-1], 'arbitrary')
  sums = k.dtype if grid[-1] == 1 else jnp.float32
  dq, dk, dv = pl.pallas_call(
    functools.partial(_backward_kernel, head=head),
    grid=grid,
    in_specs=[of_queries, of_keys, of_keys, of_queries],
    out_specs=[of_queries, of_keys, of_keys],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(k.shape, sums),
      jax.ShapeDtypeStruct(v.shape, sums),
    ],
    cost_estimate=_cost(q, k, head, products=5),
    compiler_params=pltpu.CompilerParams(dimension_semantics=order),
    interpret=interpret,
    name='attention_backward',
  )(q, k, v, dout)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype)


attention.defvjp(_attention_fwd, _attention_bwd)

_ANY_ORDER = ('parallel',) * 4


def _query_block(queries: int) -> int:
  """Returns how many queries a kernel takes at a time, 0 if it cannot."""
  if queries <= _MOST_QUERIES:
    return queries
  sizes = (n for n in range(_MOST_QUERIES, 0, -8) if queries % n == 0)
  return next(sizes, 0)


def _blocks(
  q: Float[Array, 'g b l c'], k: Float[Array, 'g b m c']
) -> tuple[tuple[int, ...], pl.BlockSpec, pl.BlockSpec]:
  """Returns the grid of kernels, and what each sees of queries and keys."""
  groups, batch, queries, channels = q.shape
  rows = _query_block(queries)
  lanes = min(_LANES, channels)
  grid = (groups, batch, channels // lanes, queries // rows)
  of_queries = pl.BlockSpec(
    (1, 1, rows, lanes), lambda g, b, c, i: (g, b, i, c)
  )
  of_keys = pl.BlockSpec(
    (1, 1, k.shape[2], lanes), lambda g, b, c, i: (g, b, 0, c)
  )
  return grid, of_queries, of_keys


def _cost(q, k, head: int, products: int) -> pl.CostEstimate:
  scores = math.prod(q.shape[:3]) * (q.shape[3] // head) * k.shape[2]
  tensors = products  # of each kind, read or written: near enough
  return pl.CostEstimate(
    flops=2 * products * scores * head,
    transcendentals=scores,
    bytes_accessed=tensors * (q.size + k.size) * q.dtype.itemsize,
  )


def _masks(lanes: int, head: int) -> list[Array]:
  """Returns which lanes are each head's, [1, lanes]."""
  owner = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1) // head
  return [owner == h for h in range(lanes // head)]


def _dot(x, y, x_axis: int, y_axis: int):
  return jax.lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _softmax(q, k, scale: float):
  """Returns exponentials of scores [l, m], and their sums [l, 1]."""
  scores = _dot(q, k, 1, 1) * scale
  weights = jnp.exp(scores - scores.max(-1, keepdims=True))
  return weights, weights.sum(-1, keepdims=True)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, head: int):
  q, k, v = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0]
  out = jnp.zeros(q.shape, jnp.float32)
  for mask in _masks(q.shape[1], head):
    weights, total = _softmax(jnp.where(mask, q, 0), k, head**-0.5)
    own = _dot(weights.astype(v.dtype), v, 1, 0) / total
    out = jnp.where(mask, own, out)
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
    dv = jnp.where(mask, _dot(weights.astype(q.dtype), dout, 0, 0), dv)
    dweights = _dot(jnp.where(mask, dout, 0), v, 1, 1)
    mean = (weights * dweights).sum(-1, keepdims=True)
    dscores = (weights * (dweights - mean) * scale).astype(q.dtype)
    dq = jnp.where(mask, _dot(dscores, k, 1, 0), dq)
    dk = jnp.where(mask, _dot(dscores, q, 0, 0), dk)
  dq_ref[0, 0] = dq.astype(dq_ref.dtype)

  @pl.when(pl.program_id(3) == 0)
  def _():
    dk_ref[0, 0] = dk.astype(dk_ref.dtype)
    dv_ref[0, 0] = dv.astype(dv_ref.dtype)

  @pl.when(pl.program_id(3) > 0)
  def _():
    dk_ref[0, 0] += dk.astype(dk_ref.dtype)
    dv_ref[0, 0] += dv.astype(dv_ref.dtype)
