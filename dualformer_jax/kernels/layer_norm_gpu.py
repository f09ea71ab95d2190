"""LayerNorm as Pallas kernels for Hopper GPUs.

Each kernel reads its tokens once. The backward pass computes the statistics
again, so that nothing but the input is saved, and sums the gradients of scale
and bias over 64 tokens in the same pass.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import hopper
from dualformer_jax.kernels.layer_norm import EPSILON

# Tokens of a program, and the most channels that fit into shared memory.
_ROWS = 64
_MAX_CHANNELS = 768


def fits(tokens: int, channels: int) -> bool:
  """Returns whether `layer_norm` supports arrays of these sizes."""
  return (
    tokens % _ROWS == 0 and channels % 32 == 0 and channels <= _MAX_CHANNELS
  )


@jax.custom_vjp
def layer_norm(
  x: Float[Array, 'n c'], scale: Float[Array, 'c'], bias: Float[Array, 'c']
) -> Float[Array, 'n c']:
  """Normalizes bfloat16 tokens over channels, in float32."""
  return _forward(x, scale, bias)


# Compiled functions are traced and lowered once for all blocks of a stage.
@jax.jit
def _forward(x, scale, bias):
  tokens, channels = x.shape

  def body(x, scale, bias, out, tiles, arrived):
    (x_tile,) = tiles
    mine = pl.ds(jax.lax.axis_index('rows') * _ROWS, _ROWS)
    plgpu.copy_gmem_to_smem(x.at[mine], x_tile, arrived)
    plgpu.barrier_wait(arrived)
    mean, inverse = hopper.statistics(x_tile, EPSILON)
    for chunk in hopper.chunks(channels):
      y = hopper.normalized(x_tile, chunk, mean, inverse)
      y *= hopper.load_by_column(scale.at[chunk], y.shape)
      y += hopper.load_by_column(bias.at[chunk], y.shape)
      x_tile[:, chunk] = y.astype(x_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_tile, out.at[mine])
    plgpu.wait_smem_to_gmem(0)

  return hopper.kernel(
    body,
    'layer_norm',
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch=((_tile(channels),), plgpu.Barrier()),
    grid={'rows': tokens // _ROWS},
    flops=0,
    transcendentals=tokens,
  )(x, scale, bias)


def _layer_norm_fwd(x, scale, bias):
  return layer_norm(x, scale, bias), (x, scale)


def _layer_norm_bwd(residuals, dy):
  return _backward(*residuals, dy)


@jax.jit
def _backward(x, scale, dy):
  tokens, channels = x.shape

  def body(x, dy, scale, dx, dscale, dbias, tiles, arrived):
    x_tile, dy_tile = tiles
    program = jax.lax.axis_index('rows')
    mine = pl.ds(program * _ROWS, _ROWS)
    plgpu.copy_gmem_to_smem(x.at[mine], x_tile, arrived)
    plgpu.copy_gmem_to_smem(dy.at[mine], dy_tile, arrived)
    plgpu.barrier_wait(arrived)
    mean, inverse = hopper.statistics(x_tile, EPSILON)
    total = product = hopper.zeros((_ROWS,), hopper.ROW)
    for chunk in hopper.chunks(channels):
      y = hopper.normalized(x_tile, chunk, mean, inverse)
      gradient = hopper.load(dy_tile.at[:, chunk])
      dbias[program, chunk] = gradient.sum(0)
      dscale[program, chunk] = (gradient * y).sum(0)
      gradient *= hopper.load_by_column(scale.at[chunk], y.shape)
      total += gradient.sum(1)
      product += (gradient * y).sum(1)
    total *= 1 / channels
    product *= 1 / channels
    for chunk in hopper.chunks(channels):
      y = hopper.normalized(x_tile, chunk, mean, inverse)
      gradient = hopper.load(dy_tile.at[:, chunk])
      gradient *= hopper.load_by_column(scale.at[chunk], y.shape)
      gradient -= hopper.by_row(total, y.shape)
      gradient -= y * hopper.by_row(product, y.shape)
      gradient *= hopper.by_row(inverse, y.shape)
      dy_tile[:, chunk] = gradient.astype(dy_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(dy_tile, dx.at[mine])
    plgpu.wait_smem_to_gmem(0)

  programs = tokens // _ROWS
  sums = jax.ShapeDtypeStruct((programs, channels), jnp.float32)
  dx, dscale, dbias = hopper.kernel(
    body,
    'layer_norm_gradient',
    out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums),
    scratch=(
      (_tile(channels), _tile(channels)),
      plgpu.Barrier(num_arrivals=2),
    ),
    grid={'rows': programs},
    flops=0,
    transcendentals=tokens,
  )(x, dy, scale)
  return dx, dscale.sum(0), dbias.sum(0)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def _tile(channels):
  return hopper.tile(_ROWS, channels, 64 if channels % 64 == 0 else 32)
