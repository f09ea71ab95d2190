"""The device mesh and the rules that shard arrays over it.

Batches are sharded over `data` and `fsdp`. Parameters and optimizer state are
replicated along `data`, sharded along `fsdp` in their largest divisible
dimension (ZeRO, arXiv 1910.02054), and sharded along `tensor` by heads and
hidden channels (Megatron-LM, arXiv 1909.08053).
"""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from dualformer_jax.errors import UserError

AXES: tuple[str, ...] = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))

# (end of the name, dimension sharded along `tensor`); the first match counts.
_TENSOR_RULES = (
  (r'attn/(q|kv|qkv)/(kernel|bias)', -2),  # heads
  (r'attn/proj/kernel', 0),  # heads
  (r'mlp/fc1/(kernel|bias)', -1),  # hidden channels
  (r'mlp/fc2/kernel', 0),  # hidden channels
)
# Smaller arrays are replicated: gathering them costs more than it saves.
_MIN_FSDP_SIZE = 1024


def make_mesh(
  axes: Mapping[str, int],
  batch_size: int,
  accumulation_steps: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Returns a mesh of all devices of the run, or of `devices`.

  `axes` are the numbers of devices along each axis; one may be -1 for all
  remaining devices. Raises UserError if they do not multiply to the number of
  devices, or the batch does not divide evenly among them.
  """
  sizes = [axes[name] for name in AXES]
  given = ' x '.join(f'mesh.{n}={s}' for n, s in zip(AXES, sizes, strict=True))
  count = jax.device_count() if devices is None else len(devices)
  known = int(np.prod([size for size in sizes if size != -1]))
  sizes = [size if size != -1 else count // known for size in sizes]
  if np.prod(sizes) != count:
    raise UserError(
      f'{given} does not multiply to the number of devices, {count}; set one '
      'of them to -1 for all remaining devices'
    )
  parts = sizes[0] * sizes[1] * accumulation_steps
  if batch_size % parts:
    raise UserError(
      f'batch_size={batch_size} cannot be split over data x fsdp = '
      f'{sizes[0]} x {sizes[1]} devices and accumulation_steps='
      f'{accumulation_steps}; use a multiple of {parts}'
    )
  # jax.make_mesh does not split the physical axes of a TPU slice.
  placed = mesh_utils.create_device_mesh(
    sizes, devices, allow_split_physical_axes=True
  )
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(
  name: str, shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
  """Returns how an array of a model or an optimizer is sharded.

  Its name is a path such as 'backbone/blocks_0_0/attn/qkv/kernel'. Any prefix
  is allowed, so optimizer moments are sharded like their parameters.
  """
  axes: list[str | None] = [None] * len(shape)
  tensor, fsdp = mesh.shape['tensor'], mesh.shape['fsdp']
  for pattern, dimension in _TENSOR_RULES:
    if re.search(f'{pattern}$', name) and len(shape) >= abs(dimension):
      if tensor > 1 and shape[dimension] % tensor == 0:
        axes[dimension] = 'tensor'
      break
  if fsdp > 1 and np.prod(shape) >= _MIN_FSDP_SIZE:
    free = [
      i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0
    ]
    if free:
      axes[max(free, key=lambda i: shape[i])] = 'fsdp'
  return PartitionSpec(*axes)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns the NamedSharding of each array of a model or an optimizer."""

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def local_batch_indices(mesh: Mesh, batch_size: int) -> list[int]:
  """Returns the rows of a global batch that this process loads, in order.

  If `tensor` spans several processes, they load the same rows.
  """
  sharding = NamedSharding(mesh, BATCH)
  slices = sharding.addressable_devices_indices_map((batch_size,)).values()
  ranges = {index[0].indices(batch_size) for index in slices if index}
  return [i for bounds in sorted(ranges) for i in range(*bounds)]


def put_tree(tree: Any, shardings: Any) -> Any:
  """Shards arrays, of which each process has a full copy, over all devices.

  Arrays that have the wanted sharding already are returned unchanged.
  """

  def put(leaf, where):
    if getattr(leaf, 'sharding', None) == where:
      return leaf
    values = np.asarray(leaf)
    return jax.make_array_from_callback(
      values.shape, where, lambda index: values[index]
    )

  return jax.tree.map(put, tree, shardings)


def all_gather_params(mesh: Mesh) -> Callable[[Any], Any]:
  """Returns a function that gathers parameters along `fsdp`, for use in jit.

  Without it, XLA may shard activations like the parameters, which takes more
  memory and arithmetic. Gradients are sharded like the parameters.
  """
  if mesh.shape['fsdp'] == 1:
    return lambda tree: tree

  constrain = jax.lax.with_sharding_constraint

  def drop_fsdp(sharding: NamedSharding) -> NamedSharding:
    axes = (None if axis == 'fsdp' else axis for axis in sharding.spec)
    return NamedSharding(mesh, PartitionSpec(*axes))

  @jax.custom_vjp
  def gather(tree: Any) -> Any:
    return constrain(tree, jax.tree.map(drop_fsdp, tree_shardings(tree, mesh)))

  gather.defvjp(
    lambda tree: (gather(tree), None),
    lambda _, grads: (constrain(grads, tree_shardings(grads, mesh)),),
  )
  return gather


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """Returns the compiler options of training and evaluation steps.

  CPU: a lower optimization level, which compiles sooner and runs as fast, and
  the full width of AVX-512. TPU with `fsdp`: no windowed einsum, which hides
  few of the gathers of weights and reads the larger activations more often.
  """
  platform = mesh.devices.flat[0].platform
  if platform == 'cpu':
    return {
      'xla_backend_optimization_level': '1',
      'xla_cpu_prefer_vector_width': '512',
    }
  if mesh.shape['fsdp'] == 1 or platform != 'tpu':
    return {}
  # The minimum size of an operand, in MiB.
  return {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Returns the global batch on the mesh, from the local batch of each host."""
  sharding = NamedSharding(mesh, BATCH)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }
