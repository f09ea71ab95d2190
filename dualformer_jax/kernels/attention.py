"""Multi-head attention: softmax(q k^T / sqrt(e)) v."""

from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from dualformer_jax.kernels.dispatch import (
  Compute,
  batch_shards,
  device_count,
  matmul_precision,
  platform,
)

# Bytes of float32 scores of one block on each device: what fits into the
# last-level cache of a CPU, and what keeps a GPU or TPU busy.
_BLOCK_BYTES = {'cpu': 2**23, 'gpu': 2**28, 'tpu': 2**28}


def attention(
  q: Float[Array, 'g b l c'],
  k: Float[Array, 'g b m c'],
  v: Float[Array, 'g b m c'],
  num_heads: int,
  compute: Compute,
  is_key: Bool[np.ndarray, 'g m'] | None = None,
) -> Float[Array, 'g b l c']:
  """Attends to the keys of the same group (window), softmax in float32.

  Each head has c / num_heads consecutive channels. `is_key` is False for
  padding, which gets no attention.
  """
  attend = compute.choose(reference, default=_blocked, gpu=_cudnn, tpu=_pallas)
  return attend(q, k, v, num_heads, is_key)


def reference(
  q: Float[Array, 'g b l c'],
  k: Float[Array, 'g b m c'],
  v: Float[Array, 'g b m c'],
  num_heads: int,
  is_key: Bool[np.ndarray, 'g m'] | None = None,
) -> Float[Array, 'g b l c']:
  """The plain implementation."""
  q, k, v = _split_heads(num_heads, q, k, v)
  scores = _scores(q * q.shape[-1] ** -0.5, k, is_key)
  weights = jax.nn.softmax(scores).astype(v.dtype)
  out = _product('gbnlm,gbmne->gblne', weights, v).astype(q.dtype)
  return rearrange(out, 'g b l n e -> g b l (n e)')


def _cudnn(q, k, v, num_heads, is_key):
  """CuDNN attention, for bfloat16 only: in float32 it is less accurate."""
  if q.dtype != jnp.bfloat16 or is_key is not None:
    return _blocked(q, k, v, num_heads, is_key)
  heads = _split_heads(num_heads, q, k, v)
  try:
    out = jax.nn.dot_product_attention(
      *(rearrange(x, 'g b l n e -> (b g) l n e') for x in heads),
      implementation='cudnn',
    )
  except (NotImplementedError, RuntimeError):
    # No cuDNN, or none for this GPU or head size.
    return _blocked(q, k, v, num_heads, is_key)
  return rearrange(out, '(b g) l n e -> g b l (n e)', g=len(q))


def _pallas(q, k, v, num_heads, is_key):
  """The kernel of attention_tpu, on each device for its batch and heads.

  XLA cannot partition a Pallas kernel, so it runs under shard_map.
  """
  # Imported late, as all kernels for TPUs: importing Pallas takes long.
  from dualformer_jax.kernels import attention_tpu

  batch, length, channels = q.shape[1:]
  head = channels // num_heads
  mesh = jax.sharding.get_abstract_mesh()
  head_parts = mesh.shape.get('tensor', 1)
  if (
    q.dtype != jnp.bfloat16
    or is_key is not None
    or batch % batch_shards()
    or not attention_tpu.fits(length, channels // head_parts, head)
  ):
    return _blocked(q, k, v, num_heads, is_key)

  def kernel(q, k, v):
    return attention_tpu.attention(q, k, v, head)

  if device_count() > 1:
    batch_axes = tuple(axis for axis in mesh.axis_names if axis != 'tensor')
    head_axis = 'tensor' if 'tensor' in mesh.axis_names else None
    spec = jax.P(None, batch_axes, None, head_axis)
    kernel = jax.shard_map(
      kernel, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
    )
  return kernel(q, k, v)


def _blocked(q, k, v, num_heads, is_key):
  out = blocked_attention(*_split_heads(num_heads, q, k, v), is_key)
  return rearrange(out, 'g b l n e -> g b l (n e)')


@jax.custom_vjp
def blocked_attention(
  q: Float[Array, 'g b l n e'],
  k: Float[Array, 'g b m n e'],
  v: Float[Array, 'g b m n e'],
  is_key: Bool[np.ndarray | Array, 'g m'] | None = None,
) -> Float[Array, 'g b l n e']:
  """Computes attention in blocks, so that no matrix of all scores is stored.

  A block is some groups or, of a single group, some queries with all keys. The
  loop does not run over the batch, which may be sharded. The backward pass
  recomputes scores and uses the saved logarithm of the sum of their
  exponentials (algorithm 4 of FlashAttention, arXiv
  2205.14135).
  """
  return _blocked_attention_fwd(q, k, v, is_key)[0]


def _attend(q, k, v, is_key):
  scores = _scores(q * q.shape[-1] ** -0.5, k, is_key)
  largest = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - largest).astype(v.dtype)
  total = weights.sum(-1, dtype=jnp.float32)
  out = _product('gbnlm,gbmne->gbnle', weights, v)
  out = jnp.moveaxis(out / total[..., None], 2, 3)
  return out, largest[..., 0] + jnp.log(total)


