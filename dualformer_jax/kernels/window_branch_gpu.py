"""The attention branch of windows as Pallas kernels for Hopper GPUs.

A program has the tokens of a window: LayerNorm, projections, attention, drop
path and residual. It reads them from the grid and writes them to it. Queries,
keys, values and weights of attention of one head at a time stay in shared
memory and registers. The forward pass saves the output of attention, and the
backward pass, one kernel, recomputes everything else from the tokens.

LayerNorm is folded into the weights of the projections, as in `mlp_gpu`. The
logarithm of the weights of attention is to base 2.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import windows_gpu
from dualformer_jax.kernels.dispatch import Size
from dualformer_jax.kernels.mlp import Weights
from dualformer_jax.kernels.window_branch_gpu_backward import backward
from dualformer_jax.kernels.window_branch_gpu_forward import forward
from dualformer_jax.kernels.window_branch_gpu_tiles import HEAD, ROWS, Sizes

# What fits into shared memory.
_CHANNELS = 64, 96, 128, 192
_MAX_TOKENS = 448
# Programs for most of the 132 multiprocessors. With fewer, separate operations
# divide the work better.
_MIN_WINDOWS = 128


def fits(
  batch: int, grid: Size, channels: int, head: int, window: Size | None
) -> bool:
  """Returns whether `window_branch` supports these sizes.

  Args:
    batch: clips of a device; 0 if devices share clips.
    grid: frames, rows and columns of tokens.
    channels: channels of all heads.
    head: channels of a head.
    window: frames, rows and columns of a window, or None.
  """
  if window is None or window[0] != windows_gpu.FRAMES:
    return False
  tokens = math.prod(window)
  return (
    channels in _CHANNELS
    and head == HEAD
    and ROWS <= tokens <= _MAX_TOKENS
    and all(g % w == 0 for g, w in zip(grid, window, strict=True))
    and batch * math.prod(grid) >= _MIN_WINDOWS * tokens
  )


def window_branch(
  window: Size,
  x: Float[Array, 'b d h w c'],
  branch_scale: Float[Array, 'b'],
  norm: Weights,
  projections: tuple[Weights, Weights, Weights],
  proj: Weights,
) -> Float[Array, 'b d h w c']:
  """Returns x + branch_scale * proj(attention(norm(x))).

  `branch_scale` has no gradient.

  Args:
    window: frames, rows and columns of a window.
    x: tokens, bfloat16.
    branch_scale: factor of each clip.
    norm: scale and bias of LayerNorm.
    projections: kernels and biases of queries, keys and values.
    proj: kernel and bias of the output.
  """
  batch, *grid, channels = x.shape
  sizes = Sizes((grid[0], grid[1], grid[2]), window, channels, batch)
  norm_scale, norm_bias = norm
  kernels = jnp.stack([kernel for kernel, _ in projections])
  biases = jnp.stack([bias for _, bias in projections])
  # Products of float32 matrices may be less accurate than sums.
  biases += jnp.sum(norm_bias[:, None] * kernels, axis=1)
  factor = HEAD**-0.5 / math.log(2)
  kernels *= jnp.array([factor, 1, 1])[:, None, None] * norm_scale[:, None]
  # A bias of all keys changes no weights of attention, but their rounding.
  biases *= jnp.array([factor, 0, 1])[:, None]
  kernels = kernels.reshape(3, channels, sizes.heads, HEAD)
  kernels = kernels.transpose(2, 0, 1, 3)
  biases = biases.reshape(3, sizes.heads, HEAD).transpose(1, 0, 2)
  return _branch(sizes, x, branch_scale, kernels, biases, *proj)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branch(
  sizes: Sizes,
  x: Float[Array, 'b d h w c'],
  branch_scale: Float[Array, 'b'],
  kernels: Float[Array, 'n 3 c e'],
  biases: Float[Array, 'n 3 e'],
  proj: Float[Array, 'c c'],
  proj_bias: Float[Array, 'c'],
) -> Float[Array, 'b d h w c']:
  """The branch, with weights of each head for normalized tokens."""
  operands = x, branch_scale, kernels, biases, proj, proj_bias
  return _branch_fwd(sizes, *operands)[0]


def _branch_fwd(sizes, x, branch_scale, kernels, biases, proj, proj_bias):
  rounded, sums = _round(kernels, x.dtype)
  columns = proj.reshape(-1, sizes.heads, HEAD).transpose(1, 0, 2)
  out, *saved = forward(
    sizes,
    x,
    branch_scale,
    rounded,
    sums,
    biases,
    columns.astype(x.dtype),
    proj_bias,
  )
  return out, (x, branch_scale, kernels, biases, proj, *saved)


def _branch_bwd(sizes, residuals, dout):
  x, branch_scale, kernels, biases, proj, *saved = residuals
  rounded, sums = _round(kernels, x.dtype)
  rows = proj.reshape(sizes.heads, 1, HEAD, -1).transpose(0, 1, 3, 2)
  rounded = jnp.concatenate([rounded, rows.astype(x.dtype)], axis=1)
  dx, *gradients = backward(
    sizes, x, dout, *saved, branch_scale, rounded, sums, biases
  )
  dkernels, dq_bias, dproj_bias = (g.sum(0) for g in gradients)
  # Weights of attention sum to 1. Keys have no bias.
  dv_bias = jnp.sum(proj * dproj_bias, axis=1).reshape(dq_bias.shape)
  dbiases = jnp.stack([dq_bias, jnp.zeros_like(dq_bias), dv_bias], axis=1)
  dproj = dkernels[:, 3].transpose(0, 2, 1).reshape(proj.shape)
  return dx, None, dkernels[:, :3], dbiases, dproj, dproj_bias


_branch.defvjp(_branch_fwd, _branch_bwd)


def _round(kernels, dtype):
  """Returns kernels in `dtype`, and the sums of their columns."""
  rounded = kernels.astype(dtype)
  return rounded, jnp.sum(rounded, axis=2, dtype=jnp.float32)
