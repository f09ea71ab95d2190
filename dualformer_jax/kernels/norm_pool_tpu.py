"""LayerNorm and pooling to both levels of a pyramid, for TPUs.

A Pallas kernel reads tokens once forward, and once backward, where it also adds
the gradient of their other use (docs/performance.md).
"""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import tiles_tpu
from dualformer_jax.kernels.dispatch import Size
from dualformer_jax.kernels.layer_norm import normalize, normalize_backward
from dualformer_jax.kernels.tiles_tpu import ROWS, whole


def fits(
  batch: int, grid: Size, channels: int, sizes: tuple[Size, ...]
) -> bool:
  """Returns whether `norm_pool` supports the target devices and these sizes.

  Args:
    batch: clips of a device; 0 if devices share clips.
    grid: frames, rows and columns of tokens.
    channels: channels of tokens.
    sizes: pooling kernels: one, or two of which the second has one frame.
  """
  if not batch or batch % ROWS or not tiles_tpu.is_supported():
    return False
  if not 1 <= len(sizes) <= 2 or sizes[1:] and sizes[1][0] > 1:
    return False
  fits_all = all(
    n % k == 0 for size in sizes for n, k in zip(grid, size, strict=True)
  )
  # Two buffers of rows of tokens and their gradients, and float32 values.
  row = sizes[0][0] * grid[2] * ROWS * max(channels, tiles_tpu.LANES)
  return fits_all and row * (3 * 2 * 2 + 8 * 4) <= tiles_tpu.VMEM_BYTES // 2


@jax.custom_vjp
def norm_pool(
  x: Float[Array, 'b d h w c'],
  norm: tuple[Float[Array, 'c'], Float[Array, 'c']],
  kernels: tuple[Float[Array, '_ _ _ c'], ...],
) -> tuple[Float[Array, 'b d h w c'], tuple[Float[Array, 'b _ _ _ c'], ...]]:
  """Returns x, and the sums of blocks of norm(x) times each kernel, in float32.

  Callers must continue with the returned x, so that both gradients are added in
  the kernel.
  """
  return _fwd(x, norm, kernels)[0]


def _fwd(x, norm, kernels):
  grid, specs, sums, sum_specs = _layout(x, kernels)
  levels = pl.pallas_call(
    functools.partial(_forward_kernel, sizes=_sizes(kernels)),
    grid=grid,
    in_specs=specs,
    out_specs=sum_specs,
    out_shape=sums,
    compiler_params=tiles_tpu.params(3, in_order=True),
    name='norm_pool',
  )(*_operands(x, norm, kernels))
  return (x, tuple(_join(level) for level in levels)), (x, norm, kernels)


def _bwd(residuals, gradients):
  x, norm, kernels = residuals
  dx, dlevels = gradients
  grid, specs, _, sum_specs = _layout(x, kernels)
  operands = _operands(x, norm, kernels)
  weights = operands[1:]
  dx, *dweights = pl.pallas_call(
    functools.partial(_backward_kernel, sizes=_sizes(kernels)),
    grid=grid,
    in_specs=[*specs, specs[0], *sum_specs],
    out_specs=[specs[0], *(whole(*w.shape) for w in weights)],
    out_shape=[
      jax.ShapeDtypeStruct(operands[0].shape, x.dtype),
      *(jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in weights),
    ],
    compiler_params=tiles_tpu.params(3, in_order=True),
    name='norm_pool_backward',
  )(*operands, _split(dx), *(_split(dlevel) for dlevel in dlevels))
  dnorm, *dkernels = (w.sum(-2) for w in dweights)
  return (
    _join(dx),
    tuple(d.astype(w.dtype) for d, w in zip(dnorm, norm, strict=True)),
    tuple(
      jnp.moveaxis(d, 0, 1).astype(k.dtype)
      for d, k in zip(dkernels, kernels, strict=True)
    ),
  )


norm_pool.defvjp(_fwd, _bwd)


def _split(x: Float[Array, 'b d h w c']) -> Float[Array, 'd h w g 8 c']:
  """Returns tokens in tiles of 8 clips."""
  return jnp.moveaxis(x.reshape(-1, ROWS, *x.shape[1:]), (0, 1), (3, 4))


def _join(x: Float[Array, 'd h w g 8 c']) -> Float[Array, 'b d h w c']:
  """Reverts `_split`."""
  x = jnp.moveaxis(x, (3, 4), (0, 1))
  return x.reshape(-1, *x.shape[2:])


def _sizes(kernels) -> tuple[Size, ...]:
  return tuple(kernel.shape[:3] for kernel in kernels)


