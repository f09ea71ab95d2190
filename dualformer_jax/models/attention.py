"""Local window and global pyramid attention (arXiv 2112.04674, section 3).

A block may recompute `project` (queries, keys, values), but never `attend`.
"""

from collections.abc import Sequence
import math
from typing import Any

from einops import rearrange
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dualformer_jax.kernels.attention import attention
from dualformer_jax.kernels.attention_branch import Branch, find_branch
from dualformer_jax.kernels.dispatch import Compute, Size
from dualformer_jax.kernels.mlp import Weights
from dualformer_jax.kernels.norm_pool import NormPool, find_norm_pool
from dualformer_jax.kernels.projections import (
  FusedProjections,
  find_projections,
)
from dualformer_jax.models.layers import (
  BatchNorm,
  DepthwisePooling,
  LayerNorm,
  Linear,
  Projections,
)

# Queries, keys and values: groups, batch, tokens, channels.
QKV = tuple[
  Float[Array, 'g b l c'], Float[Array, 'g b m c'], Float[Array, 'g b m c']
]


class LocalWindowAttention(nn.Module):
  """Multi-head attention inside windows that do not overlap (LW-MSA).

  A grid that is no multiple of the window is padded; padding gets no attention.
  """

  channels: int
  num_heads: int
  grid: Size
  window: Size
  compute: Compute

  def setup(self):
    heads = self.num_heads, self.channels // self.num_heads
    self.qkv = Projections((3, *heads), self.compute)
    self.proj = Linear(self.channels, self.compute, inputs=heads)

    window = [min(w, g) for w, g in zip(self.window, self.grid, strict=True)]
    count = [math.ceil(g / w) for g, w in zip(self.grid, window, strict=True)]
    self.padding = [
      (0, n * w - g) for n, w, g in zip(count, window, self.grid, strict=True)
    ]
    self.sizes = dict(zip(('wd', 'wh', 'ww'), window, strict=True))
    self.counts = dict(zip(('i', 'j', 'k'), count, strict=True))

  def find_branch(self, batch: int) -> Branch | None:
    """Returns a function that computes the branch in one operation.

    Returns None if there is none for the platform, the dtype or the sizes.
    """
    shape = (batch, *self.grid, self.channels)
    window: Any = tuple(self.sizes.values())
    return find_branch(shape, self.num_heads, self.compute, window)

  def find_projections(self, batch: int) -> FusedProjections | None:
    """Returns the projections as operations fused with norm and residual.

    Returns None if there are none for the platform, the dtype or the sizes.
    """
    window: Any = tuple(self.sizes.values())
    shape = (batch, *self.grid, self.channels)
    return find_projections(shape, window, self.compute)

  def project_fused(
    self,
    projections: FusedProjections,
    x: Float[Array, 'b d h w c'],
    norm: Weights,
    train: bool = False,
  ) -> tuple[Float[Array, '...'], ...]:
    """Returns x, and queries, keys and values [n, l, c] of norm(x)."""
    layers, _ = self.weights(x.shape)
    x, qkv = projections.norm_project(x, norm, layers)
    return x, *qkv

  def weights(self, shape: Sequence[int]) -> tuple[list[Weights], Weights]:
    """Returns the weights of projections before and after attention."""
    return self.qkv.weights(shape), self.proj.weights(shape)

  def project(self, x: Float[Array, 'b d h w c'], train: bool = False) -> QKV:
    """Returns queries, keys and values of all windows."""
    x = jnp.pad(x, [(0, 0), *self.padding, (0, 0)])
    x = rearrange(
      x,
      'b (i wd) (j wh) (k ww) c -> (i j k) b (wd wh ww) c',
      **self.sizes,
    )
    q, k, v = self.qkv(x)
    return q, k, v

  def attend(self, qkv: QKV) -> Float[Array, 'b d h w c']:
    """Returns the output of attention for each token."""
    is_key = None
    if any(after for _, after in self.padding):
      is_key = rearrange(
        np.pad(np.ones(self.grid, bool), self.padding),
        '(i wd) (j wh) (k ww) -> (i j k) (wd wh ww)',
        **self.sizes,
      )
    x = self.proj(attention(*qkv, self.num_heads, self.compute, is_key))
    x = rearrange(
      x,
      '(i j k) b (wd wh ww) c -> b (i wd) (j wh) (k ww) c',
      **self.sizes,
      **self.counts,
    )
    d, h, w = self.grid
    return x[:, :d, :h, :w]


