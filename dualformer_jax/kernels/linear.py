"""Linear layers."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from dualformer_jax.kernels.dispatch import (
  Compute,
  device_count,
  matmul_precision,
)


def linear(
  x: Float[Array, '... i'],
  kernel: Float[Array, 'i o'],
  bias: Float[Array, 'o'],
  compute: Compute,
) -> Float[Array, '... o']:
  """Returns x @ kernel + bias in `compute.dtype`."""
  apply = compute.choose(reference, default=_default, cpu=_cpu)
  return apply(x.astype(compute.dtype), kernel, bias)


def reference(
  x: Float[Array, '... i'], kernel: Float[Array, 'i o'], bias: Float[Array, 'o']
) -> Float[Array, '... o']:
  """The plain implementation, with float32 sums."""
  y = jnp.dot(
    x,
    kernel.astype(x.dtype),
    precision=matmul_precision(x.dtype),
    preferred_element_type=jnp.float32,
  )
  return (y + bias).astype(x.dtype)


def _default(
  x: Float[Array, '... i'], kernel: Float[Array, 'i o'], bias: Float[Array, 'o']
) -> Float[Array, '... o']:
  """Products in x.dtype, so that the backward pass has no float32 operands."""
  precision = matmul_precision(x.dtype)
  y = jnp.dot(x, kernel.astype(x.dtype), precision=precision)
  return y + bias.astype(x.dtype)


def _cpu(
  x: Float[Array, '... i'], kernel: Float[Array, 'i o'], bias: Float[Array, 'o']
) -> Float[Array, '... o']:
  if device_count() > 1:  # The batch is sharded: keep its axis.
    return _default(x, kernel, bias)
  # With several token axes, XLA:CPU transposes dy for the kernel's gradient.
  tokens = x.reshape(-1, x.shape[-1])
  if x.dtype == jnp.bfloat16:
    y = (_bfloat16_dot(tokens, kernel) + bias).astype(x.dtype)
  else:
    y = _default(tokens, kernel, bias)
  return y.reshape(*x.shape[:-1], bias.size)


@jax.custom_vjp
def _bfloat16_dot(
  x: BFloat16[Array, 'n i'], kernel: Float[Array, 'i o']
) -> Float[Array, 'n o']:
  """A bfloat16 product in the form that XLA:CPU computes fast.

  It uses the CPU's bfloat16 instructions only with float32 sums, and only if
  the contracted axis is the last one of the first operand.
  """
  kernel = kernel.astype(x.dtype)
  return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _bfloat16_dot_fwd(x, kernel):
  return _bfloat16_dot(x, kernel), (x, kernel)


def _bfloat16_dot_bwd(residuals, dy):
  x, kernel = residuals
  dy = dy.astype(x.dtype)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dx = dot('no,io->ni', dy, kernel.astype(x.dtype)).astype(x.dtype)
  # Transpose the smaller operand, and then the result by a copy as well:
  # otherwise XLA swaps the operands.
  if x.shape[1] <= dy.shape[1]:
    dkernel = dot('in,no->io', _transpose(x), dy)
  else:
    dkernel = _transpose(dot('on,ni->oi', _transpose(dy), x))
  return dx, dkernel


_bfloat16_dot.defvjp(_bfloat16_dot_fwd, _bfloat16_dot_bwd)


def _transpose(x: Float[Array, 'n c']) -> Float[Array, 'c n']:
  """Returns a transposed copy; the barrier keeps XLA from removing it."""
  n, c = x.shape
  rows = math.gcd(n, 16)
  x = x.reshape(n // rows, rows, c).transpose(2, 0, 1)
  return jax.lax.optimization_barrier(x).reshape(c, n)
