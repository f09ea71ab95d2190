"""Gradients of a short sequence of keys and values, sums over tokens.

A Pallas kernel for Hopper GPUs: a program has some keys of a head and a part of
the tokens of a clip, which pass through its shared memory.
"""

import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from dualformer_jax.kernels import hopper, windows_gpu
from dualformer_jax.kernels.short_attention_gpu_tokens import HEAD

KEYS = 128  # of a program
_TOKENS = 64  # of a step
_PROGRAMS = 264  # that run at a time, two on each multiprocessor


# Compiled functions are traced and lowered once for all blocks of a stage.
@jax.jit
def key_gradients(keys, values, q, dy, log_sums, deltas):
  """Returns gradients of keys and values.

  The other arguments are outputs of `forward` and `query_gradients`.
  """
  batch, num_keys, channels = keys.shape
  tokens, heads = len(q), channels // HEAD
  clip_tokens, parts = tokens // batch, pl.cdiv(num_keys, KEYS)
  most = max(1, _PROGRAMS // (batch * heads * parts))
  splits = next(
    n for n in range(most, 0, -1) if clip_tokens // _TOKENS % n == 0
  )
  share = clip_tokens // splits
  shape = KEYS, _TOKENS

  def body(keys, values, q, dy, log_sums, deltas, dkeys, dvalues, *scratch):
    key_tile, value_tile, arrived = scratch
    clip, head = jax.lax.axis_index('clip'), jax.lax.axis_index('head')
    part, split = jax.lax.axis_index('part'), jax.lax.axis_index('split')
    start = clip * clip_tokens + split * share
    columns = pl.ds(head * HEAD, HEAD)
    # The last programs of a clip compute some gradients twice.
    first = jnp.minimum(part * KEYS, num_keys - KEYS)
    first = pl.multiple_of(clip * num_keys + first, 8)
    mine = pl.ds(first, KEYS)
    plgpu.copy_gmem_to_smem(keys.at[mine, columns], key_tile, arrived)
    plgpu.copy_gmem_to_smem(values.at[mine, columns], value_tile, arrived)
    plgpu.barrier_wait(arrived)

    def step(_, q, dy, log_sums, deltas, totals):
      dkeys, dvalues = totals
      scores = hopper.product(key_tile, q.transpose((1, 0)))
      weights = jnp.exp2(scores - hopper.load_by_column(log_sums, shape))
      dvalues = hopper.add_product(dvalues, weights.astype(q.dtype), dy)
      dweights = hopper.product(value_tile, dy.transpose((1, 0)))
      dweights -= hopper.load_by_column(deltas, shape)
      dscores = (weights * dweights).astype(q.dtype)
      return hopper.add_product(dkeys, dscores, q), dvalues

    tile = hopper.tile_spec((_TOKENS, HEAD), lambda i: (i, 0))
    of_split = pl.ds(start, share)
    of_head = pl.ds(head * tokens + start, share)
    totals = plgpu.emit_pipeline(
      step,
      grid=(share // _TOKENS,),
      in_specs=[tile, tile, *[hopper.vector_spec(_TOKENS)] * 2],
      max_concurrent_steps=3,
      init_carry=(hopper.zeros((KEYS, HEAD)),) * 2,
    )(
      q.at[of_split, columns],
      dy.at[of_split, columns],
      log_sums.at[of_head],
      deltas.at[of_head],
    )
    # Queries have the factor log2(e) / sqrt(32).
    totals = totals[0] * math.log(2), totals[1]
    for out, total, tile in zip(
      (dkeys, dvalues), totals, (key_tile, value_tile), strict=True
    ):
      if splits == 1:
        windows_gpu.write(total, tile, out.at[split, mine, columns])
      else:
        out[split, mine, columns] = total
    plgpu.wait_smem_to_gmem(0)

  dtype = keys.dtype if splits == 1 else jnp.float32
  sums = jax.ShapeDtypeStruct((splits, batch * num_keys, channels), dtype)
  tile = hopper.tile(KEYS, HEAD)
  dkeys, dvalues = hopper.kernel(
    body,
    'short_attention_key_gradients',
    out_type=(sums, sums),
    scratch=(tile, tile, plgpu.Barrier(num_arrivals=2)),
    grid={'part': parts, 'head': heads, 'split': splits, 'clip': batch},
    flops=8 * tokens * channels * num_keys,
    transcendentals=tokens * heads * num_keys,
  )(
    keys.reshape(-1, channels),
    values.reshape(-1, channels),
    q,
    dy,
    log_sums,
    deltas,
  )
  return [
    (y[0] if splits == 1 else y.sum(0)).reshape(keys.shape).astype(keys.dtype)
    for y in (dkeys, dvalues)
  ]
