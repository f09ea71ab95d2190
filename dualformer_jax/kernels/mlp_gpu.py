"""The MLP branch as Pallas kernels for Hopper GPUs.

Hidden activations stay in registers. With r = rsqrt(var + epsilon), LayerNorm
is folded into the first product,

  norm(x) w1 + b1 = r (x w1' - mean sum(w1')) + b1',

with w1' = norm_scale w1 and b1' = b1 + norm_bias w1, so that tensor cores read
x itself from shared memory. Three kernels, each of which reads its tokens once
from memory and recomputes the hidden activations in blocks:

- `_forward`: a program has a few tokens; the weights pass through its shared
  memory.
- `_input_gradient`: the same, for the gradient of x.
- `_weight_gradients`: a program has 64 hidden channels and a share of the
  tokens, which pass through its shared memory. Sums stay in registers.

A program is one warpgroup, which leaves 255 registers to each thread; two run
at a time on each multiprocessor.
"""

import dataclasses
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import hopper
from dualformer_jax.kernels.layer_norm import EPSILON

# Programs that run at a time, two on each multiprocessor of an H100 or H200.
_PROGRAMS = 264


@dataclasses.dataclass(frozen=True)
class _Tiling:
  """Sizes of blocks: what fits into registers and shared memory.

  Attributes:
    rows: tokens of a program, forward and for the gradient of x.
    forward_hidden: hidden channels of a block, forward.
    backward_hidden: hidden channels of a block, for the gradient of x.
    tokens: tokens of a step of a program for the gradients of weights.
    width: channels of a program for the gradients of weights.
  """

  rows: int
  forward_hidden: int
  backward_hidden: int
  tokens: int
  width: int


# By channels.
_TILINGS = {
  64: _Tiling(128, 64, 64, 64, 64),
  128: _Tiling(128, 64, 32, 64, 128),
  256: _Tiling(64, 64, 32, 32, 128),
}
# Hidden channels of a program of `_weight_gradients`.
_BLOCK = 64
# Weights of the approximation 7.1.26 of Abramowitz and Stegun.
_ERF_SCALE = 0.3275911
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def fits(batch: int, tokens: int, channels: int, hidden: int) -> bool:
  """Returns whether `mlp` supports these sizes.

  Args:
    batch: clips of a device; 0 if devices share clips.
    tokens: tokens of a clip.
    channels: channels of the tokens.
    hidden: channels of the hidden layer.
  """
  return (
    batch > 0
    and channels in _TILINGS
    and batch * tokens % _TILINGS[channels].rows == 0
    and hidden % _BLOCK == 0
  )


@jax.custom_vjp
def mlp(
  x: Float[Array, 'b n c'],
  branch_scale: Float[Array, 'b'],
  norm_scale: Float[Array, 'c'],
  norm_bias: Float[Array, 'c'],
  w1: Float[Array, 'c i'],
  b1: Float[Array, 'i'],
  w2: Float[Array, 'i c'],
  b2: Float[Array, 'c'],
) -> Float[Array, 'b n c']:
  """Returns x + branch_scale * (gelu(norm(x) @ w1 + b1) @ w2 + b2).

  `branch_scale` has no gradient. The backward pass needs only the arguments.
  """
  rows, scale = _flatten(x, branch_scale)
  kernel, sums, bias = _fold(norm_scale, norm_bias, w1, b1, x.dtype)
  out = _forward(rows, scale, kernel, sums, bias, w2.astype(x.dtype), b2)
  return out.reshape(x.shape)


def _mlp_fwd(x, *weights):
  return mlp(x, *weights), (x, *weights)


def _mlp_bwd(residuals, dout):
  x, branch_scale, norm_scale, norm_bias, w1, b1, w2, b2 = residuals
  rows, scale = _flatten(x, branch_scale)
  dout = dout.reshape(rows.shape)
  kernel, sums, bias = _fold(norm_scale, norm_bias, w1, b1, x.dtype)
  w2 = w2.astype(x.dtype)
  dx, mean, inverse = _input_gradient(rows, dout, scale, kernel, sums, bias, w2)
  dw1, dw2, db1, dmean = _weight_gradients(
    rows, dout, scale, mean, inverse, kernel.T, sums, bias, w2
  )
  # The gradient of the product of normalized tokens and w1, [i, c].
  dw1 = (dw1 - dmean[:, None]).T
  db2 = jnp.einsum('n,nc->c', scale, dout, preferred_element_type=jnp.float32)
  return (
    dx.reshape(x.shape),
    None,
    jnp.sum(w1 * dw1, axis=1),
    jnp.sum(w1 * db1, axis=1),
    norm_scale[:, None] * dw1 + norm_bias[:, None] * db1,
    db1,
    dw2,
    db2,
  )


mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _flatten(x, branch_scale):
  """Returns tokens [n, c] and the factor of each token [n]."""
  batch, tokens, channels = x.shape
  scale = jnp.broadcast_to(branch_scale[:, None], (batch, tokens))
  return x.reshape(batch * tokens, channels), scale.reshape(-1)


