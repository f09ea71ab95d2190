"""The attention branch of a block as one operation, where there is a kernel."""

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels.dispatch import (
  Compute,
  Size,
  clips_per_device,
  hopper_kernels,
  no_kernel,
  run_per_device,
)
from dualformer_jax.kernels.mlp import Weights

# (x, branch_scale, norm, projections, proj, keys) -> tokens. `projections` are
# weights of the linear layers of queries and, in windows, keys and values.
# `keys` are keys and values [b, m, c] without windows, otherwise empty.
Branch = Callable[..., Float[Array, 'b d h w c']]


def find_branch(
  shape: Sequence[int],
  num_heads: int,
  compute: Compute,
  window: Size | None = None,
  num_keys: int = 0,
) -> Branch | None:
  """Returns a function that computes the attention branch in one operation.

  The function returns x + branch_scale * proj(attention(norm(x))). Returns None
  if there is none for the platform, the dtype or the sizes; then call the
  separate operations.

  Args:
    shape: clips, frames, rows, columns and channels of x.
    num_heads: attention heads.
    compute: dtype and selection of kernels.
    window: frames, rows and columns of a window, whose tokens are also its
      keys, or None.
    num_keys: keys of a clip without windows.
  """
  find = compute.choose(no_kernel, gpu=_find_gpu, tpu=_find_tpu)
  run = find(shape, num_heads, compute, window, num_keys)
  if run is None:
    return None

  def branch(
    x: Float[Array, 'b d h w c'],
    branch_scale: Float[Array, 'b'] | None,
    norm: Weights,
    projections: Sequence[Weights],
    proj: Weights,
    keys: Sequence[Float[Array, 'b m c']] = (),
  ) -> Float[Array, 'b d h w c']:
    if branch_scale is None:
      branch_scale = jnp.ones(len(x))
    with jax.named_scope('attn'):
      return run_per_device(
        run,
        (x.astype(compute.dtype), branch_scale, tuple(keys)),
        (norm, tuple(projections), proj),
      )

  return branch


# What these return takes (x, branch_scale, keys, norm, projections, proj) of
# the clips of a device.
def _find_tpu(
  shape: Sequence[int],
  num_heads: int,
  compute: Compute,
  window: Size | None,
  num_keys: int,
) -> Callable[..., Float[Array, 'b d h w c']] | None:
  """The kernel of attention_branch_tpu."""
  from dualformer_jax.kernels import attention_branch_tpu

  batch, d, h, w, channels = shape
  head = channels // num_heads
  blocks = attention_branch_tpu.blocks(
    clips_per_device(batch), (d, h, w), channels, head, window, num_keys
  )
  if compute.dtype != 'bfloat16' or blocks is None:
    return None

  def run(x, branch_scale, keys, norm, projections, proj):
    matrices, biases = zip(*projections, proj, strict=True)
    tokens = x.reshape(len(x), math.prod(x.shape[1:4]), channels)
    out = attention_branch_tpu.attention_branch(
      tokens, branch_scale, keys, (*norm, *biases), matrices, blocks, head
    )
    return out.reshape(x.shape)

  return run


def _find_gpu(
  shape: Sequence[int],
  num_heads: int,
  compute: Compute,
  window: Size | None,
  num_keys: int,
) -> Callable[..., Float[Array, 'b d h w c']] | None:
  """The kernel of window_branch_gpu."""
  module = hopper_kernels('window_branch_gpu', compute)
  batch, *grid, channels = shape
  if module is None or not module.fits(
    clips_per_device(batch),
    tuple(grid),
    channels,
    channels // num_heads,
    window,
  ):
    return None

  def run(x, branch_scale, keys, *weights):
    del keys  # those of windows are projections of x
    scale = branch_scale.astype(jnp.float32)
    return module.window_branch(window, x, scale, *weights)

  return run
