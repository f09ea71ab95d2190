"""Depthwise convolution with stride = kernel size: a weighted block sum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels.dispatch import Compute


def pool(
  x: Float[Array, 'b t y x c'],
  kernel: Float[Array, 'i j k c'],
  bias: Float[Array, 'c'],
  compute: Compute,
) -> Float[Array, 'b d h w c']:
  """Returns the sum of each block of tokens times `kernel`, plus `bias`.

  Incomplete blocks at the ends are dropped, as in a convolution without
  padding. Sums are float32, the result is `compute.dtype`.
  """
  x = split_blocks(x, kernel.shape[:3]).astype(compute.dtype)
  weigh = compute.choose(reference, default=_per_clip)
  return (weigh(x, kernel) + bias).astype(compute.dtype)


def reference(
  x: Float[Array, 'b d i h j w k c'], kernel: Float[Array, 'i j k c']
) -> Float[Array, 'b d h w c']:
  """The plain implementation, of tokens in blocks."""
  kernel = kernel.astype(x.dtype)[:, None, :, None, :]
  return jnp.sum(x * kernel, axis=(2, 4, 6), dtype=jnp.float32)


def _per_clip(
  x: Float[Array, 'b d i h j w k c'], kernel: Float[Array, 'i j k c']
) -> Float[Array, 'b d h w c']:
  """Pools with a copy of the kernel for each clip, behind a barrier.

  The kernel's gradient is then summed over tokens before it is summed over
  clips. Otherwise devices exchange gradients as large as x.
  """
  kernel = jnp.broadcast_to(kernel, (x.shape[0], *kernel.shape))
  kernel = jax.lax.optimization_barrier(kernel.astype(x.dtype))
  kernel = kernel[:, None, :, None, :, None, :]
  return jnp.sum(x * kernel, axis=(2, 4, 6), dtype=jnp.float32)


def split_blocks(
  x: Float[Array, 'b t y x c'], size: tuple[int, ...]
) -> Float[Array, 'b d i h j w k c']:
  """Splits tokens into blocks of `size`; drops incomplete ones at the ends."""
  d, h, w = (n // s for n, s in zip(x.shape[1:4], size, strict=True))
  i, j, k = size
  x = x[:, : d * i, : h * j, : w * k]
  return x.reshape(x.shape[0], d, i, h, j, w, k, x.shape[-1])