def _fold(norm_scale, norm_bias, w1, b1, dtype):
  """Returns w1' in `dtype`, the sums of its columns, and b1'."""
  kernel = (norm_scale[:, None] * w1).astype(dtype)
  sums = jnp.sum(kernel, axis=0, dtype=jnp.float32)
  return kernel, sums, b1 + jnp.sum(norm_bias[:, None] * w1, axis=0)


def _gelu(x):
  """Returns the exact GELU, within 2e-7 of max(1, |x|), and its derivative.

  With t = 1 / (1 + a |x|), 1 - erf(|x| / sqrt(2)) = poly(t) exp(-x^2 / 2).
  """
  size = jnp.abs(x)
  t = jax.lax.rsqrt(1 + _ERF_SCALE * 0.5**0.5 * size)
  t = t * t
  poly = _ERF[-1] * t
  for coefficient in _ERF[-2::-1]:
    poly = (poly + coefficient) * t
  density = jnp.exp(-0.5 * x * x)
  tail = 0.5 * poly * density
  cdf = jnp.where(x < 0, tail, 1 - tail)
  return x * cdf, cdf + x * density * (2 * math.pi) ** -0.5


def _hidden(product, mean, inverse, sums, bias):
  """Returns the input of GELU, from x w1' and broadcast vectors."""
  return (product - mean * sums) * inverse + bias


def _hidden_block(x_tile, mean, inverse, kernel, sums, bias):
  """Returns the input of GELU for tokens and a block of hidden channels."""
  product = hopper.product(x_tile, kernel)
  return _hidden(
    product,
    hopper.by_row(mean, product.shape),
    hopper.by_row(inverse, product.shape),
    hopper.load_by_column(sums, product.shape),
    hopper.load_by_column(bias, product.shape),
  )


