"""The MLP branch of a block: x + scale * mlp(norm(x)) as one operation."""

import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels.dispatch import (
  Compute,
  clips_per_device,
  hopper_kernels,
  run_per_device,
)
from dualformer_jax.kernels.layer_norm import layer_norm
from dualformer_jax.kernels.linear import linear

# Scale or kernel, and bias.
Weights = tuple[Float[Array, '...'], Float[Array, '...']]


def mlp_branch(
  x: Float[Array, 'b d h w c'],
  branch_scale: Float[Array, 'b'] | None,
  norm: Weights,
  fc1: Weights,
  fc2: Weights,
  compute: Compute,
) -> Float[Array, 'b d h w c']:
  """Returns x + branch_scale * fc2(gelu(fc1(norm(x)))) in `compute.dtype`.

  Args:
    x: tokens.
    branch_scale: factor of each clip (drop path), without gradient, or None.
    norm: scale [c] and bias [c] of LayerNorm.
    fc1: kernel [c, i] and bias [i] of the first linear layer.
    fc2: kernel [i, c] and bias [c] of the second linear layer.
    compute: dtype and selection of kernels.
  """
  run = compute.choose(composed, gpu=_gpu, tpu=_tpu)
  return run(x, branch_scale, norm, fc1, fc2, compute)


def _tpu(x, branch_scale, norm, fc1, fc2, compute):
  """The kernels of mlp_tpu, for bfloat16."""
  if compute.dtype != 'bfloat16':
    return composed(x, branch_scale, norm, fc1, fc2, compute)
  from dualformer_jax.kernels import mlp_tpu

  return _fused(mlp_tpu, x, branch_scale, norm, fc1, fc2, compute)


def composed(
  x: Float[Array, 'b d h w c'],
  branch_scale: Float[Array, 'b'] | None,
  norm: Weights,
  fc1: Weights,
  fc2: Weights,
  compute: Compute,
) -> Float[Array, 'b d h w c']:
  """One operation after the other, each with its own kernels.

  Scopes are the names of the modules that own the weights.
  """
  with jax.named_scope('norm2'):
    y = layer_norm(x, *norm, compute)
  with jax.named_scope('mlp'):
    with jax.named_scope('fc1'):
      y = linear(y, *fc1, compute)
    y = gelu(checkpoint_name(y, 'hidden'))
    with jax.named_scope('fc2'):
      y = linear(y, *fc2, compute)
  return add_branch(x, branch_scale, y)


def _gpu(x, branch_scale, norm, fc1, fc2, compute):
  """The kernels of mlp_gpu, if they are used."""
  module = hopper_kernels('mlp_gpu', compute)
  if module is None:
    return composed(x, branch_scale, norm, fc1, fc2, compute)
  return _fused(module, x, branch_scale, norm, fc1, fc2, compute)


def _fused(module, x, branch_scale, norm, fc1, fc2, compute):
  """Runs `module.mlp` on each device for its clips, if it fits."""
  sizes = math.prod(x.shape[1:4]), *fc1[0].shape
  if not module.fits(clips_per_device(len(x)), *sizes):
    return composed(x, branch_scale, norm, fc1, fc2, compute)
  if branch_scale is None:
    branch_scale = jnp.ones(len(x))

  def run(x, *operands):
    tokens = x.astype(compute.dtype).reshape(len(x), -1, x.shape[-1])
    return module.mlp(tokens, *operands).reshape(x.shape)

  operands = x, branch_scale.astype(jnp.float32)
  with jax.named_scope('mlp'):
    return run_per_device(run, operands, (*norm, *fc1, *fc2))


def add_branch(
  x: Float[Array, 'b d h w c'],
  branch_scale: Float[Array, 'b'] | None,
  y: Float[Array, 'b d h w c'],
) -> Float[Array, 'b d h w c']:
  """Returns x + branch_scale * y, or x + y if `branch_scale` is None."""
  if branch_scale is None:
    return x + y
  return x + y * branch_scale.astype(y.dtype)[:, None, None, None, None]


def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
  """The exact GELU, in float32: bfloat16 has too few digits for constants."""
  y = x.astype(jnp.float32)
  return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)
