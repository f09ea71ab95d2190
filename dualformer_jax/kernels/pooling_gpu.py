"""Norm and pooling to the levels of a pyramid, as kernels for Hopper GPUs.

Tokens are read in the order of the grid, whatever the sizes of the pooling
kernels. A product with ones and zeros gives each token its weights, and another
one sums tokens of the same block: both run on tensor cores. So one kernel
computes the norm and all levels from tokens that it reads once.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import hopper
from dualformer_jax.kernels.layer_norm import EPSILON
from dualformer_jax.kernels.pooling import split_blocks
from dualformer_jax.kernels.pooling_plan import ROWS, Level, Plan, add_programs

_MAX_CHANNELS = 128  # of the sums of a program


def weight_matrix(
  kernel: Float[Array, 'i j k c'], level: Level, dtype: Any
) -> Float[Array, 'n c']:
  """Returns weights as rows of a matrix, with rows of zeros after them."""
  kernel = kernel.reshape(-1, kernel.shape[-1]).astype(dtype)
  return jnp.pad(kernel, [(0, level.weights - len(kernel)), (0, 0)])


def one_hot(index, size, axis=0):
  """Returns a matrix of ones where its other axis is `index`, else zeros.

  Args:
    index: vector, int32, of the layout of `axis` of the matrix.
    size: length of the other axis.
    axis: axis of the matrix that the vector has.
  """
  shape = (len(index), size) if axis == 0 else (size, len(index))
  index = jax.lax.broadcast_in_dim(index, shape, (axis,))
  other = plgpu.broadcasted_iota(
    jnp.int32, shape, 1 - axis, layout=plgpu.Layout.WGMMA
  )
  return jnp.where(index == other, 1.0, 0.0).astype(jnp.bfloat16)


def select_rows(ones, matrix):
  """Returns rows of a matrix in shared memory, float32, by a `one_hot`."""
  zeros = hopper.zeros((ones.shape[0], matrix.shape[1]))
  return hopper.add_product(zeros, ones, matrix)


def token_indices(start, axis=0):
  """Returns the indices of the tokens of a tile, along an axis of a matrix."""
  layout = hopper.ROW if axis == 0 else hopper.COLUMN
  index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout)
  return start + index


# Compiled functions are traced and lowered once for all blocks of a stage.
@functools.partial(jax.jit, static_argnums=0)
def pooled_sums(
  plan: Plan,
  x: Float[Array, 'b d h w c'],
  norm_scale: Float[Array, 'c'],
  norm_bias: Float[Array, 'c'],
  kernels: tuple[Float[Array, '_ _ _ c'], ...],
) -> list[Float[Array, 'b _ _ _ c']]:
  """Returns the sums of blocks of norm(x) times each kernel, float32."""
  batch, frames, rows, columns, channels = x.shape
  tokens = x.size // channels
  unit = hopper.chunks(channels)[0].stop
  width = max(
    n for n in range(unit, _MAX_CHANNELS + 1, unit) if channels % n == 0
  )
  parts = channels // width
  count = sum(plan.counts)
  tiles = plan.tokens // plan.tile
  firsts = [sum(plan.counts[:n]) for n in range(len(kernels))]
  chunks = [slice(n, n + unit) for n in range(0, width, unit)]

  def body(x, norm_scale, norm_bias, *refs):
    weights, refs = refs[: len(kernels)], refs[len(kernels) :]
    out, x_tiles, weight_tiles, y_tile, out_tile, arrived, loaded = refs
    program, part = jax.lax.axis_index('rows'), jax.lax.axis_index('part')
    start = program * plan.tokens

    def copy(index, slot):
      here = pl.ds(start + index * plan.tile, plan.tile)
      to = x_tiles.at[slot, pl.ds(0, plan.tile)]
      plgpu.copy_gmem_to_smem(x.at[here], to, arrived.at[slot])

    for slot in range(2):
      for chunk in hopper.chunks(channels):
        tile = x_tiles.at[slot, :, chunk]
        tile[...] = hopper.zeros(tile.shape).astype(tile.dtype)
    plgpu.commit_smem()
    copy(0, 0)
    for source, target in zip(weights, weight_tiles, strict=True):
      here = pl.ds(part * width, width)
      plgpu.copy_gmem_to_smem(source.at[:, here], target, loaded)
    plgpu.barrier_wait(loaded)

    def step(index, totals):
      slot = jax.lax.rem(index, 2)

      @pl.when(index + 1 < tiles)
      def _():
        copy(index + 1, 1 - slot)

      plgpu.barrier_wait(arrived.at[slot])
      x_tile = x_tiles.at[slot]
      mean, inverse = hopper.statistics(x_tile, EPSILON)
      first = start + index * plan.tile
      of_token, of_block = [], []
      for level, offset in zip(plan.levels, firsts, strict=True):
        of_token.append(
          one_hot(level.weight(token_indices(first)), level.weights)
        )
        token = token_indices(first, axis=1)
        block = offset + level.block(token) - level.block(start)
        block = jnp.where(token < first + plan.tile, block, -1)
        of_block.append(one_hot(block, ROWS, axis=1))
      totals = list(totals)
      for n, chunk in enumerate(chunks):
        here = pl.ds(part * width + chunk.start, unit)
        y = hopper.normalized(x_tile, here, mean, inverse)
        y *= hopper.load_by_column(norm_scale.at[here], y.shape)
        y += hopper.load_by_column(norm_bias.at[here], y.shape)
        for weight_tile, token, block in zip(
          weight_tiles, of_token, of_block, strict=True
        ):
          factor = select_rows(token, weight_tile.at[:, chunk])
          plgpu.commit_smem()  # The last product has read the tile.
          y_tile[...] = (y * factor).astype(y_tile.dtype)
          plgpu.commit_smem()
          totals[n] = hopper.add_product(totals[n], block, y_tile)
      return tuple(totals)

    zeros = tuple(hopper.zeros((ROWS, unit)) for _ in chunks)
    totals = jax.lax.fori_loop(0, tiles, step, zeros)
    for chunk, total in zip(chunks, totals, strict=True):
      plgpu.wait_smem_to_gmem(0)
      out_tile[...] = total
      plgpu.commit_smem()
      here = pl.ds(part * width + chunk.start, unit)
      plgpu.copy_smem_to_gmem(
        out_tile.at[pl.ds(0, count)], out.at[program, :, here]
      )
    plgpu.wait_smem_to_gmem(0)

  matrices = [
    weight_matrix(kernel, level, x.dtype)
    for kernel, level in zip(kernels, plan.levels, strict=True)
  ]
  sums = hopper.kernel(
    body,
    'norm_pool',
    out_type=jax.ShapeDtypeStruct(
      (tokens // plan.tokens, count, channels), jnp.float32
    ),
    scratch=(
      hopper.tile(ROWS, channels, buffers=(2,)),
      [hopper.tile(len(matrix), width) for matrix in matrices],
      hopper.tile(ROWS, unit),
      plgpu.SMEM((ROWS, unit), jnp.float32),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_arrivals=len(matrices)),
    ),
    grid={'part': parts, 'rows': tokens // plan.tokens},
    flops=0,
    transcendentals=tokens,
  )(x.reshape(-1, channels), norm_scale, norm_bias, *matrices)
  return [
    level_sums.reshape(batch, *level.grid(frames), channels)
    for level, level_sums in zip(
      plan.levels, add_programs(plan, sums), strict=True
    )
  ]


def gradient_operands(
  plan: Plan,
  dlevels: Sequence[Float[Array, 'b _ _ _ c']],
  kernels: Sequence[Float[Array, '_ _ _ c']],
) -> list[Float[Array, 'n c']]:
  """Returns gradients of the levels, and weights, as matrices."""
  return [
    *[dlevel.reshape(-1, dlevel.shape[-1]) for dlevel in dlevels],
    *[
      weight_matrix(kernel, level, dlevels[0].dtype)
      for kernel, level in zip(kernels, plan.levels, strict=True)
    ],
  ]


def spread_gradients(plan, start, rows, operands, target):
  """Computes the gradient of normalized tokens, in a kernel.

  Args:
    plan: blocks of the levels.
    start: first token.
    rows: number of tokens.
    operands: those of `gradient_operands`, in memory.
    target: tile [rows, c] of shared memory that gets the gradient.
  """
  channels = target.shape[1]
  dlevels, matrices = operands[: len(plan.levels)], operands[len(plan.levels) :]

  def scoped(dlevel_tiles, weight_tiles, arrived):
    firsts = [
      level.first_block(start, dlevel.shape[0])
      for level, dlevel in zip(plan.levels, dlevels, strict=True)
    ]
    for first, dlevel, tile in zip(firsts, dlevels, dlevel_tiles, strict=True):
      here = pl.ds(pl.multiple_of(first, 8), ROWS)
      plgpu.copy_gmem_to_smem(dlevel.at[here], tile, arrived)
    for matrix, tile in zip(matrices, weight_tiles, strict=True):
      plgpu.copy_gmem_to_smem(matrix, tile, arrived)
    plgpu.barrier_wait(arrived)
    for part in range(0, rows, ROWS):
      token = token_indices(start + part)
      operands = [
        (
          one_hot(level.block(token) - first, ROWS),
          dlevel_tile,
          one_hot(level.weight(token), level.weights),
          weight_tile,
        )
        for level, first, dlevel_tile, weight_tile in zip(
          plan.levels, firsts, dlevel_tiles, weight_tiles, strict=True
        )
      ]
      for chunk in hopper.chunks(channels):
        total = hopper.zeros((ROWS, chunk.stop - chunk.start))
        for of_block, dlevel, of_token, weights in operands:
          dy = select_rows(of_block, dlevel.at[:, chunk])
          total += dy * select_rows(of_token, weights.at[:, chunk])
        target[pl.ds(part, ROWS), chunk] = total.astype(target.dtype)
    plgpu.commit_smem()

  pl.run_scoped(
    scoped,
    [hopper.tile(ROWS, channels) for _ in dlevels],
    [hopper.tile(matrix.shape[0], channels) for matrix in matrices],
    plgpu.Barrier(num_arrivals=2 * len(dlevels)),
  )


def spread(
  plan: Plan,
  dlevels: Sequence[Float[Array, 'b _ _ _ c']],
  kernels: Sequence[Float[Array, '_ _ _ c']],
) -> Float[Array, 'b d h w c']:
  """Returns the gradient of normalized tokens, by XLA."""
  total: Any = 0
  for level, dlevel, kernel in zip(plan.levels, dlevels, kernels, strict=True):
    of_blocks = dlevel[:, :, None, :, None, :, None]
    weights = kernel.astype(dlevel.dtype)[:, None, :, None]
    product = of_blocks * weights
    frames = product.shape[1] * level.size[0]
    shape = len(dlevel), frames, level.rows, level.columns, -1
    total += product.reshape(shape)
  return total


def kernel_gradients(
  plan: Plan,
  normalized: Float[Array, 'b d h w c'],
  dlevels: Sequence[Float[Array, 'b _ _ _ c']],
  norm_scale: Float[Array, 'c'],
  norm_bias: Float[Array, 'c'],
) -> tuple[Float[Array, '_ _ _ c'], ...]:
  """Returns the gradients of the kernels, float32.

  Args:
    plan: blocks of the levels.
    normalized: normalized tokens, without scale and bias of the norm.
    dlevels: gradients of the levels.
    norm_scale: scale of LayerNorm.
    norm_bias: bias of LayerNorm.
  """
  gradients = []
  for level, dlevel in zip(plan.levels, dlevels, strict=True):
    blocks = split_blocks(normalized, level.size).astype(jnp.float32)
    dlevel = dlevel.astype(jnp.float32)
    of_blocks = dlevel[:, :, None, :, None, :, None]
    total = jnp.sum(blocks * of_blocks, axis=(0, 1, 3, 5))
    total_bias = norm_bias * dlevel.sum((0, 1, 2, 3))
    gradients.append(norm_scale * total + total_bias)
  return tuple(gradients)
