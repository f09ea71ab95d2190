"""Gradients of the weights of the MLP branch: a Pallas kernel for Hopper GPUs.

A program has 64 hidden channels and a share of the tokens, which pass through
its shared memory. Sums stay in registers.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from dualformer_jax.kernels import hopper

# Programs that run at a time, two on each multiprocessor of an H100 or H200.
_PROGRAMS = 264
# Hidden channels of a program.
BLOCK = 64
# By channels: tokens of a step, and channels of a program.
TILINGS = {
  64: (64, 64),
  96: (64, 96),
  128: (64, 128),
  192: (32, 192),
  256: (32, 128),
}


@jax.jit
def weight_gradients(x, dout, scale, mean, inverse, kernel, sums, bias, w2):
  """Returns gradients that are sums over tokens, float32.

  Those of w1' [i, c], without the part of the mean; of w2 [i, c]; of b1 [i];
  and the part of the mean [i]. `kernel` is the transpose of w1'.
  """
  (tokens, channels), hidden = x.shape, len(w2)
  rows, width = TILINGS[channels]
  parts, blocks = channels // width, hidden // BLOCK
  splits = hopper.largest_divisor(tokens // rows, _PROGRAMS // (blocks * parts))
  share = tokens // splits
  tile = (BLOCK, rows)

  def body(x, dout, scale, mean, inverse, kernel, sums, bias, w2, *refs):
    *outputs, tiles, arrived = refs
    kernel_tile, w2_tile, sums_tile, bias_tile = tiles
    split = jax.lax.axis_index('split')
    mine = pl.ds(jax.lax.axis_index('block') * BLOCK, BLOCK)
    columns = pl.ds(jax.lax.axis_index('part') * width, width)
    plgpu.copy_gmem_to_smem(kernel.at[mine], kernel_tile, arrived)
    plgpu.copy_gmem_to_smem(w2.at[mine], w2_tile, arrived)
    plgpu.copy_gmem_to_smem(sums.at[mine], sums_tile, arrived)
    plgpu.copy_gmem_to_smem(bias.at[mine], bias_tile, arrived)
    plgpu.barrier_wait(arrived)

    def step(_, x, dout, scale, mean, inverse, totals):
      dw1, dw2, db1, dmean = totals
      scale, mean, inverse = (
        hopper.load_by_column(vector, tile) for vector in (scale, mean, inverse)
      )
      y = hopper.hidden(
        hopper.product(kernel_tile, x.transpose((1, 0))),
        mean,
        inverse,
        hopper.load_by_row(sums_tile, tile),
        hopper.load_by_row(bias_tile, tile),
      )
      y, slope = hopper.gelu(y)
      y = (y * scale).astype(x.dtype)
      dw2 = hopper.add_product(dw2, y, dout.at[:, columns])
      dy = hopper.product(w2_tile, dout.transpose((1, 0))) * slope * scale
      db1 += dy.sum(1)
      dy = (dy * inverse).astype(x.dtype)
      dmean += (dy.astype(jnp.float32) * mean).sum(1)
      dw1 = hopper.add_product(dw1, dy, x.at[:, columns])
      return dw1, dw2, db1, dmean

    run = plgpu.emit_pipeline(
      step,
      grid=(share // rows,),
      in_specs=[
        *[hopper.tile_spec((rows, channels), lambda i: (i, 0), rows)] * 2,
        *[hopper.vector_spec(rows)] * 3,
      ],
      max_concurrent_steps=2 if channels <= 128 else 1,
      init_carry=(
        *[hopper.zeros((BLOCK, width))] * 2,
        *[hopper.zeros((BLOCK,), hopper.ROW)] * 2,
      ),
    )
    tokens_of_split = pl.ds(split * share, share)
    totals = run(
      *(ref.at[tokens_of_split] for ref in (x, dout, scale, mean, inverse))
    )
    for out, total in zip(outputs[:2], totals[:2], strict=True):
      out[split, mine, columns] = total
    # Programs that differ in their columns alone write the same numbers.
    for out, total in zip(outputs[2:], totals[2:], strict=True):
      out[split, mine] = total

  matrix = jax.ShapeDtypeStruct((splits, hidden, channels), jnp.float32)
  vector = jax.ShapeDtypeStruct((splits, hidden), jnp.float32)
  outputs = hopper.kernel(
    body,
    'mlp_weight_gradients',
    out_type=(matrix, matrix, vector, vector),
    scratch=(
      (
        *[hopper.tile(BLOCK, channels, rows)] * 2,
        *[hopper.vector(BLOCK)] * 2,
      ),
      plgpu.Barrier(num_arrivals=4),
    ),
    grid={'part': parts, 'block': blocks, 'split': splits},
    flops=(2 + 2 * parts) * 2 * tokens * channels * hidden,
    transcendentals=2 * parts * tokens * hidden,
  )(x, dout, scale, mean, inverse, kernel, sums, bias, w2)
  return [output.sum(0) for output in outputs]
