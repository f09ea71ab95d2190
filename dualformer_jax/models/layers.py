"""The layers that DualFormer is made of, with PyTorch's names and defaults."""

from collections.abc import Sequence
import functools
import itertools
import math

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float
import numpy as np

Size = tuple[int, int, int]

_LAYER_NORM_EPSILON = 1e-5


def platform() -> str:
  """Returns what is compiled for: 'cpu', 'gpu' or 'tpu'.

  The mesh is asked what its devices are, as they need not be this machine's:
  programs are also compiled ahead of time.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def matmul_precision(dtype: str | np.dtype) -> jax.lax.Precision:
  """Float32 means float32: no TF32 on GPUs, no bfloat16 passes on TPUs."""
  if jnp.dtype(dtype) == jnp.float32:
    return jax.lax.Precision.HIGHEST
  return jax.lax.Precision.DEFAULT


class LayerNorm(nn.Module):
  """LayerNorm over channels, epsilon 1e-5, computed in float32."""

  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, '... c']) -> Float[Array, '... c']:
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    normalize = _normalize_on_cpu if platform() == 'cpu' else _normalize
    x = normalize(x.astype(jnp.float32), scale, bias)
    return x.astype(self.dtype)


def _normalize(
  x: Float[Array, '... c'], scale: Float[Array, 'c'], bias: Float[Array, 'c']
) -> Float[Array, '... c']:
  mean = x.mean(-1, keepdims=True)
  var = jnp.square(x - mean).mean(-1, keepdims=True)
  return (x - mean) * (jax.lax.rsqrt(var + _LAYER_NORM_EPSILON) * scale) + bias


@jax.custom_vjp
def _normalize_on_cpu(
  x: Float[Array, '... c'], scale: Float[Array, 'c'], bias: Float[Array, 'c']
) -> Float[Array, '... c']:
  """LayerNorm with a derivative that passes less often over memory on a CPU.

  There, the compiler writes whatever a sum along channels is of, and what is
  repeated along them, to memory; a product with a vector takes neither.
  """
  return _normalize(x, scale, bias)


def _normalize_on_cpu_bwd(residuals, dy):
  x, scale = residuals
  channels = x.shape[-1]

  def dot(x, y):
    return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)[..., None]

  every = jnp.full(channels, 1 / channels)
  mean = dot(x, every)
  deviation = jax.lax.rsqrt(
    dot(jnp.square(x - mean), every) + _LAYER_NORM_EPSILON
  )
  normalized = (x - mean) * deviation
  product = dy * normalized
  # Of dy scale and of its product with what is normalised, the mean.
  first, second = (dot(y, scale / channels) for y in (dy, product))
  dx = deviation * (dy * scale - first - normalized * second)
  axes = tuple(range(x.ndim - 1))
  return dx, product.sum(axes), dy.sum(axes)


_normalize_on_cpu.defvjp(
  lambda x, scale, bias: (_normalize_on_cpu(x, scale, bias), (x, scale)),
  _normalize_on_cpu_bwd,
)


class Linear(nn.Module):
  """A linear layer of whose weights axes may be split, as into heads.

  Activations keep their channels on one axis, which is what devices lay out
  best; splitting the axes of weights is for those who name, cut or shard them.

  Weights start as a normal distribution of `std`, biases at zero. (The
  published code truncates at 100 standard deviations, which is never.)

  Attributes:
    features: size of the output axis or, in the weights, axes.
    dtype: what to compute in; parameters are float32.
    inputs: sizes of the input axes in the weights; by default one, the input's.
    std: standard deviation of the initial weights.
  """

  features: int | Sequence[int]
  dtype: str
  inputs: Sequence[int] | None = None
  std: float = 0.02

  @nn.compact
  def __call__(self, x: Float[Array, '... i']) -> Float[Array, '... o']:
    features = (
      (self.features,)
      if isinstance(self.features, int)
      else tuple(self.features)
    )
    shape = (*(self.inputs or x.shape[-1:]), *features)
    kernel = self.param('kernel', nn.initializers.normal(self.std), shape)
    bias = self.param('bias', nn.initializers.zeros, features)
    return _linear(x, kernel, bias, self.dtype)


class Projections(nn.Module):
  """Linear layers of one input whose weights are kept together, as qkv.

  To cut the weights is to move less than to cut what comes out.

  Attributes:
    features: sizes of the axes of weights; first, how many layers there are.
    dtype: as in Linear.
  """

  features: Sequence[int]
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, '... i']) -> list[Float[Array, '... o']]:
    shape = (x.shape[-1], *self.features)
    kernel = self.param('kernel', nn.initializers.normal(0.02), shape)
    bias = self.param('bias', nn.initializers.zeros, tuple(self.features))
    return [
      _linear(x, kernel[:, index], bias[index], self.dtype)
      for index in range(self.features[0])
    ]


def _linear(
  x: Float[Array, '... i'], kernel: Array, bias: Array, dtype: str
) -> Float[Array, '... o']:
  """Returns x kernel + bias; axes of inputs, and of outputs, are one each."""
  kernel, bias = kernel.reshape(x.shape[-1], -1), bias.reshape(-1)
  shape = *x.shape[:-1], bias.size
  x = x.astype(dtype)
  if platform() == 'cpu' and jax.sharding.get_abstract_mesh().size <= 1:
    # Otherwise the kernel's gradient would be made of a transposed copy.
    x = x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.bfloat16:
      return (_bfloat16_dot(x, kernel) + bias).astype(dtype).reshape(shape)
  y = jnp.dot(x, kernel.astype(dtype), precision=matmul_precision(dtype))
  return (y + bias.astype(dtype)).reshape(shape)


@jax.custom_vjp
def _bfloat16_dot(
  x: BFloat16[Array, 'n i'], kernel: Float[Array, 'i o']
) -> Float[Array, 'n o']:
  """A product in bfloat16, as XLA on a CPU is fast at it.

  Only with float32 sums does it use the CPU's instructions for bfloat16, and
  only if what is summed over comes last in the first factor.
  """
  kernel = kernel.astype(x.dtype)
  return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _bfloat16_dot_bwd(residuals, dy):
  x, kernel = residuals
  dy = dy.astype(x.dtype)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dx = dot('no,io->ni', dy, kernel.astype(x.dtype)).astype(x.dtype)
  # What is smaller is transposed, and then the result by a copy, too: XLA would
  # swap the factors instead.
  if x.shape[1] <= dy.shape[1]:
    dkernel = dot('in,no->io', _transpose(x), dy)
  else:
    dkernel = _transpose(dot('on,ni->oi', _transpose(dy), x))
  return dx, dkernel


_bfloat16_dot.defvjp(
  lambda x, kernel: (_bfloat16_dot(x, kernel), (x, kernel)), _bfloat16_dot_bwd
)


def _transpose(x: Float[Array, 'n c']) -> Float[Array, 'c n']:
  """A transposed copy, which XLA would leave out without the barrier."""
  n, c = x.shape
  rows = math.gcd(n, 16)
  x = x.reshape(n // rows, rows, c).transpose(2, 0, 1)
  return jax.lax.optimization_barrier(x).reshape(c, n)


def _conv_init(fan_in: int):
  """PyTorch's default for convolutions: uniform within 1 / sqrt(fan_in)."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class PatchEmbedding(nn.Module):
  """A convolution whose kernel is its stride, then LayerNorm.

  What a last, incomplete patch would hold is left out, as by a convolution
  without padding.
  """

  patch: Size
  features: int
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, 'b t y x i']) -> Float[Array, 'b d h w c']:
    x = _blocks(x, self.patch)
    x = rearrange(x, 'b d i h j w k c -> b d h w i j k c')
    x = PatchProjection(self.features, self.dtype, name='proj')(x)
    return LayerNorm(self.dtype, name='norm')(x)


