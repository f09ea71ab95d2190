"""A linear layer of the output of attention, drop path and the residual.

Pallas kernels for Hopper GPUs. Tokens of windows are written to the grid.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import hopper, windows_gpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_add(
  window: windows_gpu.Window,
  x: Float[Array, 'b d h w c'],
  y: Float[Array, 'n c'],
  branch_scale: Float[Array, 'b'],
  kernel: Float[Array, 'c c'],
  bias: Float[Array, 'c'],
) -> Float[Array, 'b d h w c']:
  """Returns x + branch_scale * (y @ kernel + bias).

  `branch_scale` has no gradient.

  Args:
    window: as for `norm_project`.
    x: tokens, bfloat16.
    y: tokens in the order that `norm_project` outputs.
    branch_scale: factor of each clip.
    kernel: weights of the linear layer.
    bias: bias of the linear layer.
  """
  scale = _scale_of_tokens(branch_scale, y)
  return _projected_sum(window, x, y, scale, kernel.astype(x.dtype), bias)


def _project_add_fwd(window, *operands):
  return project_add(window, *operands), operands[1:]


def _project_add_bwd(window, residuals, dout):
  y, branch_scale, kernel, _ = residuals
  scale = _scale_of_tokens(branch_scale, y)
  dy, scaled, sums = _project_gradient(
    window, dout, scale, kernel.astype(y.dtype)
  )
  return dout, dy, None, weight_gradient(y, scaled), sums.sum(0)


project_add.defvjp(_project_add_fwd, _project_add_bwd)


def _scale_of_tokens(branch_scale, y):
  return jnp.repeat(branch_scale, len(y) // len(branch_scale))


def weight_gradient(
  x: Float[Array, 'n c'], dy: Float[Array, 'n o']
) -> Float[Array, 'c o']:
  """Returns the gradient of the weights of a linear layer of x."""
  return jnp.einsum('nc,no->co', x, dy, preferred_element_type=jnp.float32)


# Compiled functions are traced and lowered once for all blocks of a stage.
@functools.partial(jax.jit, static_argnums=0)
def _projected_sum(window, x, y, scale, kernel, bias):
  """Returns x + scale * (y @ kernel + bias)."""
  shape, channels = x.shape, x.shape[-1]
  tokens, rows = x.size // channels, windows_gpu.ROWS[channels]
  width = windows_gpu.step_width(channels)
  x, copies = windows_gpu.copied_grid(x, window)

  def body(x, y, scale, kernel, bias, out, tiles, arrived):
    x_tile, y_tile, scale_tile = tiles
    mine = windows_gpu.tokens_of_program(rows)
    for source, target in copies(x, x_tile):
      plgpu.copy_gmem_to_smem(source, target, arrived)
    plgpu.copy_gmem_to_smem(y.at[mine], y_tile, arrived)
    plgpu.copy_gmem_to_smem(scale.at[mine], scale_tile, arrived)
    plgpu.barrier_wait(arrived)

    def step(index, kernel, bias):
      columns = pl.ds(index[0] * width, width)
      part = hopper.product(y_tile, kernel)
      part += hopper.load_by_column(bias, part.shape)
      part *= hopper.load_by_row(scale_tile, part.shape)
      part += hopper.load(x_tile.at[:, columns])
      x_tile[:, columns] = part.astype(x_tile.dtype)

    plgpu.emit_pipeline(
      step,
      grid=(channels // width,),
      in_specs=[
        hopper.tile_spec((channels, width), lambda i: (0, i)),
        hopper.vector_spec(width),
      ],
      max_concurrent_steps=2 if channels < 512 else 1,
    )(kernel, bias)
    plgpu.commit_smem()
    for target, source in copies(out, x_tile):
      plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)

  return hopper.kernel(
    body,
    'project_add',
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch=(
      (*[hopper.tile(rows, channels)] * 2, hopper.vector(rows)),
      plgpu.Barrier(num_arrivals=windows_gpu.num_copies(rows, window) + 2),
    ),
    grid={'rows': tokens // rows},
    flops=2 * tokens * channels**2,
    transcendentals=0,
  )(x, y, scale, kernel, bias).reshape(shape)


@functools.partial(jax.jit, static_argnums=0)
def _project_gradient(window, dout, scale, kernel):
  """Returns the gradient of y, scale * dout, and its sums of each program."""
  channels = dout.shape[-1]
  tokens, rows = dout.size // channels, windows_gpu.ROWS[channels]
  width = windows_gpu.step_width(channels)
  dout, copies = windows_gpu.copied_grid(dout, window)

  def body(dout, scale, kernel, dy, scaled, sums, *scratch):
    dout_tile, scale_tile, out_tile, arrived = scratch
    program = jax.lax.axis_index('rows')
    mine = windows_gpu.tokens_of_program(rows)
    for source, target in copies(dout, dout_tile):
      plgpu.copy_gmem_to_smem(source, target, arrived)
    plgpu.copy_gmem_to_smem(scale.at[mine], scale_tile, arrived)
    plgpu.barrier_wait(arrived)
    for chunk in hopper.chunks(channels):
      y = hopper.load(dout_tile.at[:, chunk])
      y *= hopper.load_by_row(scale_tile, y.shape)
      sums[program, chunk] = y.sum(0)
      dout_tile[:, chunk] = y.astype(dout_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(dout_tile, scaled.at[mine])

    def step(index, kernel):
      y = hopper.product(dout_tile, kernel.transpose((1, 0)))
      columns = pl.ds(index[0] * width, width)
      windows_gpu.write(y, out_tile, dy.at[mine, columns])

    plgpu.emit_pipeline(
      step,
      grid=(channels // width,),
      in_specs=[hopper.tile_spec((width, channels), lambda i: (i, 0))],
      max_concurrent_steps=2,
    )(kernel)
    plgpu.wait_smem_to_gmem(0)

  out = jax.ShapeDtypeStruct((tokens, channels), dout.dtype)
  sums = jax.ShapeDtypeStruct((tokens // rows, channels), jnp.float32)
  return hopper.kernel(
    body,
    'project_gradient',
    out_type=(out, out, sums),
    scratch=(
      hopper.tile(rows, channels),
      hopper.vector(rows),
      hopper.tile(rows, width),
      plgpu.Barrier(num_arrivals=windows_gpu.num_copies(rows, window) + 1),
    ),
    grid={'rows': tokens // rows},
    flops=2 * tokens * channels**2,
    transcendentals=0,
  )(dout, scale, kernel)
