"""The linear layers around attention as Pallas kernels for Hopper GPUs.

`norm_project` is LayerNorm and linear layers of its output,
`norm_pool_project` also pools its output, and `project_add` is a linear layer
of the output of attention, drop path and the residual. Tokens of windows are
read from the grid and written window by window, so that nothing is transposed
in memory. In a window, the 8 frames of a position are consecutive: that is one
tile of the operands of tensor cores.

The backward passes recompute the normalized tokens, add the gradient of the
residual stream, and output the operands of the gradients of the weights, which
XLA computes. With more than 256 channels, sums of the gradient of x do not fit
into registers, so XLA also computes the products of that gradient.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import (
  hopper,
  layer_norm_gpu,
  pooling_gpu,
  pooling_plan,
  windows_gpu,
)
from dualformer_jax.kernels.dispatch import Size
from dualformer_jax.kernels.layer_norm import EPSILON
from dualformer_jax.kernels.project_add_gpu import project_add, weight_gradient

__all__ = ['norm_pool_project', 'norm_project', 'project_add']

Vectors = tuple[Float[Array, 'o'], ...]
Matrices = tuple[Float[Array, 'c o'], ...]
_MAX_CHANNELS = 256  # of a kernel for the gradient of x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm_project(
  window: windows_gpu.Window,
  x: Float[Array, 'b d h w c'],
  norm_scale: Float[Array, 'c'],
  norm_bias: Float[Array, 'c'],
  kernels: Matrices,
  biases: Vectors,
) -> tuple[Float[Array, 'b d h w c'], list[Float[Array, 'n c']]]:
  """Returns x, and norm(x) @ kernel + bias for each layer.

  The n tokens are ordered by clip, window, row, column and frame. Without
  windows they are ordered as in x, and norm(x) is the first of the outputs.
  Callers must continue with the returned x: its gradient is added in the
  kernel.

  Args:
    window: rows and columns of a window of 8 frames, or None.
    x: tokens, bfloat16.
    norm_scale: scale of LayerNorm.
    norm_bias: bias of LayerNorm.
    kernels: weights of the linear layers.
    biases: biases of the linear layers.
  """
  return _norm_project_fwd(window, x, norm_scale, norm_bias, kernels, biases)[0]


def _project(window, has_norm, x, norm_scale, norm_bias, kernels, biases):
  """Returns the outputs, and the kernels that include the scale of the norm.

  The latter are saved for the backward pass, which would take a launch for each
  again.
  """
  folded = tuple(
    checkpoint_name((norm_scale[:, None] * k).astype(x.dtype), 'prepared')
    for k in kernels
  )
  # Products of float32 matrices may be less accurate than sums.
  biases = tuple(
    b + jnp.sum(norm_bias[:, None] * k, axis=0)
    for k, b in zip(kernels, biases, strict=True)
  )
  outputs = _normed_products(
    window, has_norm, x, norm_scale, norm_bias, folded, biases
  )
  return outputs, folded


def _norm_project_fwd(window, x, *weights):
  outputs, folded = _project(window, window is None, x, *weights)
  return (x, outputs), (x, folded, *weights)


def _norm_project_bwd(window, residuals, gradients):
  x, folded, *weights = residuals
  dout, dys = gradients
  if x.shape[-1] > _MAX_CHANNELS:
    return _separate_gradients(window, x, dout, dys, *weights)[0]
  return _fused_gradients(window, x, dout, tuple(dys), folded, weights)[0]


norm_project.defvjp(_norm_project_fwd, _norm_project_bwd)


def _fused_gradients(
  window, x, dout, dys, folded, weights, plan=None, levels=()
):
  """Returns gradients of x and weights, and the normalized tokens."""
  norm_scale, norm_bias, kernels, biases = weights
  dx, normalized, *sums = _norm_project_gradient(
    window, plan, x, dout, dys, norm_scale, folded, levels
  )
  dys = dys[-len(kernels) :]
  dnorm_scale, dnorm_bias = sums[1].sum(0) if len(sums) > 1 else (0, 0)
  dkernels, dbiases = [], jnp.split(sums[0].sum(0), len(biases))
  for kernel, dy, dbias in zip(kernels, dys, dbiases, strict=True):
    product = weight_gradient(normalized, dy)
    dkernels.append(norm_scale[:, None] * product + norm_bias[:, None] * dbias)
    dnorm_scale += jnp.sum(kernel * product, axis=1)
    dnorm_bias += jnp.sum(kernel * dbias, axis=1)
  gradients = dx, dnorm_scale, dnorm_bias, tuple(dkernels), tuple(dbiases)
  return gradients, normalized


def _separate_gradients(
  window, x, dout, dys, norm_scale, norm_bias, kernels, _
):
  """Returns gradients of x and weights, and norm(x).

  Only the norm is a kernel.
  """
  dnorm = [] if window else [dys[0]]
  dys = dys[-len(kernels) :]
  [y] = _normed_products(window, True, x, norm_scale, norm_bias, (), ())
  dkernels = tuple(weight_gradient(y, dy) for dy in dys)
  dbiases = tuple(jnp.sum(dy, axis=0, dtype=jnp.float32) for dy in dys)
  dnorm += [
    dy @ kernel.T.astype(dy.dtype)
    for dy, kernel in zip(dys, kernels, strict=True)
  ]
  dnorm = windows_gpu.to_grid(sum(dnorm), window, x.shape)
  flat = -1, x.shape[-1]
  _, norm_vjp = jax.vjp(
    layer_norm_gpu.layer_norm, x.reshape(flat), norm_scale, norm_bias
  )
  dx, *dnorm_weights = norm_vjp(dnorm.reshape(flat))
  gradients = dout + dx.reshape(x.shape), *dnorm_weights, dkernels, dbiases
  return gradients, y


def find_pooling(
  batch: int, grid: Size, channels: int, sizes: tuple[Size, ...]
) -> pooling_plan.Plan | None:
  """Returns the plan of `norm_pool_project`; None if it does not support sizes.

  Args:
    batch: clips of a device.
    grid: frames, rows and columns of tokens.
    channels: channels of the tokens.
    sizes: sizes of the pooling kernels.
  """
  plan = pooling_plan.find_plan(grid, sizes)
  rows = windows_gpu.ROWS[channels]
  is_supported = plan and pooling_plan.fits(plan, grid, batch, rows)
  return plan if is_supported else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm_pool_project(
  plan: pooling_plan.Plan,
  x: Float[Array, 'b d h w c'],
  norm_scale: Float[Array, 'c'],
  norm_bias: Float[Array, 'c'],
  kernels: Matrices,
  biases: Vectors,
  pooling: tuple[Float[Array, '_ _ _ c'], ...],
) -> tuple[
  Float[Array, 'b d h w c'],
  list[Float[Array, 'n c']],
  list[Float[Array, 'b _ _ _ c']],
]:
  """Returns x, the outputs of `norm_project`, and pooled tokens.

  The latter are float32 sums of blocks of norm(x) times each pooling kernel.
  norm(x) is not stored.

  Args:
    plan: from `pooling_plan.find_plan`.
    x: tokens, bfloat16.
    norm_scale: scale of LayerNorm.
    norm_bias: bias of LayerNorm.
    kernels: weights of the linear layers.
    biases: biases of the linear layers.
    pooling: kernels of the pooling to each level.
  """
  operands = x, norm_scale, norm_bias, kernels, biases, pooling
  return _norm_pool_project_fwd(plan, *operands)[0]


def _norm_pool_project_fwd(plan, x, *weights):
  norm_scale, norm_bias, kernels, biases, pooling = weights
  norm = norm_scale, norm_bias
  outputs, folded = _project(None, False, x, *norm, kernels, biases)
  levels = pooling_gpu.pooled_sums(plan, x, *norm, pooling)
  return (x, outputs, levels), (x, folded, *weights)


def _norm_pool_project_bwd(plan, residuals, gradients):
  x, folded, *weights, pooling = residuals
  norm_scale, norm_bias, *_ = weights
  dout, dys, dlevels = gradients
  dlevels = [dlevel.astype(x.dtype) for dlevel in dlevels]
  if x.shape[-1] > _MAX_CHANNELS:
    dnorm = pooling_gpu.spread(plan, dlevels, pooling)
    dys = [dnorm.reshape(-1, x.shape[-1]), *dys]
    gradients, y = _separate_gradients(None, x, dout, dys, *weights)
    norm_scale, norm_bias = jnp.ones(()), jnp.zeros(())  # y has them.
  else:
    levels = pooling_gpu.gradient_operands(plan, dlevels, pooling)
    gradients, y = _fused_gradients(
      None, x, dout, tuple(dys), folded, weights, plan, levels
    )
  dpooling = pooling_gpu.kernel_gradients(
    plan, y.reshape(x.shape), dlevels, norm_scale, norm_bias
  )
  return *gradients, dpooling


norm_pool_project.defvjp(_norm_pool_project_fwd, _norm_pool_project_bwd)


# Compiled functions are traced and lowered once for all blocks of a stage.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _normed_products(
  window, has_norm, x, norm_scale, norm_bias, kernels, biases
):
  """Returns norm(x), if `has_norm`, and its products with folded weights."""
  channels, count = x.shape[-1], len(kernels)
  tokens, rows = x.size // channels, windows_gpu.ROWS[channels]
  width = windows_gpu.step_width(channels)
  x, copies = windows_gpu.copied_grid(x, window)

  def body(x, norm_scale, norm_bias, *refs):
    kernels, biases = refs[:count], refs[count : 2 * count]
    *outs, x_tile, out_tile, arrived = refs[2 * count :]
    mine = windows_gpu.tokens_of_program(rows)
    for source, target in copies(x, x_tile):
      plgpu.copy_gmem_to_smem(source, target, arrived)
    plgpu.barrier_wait(arrived)
    hopper.normalize(x_tile, x_tile, EPSILON)
    for start in range(0, channels, width) if has_norm else ():
      chunk = pl.ds(start, width)
      y = hopper.load(x_tile.at[:, chunk])
      y *= hopper.load_by_column(norm_scale.at[chunk], y.shape)
      y += hopper.load_by_column(norm_bias.at[chunk], y.shape)
      windows_gpu.write(y, out_tile, outs[0].at[mine, chunk])

    for kernel, bias, out in zip(kernels, biases, outs[has_norm:], strict=True):

      def step(index, kernel, bias, out=out):
        y = hopper.product(x_tile, kernel)
        y += hopper.load_by_column(bias, y.shape)
        columns = pl.ds(index[0] * width, width)
        windows_gpu.write(y, out_tile, out.at[mine, columns])

      plgpu.emit_pipeline(
        step,
        grid=(channels // width,),
        in_specs=[
          hopper.tile_spec((channels, width), lambda i: (0, i)),
          hopper.vector_spec(width),
        ],
        max_concurrent_steps=2,
      )(kernel, bias)
    plgpu.wait_smem_to_gmem(0)

  out = jax.ShapeDtypeStruct((tokens, channels), x.dtype)
  return hopper.kernel(
    body,
    'norm_project',
    out_type=[out] * (has_norm + count),
    scratch=(
      hopper.tile(rows, channels),
      hopper.tile(rows, width),
      plgpu.Barrier(num_arrivals=windows_gpu.num_copies(rows, window)),
    ),
    grid={'rows': tokens // rows},
    flops=2 * tokens * channels**2 * count,
    transcendentals=tokens,
  )(x, norm_scale, norm_bias, *kernels, *biases)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norm_project_gradient(
  window, plan, x, dout, dys, norm_scale, kernels, levels
):
  """Returns the gradient of x, normalized tokens, and sums of each program.

  With a `plan`, `levels` are operands of `pooling_gpu.spread_gradients`, the
  gradient of norm(x); otherwise it is the first of `dys` without windows.

  Sums are float32: those of the gradients of the layers, [p, m], and
  without windows those of the scale and the bias of the norm, [p, 2, c].
  """
  shape, channels, count = x.shape, x.shape[-1], len(kernels)
  tokens, rows = x.size // channels, windows_gpu.ROWS[channels]
  has_norm, width = window is None, windows_gpu.step_width(channels)
  num_dys, num_levels = len(dys), len(levels)
  x, copies = windows_gpu.copied_grid(x, window)

  def body(x, dout, norm_scale, *refs):
    dys, refs = refs[:num_dys], refs[num_dys:]
    kernels, refs = refs[:count], refs[count:]
    levels, refs = refs[:num_levels], refs[num_levels:]
    dx, out, sums, *norm_sums, x_tile, dout_tile, arrived, dout_arrived = refs
    program = jax.lax.axis_index('rows')
    mine = windows_gpu.tokens_of_program(rows)
    for source, target in copies(x, x_tile):
      plgpu.copy_gmem_to_smem(source, target, arrived)
    plgpu.barrier_wait(arrived)
    inverse = hopper.normalize(x_tile, x_tile, EPSILON)
    plgpu.copy_smem_to_gmem(x_tile, out.at[mine])

    total = hopper.zeros((rows, channels))
    if has_norm:
      if plan:
        pooling_gpu.spread_gradients(
          plan, program * rows, rows, levels, dout_tile
        )
      else:
        plgpu.copy_gmem_to_smem(dys[0].at[mine], dout_tile, arrived)
        plgpu.barrier_wait(arrived)
      for chunk in hopper.chunks(channels):
        y = hopper.load(dout_tile.at[:, chunk])
        norm_sums[0][program, 1, chunk] = y.sum(0)
        y *= hopper.load(x_tile.at[:, chunk])
        norm_sums[0][program, 0, chunk] = y.sum(0)
      total = hopper.load(dout_tile)
      total *= hopper.load_by_column(norm_scale, total.shape)
      plgpu.commit_smem()
    for source, target in copies(dout, dout_tile):
      plgpu.copy_gmem_to_smem(source, target, dout_arrived)

    layers = zip(dys[-count:], kernels, strict=True)
    for n, (dy, kernel) in enumerate(layers):

      def step(index, dy, kernel, total, n=n):
        columns = pl.ds(n * channels + index[0] * width, width)
        sums[program, columns] = hopper.load(dy).sum(0)
        return hopper.add_product(total, dy, kernel.transpose((1, 0)))

      total = plgpu.emit_pipeline(
        step,
        grid=(channels // width,),
        in_specs=[
          hopper.tile_spec((rows, width), lambda i: (0, i)),
          hopper.tile_spec((channels, width), lambda i: (0, i)),
        ],
        max_concurrent_steps=2,
        init_carry=total,
      )(dy.at[mine], kernel)
    plgpu.barrier_wait(dout_arrived)

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
    for target, source in copies(dx, dout_tile):
      plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)

  def sums(*shape):
    return jax.ShapeDtypeStruct((tokens // rows, *shape), jnp.float32)

  num_copies = windows_gpu.num_copies(rows, window)
  dx, *rest = hopper.kernel(
    body,
    'norm_project_gradient',
    out_type=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((tokens, channels), x.dtype),
      sums(count * channels),
      *[sums(2, channels)] * has_norm,
    ],
    scratch=(
      *[hopper.tile(rows, channels)] * 2,
      *[plgpu.Barrier(num_arrivals=num_copies)] * 2,
    ),
    grid={'rows': tokens // rows},
    flops=2 * tokens * channels**2 * count,
    transcendentals=tokens,
  )(x, dout.reshape(x.shape), norm_scale, *dys, *kernels, *levels)
  return dx.reshape(shape), *rest