class GlobalPyramidAttention(nn.Module):
  """All tokens attend to a short pyramid of pooled tokens (GP-MSA).

  The fine level pools by grid // fine_size. If that is 1 along all axes, or 0
  along any, nothing is pooled and all tokens attend to all tokens.
  """

  channels: int
  num_heads: int
  grid: Size
  fine_size: Size
  coarse_size: Size | None
  compute: Compute

  def setup(self):
    heads = self.num_heads, self.channels // self.num_heads
    self.q = Linear(heads, self.compute)
    self.kv = Projections((2, *heads), self.compute)
    self.proj = Linear(self.channels, self.compute, inputs=heads)
    kernels = pyramid_kernels(self.grid, self.fine_size, self.coarse_size)
    self.pooling_kernels = kernels
    self.has_fine, self.has_coarse = len(kernels) > 0, len(kernels) > 1
    if self.has_fine:
      self.sr = DepthwisePooling(kernels[0][0], self.compute)
      self.norm = LayerNorm(self.compute)
    if self.has_coarse:
      self.lr_0 = DepthwisePooling(kernels[1][0], self.compute)
      self.lr_1 = BatchNorm(self.compute.dtype)
      self.lr_3 = DepthwisePooling(kernels[1][1], self.compute)

  def find_branch(self, batch: int) -> Branch | None:
    """Returns a function that computes the branch in one operation.

    Returns None if there is none for the platform, the dtype or the sizes.
    """
    shape = (batch, *self.grid, self.channels)
    return find_branch(
      shape, self.num_heads, self.compute, num_keys=self._num_keys()
    )

  def _num_keys(self) -> int:
    """Returns the number of keys of a clip."""
    num_keys = 0
    for level in self.pooling_kernels or [()]:
      size = self.grid
      for kernel in level:
        size = tuple(n // k for n, k in zip(size, kernel, strict=True))
      num_keys += math.prod(size)
    return num_keys

  def find_projections(self, batch: int) -> FusedProjections | None:
    """Returns the projections as operations fused with norm and residual.

    Returns None if there are none for the platform, the dtype or the sizes.
    """
    shape = (batch, *self.grid, self.channels)
    sizes = [first for first, *_ in self.pooling_kernels]
    return find_projections(
      shape, None, self.compute, sizes, self.num_heads, self._num_keys()
    )

  def project_fused(
    self,
    projections: FusedProjections,
    x: Float[Array, 'b d h w c'],
    norm: Weights,
    train: bool = False,
  ) -> tuple[Float[Array, '...'], ...]:
    """Returns x, and queries, keys and values [n, l, c] of norm(x)."""
    layers, _ = self.weights(x.shape)
    if projections.pooling:
      pooling = self.pooling_weights(x.shape)
      x, (q,), levels = projections.norm_pool_project(x, norm, layers, pooling)
      return x, q, *self.project_levels(levels, train)
    x, (y, q) = projections.norm_project(x, norm, layers)
    return x, q, *self.project_keys(y.reshape(x.shape), train)

  def weights(self, shape: Sequence[int]) -> tuple[list[Weights], Weights]:
    """Returns the weights of projections of queries and of the output."""
    return [self.q.weights(shape)], self.proj.weights(shape)

  def project(self, x: Float[Array, 'b d h w c'], train: bool = False) -> QKV:
    """Returns queries of all tokens, keys and values of the pyramid."""
    q = rearrange(self.q(x), 'b d h w c -> 1 b (d h w) c')
    k, v = self.project_keys(x, train)
    return q, k[None], v[None]

  def project_keys(
    self, x: Float[Array, 'b d h w c'], train: bool = False
  ) -> list[Float[Array, 'b m c']]:
    """Returns keys and values of the pyramid of normalized tokens."""
    levels = [self.sr(x)] if self.has_fine else [x]
    if self.has_coarse:
      levels.append(self.lr_0(x))
    return self.project_levels(levels, train)

  def find_norm_pool(self, batch: int) -> NormPool | None:
    """Returns a function that computes norm and pooling in one operation.

    It outputs the `levels` of `project_levels`. Returns None if there is none
    for the platform, the dtype or the sizes.
    """
    if not self.has_fine:
      return None
    shape = (batch, *self.grid, self.channels)
    sizes = [first for first, *_ in self.pooling_kernels]
    return find_norm_pool(shape, sizes, self.compute)

  def pooling_weights(self, shape: Sequence[int]) -> list[Weights]:
    """Returns kernel and bias of the first pooling of each level."""
    layers = [self.sr, self.lr_0] if self.has_coarse else [self.sr]
    return [layer.weights(layer.output_shape(shape)) for layer in layers]

  def project_levels(
    self, levels: Sequence[Float[Array, 'b _ _ _ c']], train: bool = False
  ) -> list[Float[Array, 'b m c']]:
    """Returns keys and values of levels that were pooled once."""
    if self.has_coarse:
      fine, coarse = levels
      levels = [fine, self.lr_3(nn.relu(self.lr_1(coarse, train)))]
    pyramid = jnp.concatenate(
      [rearrange(y, 'b d h w c -> b (d h w) c') for y in levels], axis=1
    )
    if self.has_fine:
      pyramid = self.norm(pyramid)
    return self.kv(pyramid)

  def attend(self, qkv: QKV) -> Float[Array, 'b d h w c']:
    """Returns the output of attention for each token."""
    x = self.proj(attention(*qkv, self.num_heads, self.compute)[0])
    return x.reshape(-1, *self.grid, self.channels)


def pyramid_kernels(
  grid: Size, fine_size: Size, coarse_size: Size | None
) -> list[tuple[Size, ...]]:
  """Returns the kernels that pool `grid` to each level of the pyramid.

  The fine level has one, the coarse level two, applied one after the other. The
  list is empty if all tokens attend to all tokens.
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
  """Returns the two kernels that together pool `grid` to `coarse_size`.

  The first is (1, k, k) with k the largest divisor of the spatial reduction
  that is at most 7, as in the published model; the second is the rest.
  """
  t, *space = (max(1, g // s) for g, s in zip(grid, coarse_size, strict=True))
  kh, kw = (max(k for k in range(1, 8) if s % k == 0) for s in space)
  return (1, kh, kw), (t, space[0] // kh, space[1] // kw)
