"""The layers of DualFormer, initialized as in the published implementation."""

from collections.abc import Sequence
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels.depthwise_conv import positional_conv
from dualformer_jax.kernels.dispatch import Compute, Size
from dualformer_jax.kernels.layer_norm import EPSILON, layer_norm
from dualformer_jax.kernels.linear import linear
from dualformer_jax.kernels.mlp import Weights
from dualformer_jax.kernels.patches import patch_linear
from dualformer_jax.kernels.pooling import pool


class LayerNorm(nn.Module):
  """LayerNorm over channels, epsilon 1e-5, computed in float32."""

  compute: Compute

  @nn.compact
  def weights(self, shape: Sequence[int]) -> Weights:
    """Returns scale and bias, for an input of this shape."""
    channels = shape[-1:]
    scale = self.param('scale', nn.initializers.ones, channels)
    return scale, self.param('bias', nn.initializers.zeros, channels)

  def __call__(self, x: Float[Array, '... c']) -> Float[Array, '... c']:
    return layer_norm(x, *self.weights(x.shape), self.compute)


class Linear(nn.Module):
  """A linear layer whose weights may have several input or output axes.

  Weights are split into heads, for example, so that they can be named, sliced
  and sharded by head. Activations keep all channels on one axis, which is the
  best layout on all platforms. Initial weights are normal, biases zero.
  """

  features: int | Sequence[int]
  compute: Compute
  inputs: Sequence[int] | None = None
  std: float = 0.02

  @nn.compact
  def weights(self, shape: Sequence[int]) -> Weights:
    """Returns kernel [i, o] and bias [o], for an input of this shape."""
    features = self.features
    features = (features,) if isinstance(features, int) else tuple(features)
    inputs = self.inputs or shape[-1:]
    init = nn.initializers.normal(self.std)
    kernel = self.param('kernel', init, (*inputs, *features))
    bias = self.param('bias', nn.initializers.zeros, features)
    return kernel.reshape(shape[-1], -1), bias.reshape(-1)

  def __call__(self, x: Float[Array, '... i']) -> Float[Array, '... o']:
    return linear(x, *self.weights(x.shape), self.compute)


class Projections(nn.Module):
  """Linear layers of the same input whose weights are one array, as qkv.

  The first of `features` is the number of layers. Slicing the weights costs
  less than slicing the output.
  """

  features: Sequence[int]
  compute: Compute

  @nn.compact
  def weights(self, shape: Sequence[int]) -> list[Weights]:
    """Returns kernel [i, o] and bias [o] of each layer for this input shape."""
    channels = shape[-1]
    init = nn.initializers.normal(0.02)
    kernel = self.param('kernel', init, (channels, *self.features))
    bias = self.param('bias', nn.initializers.zeros, tuple(self.features))
    return [
      (kernel[:, index].reshape(channels, -1), bias[index].reshape(-1))
      for index in range(self.features[0])
    ]

  def __call__(self, x: Float[Array, '... i']) -> list[Float[Array, '... o']]:
    return [linear(x, *w, self.compute) for w in self.weights(x.shape)]


class Mlp(nn.Module):
  """Linear to four times the channels, exact GELU, linear back."""

  compute: Compute

  @nn.compact
  def weights(self, shape: Sequence[int]) -> tuple[Weights, Weights]:
    """Returns the weights of both layers, for an input of this shape."""
    *tokens, channels = shape
    hidden = 4 * channels
    fc1 = Linear(hidden, self.compute, name='fc1').weights(shape)
    fc2 = Linear(channels, self.compute, name='fc2').weights((*tokens, hidden))
    return fc1, fc2


def _conv_params(
  module: nn.Module, *shape: int
) -> tuple[Float[Array, '...'], Float[Array, 'c']]:
  """Adds kernel and bias, uniform within 1 / sqrt(fan_in) as in PyTorch."""
  bound = math.prod(shape[:-1]) ** -0.5
  init = functools.partial(
    jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound
  )
  kernel = module.param('kernel', init, shape)
  return kernel, module.param('bias', init, shape[-1:])


class PatchEmbedding(nn.Module):
  """A convolution with stride = kernel size, then LayerNorm."""

  patch: Size
  features: int
  compute: Compute

  @nn.compact
  def __call__(self, x: Float[Array, 'b t y x i']) -> Float[Array, 'b d h w c']:
    x = PatchProjection(self.patch, self.features, self.compute, name='proj')(x)
    return LayerNorm(self.compute, name='norm')(x)


class PatchProjection(nn.Module):
  """A linear layer of patches, initialized like a convolution."""

  patch: Size
  features: int
  compute: Compute

  @nn.compact
  def __call__(self, x: Float[Array, 'b t y x p']) -> Float[Array, 'b d h w c']:
    shape = (*self.patch, x.shape[-1], self.features)
    return patch_linear(x, *_conv_params(self, *shape), self.compute)


class DepthwisePooling(nn.Module):
  """A depthwise convolution with stride = kernel size."""

  kernel_size: Size
  compute: Compute

  @nn.compact
  def weights(self, shape: Sequence[int]) -> Weights:
    """Returns kernel [i, j, k, c] and bias [c], for an output of this shape."""
    return _conv_params(self, *self.kernel_size, shape[-1])

  def __call__(self, x: Float[Array, 'b t y x c']) -> Float[Array, 'b d h w c']:
    return pool(x, *self.weights(self.output_shape(x.shape)), self.compute)

  def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the output for an input of this shape."""
    batch, *grid, channels = shape
    pairs = zip(grid, self.kernel_size, strict=True)
    return batch, *(n // k for n, k in pairs), channels


class PositionalConvolution(nn.Module):
  """A depthwise 3x3x3 convolution, zero-padded, plus its input (PEG)."""

  compute: Compute

  @nn.compact
  def __call__(self, x: Float[Array, 'b d h w c']) -> Float[Array, 'b d h w c']:
    kernel, bias = DepthwiseConvolution(name='proj_0').weights(x.shape)
    return positional_conv(x, kernel, bias, self.compute)


class DepthwiseConvolution(nn.Module):
  """Weights of a depthwise 3x3x3 convolution."""

  @nn.compact
  def weights(self, shape: Sequence[int]) -> Weights:
    """Returns kernel [3, 3, 3, c] and bias [c], for an input of this shape."""
    return _conv_params(self, 3, 3, 3, shape[-1])


class BatchNorm(nn.Module):
  """BatchNorm with PyTorch's running statistics, computed in float32.

  The running variance is unbiased. Statistics are those of the global batch.
  `num_batches_tracked` is kept for conversion to PyTorch.
  """

  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b d h w c'], train: bool
  ) -> Float[Array, 'b d h w c']:
    channels = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, channels)
    running_var = self.variable('batch_stats', 'var', jnp.ones, channels)
    count = self.variable(
      'batch_stats', 'num_batches_tracked', jnp.zeros, (), jnp.int32
    )
    x = x.astype(jnp.float32)
    if train:
      axes = tuple(range(x.ndim - 1))
      mean, var = x.mean(axes), x.var(axes)
      if not self.is_initializing():
        size = x.size // channels
        keep = 0.9
        unbiased = var * (size / max(1, size - 1))
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * unbiased
        count.value += 1
    else:
      mean, var = running_mean.value, running_var.value
    x = (x - mean) * (scale * jax.lax.rsqrt(var + EPSILON)) + bias
    return x.astype(self.dtype)
