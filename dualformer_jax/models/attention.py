"""Local window and global pyramid attention (2112.04674, section 3).

Neither keeps a score matrix: attention runs over blocks of windows (or of
queries), and the backward pass makes each block's scores anew.
"""

import math

from einops import rearrange
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from dualformer_jax.models.layers import (
  BatchNorm,
  DepthwisePooling,
  Linear,
  Size,
  layer_norm,
  matmul_precision,
)

# Scores of one block that a device may hold, in bytes of float32: what stays in
# the second-level cache of a CPU core, and what keeps a GPU or TPU busy.
_BLOCK_BYTES = {'cpu': 2**22, 'gpu': 2**28, 'tpu': 2**28}
# Queries that global attention takes at a time.
_QUERY_BLOCK = 448


def blocked_attention(
  q: Float[Array, 'g b l n e'],
  k: Float[Array, '#g b m n e'],
  v: Float[Array, '#g b m n e'],
  is_key: Bool[np.ndarray, 'g m'] | None = None,
) -> Float[Array, 'g b l n e']:
  """Returns softmax(q k^T / sqrt(e)) v, group by group, softmax in float32.

  Args:
    q: queries: groups, batch, tokens, heads, channels of a head.
    k: keys; one group may serve all groups of queries.
    v: values, as `k`.
    is_key: False for keys that stand for padding and take no part.

  Groups are taken some at a time, so that their scores stay small; the scores
  are not kept for the backward pass but made again there. The loop runs over
  groups and never over the batch, which may be spread over devices.
  """
  groups, batch, length, heads, channels = q.shape
  precision = matmul_precision(q.dtype)

  def attend(q, k, v, is_key):
    scores = jnp.einsum(
      'blne,bmne->bnlm',
      q * channels**-0.5,
      k,
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    if is_key is not None:
      scores = jnp.where(is_key, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum('bnlm,bmne->blne', weights, v, precision=precision)

  score_bytes = 4 * batch * heads * length * k.shape[2]
  budget = _block_bytes()
  block = max(
    size
    for size in range(1, groups + 1)
    if groups % size == 0 and (size == 1 or size * score_bytes <= budget)
  )

  def split(x):
    return x.reshape(-1, block, *x.shape[1:])

  if k.shape[0] == 1 < groups:
    k, v = k[0], v[0]
    attend_block = jax.checkpoint(jax.vmap(attend, (0, None, None, None)))
    out = jax.lax.map(lambda q: attend_block(q, k, v, is_key), split(q))
  else:
    attend_block = jax.checkpoint(jax.vmap(attend))
    operands = q, k, v, is_key
    out = jax.lax.map(
      lambda operands: attend_block(*operands), jax.tree.map(split, operands)
    )
  return out.reshape(q.shape)


def _block_bytes() -> int:
  """Returns the bytes of a block's scores, which all devices of a mesh share.

  The mesh is asked what its devices are, as they need not be this machine's:
  programs are also compiled ahead of time.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = mesh.abstract_device
  platform = device.platform if device else jax.default_backend()
  return max(1, mesh.size) * _BLOCK_BYTES.get(platform, 2**28)


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

    head = x.shape[-1] // self.num_heads
    qkv = Linear((3, self.num_heads, head), self.dtype, name='qkv')(x)
    qkv = checkpoint_name(qkv, 'qkv')
    q, k, v = (qkv[..., i, :, :] for i in range(3))
    x = blocked_attention(q, k, v, None if is_key.all() else is_key)
    x = checkpoint_name(x, 'attention')
    x = Linear(self.num_heads * head, self.dtype, inputs=2, name='proj')(x)
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
    head = channels // self.num_heads
    q = Linear((self.num_heads, head), self.dtype, name='q')(x)
    q = rearrange(checkpoint_name(q, 'qkv'), 'b d h w n e -> b (d h w) n e')

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
      pyramid = layer_norm(self.dtype, name='norm')(pyramid)
    else:
      pyramid = rearrange(x, 'b d h w c -> b (d h w) c')
    kv = Linear((2, self.num_heads, head), self.dtype, name='kv')(pyramid)
    kv = checkpoint_name(kv, 'qkv')

    block = math.gcd(q.shape[1], _QUERY_BLOCK)
    q = rearrange(q, 'b (g l) n e -> g b l n e', l=block)
    x = blocked_attention(q, kv[None, :, :, 0], kv[None, :, :, 1])
    x = rearrange(x, 'g b l n e -> b (g l) n e')
    x = checkpoint_name(x, 'attention')
    x = Linear(channels, self.dtype, inputs=2, name='proj')(x)
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
