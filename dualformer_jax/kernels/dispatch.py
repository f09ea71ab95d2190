"""The rule that selects the implementation of an operation."""

from collections.abc import Callable, Sequence
import dataclasses
import importlib
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

T = TypeVar('T')
# Frames, rows and columns of a grid, a window or a pooling kernel.
Size = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Compute:
  """Compute dtype and kernel selection, shared by all layers of a model.

  Attributes:
    dtype: 'float32' or 'bfloat16', of activations and operands of products.
    kernels: 'auto' for the fastest implementations, 'experimental' also for
      those that have not been run on a device yet, or 'reference'.
  """

  dtype: str = 'float32'
  kernels: str = 'auto'

  def choose(self, reference: T, default: T | None = None, **variants: T) -> T:
    """Returns the implementation of an operation to use.

    That is the variant of the platform ('cpu', 'gpu', 'tpu'), if there is one,
    otherwise `default`, or `reference`, the plain one. Whether a variant
    supports a dtype, a chip or sizes is decided in the operation's module.
    """
    if self.kernels == 'reference':
      return reference
    default = reference if default is None else default
    return variants.get(platform(), default)


def no_kernel(*_: Any) -> None:
  """Returns None: a platform without a kernel runs separate operations."""


def platform() -> str:
  """Returns the target platform: 'cpu', 'gpu' or 'tpu'.

  It is that of the current mesh, if there is one, because programs are also
  compiled ahead of time for devices of other machines.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def device_count() -> int:
  """Returns the number of devices of the current mesh, 1 without a mesh."""
  return max(1, jax.sharding.get_abstract_mesh().size)


def device_kind() -> str:
  """Returns the kind of the target devices, such as 'TPU v5 lite'."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else jax.devices()[0].device_kind


def batch_shards() -> int:
  """Returns the number of parts of a batch.

  Devices along `tensor` share one part.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return device_count() // mesh.shape.get('tensor', 1)


def clips_per_device(batch: int) -> int:
  """Returns the number of clips of each device.

  It is 0 if devices share clips or the batch does not divide evenly.
  """
  shards = batch_shards()
  return 0 if shards < device_count() or batch % shards else batch // shards


def run_per_device(
  function: Callable[..., Any], by_clip: Sequence[Any], shared: Sequence[Any]
) -> Any:
  """Calls function(*by_clip, *shared) on each device, for its clips.

  XLA cannot partition a custom kernel. Devices along `tensor` do the same.

  Args:
    function: returns arrays whose first axis is clips.
    by_clip: arrays, or tuples of arrays, whose first axis is clips.
    shared: weights.
  """
  if device_count() > 1:
    axes = jax.sharding.get_abstract_mesh().axis_names
    clips = jax.P(tuple(axis for axis in axes if axis != 'tensor'))
    specs = [clips] * len(by_clip) + [jax.P()] * len(shared)
    function = jax.shard_map(
      function, in_specs=tuple(specs), out_specs=clips, check_vma=False
    )
  return function(*by_clip, *shared)


def parameters_are_replicated() -> bool:
  """Returns whether each device has all parameters, and the optimizer state."""
  shape = jax.sharding.get_abstract_mesh().shape
  return shape.get('fsdp', 1) == shape.get('tensor', 1) == 1


def run_replicated(function: Callable[..., Any], *trees: Any) -> Any:
  """Calls function(*trees) on each device, with whole arrays."""
  if device_count() > 1:
    function = jax.shard_map(
      function, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
    )
  return function(*trees)


def hopper_kernels(name: str, compute: Compute) -> Any:
  """Returns a module of this package with kernels for Hopper GPUs, or None.

  It is used on an NVIDIA H100, H200 or a relative, in bfloat16, if
  `compute.kernels` is 'experimental'.
  """
  is_hopper = re.search(r'\bG?H[128]00\b|\bH20\b', device_kind())
  is_used = compute.kernels == 'experimental' and compute.dtype == 'bfloat16'
  if not (is_used and is_hopper):
    return None
  # Pallas for GPUs is experimental: another version may have no such kernels.
  try:
    return importlib.import_module(f'dualformer_jax.kernels.{name}')
  except (ImportError, AttributeError):
    return None


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
  """Returns the precision of matrix products of a dtype.

  Float32 products use full float32 precision: no TF32 on GPUs, no
  bfloat16 passes on TPUs.
  """
  is_float32 = jnp.dtype(dtype) == jnp.float32
  return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT
