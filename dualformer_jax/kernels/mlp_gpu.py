"""The MLP branch as Pallas kernels for Hopper GPUs.

With r = rsqrt(var + epsilon), LayerNorm is folded into the first product,

  norm(x) w1 + b1 = r (x w1' - mean sum(w1')) + b1',

with w1' = norm_scale w1 and b1' = b1 + norm_bias w1, so that tensor cores read
x itself from shared memory. Kernels read their tokens once from memory:

- `mlp_gpu_tokens.forward`: a program has a few tokens.
- `mlp_gpu_tokens.input_gradient`: the same, for the gradient of x. It
  recomputes the hidden activations.
- `mlp_gpu_weights.weight_gradients`: a program has 64 hidden channels. It
  recomputes the hidden activations once more, which takes no memory.

From 384 channels on, the gradients of the weights of 64 hidden channels do not
fit into the registers of a warpgroup, and programs with a part of the channels
would each recompute everything and read all tokens from the L2 cache: 6.6 GB
for 25,088 tokens of 512 channels, and 2.5 times the arithmetic, at least 1.2 ms
on an H200 (5.5 TB/s). There, `input_gradient` stores the hidden activations and
their gradient, and XLA multiplies them: 0.4 GB of memory traffic, 0.11 ms.
"""

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import mlp_gpu_tokens, mlp_gpu_weights


def fits(batch: int, tokens: int, channels: int, hidden: int) -> bool:
  """Returns whether `mlp` supports these sizes.

  Args:
    batch: clips of a device; 0 if devices share clips.
    tokens: tokens of a clip.
    channels: channels of the tokens.
    hidden: channels of the hidden layer.
  """
  return (
    batch > 0
    and channels in mlp_gpu_tokens.TILINGS
    and batch * tokens % mlp_gpu_tokens.TILINGS[channels].rows == 0
    and hidden % mlp_gpu_weights.BLOCK == 0
  )


@jax.custom_vjp
def mlp(
  x: Float[Array, 'b n c'],
  branch_scale: Float[Array, 'b'],
  norm_scale: Float[Array, 'c'],
  norm_bias: Float[Array, 'c'],
  w1: Float[Array, 'c i'],
  b1: Float[Array, 'i'],
  w2: Float[Array, 'i c'],
  b2: Float[Array, 'c'],
) -> Float[Array, 'b n c']:
  """Returns x + branch_scale * (gelu(norm(x) @ w1 + b1) @ w2 + b2).

  `branch_scale` has no gradient.
  """
  weights = norm_scale, norm_bias, w1, b1, w2, b2
  return _mlp_fwd(x, branch_scale, *weights)[0]


def _mlp_fwd(x, branch_scale, norm_scale, norm_bias, w1, b1, w2, b2):
  # What is saved would take launches again in the backward pass.
  scale = jnp.repeat(branch_scale, x.shape[1])  # of each token
  scale = checkpoint_name(scale, 'prepared')
  folded = _fold(norm_scale, norm_bias, w1, b1, w2, x.dtype)
  folded = checkpoint_name(folded, 'prepared')
  rows = x.reshape(-1, x.shape[-1])
  out = mlp_gpu_tokens.forward(rows, scale, *folded, b2)
  return out.reshape(x.shape), (x, scale, norm_scale, norm_bias, w1, folded)


def _mlp_bwd(residuals, dout):
  x, scale, norm_scale, norm_bias, w1, folded = residuals
  rows = x.reshape(-1, x.shape[-1])
  dout = dout.reshape(rows.shape)
  kernel, sums, bias, w2 = folded
  dx, db2, rest = mlp_gpu_tokens.input_gradient(rows, dout, scale, *folded)
  if mlp_gpu_tokens.TILINGS[x.shape[-1]].warpgroups == 1:
    dw1, dw2, db1, dmean = mlp_gpu_weights.weight_gradients(
      rows, dout, scale, *rest, kernel.T, sums, bias, w2
    )
    dw1 = dw1.T
  else:
    hidden, dhidden, db1, dmean = rest
    dw1, dw2 = _product(rows, dhidden), _product(hidden, dout)
  # The gradient of the product of normalized tokens and w1.
  dw1 -= dmean
  return (
    dx.reshape(x.shape),
    None,
    jnp.sum(w1 * dw1, axis=1),
    jnp.sum(w1 * db1, axis=1),
    norm_scale[:, None] * dw1 + norm_bias[:, None] * db1,
    db1,
    dw2,
    db2,
  )


mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _product(x, dy):
  """Returns the gradient of a kernel [i, o], from [n, i] and [n, o]."""
  return jnp.einsum('ni,no->io', x, dy, preferred_element_type=jnp.float32)


def _fold(norm_scale, norm_bias, w1, b1, w2, dtype):
  """Returns w1' in `dtype`, the sums of its columns, b1', and w2 in `dtype`."""
  kernel = (norm_scale[:, None] * w1).astype(dtype)
  sums = jnp.sum(kernel, axis=0, dtype=jnp.float32)
  bias = b1 + jnp.sum(norm_bias[:, None] * w1, axis=0)
  return kernel, sums, bias, w2.astype(dtype)
