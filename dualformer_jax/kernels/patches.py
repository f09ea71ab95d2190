"""A linear layer of patches: a convolution with stride = kernel size."""

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dualformer_jax.kernels.dispatch import Compute, matmul_precision
from dualformer_jax.kernels.linear import linear
from dualformer_jax.kernels.pooling import split_blocks

# Pixels in a row from which a TPU computes patches by a product.
_MIN_COLUMNS = 128


def patch_linear(
  x: Float[Array, 'b t y x p'],
  kernel: Float[Array, 'i j k p o'],
  bias: Float[Array, 'o'],
  compute: Compute,
) -> Float[Array, 'b d h w o']:
  """Multiplies each patch of i x j x k tokens by `kernel`, and adds `bias`."""
  apply = compute.choose(_default, tpu=_tpu)
  return apply(x.astype(compute.dtype), kernel, bias, compute)


def _default(
  x: Float[Array, 'b t y x p'],
  kernel: Float[Array, 'i j k p o'],
  bias: Float[Array, 'o'],
  compute: Compute,
) -> Float[Array, 'b d h w o']:
  x = split_blocks(x, kernel.shape[:3])
  x = jnp.moveaxis(x, (1, 3, 5), (1, 2, 3))  # b d h w i j k p
  x = x.reshape(*x.shape[:4], -1)
  return linear(x, kernel.reshape(x.shape[-1], -1), bias, compute)


def _tpu(
  x: Float[Array, 'b t y x p'],
  kernel: Float[Array, 'i j k p o'],
  bias: Float[Array, 'o'],
  compute: Compute,
) -> Float[Array, 'b d h w o']:
  """Splits rows of pixels into patches by a product with ones and zeros.

  XLA for TPUs transposes pixels in layouts that are up to 16 times as large as
  the clips (docs/performance.md).
  """
  i, j, k, channels, _ = kernel.shape
  columns = x.shape[3]
  if channels >= k or columns < _MIN_COLUMNS or columns % k:
    return _default(x, kernel, bias, compute)
  x = x[:, : x.shape[1] // i * i, : x.shape[2] // j * j]
  b, t, y, *_ = x.shape
  select = np.arange(columns) == np.arange(columns).reshape(-1, k).T[..., None]
  select = jnp.asarray(select, x.dtype)  # column of each k and w
  precision = matmul_precision(x.dtype)
  x = jnp.einsum('btyxp,kwx->btpykw', x, select, precision=precision)
  x = x.reshape(b, t // i, i, channels, y // j, j, k, -1)
  kernel = kernel.astype(x.dtype)
  x = jnp.einsum('bdiphjkw,ijkpo->bdhwo', x, kernel, precision=precision)
  return x + bias.astype(x.dtype)
