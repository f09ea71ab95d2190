"""LayerNorm and pooling to a pyramid in one pass, where there is a kernel."""

from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array, Float

from dualformer_jax.kernels.dispatch import (
  Compute,
  Size,
  clips_per_device,
  no_kernel,
  run_per_device,
)

# (x, norm, weights) -> x, levels
NormPool = Callable[
  ..., tuple[Float[Array, 'b d h w c'], list[Float[Array, 'b _ _ _ c']]]
]


def find_norm_pool(
  shape: Sequence[int], sizes: Sequence[Size], compute: Compute
) -> NormPool | None:
  """Returns a function that normalizes tokens and pools them to levels.

  It has the arguments x [b, d, h, w, c], scale and bias of the norm, and kernel
  and bias of the pooling of each level. Callers must continue with the returned
  x, so that both gradients are added in the kernel. Returns None if there is
  none for the platform, the dtype or the sizes.

  Args:
    shape: clips, frames, rows, columns and channels of x.
    sizes: sizes of the pooling kernels.
    compute: dtype and selection of kernels.
  """
  find = compute.choose(no_kernel, tpu=_find_pallas)
  return find(shape, sizes, compute)


def _find_pallas(
  shape: Sequence[int], sizes: Sequence[Size], compute: Compute
) -> NormPool | None:
  """The kernel of norm_pool_tpu, on each device for its clips."""
  from dualformer_jax.kernels import norm_pool_tpu

  batch, d, h, w, channels = shape
  if compute.dtype != 'bfloat16' or not norm_pool_tpu.fits(
    clips_per_device(batch), (d, h, w), channels, tuple(sizes)
  ):
    return None

  def norm_pool(x, norm, weights):
    kernels, biases = zip(*weights, strict=True)
    with jax.named_scope('norm_pool'):
      x, sums = run_per_device(
        norm_pool_tpu.norm_pool,
        (x.astype(compute.dtype),),
        (tuple(norm), tuple(kernels)),
      )
    levels = [
      (level + bias).astype(compute.dtype)
      for level, bias in zip(sums, biases, strict=True)
    ]
    return x, levels

  return norm_pool