class PatchProjection(nn.Module):
  """Linear from patches to features; initialised as a convolution is."""

  features: int
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b d h w i j k p']
  ) -> Float[Array, 'b d h w c']:
    init = _conv_init(math.prod(x.shape[4:]))
    kernel = self.param('kernel', init, (*x.shape[4:], self.features))
    bias = self.param('bias', init, (self.features,))
    return _linear(x.reshape(*x.shape[:4], -1), kernel, bias, self.dtype)


class DepthwisePooling(nn.Module):
  """A depthwise convolution whose kernel is its stride: a weighted block sum.

  Rows that do not fill a last block are left out, as by a convolution without
  padding.
  """

  kernel_size: Size
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b d h w c']
  ) -> Float[Array, 'b pd ph pw c']:
    channels = x.shape[-1]
    init = _conv_init(math.prod(self.kernel_size))
    kernel = self.param('kernel', init, (*self.kernel_size, channels))
    bias = self.param('bias', init, (channels,))
    dtype = jnp.dtype(self.dtype)
    x = _blocks(x, self.kernel_size).astype(dtype)
    # A copy for each clip, behind a barrier: so its gradient is summed over
    # tokens first. Otherwise devices would add up gradients as large as x.
    kernel = jnp.broadcast_to(kernel, (x.shape[0], *kernel.shape))
    kernel = jax.lax.optimization_barrier(kernel.astype(dtype))
    kernel = rearrange(kernel, 'b i j k c -> b 1 i 1 j 1 k c')
    # A sum of products in float32, which XLA fuses into one pass over x.
    x = jnp.sum(x * kernel, axis=(2, 4, 6), dtype=jnp.float32)
    return (x + bias).astype(dtype)