def _weight_pipeline(step, hidden, channels, width, carry):
  """Passes blocks of w1', its sums, b1' and w2 to `step`."""
  return plgpu.emit_pipeline(
    step,
    grid=(hidden // width,),
    in_specs=[
      hopper.tile_spec((channels, width), lambda i: (0, i)),
      hopper.vector_spec(width),
      hopper.vector_spec(width),
      hopper.tile_spec((width, channels), lambda i: (i, 0)),
    ],
    max_concurrent_steps=2 if channels <= 128 else 1,
    init_carry=carry,
  )


# Compiled functions are traced and lowered once for all blocks of a stage.
@jax.jit
def _forward(x, scale, kernel, sums, bias, w2, b2):
  """Returns x + scale * mlp(norm(x))."""
  (tokens, channels), hidden = x.shape, len(w2)
  rows = _TILINGS[channels].rows
  width = _TILINGS[channels].forward_hidden

  def body(x, scale, kernel, sums, bias, w2, b2, out, tiles, arrived):
    x_tile, scale_tile, b2_tile = tiles
    mine = pl.ds(jax.lax.axis_index('rows') * rows, rows)
    plgpu.copy_gmem_to_smem(x.at[mine], x_tile, arrived)
    plgpu.copy_gmem_to_smem(scale.at[mine], scale_tile, arrived)
    plgpu.copy_gmem_to_smem(b2, b2_tile, arrived)
    plgpu.barrier_wait(arrived)
    mean, inverse = hopper.statistics(x_tile, EPSILON)

    def step(_, kernel, sums, bias, w2, total):
      y = _hidden_block(x_tile, mean, inverse, kernel, sums, bias)
      y, _ = _gelu(y)
      return hopper.add_product(total, y.astype(w2.dtype), w2)

    total = hopper.zeros((rows, channels))
    run = _weight_pipeline(step, hidden, channels, width, total)
    total = run(kernel, sums, bias, w2)
    for chunk in hopper.chunks(channels):
      y = total[:, chunk]
      y += hopper.load_by_column(b2_tile.at[chunk], y.shape)
      y *= hopper.load_by_row(scale_tile, y.shape)
      y += hopper.load(x_tile.at[:, chunk])
      x_tile[:, chunk] = y.astype(x_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_tile, out.at[mine])
    plgpu.wait_smem_to_gmem(0)

  return hopper.kernel(
    body,
    'mlp_forward',
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch=(
      (
        hopper.tile(rows, channels, width),
        hopper.vector(rows),
        hopper.vector(channels),
      ),
      plgpu.Barrier(num_arrivals=3),
    ),
    grid={'rows': tokens // rows},
    flops=2 * 2 * tokens * channels * hidden,
    transcendentals=2 * tokens * hidden,
  )(x, scale, kernel, sums, bias, w2, b2)


@jax.jit
def _input_gradient(x, dout, scale, kernel, sums, bias, w2):
  """Returns the gradient of x, and mean and 1 / deviation of each token."""
  (tokens, channels), hidden = x.shape, len(w2)
  rows = _TILINGS[channels].rows
  width = _TILINGS[channels].backward_hidden
  tile = (rows, width)

  def body(
    x, dout, scale, kernel, sums, bias, w2, dx, means, inverses, tiles, arrived
  ):
    x_tile, dout_tile, scale_tile, mean_tile, inverse_tile = tiles
    mine = pl.ds(jax.lax.axis_index('rows') * rows, rows)
    plgpu.copy_gmem_to_smem(x.at[mine], x_tile, arrived)
    plgpu.copy_gmem_to_smem(dout.at[mine], dout_tile, arrived)
    plgpu.copy_gmem_to_smem(scale.at[mine], scale_tile, arrived)
    plgpu.barrier_wait(arrived)
    mean, inverse = hopper.statistics(x_tile, EPSILON)
    factor = hopper.load(scale_tile, hopper.ROW)
    mean_tile[...] = mean
    inverse_tile[...] = inverse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mean_tile, means.at[mine])
    plgpu.copy_smem_to_gmem(inverse_tile, inverses.at[mine])

    def step(_, kernel, sums, bias, w2, total):
      y = _hidden_block(x_tile, mean, inverse, kernel, sums, bias)
      _, slope = _gelu(y)
      dy = hopper.product(dout_tile, w2.transpose((1, 0)))
      dy = (dy * slope * hopper.by_row(factor, tile)).astype(kernel.dtype)
      return hopper.add_product(total, dy, kernel.transpose((1, 0)))

    total = hopper.zeros((rows, channels))
    run = _weight_pipeline(step, hidden, channels, width, total)
    total = run(kernel, sums, bias, w2)

    # The gradient of the normalized tokens is now `total`.
    mean_total = mean_product = hopper.zeros((rows,), hopper.ROW)
    for chunk in hopper.chunks(channels):
      mean_total += total[:, chunk].sum(1)
      y = hopper.normalized(x_tile, chunk, mean, inverse)
      mean_product += (total[:, chunk] * y).sum(1)
    mean_total *= 1 / channels
    mean_product *= 1 / channels
    for chunk in hopper.chunks(channels):
      y = total[:, chunk]
      y -= hopper.by_row(mean_total, y.shape)
      normalized = hopper.normalized(x_tile, chunk, mean, inverse)
      y -= normalized * hopper.by_row(mean_product, y.shape)
      y *= hopper.by_row(inverse, y.shape)
      y += hopper.load(dout_tile.at[:, chunk])
      dout_tile[:, chunk] = y.astype(dout_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(dout_tile, dx.at[mine])
    plgpu.wait_smem_to_gmem(0)

  statistics = jax.ShapeDtypeStruct((tokens,), jnp.float32)
  return hopper.kernel(
    body,
    'mlp_input_gradient',
    out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), statistics, statistics),
    scratch=(
      (
        hopper.tile(rows, channels, width),
        hopper.tile(rows, channels),
        *[hopper.vector(rows)] * 3,
      ),
      plgpu.Barrier(num_arrivals=3),
    ),
    grid={'rows': tokens // rows},
    flops=3 * 2 * tokens * channels * hidden,
    transcendentals=2 * tokens * hidden,
  )(x, dout, scale, kernel, sums, bias, w2)


@jax.jit
def _weight_gradients(x, dout, scale, mean, inverse, kernel, sums, bias, w2):
  """Returns gradients that are sums over tokens, float32.

  Those of w1' [i, c], without the part of the mean; of w2 [i, c]; of b1 [i];
  and the part of the mean [i]. `kernel` is the transpose of w1'.
  """
  (tokens, channels), hidden = x.shape, len(w2)
  rows, width = _TILINGS[channels].tokens, _TILINGS[channels].width
  parts, blocks = channels // width, hidden // _BLOCK
  splits = _splits(tokens // rows, _PROGRAMS // (blocks * parts))
  share = tokens // splits
  tile = (_BLOCK, rows)

  def body(x, dout, scale, mean, inverse, kernel, sums, bias, w2, *refs):
    *outputs, tiles, arrived = refs
    kernel_tile, w2_tile, sums_tile, bias_tile = tiles
    split = jax.lax.axis_index('split')
    mine = pl.ds(jax.lax.axis_index('block') * _BLOCK, _BLOCK)
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
      y = _hidden(
        hopper.product(kernel_tile, x.transpose((1, 0))),
        mean,
        inverse,
        hopper.load_by_row(sums_tile, tile),
        hopper.load_by_row(bias_tile, tile),
      )
      y, slope = _gelu(y)
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
        *[hopper.zeros((_BLOCK, width))] * 2,
        *[hopper.zeros((_BLOCK,), hopper.ROW)] * 2,
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
        *[hopper.tile(_BLOCK, channels, rows)] * 2,
        *[hopper.vector(_BLOCK)] * 2,
      ),
      plgpu.Barrier(num_arrivals=4),
    ),
    grid={'part': parts, 'block': blocks, 'split': splits},
    flops=(2 + 2 * parts) * 2 * tokens * channels * hidden,
    transcendentals=2 * parts * tokens * hidden,
  )(x, dout, scale, mean, inverse, kernel, sums, bias, w2)
  return [output.sum(0) for output in outputs]


def _splits(steps: int, most: int) -> int:
  """Returns the largest divisor of `steps` that is at most `most`."""
  return next(n for n in range(max(1, most), 0, -1) if steps % n == 0)
