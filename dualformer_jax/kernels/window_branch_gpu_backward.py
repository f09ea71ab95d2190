"""The backward pass of the attention branch of windows, for Hopper GPUs.

A program has some of the windows, one after the other, and one head after the
other. It recomputes queries, keys and values, and then, for each tile of
tokens, the weights of attention: first those of its queries, then those of its
keys. Computing them twice takes fewer registers and less shared memory than
passing them between warpgroups.

Gradients of normalized tokens are summed over heads, and those of weights over
windows, in memory of each program: 0.2 MB for 64 channels, which the L2 cache
holds for all programs, and 1.0 MB for 192.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from dualformer_jax.kernels import hopper, windows_gpu
from dualformer_jax.kernels.layer_norm import EPSILON
from dualformer_jax.kernels.window_branch_gpu_tiles import (
  HEAD,
  POSITIONS,
  ROWS,
  Sizes,
  project,
)

# Programs that run at a time, one on each multiprocessor of an H100 or H200.
_PROGRAMS = 132
_MAX_BLOCK = 64  # Keys or queries whose weights are in registers.
# Index of the kernels of a head.
_QUERY, _KEY, _VALUE, _OUTPUT = range(4)


# Compiled functions are traced and lowered once for all blocks of a stage.
@functools.partial(jax.jit, static_argnums=0)
def backward(
  sizes: Sizes, x, dout, attended, log_sums, scale, kernels, sums, biases
):
  """Returns the gradient of x, and gradients of weights for each program.

  The latter are those of `kernels`, of the biases of queries [p, heads, 32],
  and of the bias of the output [p, c].

  Args:
    sizes: of the windows.
    x: tokens.
    dout: gradient of the output.
    attended: from `forward`.
    log_sums: from `forward`.
    scale: factor of each clip.
    kernels: of queries, keys and values, and of the output, transposed, of each
      head, [heads, 4, c, 32].
    sums: of the columns of the first three kernels.
    biases: of the first three kernels.
  """
  n, channels, groups = sizes.tokens, sizes.channels, sizes.warpgroups
  programs = hopper.largest_divisor(sizes.windows, _PROGRAMS)
  # Products with transposed tokens have a multiple of 64 rows.
  padded = -(-channels // 64) * 64
  shape, x, dout = x.shape, *map(windows_gpu.by_frames, (x, dout))

  def body(
    x, dout, attended, log_sums, scale, kernels, sums, biases, dx, *refs
  ):
    dkernels, dq_bias, dout_bias, dqueries, dnormed, *refs = refs
    tiles, vectors, barriers = refs
    kernel_tiles, padded_tile, stage, *head_tiles = tiles
    q_tile, k_tile, v_tile, do_tile = head_tiles
    means, inverses, minus_log_sums, minus_deltas = vectors
    arrived, attended_arrived, kernels_arrived, met = barriers
    program, mine = jax.lax.axis_index('program'), sizes.warpgroup()
    stage, padded_tile = sizes.own(stage), sizes.own(padded_tile)
    token_tile = padded_tile.at[:, pl.ds(0, channels)]
    arrived, attended_arrived = arrived.at[mine], attended_arrived.at[mine]

    def copy(ref, window, tile):
      """Copies tokens of the grid to the tile of this warpgroup."""
      for source, target in sizes.copies(window, tile, ref, token_tile):
        plgpu.copy_gmem_to_smem(source, target, arrived)

    def copy_attended(window, head, tile):
      @sizes.tokens_of(tile)
      def _(size):
        here = pl.ds(window * n + tile * ROWS, size)
        source = attended.at[here, pl.ds(head * HEAD, HEAD)]
        target = stage.at[pl.ds(0, size)]
        plgpu.copy_gmem_to_smem(source, target, attended_arrived)

    def load_total(ref, is_new, layout: Any = plgpu.Layout.WGMMA):
      """Loads a sum from memory; it is 0 if it is new."""
      return jax.lax.cond(
        is_new,
        lambda: hopper.zeros(ref.shape, layout),
        lambda: hopper.load(ref, layout, optimized=False),
      )

    def add(refs_and_values, bias, dbias, is_first_window):
      """Adds to sums over windows, in one warpgroup after the other."""
      is_new = is_first_window & (mine == 0)

      def run():
        for ref, value in refs_and_values:
          ref[...] = load_total(ref, is_new) + value
        if bias is not None:
          total = load_total(bias, is_new, hopper.COLUMN)
          bias[...] = total + dbias.sum(0)

      for turn in range(groups):
        run() if groups == 1 else pl.when(mine == turn)(run)
        hopper.meet(met, groups)

    def recompute(window, head, factor, tile, dkernel, dbias):
      """Recomputes what all tiles of a head need, for one of them."""
      rows, part = pl.ds(tile * ROWS, ROWS), pl.ds(head * HEAD, HEAD)
      is_token = hopper.iota((ROWS, HEAD), 0) < n - tile * ROWS
      plgpu.barrier_wait(arrived)

      @pl.when(head == 0)
      def _():
        means[rows], inverses[rows] = hopper.statistics(token_tile, EPSILON)
        plgpu.commit_smem()

      projected = [
        project(
          token_tile,
          kernel_tiles[index],
          means.at[rows],
          inverses.at[rows],
          sums.at[head, index],
          biases.at[head, index],
        )
        for index in (_QUERY, _KEY, _VALUE)
      ]
      plgpu.commit_smem()
      copy(dout, window, tile)
      for y, target in zip(projected, head_tiles[:3], strict=True):
        target[rows] = jnp.where(is_token, y, 0.0).astype(target.dtype)

      plgpu.barrier_wait(attended_arrived)
      out = jnp.where(is_token, hopper.load(stage), 0.0)
      stage[...] = out.astype(stage.dtype)
      plgpu.commit_smem()
      plgpu.barrier_wait(arrived)
      do = hopper.product(token_tile, kernel_tiles[_OUTPUT]) * factor
      do = jnp.where(is_token, do, 0.0)
      do_tile[rows] = do.astype(do_tile.dtype)
      minus_deltas[rows] = -(do * out).sum(1)
      minus_log_sums[rows] = -hopper.load(
        log_sums.at[window, head, rows], hopper.ROW, optimized=False
      )
      # Each head adds up its part of the channels.
      dout_part = hopper.load(token_tile.at[:, part])
      dbias += jnp.where(is_token, dout_part, 0.0)
      tokens = padded_tile.transpose((1, 0))
      dkernel = hopper.add_product(dkernel, tokens, stage)
      plgpu.commit_smem()
      following, has_following = sizes.following(tile)

      # After the last tile, `of_tokens` needs the first one again.
      copy(x, window, jnp.where(has_following, following, mine))
      pl.when(has_following)(lambda: copy_attended(window, head, following))
      return dkernel, dbias

    def of_queries(tile, dbias):
      """Stores the gradient of a tile of queries."""
      rows = pl.ds(tile * ROWS, ROWS)
      dq = hopper.zeros((ROWS, HEAD))
      for block in sizes.blocks(_MAX_BLOCK):
        size = ROWS, block.size
        scores = hopper.add_product(
          hopper.load_by_row(minus_log_sums.at[rows], size),
          q_tile.at[rows],
          k_tile.at[block].transpose((1, 0)),
        )
        centered = hopper.add_product(
          hopper.load_by_row(minus_deltas.at[rows], size),
          do_tile.at[rows],
          v_tile.at[block].transpose((1, 0)),
        )
        dscores = (jnp.exp2(scores) * centered).astype(q_tile.dtype)
        dq = hopper.add_product(dq, dscores, k_tile.at[block])
      dq *= math.log(2)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      stage[...] = dq.astype(stage.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(stage, dqueries.at[program, rows])
      return (dbias + dq,)

    def of_keys(tile):
      """Stores the gradients of a tile of keys and values in their place."""
      rows = pl.ds(tile * ROWS, ROWS)
      dk = dv = hopper.zeros((ROWS, HEAD))
      for block in sizes.blocks(_MAX_BLOCK):
        size = ROWS, block.size
        scores = hopper.add_product(
          hopper.load_by_column(minus_log_sums.at[block], size),
          k_tile.at[rows],
          q_tile.at[block].transpose((1, 0)),
        )
        weights = jnp.exp2(scores)
        dv = hopper.add_product(
          dv, weights.astype(v_tile.dtype), do_tile.at[block]
        )
        centered = hopper.add_product(
          hopper.load_by_column(minus_deltas.at[block], size),
          v_tile.at[rows],
          do_tile.at[block].transpose((1, 0)),
        )
        dscores = (weights * centered).astype(k_tile.dtype)
        dk = hopper.add_product(dk, dscores, q_tile.at[block])
      is_token = hopper.iota(dk.shape, 0) < n - tile * ROWS
      for target, y in (k_tile, dk * math.log(2)), (v_tile, dv):
        target[rows] = jnp.where(is_token, y, 0.0).astype(target.dtype)

    def copy_dqueries(tile):
      source = dqueries.at[program, pl.ds(tile * ROWS, ROWS)]
      plgpu.copy_gmem_to_smem(source, stage, attended_arrived)

    def of_tokens(window, head, tile, *dkernels):
      """Adds gradients of a tile of tokens; returns those of the kernels."""
      rows = pl.ds(tile * ROWS, ROWS)
      plgpu.barrier_wait(arrived)
      mean = hopper.load(means.at[rows], hopper.ROW)
      inverse = hopper.load(inverses.at[rows], hopper.ROW)
      for chunk in hopper.chunks(channels):
        y = hopper.normalized(token_tile, chunk, mean, inverse)
        token_tile[:, chunk] = y.astype(token_tile.dtype)
      plgpu.commit_smem()
      plgpu.barrier_wait(attended_arrived)
      gradients = stage, k_tile.at[rows], v_tile.at[rows]
      tokens = padded_tile.transpose((1, 0))
      dkernels = tuple(
        hopper.add_product(dkernel, tokens, gradient)
        for dkernel, gradient in zip(dkernels, gradients, strict=True)
      )
      totals = []
      for chunk in hopper.chunks(channels):
        part = pl.ds(chunk.start, chunk.stop - chunk.start)
        total = load_total(dnormed.at[program, rows, part], head == 0)
        for kernel, gradient in zip(kernel_tiles[:3], gradients, strict=True):
          kernel = kernel.at[part].transpose((1, 0))
          total = hopper.add_product(total, gradient, kernel)
        totals.append((chunk, total))

      @pl.when(head < sizes.heads - 1)
      def _():
        for chunk, total in totals:
          dnormed[program, rows, chunk] = total

      pl.when(head == sizes.heads - 1)(
        lambda: finish(window, tile, totals, inverse)
      )
      plgpu.commit_smem()
      following, has_following = sizes.following(tile)

      @pl.when(has_following)
      def _():
        copy(x, window, following)
        copy_dqueries(following)

      return dkernels

    def finish(window, tile, totals, inverse):
      """Stores the gradient of a tile of x, from that of normalized tokens."""
      mean = product = hopper.zeros((ROWS,), hopper.ROW)
      for chunk, total in totals:
        mean += total.sum(1)
        product += (total * hopper.load(token_tile.at[:, chunk])).sum(1)
      mean *= 1 / channels
      product *= 1 / channels
      gradients = []
      for chunk, total in totals:
        y = total - hopper.by_row(mean, total.shape)
        normalized = hopper.load(token_tile.at[:, chunk])
        y -= normalized * hopper.by_row(product, y.shape)
        gradients.append((chunk, y * hopper.by_row(inverse, y.shape)))
      plgpu.commit_smem()
      copy(dout, window, tile)
      plgpu.barrier_wait(arrived)
      for chunk, y in gradients:
        y += hopper.load(token_tile.at[:, chunk])
        token_tile[:, chunk] = y.astype(token_tile.dtype)
      plgpu.commit_smem()

      @sizes.tokens_of(tile)
      def _(size):
        count = size // windows_gpu.FRAMES
        copies = sizes.copies(window, tile, dx, token_tile, count=count)
        for target, source in copies:
          plgpu.copy_smem_to_gmem(source, target)

      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def run_head(window, is_first_window, head):
      factor = scale[jax.lax.div(window, jnp.int32(sizes.windows_of_clip))]

      @hopper.first(groups)
      def _():
        for index in range(4):
          source, target = kernels.at[head, index], kernel_tiles[index]
          plgpu.copy_gmem_to_smem(source, target, kernels_arrived)

      copy(x, window, mine)
      copy_attended(window, head, mine)
      plgpu.barrier_wait(kernels_arrived)
      matrix, square = hopper.zeros((padded, HEAD)), hopper.zeros((ROWS, HEAD))
      here = dkernels.at[program, head]

      dkernel, dbias = sizes.for_tiles(
        lambda *args: recompute(window, head, factor, *args), matrix, square
      )
      bias = dout_bias.at[program, pl.ds(head * HEAD, HEAD)]
      dkernel, dbias = dkernel * factor, dbias * factor
      add([(here.at[_OUTPUT], dkernel)], bias, dbias, is_first_window)

      (dbias,) = sizes.for_tiles(of_queries, square)
      add([], dq_bias.at[program, head], dbias, is_first_window)

      sizes.for_tiles(of_keys)
      plgpu.wait_smem_to_gmem(0)
      plgpu.commit_smem()
      copy_dqueries(mine)
      of_all = sizes.for_tiles(
        lambda *args: of_tokens(window, head, *args), *[matrix] * 3
      )
      refs = [here.at[index] for index in (_QUERY, _KEY, _VALUE)]
      pairs = list(zip(refs, of_all, strict=True))
      add(pairs, None, None, is_first_window)

    def run_window(index, _):
      window = program * (sizes.windows // programs) + index

      def run(head, _):
        run_head(window, index == 0, head)
        return ()

      return jax.lax.fori_loop(0, sizes.heads, run, ())

    jax.lax.fori_loop(0, sizes.windows // programs, run_window, ())
    plgpu.wait_smem_to_gmem(0)

  heads, rows = sizes.heads, sizes.rows

  def struct(*shape):
    return jax.ShapeDtypeStruct((programs, *shape), jnp.float32)

  dx, dkernels, *dbiases, _, _ = hopper.kernel(
    body,
    'window_branch_gradient',
    out_type=(
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      struct(heads, 4, padded, HEAD),
      struct(heads, HEAD),
      struct(channels),
      jax.ShapeDtypeStruct((programs, rows, HEAD), x.dtype),
      struct(rows, channels),
    ),
    scratch=(
      (
        [hopper.tile(channels, HEAD)] * 4,
        sizes.shared(padded),
        sizes.shared(HEAD),
        *[hopper.tile(rows, HEAD)] * 4,
      ),
      (hopper.vector(rows),) * 4,
      (
        plgpu.Barrier(num_arrivals=POSITIONS, num_barriers=groups),
        plgpu.Barrier(num_barriers=groups),
        plgpu.Barrier(num_arrivals=4),
        plgpu.Barrier(num_arrivals=groups),
      ),
    ),
    grid={'program': programs},
    flops=2 * sizes.windows * n * channels * (11 * channels + 7 * n),
    transcendentals=2 * sizes.windows * heads * n * n,
    warpgroups=groups,
  )(x, dout, attended, log_sums, scale, kernels, sums, biases)
  return dx.reshape(shape), dkernels[:, :, :, :channels], *dbiases
