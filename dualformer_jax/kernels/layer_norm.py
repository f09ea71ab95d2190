"""LayerNorm over channels."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels.dispatch import (
  Compute,
  batch_shards,
  hopper_kernels,
  run_per_device,
)

EPSILON = 1e-5


def layer_norm(
  x: Float[Array, '... c'],
  scale: Float[Array, 'c'],
  bias: Float[Array, 'c'],
  compute: Compute,
) -> Float[Array, '... c']:
  """Normalizes over channels in float32; returns `compute.dtype`."""
  run = compute.choose(
    functools.partial(_in_float32, reference),
    cpu=functools.partial(_in_float32, _cpu),
    gpu=_gpu,
  )
  return run(x, scale, bias, compute)


def _in_float32(normalize, x, scale, bias, compute):
  return normalize(x.astype(jnp.float32), scale, bias).astype(compute.dtype)


def _gpu(x, scale, bias, compute):
  """The kernels of layer_norm_gpu, if they are used and fit.

  The first axis of `x` is the batch: each device normalizes its clips.
  """
  module = hopper_kernels('layer_norm_gpu', compute)
  channels, shards = x.shape[-1], batch_shards()
  if not (
    module
    and x.dtype == compute.dtype
    and len(x) % shards == 0
    and module.fits(x.size // channels // shards, channels)
  ):
    return _in_float32(reference, x, scale, bias, compute)

  def run(x, scale, bias):
    y = module.layer_norm(x.reshape(-1, channels), scale, bias)
    return y.reshape(x.shape)

  return run_per_device(run, (x,), (scale, bias))


def reference(
  x: Float[Array, '... c'], scale: Float[Array, 'c'], bias: Float[Array, 'c']
) -> Float[Array, '... c']:
  """The plain implementation."""
  mean = x.mean(-1, keepdims=True)
  var = jnp.square(x - mean).mean(-1, keepdims=True)
  return (x - mean) * (jax.lax.rsqrt(var + EPSILON) * scale) + bias


def normalize(
  x: Float[Array, 'n c'],
) -> tuple[Float[Array, 'n c'], Float[Array, 'n 1']]:
  """Returns normalized rows and their inverse standard deviations."""
  centered = x - x.mean(-1, keepdims=True)
  variance = jnp.square(centered).mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + EPSILON)
  return centered * inverse, inverse


def normalize_backward(
  dy: Float[Array, 'n c'],
  normalized: Float[Array, 'n c'],
  inverse: Float[Array, 'n 1'],
) -> Float[Array, 'n c']:
  """Returns the gradient of the input of `normalize`."""
  mean = dy.mean(-1, keepdims=True)
  projection = (dy * normalized).mean(-1, keepdims=True)
  return inverse * (dy - mean - normalized * projection)


@jax.custom_vjp
def _cpu(
  x: Float[Array, '... c'], scale: Float[Array, 'c'], bias: Float[Array, 'c']
) -> Float[Array, '... c']:
  """LayerNorm whose backward pass sums over channels by matrix products.

  XLA:CPU writes the operands of a sum over channels, and arrays broadcast along
  channels, to memory; a product with a vector needs neither
  (docs/performance.md).
  """
  return reference(x, scale, bias)


def _cpu_fwd(x, scale, bias):
  return reference(x, scale, bias), (x, scale)


def _cpu_bwd(residuals, dy):
  x, scale = residuals
  channels = x.shape[-1]

  def dot(x, y):
    return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)[..., None]

  average = jnp.full(channels, 1 / channels)
  mean = dot(x, average)
  inverse = jax.lax.rsqrt(dot(jnp.square(x - mean), average) + EPSILON)
  normalized = (x - mean) * inverse
  product = dy * normalized
  mean_dy, mean_product = (dot(y, scale / channels) for y in (dy, product))
  dx = inverse * (dy * scale - mean_dy - normalized * mean_product)
  axes = tuple(range(x.ndim - 1))
  return dx, product.sum(axes), dy.sum(axes)


_cpu.defvjp(_cpu_fwd, _cpu_bwd)