def _blocks(
  x: Float[Array, 'b t y x c'], size: Size
) -> Float[Array, 'b d i h j w k c']:
  """Splits into blocks of `size`, leaving out what does not fill one."""
  d, h, w = (n // s for n, s in zip(x.shape[1:4], size, strict=True))
  i, j, k = size
  x = x[:, : d * i, : h * j, : w * k]
  return x.reshape(x.shape[0], d, i, h, j, w, k, x.shape[-1])


class PositionalConvolution(nn.Module):
  """A depthwise 3x3x3 convolution, zero-padded, plus its input (PEG).

  A sum of 27 shifted products: XLA's general depthwise 3D convolution is
  hundreds of times slower on a CPU.
  """

  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, 'b d h w c']) -> Float[Array, 'b d h w c']:
    return x + DepthwiseConvolution(self.dtype, name='proj_0')(x)


class DepthwiseConvolution(nn.Module):
  """Depthwise 3x3x3 convolution, stride 1, zero padding of 1, with bias."""

  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, 'b d h w c']) -> Float[Array, 'b d h w c']:
    channels = x.shape[-1]
    init = _conv_init(27)
    kernel = self.param('kernel', init, (3, 3, 3, channels))
    bias = self.param('bias', init, (channels,))
    dtype = jnp.dtype(self.dtype)
    return depthwise_conv(x.astype(dtype), kernel) + bias.astype(dtype)


@jax.custom_vjp
def depthwise_conv(
  x: Float[Array, 'b d h w c'], kernel: Float[Array, '3 3 3 c']
) -> Float[Array, 'b d h w c']:
  """Depthwise 3x3x3 convolution, stride 1, zero padding of 1.

  Its own derivative, because the automatic one keeps all 27 shifted inputs.
  """
  d, h, w = x.shape[1:4]
  padded = _pad(x)
  kernel = kernel.astype(x.dtype)
  y = jnp.zeros_like(x)
  for i in range(3):
    for j, k in itertools.product(range(3), repeat=2):
      y += padded[:, i : i + d, j : j + h, k : k + w] * kernel[i, j, k]
    if platform() == 'cpu':
      # One pass for each of three frames. All in one, the compiler for CPUs
      # makes 27 shifted copies first; others read each token once.
      y = jax.lax.optimization_barrier(y)
  return y


def _pad(x: Float[Array, 'b d h w c']) -> Float[Array, 'b d+2 h+2 w+2 c']:
  return jnp.pad(x, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])


def _depthwise_conv_fwd(x, kernel):
  return depthwise_conv(x, kernel), (x, kernel)


def _depthwise_conv_bwd(residuals, dy):
  x, kernel = residuals
  b, d, h, w, c = x.shape
  padded = _pad(x)
  places = list(itertools.product(range(3), repeat=3))

  # Sums of each clip first: the batch may be spread over devices, which then
  # add up once.
  if platform() == 'cpu':

    def add_frame(total, i):
      """Adds what token frame i of dy gives to the kernel's gradient."""
      frames = jax.lax.dynamic_slice_in_dim(padded, i, 3, axis=1)
      dy_i = jax.lax.dynamic_index_in_dim(dy, i, axis=1, keepdims=False)

      def product(place):
        size = (b, 1, h, w, c)
        x_i = jax.lax.dynamic_slice(frames, (0, *place, 0), size)[:, 0]
        return jnp.sum(x_i * dy_i, axis=(1, 2), dtype=jnp.float32)

      return total + jax.lax.map(product, jnp.array(places)), None

    # As loops: one by one, the compiler makes 27 copies and 27 sums of them.
    zeros = jnp.zeros((27, b, c), jnp.float32)
    dkernel, _ = jax.lax.scan(add_frame, zeros, jnp.arange(d))
  else:
    # On TPUs, one pass over x and dy. Of all frames at once, the compiler for
    # GPUs would take a minute longer.
    sums = [
      jnp.sum(
        padded[:, i : i + d, j : j + h, k : k + w] * dy,
        axis=(2, 3),
        dtype=jnp.float32,
      )
      for i, j, k in places
    ]
    dkernel = jnp.stack(sums).sum(2)
  dkernel = dkernel.sum(1).reshape(kernel.shape)
  dx = depthwise_conv(dy, kernel[::-1, ::-1, ::-1])
  return dx, dkernel.astype(kernel.dtype)


depthwise_conv.defvjp(_depthwise_conv_fwd, _depthwise_conv_bwd)


class BatchNorm(nn.Module):
  """PyTorch's BatchNorm: the running variance takes the unbiased variance.

  Under one jitted program over a mesh the batch is the global one. Statistics
  are float32; `num_batches_tracked` is kept only to be written back.
  """

  dtype: str
  momentum: float = 0.9
  epsilon: float = 1e-5

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
        keep = self.momentum
        unbiased = var * (size / max(1, size - 1))
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * unbiased
        count.value += 1
    else:
      mean, var = running_mean.value, running_var.value
    x = (x - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias
    return x.astype(self.dtype)
