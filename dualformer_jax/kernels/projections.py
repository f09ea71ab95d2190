"""The linear layers around attention, fused, where there are kernels."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
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
    module: kernels that compute the functions.
    compute: dtype of the tokens.
    window: frames, rows and columns of a window, or None.
    pooling: the module's plan for norm_pool_project; None if it does not pool.
    attention: kernels that compute attend_add, or None.
  """

  module: Any
  compute: Compute
  window: Size | None
  pooling: Any = None
  attention: Any = None

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

  def norm_pool_project(
    self,
    x: Float[Array, 'b d h w c'],
    norm: Weights,
    layers: Sequence[Weights],
    pooling: Sequence[Weights],
  ) -> tuple[
    Float[Array, 'b d h w c'],
    list[Float[Array, 'n l c']],
    list[Float[Array, 'b _ _ _ c']],
  ]:
    """Returns x, the layers' outputs for norm(x), and levels pooled from it.

    Callers must continue with the returned x. The levels have the checkpoint
    name 'levels': they are small, and recomputing them reads all tokens.

    Args:
      x: tokens.
      norm: weights of the norm.
      layers: weights of the linear layers.
      pooling: kernel and bias of the pooling to each level.
    """
    kernels, biases = zip(*layers, strict=True)
    pooling_kernels, pooling_biases = zip(*pooling, strict=True)

    def run(x, *weights):
      x, outputs, sums = self.module.norm_pool_project(
        self.pooling, x, *weights
      )
      return x, [y.reshape(len(x), -1, y.shape[-1]) for y in outputs], sums

    with jax.named_scope('attn'):
      weights = *norm, kernels, biases, pooling_kernels
      operands = (x.astype(self.compute.dtype),)
      x, outputs, sums = run_per_device(run, operands, weights)
      levels = [
        checkpoint_name((level + bias).astype(self.compute.dtype), 'levels')
        for level, bias in zip(sums, pooling_biases, strict=True)
      ]
    return x, outputs, levels

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

  def attend_add(
    self,
    x: Float[Array, 'b d h w c'],
    qkv: Sequence[Float[Array, 'b _ c']],
    branch_scale: Float[Array, 'b'] | None,
    norm: Weights,
    query: Weights,
    layer: Weights,
  ) -> Float[Array, 'b d h w c']:
    """Returns x + branch_scale * layer(attention(*qkv)).

    Args:
      x: tokens.
      qkv: query(norm(x)), keys and values. The queries are computed again: they
        are never stored if this is their only use.
      branch_scale: factor of each clip, or None.
      norm: weights of the norm.
      query: weights of the linear layer of queries.
      layer: weights of the linear layer of the output.
    """
    if branch_scale is None:
      branch_scale = jnp.ones(len(x))
    with jax.named_scope('attn'):
      return run_per_device(
        self.attention.attend_add,
        (x, *qkv, branch_scale.astype(jnp.float32)),
        (norm, query, layer),
      )

  def _size(self) -> tuple[int, int] | None:
    return self.window and self.window[1:]

  def _tokens(self, x: Float[Array, 'b d h w c']) -> int:
    d, h, w = self.window or x.shape[1:4]
    return d * h * w


def find_projections(
  shape: Sequence[int],
  window: Size | None,
  compute: Compute,
  pooling: Sequence[Size] = (),
  num_heads: int = 0,
  num_keys: int = 0,
) -> FusedProjections | None:
  """Returns the functions, or None if there are no kernels.

  That depends on the platform, the dtype and the sizes.

  Args:
    shape: clips, frames, rows, columns and channels of x.
    window: frames, rows and columns of a window, or None.
    compute: dtype and selection of kernels.
    pooling: sizes of the pooling kernels of each level.
    num_heads: attention heads.
    num_keys: keys of a clip without windows.
  """
  find = compute.choose(no_kernel, gpu=_find_pallas)
  return find(shape, window, compute, tuple(pooling), num_heads, num_keys)


def _find_pallas(
  shape: Sequence[int],
  window: Size | None,
  compute: Compute,
  pooling: tuple[Size, ...],
  num_heads: int,
  num_keys: int,
) -> FusedProjections | None:
  """The kernels of projections_gpu, if they are used and fit."""
  module = hopper_kernels('projections_gpu', compute)
  batch, d, h, w, channels = shape
  clips = clips_per_device(batch)
  sizes = clips, (d, h, w), channels
  if module is None or not module.windows_gpu.fits(*sizes, window):
    return None
  plan = module.find_pooling(*sizes, pooling)
  attention = plan and hopper_kernels('short_attention_gpu', compute)
  sizes = clips, d * h * w, num_keys, channels, num_heads
  if attention and not attention.fits(*sizes):
    attention = None
  return FusedProjections(module, compute, window, plan, attention)
