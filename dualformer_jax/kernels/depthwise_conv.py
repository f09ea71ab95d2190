"""Depthwise 3x3x3 convolution, stride 1, zero padding of 1.

A sum of 27 shifted products: XLA's general depthwise 3D convolution is hundreds
of times slower on a CPU, and cuDNN's is three times slower on a GPU
(docs/performance.md).
"""

from collections.abc import Callable
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels.dispatch import (
  Compute,
  clips_per_device,
  hopper_kernels,
  run_per_device,
)

_OFFSETS = list(itertools.product(range(3), repeat=3))

# (x, kernel) -> y
_Convolve = Callable[..., Float[Array, 'b d h w c']]


def positional_conv(
  x: Float[Array, 'b d h w c'],
  kernel: Float[Array, '3 3 3 c'],
  bias: Float[Array, 'c'],
  compute: Compute,
) -> Float[Array, 'b d h w c']:
  """Returns x + conv(x) + bias in `compute.dtype`."""
  run = compute.choose(_composed, gpu=_gpu)
  return run(x.astype(compute.dtype), kernel, bias, compute)


def _composed(x, kernel, bias, compute):
  return x + (depthwise_conv(x, kernel, compute) + bias.astype(x.dtype))


def _gpu(x, kernel, bias, compute):
  """The kernels of depthwise_conv_gpu, if they are used and fit."""
  module = hopper_kernels('depthwise_conv_gpu', compute)
  if not (module and clips_per_device(len(x)) and module.fits(*x.shape[1:])):
    return _composed(x, kernel, bias, compute)
  return run_per_device(module.positional_conv, (x,), (kernel, bias))


def depthwise_conv(
  x: Float[Array, 'b d h w c'],
  kernel: Float[Array, '3 3 3 c'],
  compute: Compute,
) -> Float[Array, 'b d h w c']:
  """Convolves each channel with its own kernel, in `compute.dtype`."""
  convolve = compute.choose(reference, default=_fused, cpu=_cpu)
  return convolve(x.astype(compute.dtype), kernel)


def reference(
  x: Float[Array, 'b d h w c'], kernel: Float[Array, '3 3 3 c']
) -> Float[Array, 'b d h w c']:
  """The plain implementation."""
  padded, kernel = _pad(x), kernel.astype(x.dtype)
  y = jnp.zeros_like(x)
  for offset in _OFFSETS:
    y += _shifted(padded, offset, x.shape) * kernel[offset]
  return y


def _by_frame(
  x: Float[Array, 'b d h w c'], kernel: Float[Array, '3 3 3 c']
) -> Float[Array, 'b d h w c']:
  """One loop for each of three frames of the kernel.

  In a single loop, XLA:CPU makes 27 shifted copies first.
  """
  padded, kernel = _pad(x), kernel.astype(x.dtype)
  y = jnp.zeros_like(x)
  for offset in _OFFSETS:
    y += _shifted(padded, offset, x.shape) * kernel[offset]
    if offset[1:] == (2, 2):
      y = jax.lax.optimization_barrier(y)
  return y


def _kernel_gradient(
  x: Float[Array, 'b d h w c'], dy: Float[Array, 'b d h w c']
) -> Float[Array, '27 b c']:
  """27 sums in one pass over x and dy.

  Frames are summed last, because XLA:GPU takes a minute longer to compile a sum
  over all axes at once.
  """
  padded = _pad(x)
  sums = [
    jnp.sum(
      _shifted(padded, offset, x.shape) * dy, axis=(2, 3), dtype=jnp.float32
    )
    for offset in _OFFSETS
  ]
  return jnp.stack(sums).sum(2)


def _kernel_gradient_by_loops(
  x: Float[Array, 'b d h w c'], dy: Float[Array, 'b d h w c']
) -> Float[Array, '27 b c']:
  """Loops over frames and offsets; unrolled, XLA:CPU makes 27 copies of x."""
  b, d, h, w, c = x.shape
  padded = _pad(x)

  def add_frame(total, i):
    frames = jax.lax.dynamic_slice_in_dim(padded, i, 3, axis=1)
    dy_i = jax.lax.dynamic_index_in_dim(dy, i, axis=1, keepdims=False)

    def product(offset):
      size = (b, 1, h, w, c)
      x_i = jax.lax.dynamic_slice(frames, (0, *offset, 0), size)[:, 0]
      return jnp.sum(x_i * dy_i, axis=(1, 2), dtype=jnp.float32)

    return total + jax.lax.map(product, jnp.array(_OFFSETS)), None

  zeros = jnp.zeros((27, b, c), jnp.float32)
  return jax.lax.scan(add_frame, zeros, jnp.arange(d))[0]


def _with_gradient(
  convolve: _Convolve, kernel_gradient: Callable[..., Float[Array, '27 b c']]
) -> _Convolve:
  """Adds a backward pass; the automatic one saves all 27 shifted inputs."""

  def forward(x, kernel):
    return convolve(x, kernel), (x, kernel)

  def backward(residuals, dy):
    x, kernel = residuals
    # Summed over clips last: the batch may be sharded.
    dkernel = kernel_gradient(x, dy).sum(1).reshape(kernel.shape)
    dx = convolve(dy, kernel[::-1, ::-1, ::-1])
    return dx, dkernel.astype(kernel.dtype)

  function = jax.custom_vjp(convolve)
  function.defvjp(forward, backward)
  return function


_fused = _with_gradient(reference, _kernel_gradient)
_cpu = _with_gradient(_by_frame, _kernel_gradient_by_loops)


def _pad(x: Float[Array, 'b d h w c']) -> Float[Array, 'b pd ph pw c']:
  return jnp.pad(x, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])


def _shifted(
  padded: Float[Array, 'b pd ph pw c'],
  offset: tuple[int, ...],
  shape: tuple[int, ...],
) -> Float[Array, 'b d h w c']:
  """Returns the inputs that one of 27 weights is multiplied by."""
  (i, j, k), (_, d, h, w, _) = offset, shape
  return padded[:, i : i + d, j : j + h, k : k + w]
