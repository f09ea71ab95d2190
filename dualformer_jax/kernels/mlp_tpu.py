"""The MLP branch of a block as a Pallas kernel for TPUs.

Norm, both products, GELU, drop path and the residual sum run on a block of
tokens at a time; hidden activations stay in vector memory. The backward pass
recomputes them, so that it needs only the input (docs/performance.md).
"""

import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import tiles_tpu
from dualformer_jax.kernels.layer_norm import normalize, normalize_backward
from dualformer_jax.kernels.tiles_tpu import Tiling, dot, whole

_MAX_ROWS = 1024
# Elements of a block of tokens at most.
_MAX_ELEMENTS = 2**18
# Hidden channels of a product at a time, at most.
_MAX_CHUNK = 256


def fits(batch: int, tokens: int, channels: int, hidden: int) -> bool:
  """Returns whether `mlp` supports the target devices and these sizes.

  Args:
    batch: clips of a device; 0 if devices share clips.
    tokens: tokens of a clip.
    channels: channels of the tokens.
    hidden: channels of the hidden layer.
  """
  if not (batch and tiles_tpu.is_supported()):
    return False
  tiling = _tiling(batch, tokens, channels)
  if tiling is None or channels % 32 or hidden % tiles_tpu.LANES:
    return False
  # The backward pass, with two buffers of each operand and output.
  weights = 2 * hidden * channels * (2 * 2 + 2 * 4)
  block = tiling.rows * max(channels, tiles_tpu.LANES) * (3 * 2 * 2 + 12)
  return weights + block <= tiles_tpu.VMEM_BYTES


@jax.custom_vjp
def mlp(
  x: Float[Array, 'b n c'],
  branch_scale: Float[Array, 'b'],
  norm_scale: Float[Array, 'c'],
  norm_bias: Float[Array, 'c'],
  w1: Float[Array, 'c h'],
  b1: Float[Array, 'h'],
  w2: Float[Array, 'h c'],
  b2: Float[Array, 'c'],
) -> Float[Array, 'b n c']:
  """Returns x + branch_scale * (gelu(norm(x) @ w1 + b1) @ w2 + b2).

  Operands of products have x.dtype, everything else is float32.
  `branch_scale` gets no gradient.
  """
  return _mlp_fwd(x, branch_scale, norm_scale, norm_bias, w1, b1, w2, b2)[0]


def _mlp_fwd(x, branch_scale, norm_scale, norm_bias, w1, b1, w2, b2):
  operands = x, branch_scale, norm_scale, norm_bias, w1, b1, w2, b2
  tiling = _tiling(*x.shape)
  assert tiling is not None
  arrays = _kernel_operands(tiling, *operands)
  out = pl.pallas_call(
    _forward_kernel,
    grid=tiling.grid,
    in_specs=_kernel_blocks(tiling, w1.shape[1]),
    out_specs=tiling.block(),
    out_shape=jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
    scratch_shapes=[
      pltpu.VMEM((tiling.rows, tiling.channels), x.dtype),
      pltpu.VMEM((tiling.rows, tiling.channels), jnp.float32),
    ],
    cost_estimate=_cost(x, w1, products=2, arrays=2),
    compiler_params=tiles_tpu.params(2, in_order=False),
    name='mlp',
  )(*arrays)
  return tiling.join(out), operands


def _mlp_bwd(residuals, dy):
  x, branch_scale, norm_scale, norm_bias, w1, b1, w2, b2 = residuals
  tiling = _tiling(*x.shape)
  assert tiling is not None
  channels, hidden = w1.shape
  arrays = _kernel_operands(tiling, *residuals)
  sums = [
    (1, channels),
    (1, channels),
    (channels, hidden),
    (1, hidden),
    (channels, hidden),
    (1, channels),
  ]
  rows = tiling.rows
  dx, dnorm_scale, dnorm_bias, dw1, db1, dw2, db2 = pl.pallas_call(
    _backward_kernel,
    grid=tiling.grid,
    in_specs=[*_kernel_blocks(tiling, hidden), tiling.block()],
    out_specs=[tiling.block(), *(whole(*shape) for shape in sums)],
    out_shape=[
      jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
      *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums),
    ],
    scratch_shapes=[
      pltpu.VMEM((rows, channels), x.dtype),
      pltpu.VMEM((rows, channels), x.dtype),
      pltpu.VMEM((channels, rows), x.dtype),
      pltpu.VMEM((channels, rows), x.dtype),
      pltpu.VMEM((rows, channels), jnp.float32),
    ],
    cost_estimate=_cost(x, w1, products=5, arrays=3),
    compiler_params=tiles_tpu.params(2, in_order=True),
    name='mlp_backward',
  )(*arrays, tiling.split(dy))
  return (
    tiling.join(dx),
    jnp.zeros_like(branch_scale),
    dnorm_scale[0].astype(norm_scale.dtype),
    dnorm_bias[0].astype(norm_bias.dtype),
    dw1.astype(w1.dtype),
    db1[0].astype(b1.dtype),
    dw2.T.astype(w2.dtype),
    db2[0].astype(b2.dtype),
  )


mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _tiling(batch: int, tokens: int, channels: int) -> Tiling | None:
  max_rows = min(_MAX_ROWS, _MAX_ELEMENTS // channels)
  return Tiling.choose(batch, tokens, channels, max_rows)


def _kernel_operands(
  tiling: Tiling, x, branch_scale, norm_scale, norm_bias, w1, b1, w2, b2
) -> list[Array]:
  """Returns the operands of both kernels; vectors become rows."""
  scale, bias, b1, b2 = (
    v.astype(jnp.float32)[None] for v in (norm_scale, norm_bias, b1, b2)
  )
  w1, w2 = w1.astype(x.dtype), w2.astype(x.dtype)
  branch_scale = tiling.split_scale(branch_scale)
  return [tiling.split(x), branch_scale, scale, bias, w1, b1, w2, b2]


def _kernel_blocks(tiling: Tiling, hidden: int) -> list[pl.BlockSpec]:
  """Returns the blocks of `_kernel_operands`."""
  row = whole(1, tiling.channels)
  return [
    tiling.block(),
    tiling.scale_block(),
    row,
    row,
    whole(tiling.channels, hidden),
    whole(1, hidden),
    whole(hidden, tiling.channels),
    row,
  ]


def _cost(x, w1, products: int, arrays: int) -> pl.CostEstimate:
  batch, tokens, _ = x.shape
  return pl.CostEstimate(
    flops=2 * products * batch * tokens * w1.size,
    transcendentals=batch * tokens * w1.shape[1],
    bytes_accessed=arrays * x.size * x.dtype.itemsize,
  )


def _distribution(x):
  """Returns the standard normal distribution function of x."""
  return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def _forward_kernel(
  x_ref,
  branch_scale_ref,
  scale_ref,
  bias_ref,
  w1_ref,
  b1_ref,
  w2_ref,
  b2_ref,
  out_ref,
  normed_ref,
  sum_ref,
):
  normalized, _ = normalize(tiles_tpu.rows(x_ref[...]))
  normed = normalized * scale_ref[...] + bias_ref[...]
  normed_ref[...] = normed.astype(normed_ref.dtype)
  sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

  def add(chunk):
    h = dot(normed_ref[...], w1_ref[:, chunk], 1, 0) + b1_ref[:, chunk]
    activated = (h * _distribution(h)).astype(normed_ref.dtype)
    sum_ref[...] += dot(activated, w2_ref[chunk, :], 1, 0)

  tiles_tpu.for_chunks(w1_ref.shape[1], add, _MAX_CHUNK)
  branch = tiles_tpu.tiles(sum_ref[...] + b2_ref[...]) * branch_scale_ref[...]
  out_ref[...] = (x_ref[...] + branch).astype(out_ref.dtype)


def _backward_kernel(
  x_ref,
  branch_scale_ref,
  scale_ref,
  bias_ref,
  w1_ref,
  b1_ref,
  w2_ref,
  b2_ref,
  dy_ref,
  dx_ref,
  dscale_ref,
  dbias_ref,
  dw1_ref,
  db1_ref,
  dw2_ref,  # transposed
  db2_ref,
  normed_ref,
  dout_ref,
  normed_transposed_ref,
  dout_transposed_ref,
  dnormed_ref,
):
  del b2_ref

  @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
  def set_to_zero():
    for ref in (dscale_ref, dbias_ref, dw1_ref, db1_ref, dw2_ref, db2_ref):
      ref[...] = jnp.zeros(ref.shape, ref.dtype)

  dtype = normed_ref.dtype
  normalized, _ = normalize(tiles_tpu.rows(x_ref[...]))
  normed = normalized * scale_ref[...] + bias_ref[...]
  normed_ref[...] = normed.astype(dtype)
  normed_transposed_ref[...] = normed.T.astype(dtype)
  dout = dy_ref[...].astype(jnp.float32) * branch_scale_ref[...]
  dout = tiles_tpu.rows(dout)
  dout_ref[...] = dout.astype(dtype)
  dout_transposed_ref[...] = dout.T.astype(dtype)
  db2_ref[...] += dout.sum(0, keepdims=True)
  dnormed_ref[...] = jnp.zeros(dnormed_ref.shape, jnp.float32)

  def add(chunk):
    w1 = w1_ref[:, chunk]
    h = dot(normed_ref[...], w1, 1, 0) + b1_ref[:, chunk]
    below = _distribution(h)
    density = jnp.exp(-0.5 * h * h) * (2 * math.pi) ** -0.5
    dh = dot(dout_ref[...], w2_ref[chunk, :], 1, 1) * (below + h * density)
    db1_ref[:, chunk] += dh.sum(0, keepdims=True)
    dh, activated = dh.astype(dtype), (h * below).astype(dtype)
    # Transposing tokens costs less than transposing hidden activations.
    dw1_ref[:, chunk] += dot(normed_transposed_ref[...], dh, 1, 0)
    dw2_ref[:, chunk] += dot(dout_transposed_ref[...], activated, 1, 0)
    dnormed_ref[...] += dot(dh, w1, 1, 1)

  tiles_tpu.for_chunks(w1_ref.shape[1], add, _MAX_CHUNK)
  dnormed = dnormed_ref[...]
  normalized, inverse = normalize(tiles_tpu.rows(x_ref[...]))
  dscale_ref[...] += (dnormed * normalized).sum(0, keepdims=True)
  dbias_ref[...] += dnormed.sum(0, keepdims=True)
  dnormed = dnormed * scale_ref[...]
  dx = normalize_backward(dnormed, normalized, inverse)
  dx_ref[...] = (dy_ref[...] + tiles_tpu.tiles(dx)).astype(dx_ref.dtype)
