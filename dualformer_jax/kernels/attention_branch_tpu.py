"""The attention branch of a block as a Pallas kernel for TPUs.

Norm, projections, attention, drop path and the residual sum run on a block of
tokens of 8 clips at a time: those of a window, which are also its keys, or some
of all tokens, with all keys of a pyramid. The backward pass recomputes
everything from the input (docs/performance.md).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import attention_tpu, tiles_tpu
from dualformer_jax.kernels.dispatch import Size
from dualformer_jax.kernels.layer_norm import normalize, normalize_backward
from dualformer_jax.kernels.tiles_tpu import LANES, ROWS, Tiling, dot, whole

# Tokens of a clip in a block at most, without windows.
_MAX_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Windows:
  """How a grid of programs divides tokens into windows."""

  batch: int
  grid_size: Size
  window: Size
  channels: int

  @property
  def rows(self) -> int:
    """Rows of a block."""
    return math.prod(self.window) * ROWS

  @property
  def grid(self) -> tuple[int, ...]:
    """The grid of programs: groups of clips, windows along each axis."""
    pairs = zip(self.grid_size, self.window, strict=True)
    return self.batch // ROWS, *(size // window for size, window in pairs)

  def split(self, x: Float[Array, 'b n c']) -> Float[Array, 'd h w j 8 c']:
    """Returns tokens in tiles."""
    x = x.reshape(-1, ROWS, *self.grid_size, self.channels)
    return x.transpose(2, 3, 4, 0, 1, 5)

  def join(self, tiles: Float[Array, 'd h w j 8 c']) -> Float[Array, 'b n c']:
    """Reverts `split`."""
    tiles = tiles.transpose(3, 4, 0, 1, 2, 5)
    return tiles.reshape(self.batch, -1, self.channels)

  def block(self) -> pl.BlockSpec:
    """Returns the block of tokens of a program, a window of tiles."""
    shape = (*self.window, None, ROWS, self.channels)
    return pl.BlockSpec(shape, lambda g, i, j, k: (i, j, k, g, 0, 0))


Blocks = Windows | Tiling


def blocks(
  batch: int,
  grid: Size,
  channels: int,
  head: int,
  window: Size | None,
  keys: int = 0,
) -> Blocks | None:
  """Returns the blocks of tokens; None if devices or sizes are not supported.

  Args:
    batch: clips of a device; 0 if devices share clips.
    grid: frames, rows and columns of tokens.
    channels: channels of all heads.
    head: channels of a head.
    window: frames, rows and columns of a window, or None.
    keys: keys of a clip without windows.
  """
  if not batch or batch % ROWS or not tiles_tpu.is_supported():
    return None
  if channels % min(channels, LANES) or LANES % head:
    return None
  if window is None:
    rows = _MAX_TOKENS * ROWS
    candidates = [
      Tiling.choose(batch, math.prod(grid), channels, rows // n)
      for n in (1, 2, 4)
    ]
  elif any(size % part for size, part in zip(grid, window, strict=True)):
    return None
  else:
    candidates = [Windows(batch, grid, window, channels)]
  for result in candidates:
    if result and _vmem_bytes(result, keys) <= tiles_tpu.VMEM_BYTES:
      return result
  return None


def _vmem_bytes(blocks: Blocks, keys: int) -> int:
  """Returns the vector memory of the backward pass: most buffers are double."""
  lanes = max(blocks.channels, LANES)
  matrices = 2 if keys else 4
  weights = 2 * matrices * blocks.channels * lanes * (2 + 4)
  of_keys = 2 * ROWS * keys * lanes * (2 + 4)
  block = blocks.rows * lanes * (3 * 2 * 2 + 2 * 4)
  length = blocks.rows // ROWS
  clip = length * lanes * (2 * 2 + 2 * 2 + 4)
  scores = 8 * 4 * length * (keys or length)
  return weights + of_keys + block + clip + scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention_branch(
  x: Float[Array, 'b n c'],
  branch_scale: Float[Array, 'b'],
  keys: tuple[Float[Array, 'b m c'], Float[Array, 'b m c']] | tuple[()],
  vectors: tuple[Float[Array, 'c'], ...],
  matrices: tuple[Float[Array, 'c c'], ...],
  blocks: Blocks,
  head: int,
) -> Float[Array, 'b n c']:
  """Returns x + branch_scale * proj(attention(norm(x))).

  Operands of products have x.dtype, everything else is float32.

  Args:
    x: tokens.
    branch_scale: factor of each clip, which gets no gradient.
    keys: keys and values; empty if they are tokens of the same window.
    vectors: scale and bias of the norm, biases of the projections of queries
      (and, in windows, keys and values) and of the output.
    matrices: kernels of the same projections.
    blocks: from the function `blocks`.
    head: channels of a head.
  """
  return _fwd(x, branch_scale, keys, vectors, matrices, blocks, head)[0]


def _fwd(x, branch_scale, keys, vectors, matrices, blocks, head):
  operands = x, branch_scale, keys, vectors, matrices
  arrays, specs = _kernel_operands(blocks, *operands)
  out = pl.pallas_call(
    functools.partial(_forward_kernel, head=head, has_keys=bool(keys)),
    grid=blocks.grid,
    in_specs=specs,
    out_specs=blocks.block(),
    out_shape=jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
    scratch_shapes=_scratch(blocks, x.dtype, 'xns'),
    cost_estimate=_cost(blocks, x, keys, head, len(matrices), 2),
    compiler_params=tiles_tpu.params(len(blocks.grid), in_order=False),
    name='attention_branch',
  )(*arrays)
  return blocks.join(out), operands


def _bwd(blocks, head, residuals, dy):
  x, branch_scale, keys, vectors, matrices = residuals
  arrays, specs = _kernel_operands(blocks, *residuals)
  sums = [(len(vectors), x.shape[-1]), (len(matrices), *matrices[0].shape)]
  out_specs = [blocks.block(), *(whole(*shape) for shape in sums)]
  out_specs += [_key_block(key) for key in keys]
  sums += [key.shape for key in keys]
  dx, dvectors, dmatrices, *dkeys = pl.pallas_call(
    functools.partial(_backward_kernel, head=head, has_keys=bool(keys)),
    grid=blocks.grid,
    in_specs=[*specs, blocks.block()],
    out_specs=out_specs,
    out_shape=[
      jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
      *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums),
    ],
    scratch_shapes=_scratch(blocks, x.dtype, 'xxnntts'),
    cost_estimate=_cost(blocks, x, keys, head, 3 * len(matrices) - 1, 6),
    compiler_params=tiles_tpu.params(len(blocks.grid), in_order=True),
    name='attention_branch_backward',
  )(*arrays, blocks.split(dy))
  *dprojections, dproj = dmatrices
  return (
    blocks.join(dx),
    jnp.zeros_like(branch_scale),
    tuple(d.astype(key.dtype) for d, key in zip(dkeys, keys, strict=True)),
    tuple(d.astype(v.dtype) for d, v in zip(dvectors, vectors, strict=True)),
    tuple(
      d.astype(m.dtype)
      for d, m in zip((*dprojections, dproj.T), matrices, strict=True)
    ),
  )


attention_branch.defvjp(_fwd, _bwd)


def _kernel_operands(
  blocks: Blocks, x, branch_scale, keys, vectors, matrices
) -> tuple[list[Array], list[pl.BlockSpec]]:
  """Returns the operands of both kernels and their blocks.

  The kernel of the output projection is transposed, so that every matrix has
  the channels of heads on its second axis.
  """
  stacked = jnp.stack([*matrices[:-1], matrices[-1].T]).astype(x.dtype)
  rows = jnp.stack([v.astype(jnp.float32) for v in vectors])
  arrays = [blocks.split(x), branch_scale.astype(jnp.float32), rows, stacked]
  specs = [
    blocks.block(),
    pl.BlockSpec(memory_space=pltpu.SMEM),
    whole(*rows.shape),
    whole(*stacked.shape),
  ]
  return [*arrays, *keys], [*specs, *(_key_block(key) for key in keys)]


def _key_block(keys: Float[Array, 'b m c']) -> pl.BlockSpec:
  shape = (ROWS, *keys.shape[1:])
  return pl.BlockSpec(
    shape, lambda g, i: (g, 0, 0), pipeline_mode=pl.Buffered(1)
  )


def _scratch(blocks: Blocks, dtype: Any, kinds: str) -> list[Any]:
  """Returns vector memory: x all rows, n tokens, t transposed, s a sum."""
  length, channels = blocks.rows // ROWS, blocks.channels
  lanes = min(channels, LANES)
  shapes = {
    'x': pltpu.VMEM((channels // lanes, blocks.rows, lanes), jnp.float32),
    'n': pltpu.VMEM((length, channels), dtype),
    't': pltpu.VMEM((channels, length), dtype),
    's': pltpu.VMEM((length, channels), jnp.float32),
  }
  return [shapes[kind] for kind in kinds]


def _cost(
  blocks: Blocks, x, keys, head: int, linear: int, products: int
) -> pl.CostEstimate:
  """Returns the cost of linear layers and of products of attention."""
  length = keys[0].shape[1] if keys else blocks.rows // ROWS
  return pl.CostEstimate(
    flops=2 * x.size * (linear * blocks.channels + products * length),
    transcendentals=x.size // head * length,
    bytes_accessed=(2 if products == 2 else 3) * x.size * x.dtype.itemsize,
  )


def _load_tiles(ref, tiles_ref) -> None:
  """Loads all tiles as float32 rows, 128 lanes after the other.

  Strided access to the rows of a clip needs float32 and 128 lanes.
  """
  lanes = ref.shape[2]
  for index in range(ref.shape[0]):
    x = tiles_ref[..., index * lanes : (index + 1) * lanes]
    ref[index] = x.astype(jnp.float32).reshape(-1, lanes)


def _store_tiles(tiles_ref, ref) -> None:
  """Reverts `_load_tiles`."""
  lanes = ref.shape[2]
  for index in range(ref.shape[0]):
    x = ref[index].reshape(*tiles_ref.shape[:-1], lanes)
    where = slice(index * lanes, (index + 1) * lanes)
    tiles_ref[..., where] = x.astype(tiles_ref.dtype)


def _load_clip(ref, clip):
  """Returns the rows of one clip, [n, c]."""
  rows = pl.ds(clip, ref.shape[1] // ROWS, stride=ROWS)
  return jnp.concatenate(
    [ref.at[index][rows, :] for index in range(ref.shape[0])], axis=1
  )


def _store_clip(ref, clip, x) -> None:
  """Reverts `_load_clip`."""
  rows = pl.ds(clip, ref.shape[1] // ROWS, stride=ROWS)
  lanes = ref.shape[2]
  for index in range(ref.shape[0]):
    ref.at[index][rows, :] = x[:, index * lanes : (index + 1) * lanes]


def _forward_kernel(
  x_ref, scale_ref, vectors_ref, matrices_ref, *refs, head, has_keys
):
  key_refs, (out_ref, x32_ref, normed_ref, sum_ref) = refs[:-4], refs[-4:]
  first = pl.program_id(0) * ROWS
  _load_tiles(x32_ref, x_ref)

  def clip(b, carry):
    x = _load_clip(x32_ref, b)
    normalized, _ = normalize(x)
    normed = normalized * vectors_ref[0:1, :] + vectors_ref[1:2, :]
    normed_ref[...] = normed.astype(normed_ref.dtype)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def heads(lanes):
      qkv = _project(normed_ref, vectors_ref, matrices_ref, lanes)
      if has_keys:
        qkv += [ref[b, :, lanes] for ref in key_refs]
      q, k, v = qkv
      out = attention_tpu.attend(q, k, v, head).astype(normed_ref.dtype)
      sum_ref[...] += dot(out, matrices_ref[-1, :, lanes], 1, 1)

    tiles_tpu.for_chunks(normed_ref.shape[1], heads, LANES)
    branch = (sum_ref[...] + vectors_ref[-1:, :]) * scale_ref[first + b]
    _store_clip(x32_ref, b, x + branch)
    return carry

  jax.lax.fori_loop(0, ROWS, clip, 0)
  _store_tiles(out_ref, x32_ref)


def _project(normed_ref, vectors_ref, matrices_ref, lanes) -> list[Array]:
  """Returns queries, and in windows keys and values, of a group of heads."""
  result = []
  for index in range(matrices_ref.shape[0] - 1):
    y = dot(normed_ref[...], matrices_ref[index, :, lanes], 1, 0)
    y += vectors_ref[index + 2 : index + 3, lanes]
    result.append(y.astype(normed_ref.dtype))
  return result


def _backward_kernel(
  x_ref, scale_ref, vectors_ref, matrices_ref, *refs, head, has_keys
):
  key_refs, refs = (refs[:2], refs[2:]) if has_keys else ((), refs)
  dy_ref, dx_ref, dvectors_ref, dmatrices_ref, *refs = refs
  dkey_refs, refs = (refs[:2], refs[2:]) if has_keys else ((), refs)
  x32_ref, dy32_ref, normed_ref, dout_ref, *refs = refs
  normed_transposed_ref, dout_transposed_ref, dnormed_ref = refs
  first = pl.program_id(0) * ROWS
  dtype = normed_ref.dtype
  axes = range(4 if not has_keys else 2)

  def zero(*refs):
    for ref in refs:
      ref[...] = jnp.zeros(ref.shape, ref.dtype)

  is_first = functools.reduce(
    jnp.logical_and, [pl.program_id(axis) == 0 for axis in axes]
  )
  pl.when(is_first)(lambda: zero(dvectors_ref, dmatrices_ref))
  if has_keys:
    pl.when(pl.program_id(1) == 0)(lambda: zero(*dkey_refs))
  _load_tiles(x32_ref, x_ref)
  _load_tiles(dy32_ref, dy_ref)

  def add_rows(index, rows, lanes=slice(None)):
    where = slice(index, index + 1)
    dvectors_ref[where, lanes] += rows.sum(0, keepdims=True)

  def clip(b, carry):
    normalized, _ = normalize(_load_clip(x32_ref, b))
    normed = normalized * vectors_ref[0:1, :] + vectors_ref[1:2, :]
    normed_ref[...] = normed.astype(dtype)
    normed_transposed_ref[...] = normed.T.astype(dtype)
    dout = _load_clip(dy32_ref, b) * scale_ref[first + b]
    dout_ref[...] = dout.astype(dtype)
    dout_transposed_ref[...] = dout.T.astype(dtype)
    add_rows(dvectors_ref.shape[0] - 1, dout)
    dnormed_ref[...] = jnp.zeros(dnormed_ref.shape, jnp.float32)

    def heads(lanes):
      qkv = _project(normed_ref, vectors_ref, matrices_ref, lanes)
      if has_keys:
        qkv += [ref[b, :, lanes] for ref in key_refs]
      dheads = dot(dout_ref[...], matrices_ref[-1, :, lanes], 1, 0)
      q, k, v = qkv
      out, *gradients = attention_tpu.attend_backward(
        q, k, v, dheads.astype(dtype), head
      )
      last = dmatrices_ref.shape[0] - 1
      dmatrices_ref[last, :, lanes] += dot(
        dout_transposed_ref[...], out.astype(dtype), 1, 0
      )
      for index in range(last):
        add_rows(index + 2, gradients[index], lanes)
        gradient = gradients[index].astype(dtype)
        dmatrices_ref[index, :, lanes] += dot(
          normed_transposed_ref[...], gradient, 1, 0
        )
        dnormed_ref[...] += dot(gradient, matrices_ref[index, :, lanes], 1, 1)
      for ref, gradient in zip(dkey_refs, gradients[last:], strict=False):
        ref[b, :, lanes] += gradient

    tiles_tpu.for_chunks(normed_ref.shape[1], heads, LANES)
    dnormed = dnormed_ref[...]
    normalized, inverse = normalize(_load_clip(x32_ref, b))
    add_rows(0, dnormed * normalized)
    add_rows(1, dnormed)
    dnormed = dnormed * vectors_ref[0:1, :]
    dx = normalize_backward(dnormed, normalized, inverse)
    _store_clip(x32_ref, b, _load_clip(dy32_ref, b) + dx)
    return carry

  jax.lax.fori_loop(0, ROWS, clip, 0)
  _store_tiles(dx_ref, x32_ref)