def _operands(x, norm, kernels) -> list[Array]:
  """Returns tokens, the norm, and kernels with rows first, for 8 clips each."""
  vectors = jnp.stack(norm).astype(jnp.float32)
  weights = [vectors, *(jnp.moveaxis(k, 1, 0) for k in kernels)]
  return [
    _split(x),
    *(
      jnp.repeat(w.astype(jnp.float32)[..., None, :], ROWS, axis=-2)
      for w in weights
    ),
  ]


def _layout(x, kernels):
  """Returns the grid, blocks of `_operands`, and shapes and blocks of sums.

  A program has one row of as many frames as the first kernel.
  """
  batch, d, h, w, c = x.shape
  frames = kernels[0].shape[0]
  grid = batch // ROWS, d // frames, h
  specs = [
    pl.BlockSpec(
      (frames, None, w, None, ROWS, c), lambda g, i, y: (i, y, 0, g, 0, 0)
    ),
    whole(2, ROWS, c),
  ]
  sums, sum_specs = [], []
  for i, j, k in _sizes(kernels):
    specs.append(whole(j, i, k, ROWS, c))
    shape = d // i, h // j, w // k, batch // ROWS, ROWS, c
    sums.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    sum_specs.append(
      pl.BlockSpec(
        (frames // i, None, w // k, None, ROWS, c),
        lambda g, i, y, j=j: (i, y // j, 0, g, 0, 0),
      )
    )
  return grid, specs, sums, sum_specs


def _normed(x_ref, norm_ref):
  """Returns normalized tokens, their inverse deviations, and the norm."""
  x = x_ref[...].astype(jnp.float32)
  normalized, inverse = normalize(x.reshape(-1, x.shape[-1]))
  normalized = normalized.reshape(x.shape)
  return normalized, inverse, normalized * norm_ref[0] + norm_ref[1]


def _blocks(x, size):
  """Splits [i, w, 8, c] into blocks [i / size[0], size[0], w / k, k, 8, c]."""
  i, _, k = size
  frames, columns, *rest = x.shape
  return x.reshape(frames // i, i, columns // k, k, *rest)


def _forward_kernel(x_ref, norm_ref, *refs, sizes):
  row = pl.program_id(2)
  normed = _normed(x_ref, norm_ref)[2]
  kernel_refs, sum_refs = refs[: len(sizes)], refs[len(sizes) :]
  for size, kernel_ref, sum_ref in zip(
    sizes, kernel_refs, sum_refs, strict=True
  ):
    index = row % size[1]
    kernel = kernel_ref[index][:, None]  # i 1 k 8 c
    total = (_blocks(normed, size) * kernel).sum((1, 3))

    @pl.when(index == 0)
    def _(sum_ref=sum_ref, total=total):
      sum_ref[...] = total

    @pl.when(index > 0)
    def _(sum_ref=sum_ref, total=total):
      sum_ref[...] += total


def _backward_kernel(x_ref, norm_ref, *refs, sizes):
  levels = len(sizes)
  kernel_refs, dpassed_ref = refs[:levels], refs[levels]
  dlevel_refs = refs[levels + 1 : 2 * levels + 1]
  dx_ref, dnorm_ref, *dkernel_refs = refs[2 * levels + 1 :]
  row = pl.program_id(2)
  is_first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0) & (row == 0)

  @pl.when(is_first)
  def _():
    for ref in (dnorm_ref, *dkernel_refs):
      ref[...] = jnp.zeros(ref.shape, ref.dtype)

  normalized, inverse, normed = _normed(x_ref, norm_ref)
  dnormed = jnp.zeros(normed.shape, jnp.float32)
  for size, kernel_ref, dlevel_ref, dkernel_ref in zip(
    sizes, kernel_refs, dlevel_refs, dkernel_refs, strict=True
  ):
    index = row % size[1]
    dlevel = dlevel_ref[...][:, None, :, None]  # d 1 w 1 8 c
    blocks = dlevel * kernel_ref[index][:, None]
    dnormed += blocks.reshape(normed.shape)
    dkernel_ref[index] += (dlevel * _blocks(normed, size)).sum((0, 2))
  dnorm_ref[0] += (dnormed * normalized).sum((0, 1))
  dnorm_ref[1] += dnormed.sum((0, 1))
  rows = (-1, normed.shape[-1])
  dx = normalize_backward(
    (dnormed * norm_ref[0]).reshape(rows), normalized.reshape(rows), inverse
  )
  dx = dpassed_ref[...] + dx.reshape(normed.shape)
  dx_ref[...] = dx.astype(dx_ref.dtype)
