"""The forward pass of the attention branch of windows, for Hopper GPUs.

A program has a window, and one head after the other. The output of attention
goes to memory; then a program multiplies it, for all heads, with the weights of
the output projection.
"""

import functools

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

_MAX_BLOCK = 96  # Keys whose scores are in registers.
# Lower than all scores, and finite.
_NO_KEY = -1e30
# The logarithm of a sum, of padding: the backward pass has weights of 0.
_NO_QUERY = 1e30


# Compiled functions are traced and lowered once for all blocks of a stage.
@functools.partial(jax.jit, static_argnums=0)
def forward(sizes: Sizes, x, scale, kernels, sums, biases, proj, proj_bias):
  """Returns the tokens, and what the backward pass needs.

  That is the output of attention, window by window, [n, c], and the logarithm
  to base 2 of the sum of the exponentials of each query, [n / l, heads, rows].

  Args:
    sizes: of the windows.
    x: tokens.
    scale: factor of each clip.
    kernels: of queries, keys and values of each head, [heads, 3, c, 32].
    sums: of the columns of the kernels.
    biases: of queries, keys and values, [heads, 3, 32].
    proj: kernel of the output, in blocks of columns, [heads, c, 32].
    proj_bias: bias of the output.
  """
  n, channels, groups = sizes.tokens, sizes.channels, sizes.warpgroups
  # Blocks of columns of `proj` at a time.
  num_parts = 3 if sizes.heads % 3 == 0 else 2
  shape, x = x.shape, windows_gpu.by_frames(x)

  def body(x, scale, kernels, sums, biases, proj, proj_bias, *refs):
    out, attended, log_sums, tiles, means, inverses, *barriers = refs
    kernel_tiles, x_tile, head_tile, *qkv_tiles = tiles
    q_tile, k_tile, v_tile = qkv_tiles
    arrived, rest_arrived, kernel_arrived, met = barriers
    window, mine = jax.lax.axis_index('window'), sizes.warpgroup()
    x_tile, head_tile = sizes.own(x_tile), sizes.own(head_tile)
    arrived, rest_arrived = arrived.at[mine], rest_arrived.at[mine]
    factor = scale[jax.lax.div(window, jnp.int32(sizes.windows_of_clip))]

    def copy_x(tile):
      for source, target in sizes.copies(window, tile, x, x_tile):
        plgpu.copy_gmem_to_smem(source, target, arrived)

    def load_kernels(refs):
      @hopper.first(groups)
      def _():
        for index in range(3):
          # Without a third part, the second one is loaded again.
          ref = refs[min(index, len(refs) - 1)]
          plgpu.copy_gmem_to_smem(ref, kernel_tiles[index], kernel_arrived)

      plgpu.barrier_wait(kernel_arrived)

    def project_tile(head, tile):
      """Stores queries, keys and values of a head."""
      rows = pl.ds(tile * ROWS, ROWS)
      plgpu.barrier_wait(arrived)

      @pl.when(head == 0)
      def _():
        means[rows], inverses[rows] = hopper.statistics(x_tile, EPSILON)
        plgpu.commit_smem()

      parts = [
        project(
          x_tile,
          kernel_tiles[index],
          means.at[rows],
          inverses.at[rows],
          sums.at[head, index],
          biases.at[head, index],
        )
        for index in range(3)
      ]
      plgpu.commit_smem()
      following, has_following = sizes.following(tile)

      # After the last tile, the next head needs the first one.
      @pl.when(has_following | (head < sizes.heads - 1))
      def _():
        copy_x(jnp.where(has_following, following, mine))

      for part, target in zip(parts, qkv_tiles, strict=True):
        target[rows] = part.astype(target.dtype)

    def attend(head, tile):
      """Stores the output of a head for a tile of queries."""
      rows = pl.ds(tile * ROWS, ROWS)
      largest = hopper.zeros((ROWS,), hopper.ROW) + _NO_KEY
      total = hopper.zeros((ROWS,), hopper.ROW)
      result = hopper.zeros((ROWS, HEAD))
      for block in sizes.blocks(_MAX_BLOCK):
        keys = k_tile.at[block].transpose((1, 0))
        scores = hopper.product(q_tile.at[rows], keys)
        if block.start + block.size > n:
          is_key = hopper.iota(scores.shape, 1) < n - block.start
          scores = jnp.where(is_key, scores, _NO_KEY)
        last, largest = largest, jnp.maximum(largest, scores.max(1))
        weights = jnp.exp2(scores - hopper.by_row(largest, scores.shape))
        decay = jnp.exp2(last - largest)
        total = total * decay + weights.sum(1)
        result *= hopper.by_row(decay, result.shape)
        weights = weights.astype(v_tile.dtype)
        result = hopper.add_product(result, weights, v_tile.at[block])
      result *= hopper.by_row(1 / total, result.shape)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      head_tile[...] = result.astype(head_tile.dtype)
      plgpu.commit_smem()

      @sizes.tokens_of(tile)
      def _(size):
        here = pl.ds(window * n + tile * ROWS, size)
        target = attended.at[here, pl.ds(head * HEAD, HEAD)]
        plgpu.copy_smem_to_gmem(head_tile.at[pl.ds(0, size)], target)

      log_sum = largest + jnp.log2(total)
      is_query = hopper.iota((ROWS,), 0, hopper.ROW) < n - tile * ROWS
      log_sums[window, head, rows] = jnp.where(is_query, log_sum, _NO_QUERY)

    def run_head(head, _):
      load_kernels([kernels.at[head, index] for index in range(3)])
      sizes.for_tiles(lambda tile: project_tile(head, tile))
      hopper.meet(met, groups)
      sizes.for_tiles(lambda tile: attend(head, tile))
      hopper.meet(met, groups)
      return ()

    def finish(start, tile):
      """Stores some channels of a tile: projection, drop path and residual."""
      rows = pl.ds(tile * ROWS, ROWS)
      parts = [
        (pl.ds((start + index) * HEAD, HEAD), qkv_tiles[index].at[rows])
        for index in range(num_parts)
      ]

      @sizes.tokens_of(tile)
      def _(size):
        source = attended.at[pl.ds(window * n + tile * ROWS, size)]
        target = x_tile.at[pl.ds(0, size)]
        plgpu.copy_gmem_to_smem(source, target, rest_arrived)

      for part, free in parts:
        for source, target in sizes.copies(window, tile, x, free, part):
          plgpu.copy_gmem_to_smem(source, target, rest_arrived)
      plgpu.barrier_wait(rest_arrived)
      for index, (part, free) in enumerate(parts):
        y = hopper.product(x_tile, kernel_tiles[index])
        y += hopper.load_by_column(proj_bias.at[part], y.shape)
        y = y * factor + hopper.load(free)
        free[...] = y.astype(free.dtype)
      plgpu.commit_smem()

      @sizes.tokens_of(tile)
      def _(size):
        count = size // windows_gpu.FRAMES
        for part, free in parts:
          copies = sizes.copies(window, tile, out, free, part, count)
          for target, source in copies:
            plgpu.copy_smem_to_gmem(source, target)

    copy_x(mine)
    jax.lax.fori_loop(0, sizes.heads, run_head, ())
    plgpu.wait_smem_to_gmem(0)
    for start in range(0, sizes.heads, num_parts):
      load_kernels([proj.at[start + index] for index in range(num_parts)])
      sizes.for_tiles(functools.partial(finish, start))
      plgpu.wait_smem_to_gmem(0)
      hopper.meet(met, groups)

  windows, struct = sizes.windows, jax.ShapeDtypeStruct
  out, attended, log_sums = hopper.kernel(
    body,
    'window_branch',
    out_type=(
      struct(x.shape, x.dtype),
      struct((windows * n, channels), x.dtype),
      struct((windows, sizes.heads, sizes.rows), jnp.float32),
    ),
    scratch=(
      (
        [hopper.tile(channels, HEAD)] * 3,
        sizes.shared(channels),
        sizes.shared(HEAD),
        *[hopper.tile(sizes.rows, HEAD)] * 3,
      ),
      *[hopper.vector(sizes.rows)] * 2,
      plgpu.Barrier(num_arrivals=POSITIONS, num_barriers=groups),
      plgpu.Barrier(
        num_arrivals=1 + num_parts * POSITIONS, num_barriers=groups
      ),
      plgpu.Barrier(num_arrivals=3),
      plgpu.Barrier(num_arrivals=groups),
    ),
    grid={'window': windows},
    flops=2 * windows * n * channels * (4 * channels + 2 * n),
    transcendentals=windows * sizes.heads * n * n,
    warpgroups=groups,
  )(x, scale, kernels, sums, biases, proj, proj_bias)
  return out.reshape(shape), attended, log_sums
