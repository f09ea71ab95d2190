"""LayerNorm and the projections of windows in one pass, where there is a kernel."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels.dispatch import (
  Compute,
  Size,
  clips_per_device,
  is_hopper,
  no_kernel,
  run_per_device,
)

# (x, norm, layers) -> x, outputs of the layers
Project = Callable[
  ..., tuple[Float[Array, 'b d h w c'], list[Float[Array, 'g b l c']]]
]
# The order of the tokens of a window in the outputs.
TOKENS = 'wh ww wd'


def find_project(
  shape: Sequence[int], window: Size, compute: Compute
) -> Project | None:
  """Returns a function that normalizes tokens and computes linear layers.

  It has the arguments x [b, d, h, w, c], scale and bias of the norm, and kernel
  [c, c] and bias [c] of each layer. Windows are groups, ordered by frame, row
  and column. Callers must continue with the returned x, so that both gradients
  are added in the kernel. Returns None if there is none for the platform, the
  dtype or the sizes.

  Args:
    shape: clips, frames, rows, columns and channels of x.
    window: frames, rows and columns of a window.
    compute: dtype and selection of kernels.
  """
  find = compute.choose(no_kernel, gpu=_find_pallas)
  return find(shape, window, compute)


def _find_pallas(
  shape: Sequence[int], window: Size, compute: Compute
) -> Project | None:
  """The kernels of projections_gpu on Hopper, for bfloat16, if experimental."""
  if compute.kernels != 'experimental' or not (
    compute.dtype == 'bfloat16' and is_hopper()
  ):
    return None
  # Pallas for GPUs is experimental: another version may have no such kernels.
  try:
    from dualformer_jax.kernels import projections_gpu
  except (ImportError, AttributeError):
    return None
  batch, d, h, w, channels = shape
  if not projections_gpu.fits(
    clips_per_device(batch), (d, h, w), channels, window
  ):
    return None

  def project(x, norm, layers):
    kernels, biases = zip(*layers, strict=True)

    def run(x, *weights):
      return projections_gpu.norm_project(window[1:], x, *weights)

    with jax.named_scope('norm_project'):
      x, outputs = run_per_device(
        run, (x.astype(compute.dtype),), (*norm, kernels, biases)
      )
    return x, [jnp.moveaxis(y, 1, 0) for y in outputs]

  return project
