"""Attention of tokens to a short sequence of keys, and the gradient of queries.

Pallas kernels for Hopper GPUs: norm, queries, attention, output projection,
drop path and residual. A program has a few tokens of a clip and reads them
once; blocks of the keys and values of the clip pass through its shared memory.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from dualformer_jax.kernels import hopper, windows_gpu
from dualformer_jax.kernels.layer_norm import EPSILON

HEAD = 32  # channels of a head
_KEYS = 64  # of a step
_LOWEST = -1e30
# Tokens of a program, by channels: what fits into registers, shared memory.
_ROWS = {64: 128, 96: 128, 128: 128, 192: 64, 256: 64}
_GRADIENT_ROWS = {64: 128, 96: 128, 128: 64, 192: 64, 256: 64}


def fits(batch: int, tokens: int, keys: int, channels: int) -> bool:
  """Returns whether the kernels support these numbers, of a device."""
  return (
    channels in _ROWS
    and tokens % _ROWS[channels] == 0
    and keys % 8 == 0
    and batch * keys >= pl.cdiv(keys, _KEYS) * _KEYS
  )


def _project(tile, kernel, target, bias=None):
  """Stores tile @ kernel + bias in a tile of the same number of channels."""
  channels, width = tile.shape[1], windows_gpu.step_width(tile.shape[1])

  def step(index, kernel, *biases):
    y = hopper.product(tile, kernel)
    for bias in biases:
      y += hopper.load_by_column(bias, y.shape)
    target[:, pl.ds(index[0] * width, width)] = y.astype(target.dtype)

  biases = [] if bias is None else [bias]
  plgpu.emit_pipeline(
    step,
    grid=(channels // width,),
    in_specs=[
      hopper.tile_spec((channels, width), lambda i: (0, i)),
      *[hopper.vector_spec(width) for _ in biases],
    ],
    max_concurrent_steps=2 if channels < 256 else 1,
  )(kernel, *biases)
  plgpu.commit_smem()


def _for_keys(step, clip, batch, keys, values, carry):
  """Calls step(head, block, keys, values, mask, carry) for blocks of a clip.

  mask(scores, value) replaces the scores of keys of other clips.
  """
  channels = keys.shape[1]
  num_keys = keys.shape[0] // batch
  blocks = pl.cdiv(num_keys, _KEYS)
  # The last block has keys of the next clip; of the last clip, the first block
  # has keys of the clip before it.
  start = jnp.minimum(clip * num_keys, (batch * num_keys) - blocks * _KEYS)
  first = clip * num_keys - start

  def run(index, keys, values, carry):
    head, block = index

    def mask(scores, value):
      column = plgpu.broadcasted_iota(
        jnp.int32, (_KEYS,), 0, layout=hopper.COLUMN
      )
      column += block * _KEYS - first
      is_key = (column >= 0) & (column < num_keys)
      is_key = jax.lax.broadcast_in_dim(is_key, scores.shape, (1,))
      return jnp.where(is_key, scores, value)

    return step(head, block, keys, values, mask, carry)

  spec = hopper.tile_spec((_KEYS, HEAD), lambda h, i: (i, h))
  mine = pl.ds(pl.multiple_of(start, 8), blocks * _KEYS)
  return plgpu.emit_pipeline(
    run,
    grid=(channels // HEAD, blocks),
    in_specs=[spec, spec],
    max_concurrent_steps=2,
    init_carry=carry,
  )(keys.at[mine], values.at[mine])


# Compiled functions are traced and lowered once for all blocks of a stage.
@functools.partial(jax.jit, static_argnums=0)
def forward(saves, x, keys, values, scale, query, proj):
  """Returns the tokens and, if `saves`, what the backward pass reads.

  That is the output of attention [n, c], and log-sum-exps [h, n]. Weights of
  the norm and the factor of queries are part of `query`; `scale` is the factor
  of each clip.
  """
  batch, clip_tokens, channels = x.shape
  tokens, rows = batch * clip_tokens, _ROWS[channels]
  heads, width = channels // HEAD, windows_gpu.step_width(channels)
  num_keys = keys.shape[1]

  def body(x, keys, values, scale, *refs):
    wq, bq, wp, bp, *refs = refs
    out, *saved, tiles, lse_tile, arrived = refs
    x_tile, y_tile, q_tile = tiles
    program = jax.lax.axis_index('rows')
    mine = pl.ds(program * rows, rows)
    clip = jax.lax.div(program, clip_tokens // rows)
    plgpu.copy_gmem_to_smem(x.at[mine], x_tile, arrived)
    plgpu.barrier_wait(arrived)
    hopper.normalize(x_tile, y_tile, EPSILON)
    _project(y_tile, wq, q_tile, bq)

    def step(head, block, keys, values, mask, carry):
      largest, total, out = carry
      columns = pl.ds(head * HEAD, HEAD)
      scores = hopper.product(q_tile.at[:, columns], keys.transpose((1, 0)))
      scores = mask(scores, _LOWEST)
      # The first block of a head drops the sums of the last head.
      limit = jnp.where(block == 0, _LOWEST, -_LOWEST)
      largest = jnp.minimum(largest, limit)
      before, largest = largest, jnp.maximum(largest, scores.max(1))
      weights = jnp.exp2(scores - hopper.by_row(largest, scores.shape))
      factor = jnp.exp2(before - largest)
      total = total * factor + weights.sum(1)
      out *= hopper.by_row(factor, out.shape)
      out = hopper.add_product(out, weights.astype(x.dtype), values)

      @pl.when(block == pl.cdiv(num_keys, _KEYS) - 1)
      def _():
        y = out * hopper.by_row(1 / total, out.shape)
        q_tile[:, columns] = y.astype(q_tile.dtype)
        if saves:
          here = pl.ds(head * tokens + program * rows, rows)
          lse = largest + jnp.log2(total)
          windows_gpu.write(lse, lse_tile, saved[1].at[here])

      return largest, total, out

    vector = hopper.zeros((rows,), hopper.ROW)
    carry = vector, vector, hopper.zeros((rows, HEAD))
    _for_keys(step, clip, batch, keys, values, carry)
    plgpu.commit_smem()
    if saves:
      plgpu.copy_smem_to_gmem(q_tile, saved[0].at[mine])

    def project(index, kernel, bias):
      columns = pl.ds(index[0] * width, width)
      y = hopper.product(q_tile, kernel)
      y += hopper.load_by_column(bias, y.shape)
      y = y * factor + hopper.load(x_tile.at[:, columns])
      x_tile[:, columns] = y.astype(x_tile.dtype)

    factor = scale[clip]
    plgpu.emit_pipeline(
      project,
      grid=(channels // width,),
      in_specs=[
        hopper.tile_spec((channels, width), lambda i: (0, i), HEAD),
        hopper.vector_spec(width),
      ],
      max_concurrent_steps=2,
    )(wp, bp)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_tile, out.at[mine])
    plgpu.wait_smem_to_gmem(0)

  flat = jax.ShapeDtypeStruct((tokens, channels), x.dtype)
  log_sums = jax.ShapeDtypeStruct((heads * tokens,), jnp.float32)
  out, *saved = hopper.kernel(
    body,
    'short_attention',
    out_type=(flat, flat, log_sums) if saves else (flat,),
    scratch=(
      [
        *[hopper.tile(rows, channels)] * 2,
        hopper.tile(rows, channels, HEAD),
      ],
      hopper.vector(rows),
      plgpu.Barrier(),
    ),
    grid={'rows': tokens // rows},
    flops=4 * tokens * channels * (channels + num_keys),
    transcendentals=tokens * heads * num_keys,
  )(
    x.reshape(-1, channels),
    keys.reshape(-1, channels),
    values.reshape(-1, channels),
    scale,
    *query,
    *proj,
  )
  return out.reshape(x.shape), *saved


@jax.jit
def query_gradients(
  x, keys, values, dout, scale, attended, log_sums, query, kernel
):
  """Returns gradients of queries, and what other gradients need.

  Those are queries [n, c], the gradient of the output of attention [n, c], its
  product with the output [h, n], and the sums of scaled `dout` of each program.
  """
  batch, clip_tokens, channels = x.shape
  tokens, rows = batch * clip_tokens, _GRADIENT_ROWS[channels]
  heads, num_keys = channels // HEAD, keys.shape[1]

  def body(x, keys, values, dout, scale, attended, log_sums, *refs):
    wq, bq, wp, dq, q, dy, deltas, sums, tiles, vectors, arrived = refs
    x_tile, dout_tile, q_tile, dy_tile, y_tile = tiles
    lse_tile, delta_tile = vectors
    program = jax.lax.axis_index('rows')
    mine = pl.ds(program * rows, rows)
    clip = jax.lax.div(program, clip_tokens // rows)
    of_heads = [
      (
        slice(n * HEAD, (n + 1) * HEAD),
        pl.ds(n * tokens + program * rows, rows),
      )
      for n in range(heads)
    ]
    plgpu.copy_gmem_to_smem(x.at[mine], x_tile, arrived)
    plgpu.copy_gmem_to_smem(dout.at[mine], dout_tile, arrived)
    plgpu.copy_gmem_to_smem(attended.at[mine], y_tile, arrived)
    for n, (_, here) in enumerate(of_heads):
      plgpu.copy_gmem_to_smem(log_sums.at[here], lse_tile.at[n], arrived)
    plgpu.barrier_wait(arrived)
    hopper.normalize(x_tile, x_tile, EPSILON)
    factor = scale[clip]
    for chunk in hopper.chunks(channels):
      y = hopper.load(dout_tile.at[:, chunk]) * factor
      sums[program, chunk] = y.sum(0)
      dout_tile[:, chunk] = y.astype(dout_tile.dtype)
    plgpu.commit_smem()
    _project(x_tile, wq, q_tile, bq)
    _project(dout_tile, wp, dy_tile)
    plgpu.copy_smem_to_gmem(q_tile, q.at[mine])
    plgpu.copy_smem_to_gmem(dy_tile, dy.at[mine])
    for n, (columns, _) in enumerate(of_heads):
      y = hopper.load(dy_tile.at[:, columns])
      y *= hopper.load(y_tile.at[:, columns])
      delta_tile[n] = y.sum(1)
    plgpu.commit_smem()
    for n, (_, here) in enumerate(of_heads):
      plgpu.copy_smem_to_gmem(delta_tile.at[n], deltas.at[here])

    def step(head, block, keys, values, mask, total):
      columns = pl.ds(head * HEAD, HEAD)
      scores = hopper.product(q_tile.at[:, columns], keys.transpose((1, 0)))
      scores -= hopper.load_by_row(lse_tile.at[head], scores.shape)
      weights = mask(jnp.exp2(scores), 0.0)
      dweights = hopper.product(
        dy_tile.at[:, columns], values.transpose((1, 0))
      )
      dweights -= hopper.load_by_row(delta_tile.at[head], scores.shape)
      dscores = (weights * dweights).astype(x.dtype)
      # The first block of a head drops the sums of the last head.
      total *= jnp.where(block == 0, 0.0, 1.0)
      total = hopper.add_product(total, dscores, keys)

      @pl.when(block == pl.cdiv(num_keys, _KEYS) - 1)
      def _():
        y_tile[:, columns] = (total * HEAD**-0.5).astype(y_tile.dtype)

      return total

    zeros = hopper.zeros((rows, HEAD))
    _for_keys(step, clip, batch, keys, values, zeros)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_tile, dq.at[mine])
    plgpu.wait_smem_to_gmem(0)

  flat = jax.ShapeDtypeStruct((tokens, channels), x.dtype)
  return hopper.kernel(
    body,
    'short_attention_query_gradients',
    out_type=(
      *[flat] * 3,
      jax.ShapeDtypeStruct((heads * tokens,), jnp.float32),
      jax.ShapeDtypeStruct((tokens // rows, channels), jnp.float32),
    ),
    scratch=(
      [
        *[hopper.tile(rows, channels)] * 2,
        *[hopper.tile(rows, channels, HEAD)] * 3,
      ],
      [plgpu.SMEM((heads, rows), jnp.float32)] * 2,
      plgpu.Barrier(num_arrivals=3 + heads),
    ),
    grid={'rows': tokens // rows},
    flops=2 * tokens * channels * (2 * channels + 3 * num_keys),
    transcendentals=tokens * heads * num_keys,
  )(
    x.reshape(-1, channels),
    keys.reshape(-1, channels),
    values.reshape(-1, channels),
    dout.reshape(-1, channels),
    scale,
    attended,
    log_sums,
    *query,
    kernel,
  )
