"""LayerNorm and linear layers of its output, as Pallas kernels for Hopper GPUs.

Tokens of windows are read from the grid and written window by window, so that
nothing is transposed in memory. In a window, the 8 frames of a position are
consecutive: that is one tile of the operands of tensor cores. The backward pass
recomputes the normalized tokens, adds the gradient of the residual stream, and
outputs the normalized tokens for the gradients of the weights, which XLA
computes.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import hopper
from dualformer_jax.kernels.dispatch import Size
from dualformer_jax.kernels.layer_norm import EPSILON

# Frames of a window.
FRAMES = 8
# Tokens of a program, by channels: what fits into registers, shared memory.
_ROWS = {64: 128, 128: 128, 192: 64, 256: 64}
# Output channels of a step of a program.
_WIDTH = 64

Vectors = tuple[Float[Array, 'o'], ...]
Matrices = tuple[Float[Array, 'c o'], ...]


def fits(batch: int, grid: Size, channels: int, window: Size) -> bool:
  """Returns whether `norm_project` supports these sizes.

  Args:
    batch: clips of a device; 0 if devices share clips.
    grid: frames, rows and columns of tokens.
    channels: channels of the tokens and of each output.
    window: frames, rows and columns of a window.
  """
  return (
    batch > 0
    and channels in _ROWS
    and window[0] == FRAMES
    and not any(g % w for g, w in zip(grid, window, strict=True))
    and batch * math.prod(grid) % _ROWS[channels] == 0
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm_project(
  window: tuple[int, int],
  x: Float[Array, 'b d h w c'],
  norm_scale: Float[Array, 'c'],
  norm_bias: Float[Array, 'c'],
  kernels: Matrices,
  biases: Vectors,
) -> tuple[Float[Array, 'b d h w c'], list[Float[Array, 'b g l o']]]:
  """Returns x, and norm(x) @ kernel + bias of each of g windows.

  The l tokens of a window are ordered by row, column and frame. Callers must
  continue with the returned x: its gradient is added in the kernel.

  Args:
    window: rows and columns of a window; it has 8 frames.
    x: tokens, bfloat16.
    norm_scale: scale of LayerNorm.
    norm_bias: bias of LayerNorm.
    kernels: weights of the linear layers.
    biases: biases of the linear layers.
  """
  folded = _fold(norm_scale, kernels, x.dtype)
  biases = tuple(b + norm_bias @ k for k, b in zip(kernels, biases, strict=True))
  outputs = _forward(window, x, folded, biases)
  batch, tokens = len(x), FRAMES * math.prod(window)
  return x, [y.reshape(batch, -1, tokens, y.shape[-1]) for y in outputs]


def _norm_project_fwd(window, x, *weights):
  return norm_project(window, x, *weights), (x, *weights)


def _norm_project_bwd(window, residuals, gradients):
  x, norm_scale, norm_bias, kernels, biases = residuals
  dx, dys = gradients
  dys = tuple(dy.reshape(-1, dy.shape[-1]) for dy in dys)
  folded = _fold(norm_scale, kernels, x.dtype)
  dx, normalized, sums = _backward(window, x, dx, dys, folded)
  dbiases = tuple(jnp.split(sums.sum(0), len(biases)))
  products = [
    jnp.einsum('nc,no->co', normalized, dy, preferred_element_type=jnp.float32)
    for dy in dys
  ]
  dkernels = tuple(
    norm_scale[:, None] * product + norm_bias[:, None] * dbias
    for product, dbias in zip(products, dbiases, strict=True)
  )
  dscale = sum(
    jnp.sum(kernel * product, axis=1)
    for kernel, product in zip(kernels, products, strict=True)
  )
  dbias = sum(
    jnp.sum(kernel * dbias, axis=1)
    for kernel, dbias in zip(kernels, dbiases, strict=True)
  )
  return dx, dscale, dbias, dkernels, dbiases


norm_project.defvjp(_norm_project_fwd, _norm_project_bwd)


def _fold(norm_scale, kernels, dtype):
  return tuple((norm_scale[:, None] * k).astype(dtype) for k in kernels)


def _positions(x, window):
  """Returns x as groups of frames [b d/8, 8, h w, c], and a function.

  The function returns the group and the position in it of the nth 8 tokens of
  all windows.
  """
  batch, frames, rows, columns, channels = x.shape
  groups, height, width = frames // FRAMES, *window

  def find(n):
    n, column = n // width, n % width
    n, row = n // height, n % height
    n, k = n // (columns // width), n % (columns // width)
    n, j = n // (rows // height), n % (rows // height)
    return n, (j * height + row) * columns + k * width + column

  return x.reshape(batch * groups, FRAMES, rows * columns, channels), find


def _copies(find, rows, ref, tile):
  """Pairs 8 tokens of the grid each with those of the tile of a program."""
  first = jax.lax.axis_index('rows') * (rows // FRAMES)
  for i in range(rows // FRAMES):
    group, position = find(first + i)
    yield ref.at[group, :, position], tile.at[pl.ds(FRAMES * i, FRAMES)]


def _normalize(x_tile):
  """Normalizes tokens in shared memory; returns 1 / deviation of each."""
  mean, inverse = hopper.statistics(x_tile, EPSILON)
  for chunk in hopper.chunks(x_tile.shape[1]):
    y = hopper.normalized(x_tile, chunk, mean, inverse)
    x_tile[:, chunk] = y.astype(x_tile.dtype)
  plgpu.commit_smem()
  return inverse


# Compiled functions are traced and lowered once for all blocks of a stage.
@functools.partial(jax.jit, static_argnums=0)
def _forward(window, x, kernels, biases):
  """Returns norm(x) @ kernel + bias [n, o], without scale and bias of norm."""
  channels, count = x.shape[-1], len(kernels)
  tokens, rows = x.size // channels, _ROWS[channels]
  x, find = _positions(x, window)
  outputs = [
    jax.ShapeDtypeStruct((tokens, kernel.shape[1]), x.dtype)
    for kernel in kernels
  ]

  def body(x, *refs):
    kernels, biases, outs = (refs[i * count : (i + 1) * count] for i in range(3))
    x_tile, out_tile, arrived = refs[3 * count :]
    mine = pl.ds(jax.lax.axis_index('rows') * rows, rows)
    for source, target in _copies(find, rows, x, x_tile):
      plgpu.copy_gmem_to_smem(source, target, arrived)
    plgpu.barrier_wait(arrived)
    _normalize(x_tile)

    for kernel, bias, out in zip(kernels, biases, outs, strict=True):

      def step(index, kernel, bias, out=out):
        y = hopper.product(x_tile, kernel)
        y += hopper.load_by_column(bias, y.shape)
        plgpu.wait_smem_to_gmem(0)
        out_tile[...] = y.astype(out.dtype)
        plgpu.commit_smem()
        columns = pl.ds(index[0] * _WIDTH, _WIDTH)
        plgpu.copy_smem_to_gmem(out_tile, out.at[mine, columns])

      plgpu.emit_pipeline(
        step,
        grid=(kernel.shape[1] // _WIDTH,),
        in_specs=[
          hopper.tile_spec((channels, _WIDTH), lambda i: (0, i)),
          hopper.vector_spec(_WIDTH),
        ],
        max_concurrent_steps=2,
      )(kernel, bias)
    plgpu.wait_smem_to_gmem(0)

  return hopper.kernel(
    body,
    'norm_project',
    out_type=outputs,
    scratch=(
      hopper.tile(rows, channels),
      hopper.tile(rows, _WIDTH),
      plgpu.Barrier(num_arrivals=rows // FRAMES),
    ),
    grid={'rows': tokens // rows},
    flops=2 * tokens * sum(kernel.size for kernel in kernels),
    transcendentals=tokens,
  )(x, *kernels, *biases)


@functools.partial(jax.jit, static_argnums=0)
def _backward(window, x, dout, dys, kernels):
  """Returns the gradient of x, normalized tokens, and sums of dys.

  The latter are those of each program, [p, m], float32.
  """
  shape, channels, count = x.shape, x.shape[-1], len(kernels)
  tokens, rows = x.size // channels, _ROWS[channels]
  x, find = _positions(x, window)
  widths = [kernel.shape[1] for kernel in kernels]

  def body(x, dout, *refs):
    dys, kernels = refs[:count], refs[count : 2 * count]
    dx, out, sums, x_tile, dout_tile, arrived = refs[2 * count :]
    program = jax.lax.axis_index('rows')
    mine = pl.ds(program * rows, rows)
    for ref, tile in ((x, x_tile), (dout, dout_tile)):
      for source, target in _copies(find, rows, ref, tile):
        plgpu.copy_gmem_to_smem(source, target, arrived)
    plgpu.barrier_wait(arrived)
    inverse = _normalize(x_tile)
    plgpu.copy_smem_to_gmem(x_tile, out.at[mine])

    total = hopper.zeros((rows, channels))
    for n, (dy, kernel) in enumerate(zip(dys, kernels, strict=True)):

      def step(index, dy, kernel, total, n=n):
        columns = pl.ds(sum(widths[:n]) + index[0] * _WIDTH, _WIDTH)
        sums[program, columns] = hopper.load(dy).sum(0)
        return hopper.add_product(total, dy, kernel.transpose((1, 0)))

      total = plgpu.emit_pipeline(
        step,
        grid=(widths[n] // _WIDTH,),
        in_specs=[
          hopper.tile_spec((rows, _WIDTH), lambda i: (0, i)),
          hopper.tile_spec((channels, _WIDTH), lambda i: (0, i)),
        ],
        max_concurrent_steps=2,
        init_carry=total,
      )(dy.at[mine], kernel)

    # The gradient of the normalized tokens is now `total`.
    mean = product = hopper.zeros((rows,), hopper.ROW)
    for chunk in hopper.chunks(channels):
      mean += total[:, chunk].sum(1)
      product += (total[:, chunk] * hopper.load(x_tile.at[:, chunk])).sum(1)
    mean *= 1 / channels
    product *= 1 / channels
    for chunk in hopper.chunks(channels):
      y = total[:, chunk]
      y -= hopper.by_row(mean, y.shape)
      y -= hopper.load(x_tile.at[:, chunk]) * hopper.by_row(product, y.shape)
      y *= hopper.by_row(inverse, y.shape)
      y += hopper.load(dout_tile.at[:, chunk])
      dout_tile[:, chunk] = y.astype(dout_tile.dtype)
    plgpu.commit_smem()
    for target, source in _copies(find, rows, dx, dout_tile):
      plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)

  dx, normalized, sums = hopper.kernel(
    body,
    'norm_project_gradient',
    out_type=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((tokens, channels), x.dtype),
      jax.ShapeDtypeStruct((tokens // rows, sum(widths)), jnp.float32),
    ],
    scratch=(
      hopper.tile(rows, channels),
      hopper.tile(rows, channels),
      plgpu.Barrier(num_arrivals=2 * (rows // FRAMES)),
    ),
    grid={'rows': tokens // rows},
    flops=2 * tokens * channels * sum(widths),
    transcendentals=tokens,
  )(x, dout.reshape(x.shape), *dys, *kernels)
  return dx.reshape(shape), normalized, sums
