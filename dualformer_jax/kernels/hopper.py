"""Building blocks of Pallas kernels for Hopper GPUs (Mosaic GPU).

A program is one warpgroup. It multiplies tiles of shared memory, or an operand
in registers by one of shared memory, on tensor cores; sums are float32.
"""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp


def by_row(vector, shape):
  """Broadcasts a vector [m] to a matrix [m, n]."""
  return jax.lax.broadcast_in_dim(vector, shape, (0,))


def by_column(vector, shape):
  """Broadcasts a vector [n] to a matrix [m, n]."""
  return jax.lax.broadcast_in_dim(vector, shape, (1,))


# Layouts of vectors with an element for each row, or column, of a matrix.
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def _transforms(width):
  """Returns the layout of operands of tensor cores, for bfloat16."""
  width = min(width, 64)
  transforms: Any = plgpu
  tiling = transforms.TilingTransform((8, width))
  return tiling, transforms.SwizzleTransform(2 * width)


def tile(rows, channels, width=64):
  """Returns an operand of tensor cores in shared memory, bfloat16.

  Both operands of a product need the same `width`, which divides their columns
  and the number of products that are summed: 32 or 64.
  """
  shape = rows, channels
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=_transforms(width))


def vector(size):
  """Returns a float32 vector in shared memory."""
  return plgpu.SMEM((size,), jnp.float32)


def tile_spec(shape, index_map, width=64):
  """Returns the blocks of a pipeline that are operands of tensor cores."""
  transforms = _transforms(min(width, shape[-1]))
  return plgpu.BlockSpec(shape, index_map, transforms=transforms)


def vector_spec(size):
  """Returns the blocks of a pipeline of a vector."""
  return plgpu.BlockSpec((size,), lambda i: (i,))


def product(a, b):
  """Returns a @ b in float32."""

  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  shape = a.shape[0], b.shape[1]
  return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_product(total, a, b):
  """Returns total + a @ b in float32."""
  return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(
    plgpu.WGMMAAccumulatorRef.init(total)
  )


def zeros(shape, layout: Any = plgpu.Layout.WGMMA):
  """Returns zeros in registers, float32."""
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def load(ref, layout: Any = plgpu.Layout.WGMMA):
  """Loads from memory into registers, as float32."""
  return plgpu.load(ref, layout=layout).astype(jnp.float32)


def load_by_row(ref, shape):
  """Loads a vector [m] and broadcasts it to a matrix [m, n]."""
  return by_row(load(ref, ROW), shape)


def load_by_column(ref, shape):
  """Loads a vector [n] and broadcasts it to a matrix [m, n]."""
  return by_column(load(ref, COLUMN), shape)


def chunks(channels):
  """Returns slices of channels: all of a tile need too many registers."""
  width = 64 if channels % 64 == 0 else 32
  return [slice(start, start + width) for start in range(0, channels, width)]


def statistics(x_tile, epsilon):
  """Returns mean and 1 / sqrt(var + epsilon) of each row [m] of a tile [m, c].

  The variance is computed from differences to the mean.
  """
  rows, channels = x_tile.shape
  mean = var = zeros((rows,), ROW)
  for chunk in chunks(channels):
    mean += load(x_tile.at[:, chunk]).sum(1)
  mean *= 1 / channels
  for chunk in chunks(channels):
    centered = load(x_tile.at[:, chunk])
    centered -= by_row(mean, centered.shape)
    var += (centered * centered).sum(1)
  return mean, jax.lax.rsqrt(var * (1 / channels) + epsilon)


def normalized(x_tile, chunk, mean, inverse):
  """Returns normalized tokens of a slice of channels."""
  y = load(x_tile.at[:, chunk])
  y -= by_row(mean, y.shape)
  return y * by_row(inverse, y.shape)


def kernel(body, name, out_type, scratch, grid, flops, transcendentals):
  """Returns a kernel whose programs are in `grid`, {axis: size}."""
  body.__name__ = name
  options = {}
  if jax.__version_info__ >= (0, 12):
    options['cost_estimate'] = pl.CostEstimate(
      flops=flops, transcendentals=transcendentals, bytes_accessed=0
    )
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    **options,
  )
