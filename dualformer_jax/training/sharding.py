"""Where arrays lie on a mesh of devices: rules from names to axes.

The mesh has three axes. Batches are spread over `data` and `fsdp`. Parameters
and optimiser state are copied along `data`, spread along `fsdp` by their
largest divisible dimension, and spread along `tensor` by heads and by hidden
channels (as in Megatron-LM, 1909.08053).
"""

from collections.abc import Callable, Mapping, Sequence
import ctypes
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from dualformer_jax.errors import UserError

AXES: tuple[str, ...] = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))

# (end of the name, dimension that `tensor` splits); the first match counts.
_TENSOR_RULES = (
  (r'attn/(q|kv|qkv)/(kernel|bias)', -2),  # heads
  (r'attn/proj/kernel', 0),  # heads
  (r'mlp/fc1/(kernel|bias)', -1),  # hidden channels
  (r'mlp/fc2/kernel', 0),  # hidden channels
)
# Smaller arrays are copied: gathering them would cost more than it saves.
_MIN_FSDP_SIZE = 1024


def make_mesh(
  axes: Mapping[str, int],
  batch_size: int,
  accumulation_steps: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Returns a mesh of all devices.

  Args:
    axes: devices along 'data', 'fsdp' and 'tensor'; -1 for what is left.
    batch_size: clips of a step, over all devices.
    accumulation_steps: passes that a batch is split into.
    devices: others than those that there are, to compile for.

  Raises:
    UserError: the axes do not multiply to the number of devices, or the batch
      cannot be split over them.
  """
  sizes = [axes[name] for name in AXES]
  given = ' x '.join(f'mesh.{n}={s}' for n, s in zip(AXES, sizes, strict=True))
  count = jax.device_count() if devices is None else len(devices)
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(
      f'{given}: expected sizes of at least 1, and at most one -1'
    )
  known = int(np.prod([size for size in sizes if size != -1]))
  sizes = [size if size != -1 else count // known for size in sizes]
  if np.prod(sizes) != count:
    raise UserError(
      f'{given} does not make the {count} devices that there are; set one '
      'of them to -1 to use what is left'
    )
  parts = sizes[0] * sizes[1] * accumulation_steps
  if batch_size % parts:
    raise UserError(
      f'batch_size={batch_size} cannot be split over data x fsdp = '
      f'{sizes[0]} x {sizes[1]} devices and accumulation_steps='
      f'{accumulation_steps}; use a multiple of {parts}'
    )
  # jax.make_mesh refuses axes that are no whole axes of most TPU slices.
  placed = mesh_utils.create_device_mesh(
    sizes, devices, allow_split_physical_axes=True
  )
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(
  name: str, shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
  """Returns the axes along which an array of a model or optimiser is spread.

  Args:
    name: its path, such as 'backbone/blocks_0_0/attn/qkv/kernel'; what stands
      before does not matter, so the optimiser's moments lie as parameters do.
    shape: its shape.
    mesh: a mesh with the axes of `make_mesh`.
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
  """Returns a NamedSharding for each array of a tree of a model or optimiser.

  Args:
    tree: arrays, or anything with shapes, such as jax.eval_shape gives.
    mesh: a mesh with the axes of `make_mesh`.
  """

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def host_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """Returns the rows of a global batch that this host's devices hold, in order.

  Where `tensor` reaches over hosts, several hosts hold the same rows.
  """
  where = NamedSharding(mesh, BATCH)
  held = where.addressable_devices_indices_map((batch_size,))
  parts = {index[0].indices(batch_size) for index in held.values() if index}
  return [row for part in sorted(parts) for row in range(*part)]


def put_tree(tree: Any, shardings: Any) -> Any:
  """Returns arrays of which each host has all, on devices of all hosts.

  Args:
    tree: arrays, the same on each host; those that lie there already may be
      spread.
    shardings: where each of them is to lie.
  """

  def put(leaf, where):
    if getattr(leaf, 'sharding', None) == where:
      return leaf
    values = np.asarray(leaf)
    return jax.make_array_from_callback(
      values.shape, where, lambda index: values[index]
    )

  return jax.tree.map(put, tree, shardings)


def gather_for_use(mesh: Mesh) -> Callable[[Any], Any]:
  """Returns what makes parameters whole along `fsdp`, inside a jitted function.

  They are stored in parts and computed with whole; without this XLA may as well
  spread activations by the parts of a parameter, which takes more memory and
  more arithmetic. Their gradients are spread again as they come, so that each
  device adds up its own part alone (as in ZeRO, 1910.02054).
  """
  if mesh.shape['fsdp'] == 1:
    return lambda tree: tree

  def constrain(tree: Any, is_whole: bool) -> Any:
    def place(leaf: Any, where: NamedSharding) -> Any:
      axes = [
        None if is_whole and axis == 'fsdp' else axis for axis in where.spec
      ]
      where = NamedSharding(mesh, PartitionSpec(*axes))
      return jax.lax.with_sharding_constraint(leaf, where)

    return jax.tree.map(place, tree, tree_shardings(tree, mesh))

  @jax.custom_vjp
  def gather(tree: Any) -> Any:
    return constrain(tree, is_whole=True)

  gather.defvjp(
    lambda tree: (gather(tree), None),
    lambda _, gradients: (constrain(gradients, is_whole=False),),
  )
  return gather


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """Returns what to tell the compiler of training and evaluation steps.

  That of CPUs is told to optimise less: what takes the time is fused before, or
  in libraries, so that it compiles sooner and is as fast. And to use vectors as
  wide as those of AVX-512, where there are; by default it takes half.

  That of TPUs would, along `fsdp`, mix gathers of weights, and sums of their
  gradients, with the products that they are for, piece by piece ("windowed
  einsum"), so as to hide them. Weights here are small beside activations: it
  hides little, does a quarter more arithmetic and moves activations once for
  each piece.
  """
  platform = mesh.devices.flat[0].platform
  if platform == 'cpu':
    return {
      'xla_backend_optimization_level': '1',
      'xla_cpu_prefer_vector_width': '512',
    }
  if mesh.shape['fsdp'] == 1 or platform != 'tpu':
    return {}
  # In MiB: what is smaller is done as written.
  return {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}


def keep_memory() -> None:
  """On CPUs, lets a step take the memory that the one before has used.

  For what it computes between, XLA asks for memory anew at each step, gigabytes
  at once, which glibc has from the system and gives back: each page is then
  given, cleared and mapped again, a fifth of a step of training. Here glibc
  keeps what it has once had, so that the process stays as large as it ever was.
  It does so only in the main thread, so that JAX has to compute in the thread
  that calls it.

  To be called before JAX computes anything. Without glibc it does nothing, and
  where JAX computes on other devices, nothing to memory.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
    return
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  if jax.default_backend() == 'cpu':
    # The numbers are those of malloc.h.
    mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too,
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never becomes smaller


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Returns a global batch on the mesh, of which each host gives host_rows."""
  sharding = NamedSharding(mesh, BATCH)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }
