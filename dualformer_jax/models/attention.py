"""Local window and global pyramid attention (2112.04674, section 3).

Neither keeps a score matrix: the backward pass makes scores anew. On TPUs and
GPUs a kernel does, elsewhere a loop over blocks of windows or of queries.
"""

from collections.abc import Callable
import contextlib
import math
from typing import Any

from einops import rearrange
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from dualformer_jax.models import tpu_attention
from dualformer_jax.models.layers import (
  BatchNorm,
  DepthwisePooling,
  LayerNorm,
  Linear,
  Projections,
  Size,
  matmul_precision,
  platform,
)

# Scores of one block that a device may hold, in bytes of float32: what stays in
# the last-level cache of a CPU, and what keeps a GPU or TPU busy.
_BLOCK_BYTES = {'cpu': 2**23, 'gpu': 2**28, 'tpu': 2**28}


def attention(
  q: Float[Array, 'g b l c'],
  k: Float[Array, 'g b m c'],
  v: Float[Array, 'g b m c'],
  num_heads: int,
  is_key: Bool[np.ndarray, 'g m'] | None = None,
) -> Float[Array, 'g b l c']:
  """Returns softmax(q k^T / sqrt(e)) v for each head of e channels.

  By the fastest means that there is; they compute what `blocked_attention`
  does, whose arguments these are, but for the axis of heads.
  """
  groups, batch, length, channels = q.shape
  # In float32, kernels for GPUs would compute with fewer digits.
  has_kernel = q.dtype == jnp.bfloat16 and is_key is None
  if has_kernel and platform() == 'tpu':
    head = channels // num_heads
    kernel, parts = _on_every_device(
      lambda q, k, v: tpu_attention.attention(q, k, v, head)
    )
    if batch % parts['batch'] == 0 and tpu_attention.fits(
      length, channels // parts['heads'], head
    ):
      return kernel(q, k, v)
  q, k, v = (
    rearrange(x, 'g b l (n e) -> g b l n e', n=num_heads) for x in (q, k, v)
  )
  out = None
  if has_kernel and platform() == 'gpu':
    # Where there is no cuDNN (or none for this GPU, or this size of heads) is
    # told before anything is compiled.
    with contextlib.suppress(NotImplementedError, RuntimeError):
      out = jax.nn.dot_product_attention(
        *(rearrange(x, 'g b l n e -> (b g) l n e') for x in (q, k, v)),
        implementation='cudnn',
      )
      out = rearrange(out, '(b g) l n e -> g b l n e', g=groups)
  if out is None:
    out = blocked_attention(q, k, v, is_key)
  return rearrange(out, 'g b l n e -> g b l (n e)')


def _on_every_device(
  function: Callable[..., Array],
) -> tuple[Callable[..., Array], dict[str, int]]:
  """Lets each device of the mesh run a kernel for its batch and its heads.

  The compiler can split what it has made, but no kernel.

  Returns:
    The function for whole arrays [g, b, l, n e], and into how many parts it
    splits 'batch' and 'heads'.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return function, {'batch': 1, 'heads': 1}
  batch_axes = tuple(axis for axis in mesh.axis_names if axis != 'tensor')
  heads_axis = 'tensor' if 'tensor' in mesh.axis_names else None
  spec = jax.sharding.PartitionSpec(None, batch_axes, None, heads_axis)
  heads = mesh.shape.get('tensor', 1)
  split = jax.shard_map(
    function, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
  )
  return split, {'batch': mesh.size // heads, 'heads': heads}


@jax.custom_vjp
def blocked_attention(
  q: Float[Array, 'g b l n e'],
  k: Float[Array, 'g b m n e'],
  v: Float[Array, 'g b m n e'],
  is_key: Bool[np.ndarray | Array, 'g m'] | None = None,
) -> Float[Array, 'g b l n e']:
  """Returns softmax(q k^T / sqrt(e)) v, group by group, softmax in float32.

  Args:
    q: queries: groups, batch, tokens, heads, channels of a head.
    k: keys.
    v: values, as `k`.
    is_key: False for keys that stand for padding and take no part.

  Some groups are taken at a time or, of a single group, some queries, so that
  their scores stay small. Scores are not kept for the backward pass, which
  makes them anew from the logarithm of their sum (algorithm 4 of
  FlashAttention, 2205.14135, with blocks of whole rows). The loop never runs
  over the batch, which may be spread over devices.
  """
  return _blocked_attention_fwd(q, k, v, is_key)[0]


def _blocked_attention_fwd(q, k, v, is_key):
  def attend(q, k, v, is_key):
    scores = _scores(q * q.shape[-1] ** -0.5, k, is_key)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest).astype(v.dtype)
    total = weights.sum(-1, dtype=jnp.float32)
    out = _product('gbnlm,gbmne->gbnle', weights, v)
    out = jnp.moveaxis(out / total[..., None], 2, 3)
    return out, largest[..., 0] + jnp.log(total)

  steps, over_groups = _steps(q, k)
  q_steps = _split(q, 0 if over_groups else 2, steps)
  if over_groups:
    operands = q_steps, *(_split(x, 0, steps) for x in (k, v, is_key))
    out, log_total = jax.lax.map(lambda block: attend(*block), operands)
  else:
    out, log_total = jax.lax.map(lambda q: attend(q, k, v, is_key), q_steps)
  # Cast here, as a loop on a CPU would cast all of it anew for each block.
  out = _join(out, 0 if over_groups else 2).astype(q.dtype)
  out = checkpoint_name(out, 'attention')
  log_total = checkpoint_name(log_total, 'attention')
  return out, (q, k, v, is_key, out, log_total)


def _blocked_attention_bwd(residuals, dout):
  q, k, v, is_key, out, log_total = residuals
  scale = q.shape[-1] ** -0.5

  def attend_bwd(q, k, v, is_key, out, log_total, dout):
    # Keys are scaled, where the forward pass scales queries: a compiler that
    # sees the same product twice would keep the first one's scores.
    k = k * scale
    weights = jnp.exp(_scores(q, k, is_key) - log_total[..., None])
    weights = weights.astype(v.dtype)
    # The products are written so that no matrix of scores is transposed.
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
  """A product of matrices with float32 sums."""
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
  """Returns what softmax takes, if q or k are scaled; float32."""
  scores = _product('gblne,gbmne->gbnlm', q, k)
  if is_key is None:
    return scores
  is_key = is_key[:, None, None, None]
  return jnp.where(is_key, scores, jnp.finfo(jnp.float32).min)


def _steps(
  q: Float[Array, 'g b l n e'], k: Float[Array, 'g b m n e']
) -> tuple[int, bool]:
  """Returns into how many blocks to split, and whether groups or queries."""
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
  """Splits an axis into `steps` blocks; these come first."""
  if x is None:
    return None
  shape = x.shape[:axis] + (steps, -1) + x.shape[axis + 1 :]
  return jnp.moveaxis(jnp.reshape(x, shape), axis, 0)


def _join(x: Array, axis: int) -> Array:
  """Undoes _split."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _block_bytes() -> int:
  """Returns the bytes of a block, which all devices of a mesh share."""
  devices = max(1, jax.sharding.get_abstract_mesh().size)
  return devices * _BLOCK_BYTES.get(platform(), 2**28)


class LocalWindowAttention(nn.Module):
  """Multi-head attention inside windows that do not overlap (LW-MSA).

  A grid that is no multiple of the window is padded, and the padding takes no
  part: each window attends to its real tokens alone.
  """

  num_heads: int
  window: Size
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, 'b d h w c']) -> Float[Array, 'b d h w c']:
    grid = x.shape[1:4]
    window = tuple(map(min, self.window, grid))
    count = tuple(math.ceil(g / w) for g, w in zip(grid, window, strict=True))
    padding = [
      (0, n * w - g) for n, w, g in zip(count, window, grid, strict=True)
    ]
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    is_key = np.pad(np.ones(grid, bool), padding)

    pattern = '(i wd) (j wh) (k ww)'
    windows = '(i j k)', '(wd wh ww)'
    sizes = dict(zip(('wd', 'wh', 'ww'), window, strict=True))
    counts = dict(zip(('i', 'j', 'k'), count, strict=True))
    x = rearrange(x, f'b {pattern} c -> {windows[0]} b {windows[1]} c', **sizes)
    is_key = rearrange(is_key, f'{pattern} -> {" ".join(windows)}', **sizes)

    heads = self.num_heads, x.shape[-1] // self.num_heads
    qkv = Projections((3, *heads), self.dtype, name='qkv')(x)
    q, k, v = (checkpoint_name(y, 'qkv') for y in qkv)
    x = attention(q, k, v, self.num_heads, None if is_key.all() else is_key)
    x = checkpoint_name(x, 'attention')
    x = Linear(x.shape[-1], self.dtype, inputs=heads, name='proj')(x)
    x = rearrange(
      x, f'{windows[0]} b {windows[1]} c -> b {pattern} c', **sizes, **counts
    )
    return x[:, : grid[0], : grid[1], : grid[2]]


class GlobalPyramidAttention(nn.Module):
  """All tokens attend to a short pyramid of pooled tokens (GP-MSA).

  Where `fine_size` is the grid itself, or exceeds it along any axis, there is
  no pooling: all tokens attend to all tokens.
  """

  num_heads: int
  fine_size: Size
  coarse_size: Size | None
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b d h w c'], train: bool = False
  ) -> Float[Array, 'b d h w c']:
    d, h, w, channels = x.shape[1:]
    grid = (d, h, w)
    heads = self.num_heads, channels // self.num_heads
    q = Linear(heads, self.dtype, name='q')(x)
    q = rearrange(checkpoint_name(q, 'qkv'), 'b d h w c -> 1 b (d h w) c')

    kernels = pyramid_kernels(grid, self.fine_size, self.coarse_size)
    if kernels:
      (fine,), *coarse = kernels
      levels = [DepthwisePooling(fine, self.dtype, name='sr')(x)]
      for first, second in coarse:
        y = DepthwisePooling(first, self.dtype, name='lr_0')(x)
        y = nn.relu(BatchNorm(self.dtype, name='lr_1')(y, train))
        levels.append(DepthwisePooling(second, self.dtype, name='lr_3')(y))
      pyramid = jnp.concatenate(
        [rearrange(y, 'b d h w c -> b (d h w) c') for y in levels], axis=1
      )
      pyramid = LayerNorm(self.dtype, name='norm')(pyramid)
    else:
      pyramid = rearrange(x, 'b d h w c -> b (d h w) c')
    kv = Projections((2, *heads), self.dtype, name='kv')(pyramid)
    k, v = (checkpoint_name(y, 'qkv')[None] for y in kv)

    x = checkpoint_name(attention(q, k, v, self.num_heads)[0], 'attention')
    x = Linear(channels, self.dtype, inputs=heads, name='proj')(x)
    return x.reshape(-1, *grid, channels)


def pyramid_kernels(
  grid: Size, fine_size: Size, coarse_size: Size | None
) -> list[tuple[Size, ...]]:
  """Returns the kernels that pool `grid` to each level of the pyramid.

  One of the fine level; of the coarse level two, one after the other. There is
  no level where all tokens attend to all tokens.
  """
  d, h, w = grid
  i, j, k = fine_size
  fine = (d // i, h // j, w // k)
  if math.prod(fine) <= 1:
    return []
  if coarse_size is None:
    return [(fine,)]
  return [(fine,), coarse_kernels(grid, coarse_size)]


def coarse_kernels(grid: Size, coarse_size: Size) -> tuple[Size, Size]:
  """Returns the two kernels that pool `grid` to `coarse_size` between them.

  With s the spatial reduction, the first is (1, k, k) with k the largest
  divisor of s that is at most 7; the second is what is left. At 224 pixels:
  k = 7, as in the published model.
  """
  t, *space = (max(1, g // s) for g, s in zip(grid, coarse_size, strict=True))
  kh, kw = (max(k for k in range(1, 8) if s % k == 0) for s in space)
  return (1, kh, kw), (t, space[0] // kh, space[1] // kw)
