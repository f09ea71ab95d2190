"""The linear layers around attention, fused, where there are kernels."""

from collections.abc import Sequence
import dataclasses
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class FusedProjections:
  """Functions for the linear layers before and after attention.

  Tokens between them are [n, l, c]: n clips, or windows of clips. The order of
  the l tokens of a window is unspecified.

  Attributes:
    module: kernels that compute norm_project and project_add.
    compute: dtype of the tokens.
    window: frames, rows and columns of a window, or None.
  """

  module: Any
  compute: Compute
  window: Size | None

  def norm_project(
    self,
    x: Float[Array, 'b d h w c'],
    norm: Weights,
    layers: Sequence[Weights],
  ) -> tuple[Float[Array, 'b d h w c'], list[Float[Array, 'n l c']]]:
    """Returns x, and the layers' outputs for norm(x).

    Without windows, the first of the outputs is norm(x). Callers must continue
    with the returned x, so that both gradients are added in the kernel.
    """
    kernels, biases = zip(*layers, strict=True)

    def run(x, *weights):
      x, outputs = self.module.norm_project(self._size(), x, *weights)
      tokens = self._tokens(x)
      return x, [y.reshape(-1, tokens, y.shape[-1]) for y in outputs]

    with jax.named_scope('attn'):
      operands = (x.astype(self.compute.dtype),)
      return run_per_device(run, operands, (*norm, kernels, biases))

  def project_add(
    self,
    x: Float[Array, 'b d h w c'],
    y: Float[Array, 'n l c'],
    branch_scale: Float[Array, 'b'] | None,
    layer: Weights,
  ) -> Float[Array, 'b d h w c']:
    """Returns x + branch_scale * layer(y)."""
    if branch_scale is None:
      branch_scale = jnp.ones(len(x))

    def run(x, y, *operands):
      y = y.reshape(-1, y.shape[-1])
      return self.module.project_add(self._size(), x, y, *operands)

    with jax.named_scope('attn'):
      operands = x, y, branch_scale.astype(jnp.float32)
      return run_per_device(run, operands, layer)

  def _size(self) -> tuple[int, int] | None:
    return self.window and self.window[1:]

  def _tokens(self, x: Float[Array, 'b d h w c']) -> int:
    d, h, w = self.window or x.shape[1:4]
    return d * h * w


def find_projections(
  shape: Sequence[int], window: Size | None, compute: Compute
) -> FusedProjections | None:
  """Returns the functions, or None if there are no kernels.

  That depends on the platform, the dtype and the sizes.

  Args:
    shape: clips, frames, rows, columns and channels of x.
    window: frames, rows and columns of a window, or None.
    compute: dtype and selection of kernels.
  """
  find = compute.choose(no_kernel, gpu=_find_pallas)
  return find(shape, window, compute)


def _find_pallas(
  shape: Sequence[int], window: Size | None, compute: Compute
) -> FusedProjections | None:
  """The kernels of projections_gpu, if they are used and fit."""
  module = hopper_kernels('projections_gpu', compute)
  batch, *grid, channels = shape
  if module is None or not module.windows_gpu.fits(
    clips_per_device(batch), tuple(grid), channels, window
  ):
    return None
  return FusedProjections(module, compute, window)