def _blocked_attention_fwd(q, k, v, is_key):
  steps, over_groups = _steps(q, k)
  q_steps = _split(q, 0 if over_groups else 2, steps)
  if over_groups:
    operands = q_steps, *(_split(x, 0, steps) for x in (k, v, is_key))
    out, log_total = jax.lax.map(lambda block: _attend(*block), operands)
  else:
    out, log_total = jax.lax.map(lambda q: _attend(q, k, v, is_key), q_steps)
  # Cast here: inside the loop, XLA:CPU casts the whole array in each iteration.
  out = _join(out, 0 if over_groups else 2).astype(q.dtype)
  return out, (q, k, v, is_key, out, log_total)


def _blocked_attention_bwd(residuals, dout):
  q, k, v, is_key, out, log_total = residuals
  scale = q.shape[-1] ** -0.5

  def attend_bwd(q, k, v, is_key, out, log_total, dout):
    # The forward pass scales queries; here keys are scaled. If both products
    # were equal, the compiler could store the first one's scores.
    k = k * scale
    weights = jnp.exp(_scores(q, k, is_key) - log_total[..., None])
    weights = weights.astype(v.dtype)
    # Products in the order that transposes no matrix of scores.
    dv = _product('gblne,gbnlm->gbnem', dout, weights)
    dweights = _product('gblne,gbmne->gbnlm', dout, v)
    mean = jnp.einsum('gblne->gbnl', dout.astype(jnp.float32) * out)
    dscores = (weights * (dweights - mean[..., None])).astype(q.dtype)
    dq = _product('gbnlm,gbmne->gbnle', dscores, k)
    dk = _product('gblne,gbnlm->gbnem', q * scale, dscores)
    return jnp.moveaxis(dq, 2, 3), dk, dv

  steps, over_groups = _steps(q, k)
  axis = 0 if over_groups else 2
  q_steps, out, dout = (_split(x, axis, steps) for x in (q, out, dout))
  if over_groups:
    k, v, is_key = (_split(x, 0, steps) for x in (k, v, is_key))
    operands = q_steps, k, v, is_key, out, log_total, dout
    dq, dk, dv = jax.lax.map(lambda block: attend_bwd(*block), operands)
    dk, dv = (_join(x, 0) for x in (dk, dv))
  else:

    def add(total, block):
      q, out, log_total, dout = block
      dq, *dkv = attend_bwd(q, k, v, is_key, out, log_total, dout)
      return jax.tree.map(jnp.add, total, dkv), dq

    g, b, m, n, e = k.shape
    zeros = [jnp.zeros((g, b, n, e, m), jnp.float32)] * 2
    operands = q_steps, out, log_total, dout
    (dk, dv), dq = jax.lax.scan(add, zeros, operands)
  dk, dv = (rearrange(x, 'g b n e m -> g b m n e') for x in (dk, dv))
  dq = _join(dq, axis)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


blocked_attention.defvjp(_blocked_attention_fwd, _blocked_attention_bwd)


def _product(equation: str, x: Array, y: Array) -> Float[Array, '...']:
  """Returns a matrix product with float32 sums."""
  return jnp.einsum(
    equation,
    x,
    y,
    precision=matmul_precision(x.dtype),
    preferred_element_type=jnp.float32,
  )


def _scores(
  q: Float[Array, 'g b l n e'],
  k: Float[Array, 'g b m n e'],
  is_key: Bool[np.ndarray | Array, 'g m'] | None,
) -> Float[Array, 'g b n l m']:
  """Returns q k^T in float32; padding gets the lowest number."""
  scores = _product('gblne,gbmne->gbnlm', q, k)
  if is_key is None:
    return scores
  is_key = is_key[:, None, None, None]
  return jnp.where(is_key, scores, jnp.finfo(jnp.float32).min)


def _steps(
  q: Float[Array, 'g b l n e'], k: Float[Array, 'g b m n e']
) -> tuple[int, bool]:
  """Returns the number of blocks, and whether they are blocks of groups."""
  groups, batch, queries, heads, _ = q.shape
  score_bytes = 4 * batch * heads * groups * queries * k.shape[2]
  size = groups if groups > 1 else queries
  steps = next(
    steps
    for steps in range(1, size + 1)
    if size % steps == 0
    and (steps == size or score_bytes <= steps * _block_bytes())
  )
  return steps, groups > 1


def _split(x: Any, axis: int, steps: int) -> Any:
  """Splits an axis into `steps` blocks, whose axis becomes the first."""
  if x is None:
    return None
  shape = x.shape[:axis] + (steps, -1) + x.shape[axis + 1 :]
  return jnp.moveaxis(jnp.reshape(x, shape), axis, 0)


def _join(x: Array, axis: int) -> Array:
  """Reverts _split."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _block_bytes() -> int:
  """Returns the bytes of a block on all devices of the mesh together."""
  return device_count() * _BLOCK_BYTES.get(platform(), 2**28)


def _split_heads(num_heads: int, *arrays: Array) -> list[Array]:
  return [rearrange(x, 'g b l (n e) -> g b l n e', n=num_heads) for x in arrays]
