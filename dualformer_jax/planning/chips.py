"""Published numbers of accelerators, and devices to compile for."""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
from typing import Any

from dualformer_jax.errors import UserError, missing_extra, require


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures: FLOP/s in bfloat16, bytes, bytes/s of memory and links.

  Attributes:
    link: Bytes/s that a chip sends along one mesh axis. On TPUs, in both
      directions of a ring.
    network: The same between machines, where it is slower.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  link: float
  network: float | None = None


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, "System architecture";
# links: jax-ml.github.io/scaling-book/tpus, "TPU specs". GPUs: NVIDIA's data
# sheets of the SXM modules (NVLink 3, 4 and 5, one direction; between machines
# InfiniBand of 200 and 400 Gbit/s per GPU).
_GIB = 2**30
CHIPS = {
  'v4': Chip('TPU v4', 275e12, 32 * _GIB, 1.2e12, 9e10),
  'v5e': Chip('TPU v5e', 197e12, 16 * _GIB, 0.82e12, 9e10),
  'v5p': Chip('TPU v5p', 459e12, 95 * _GIB, 2.77e12, 18e10),
  'v6e': Chip('TPU v6e', 918e12, 32 * _GIB, 1.64e12, 18e10),
  'a100': Chip('NVIDIA A100', 312e12, 80e9, 2.04e12, 3e11, 2.5e10),
  'h100': Chip('NVIDIA H100', 989e12, 80e9, 3.35e12, 4.5e11, 5e10),
  'h200': Chip('NVIDIA H200', 989e12, 141e9, 4.8e12, 4.5e11, 5e10),
  'b200': Chip('NVIDIA B200', 2250e12, 180e9, 8e12, 9e11, 5e10),
}
GPUS_PER_MACHINE = 8


@dataclasses.dataclass(frozen=True)
class _GpuArchitecture:
  """What XLA's compiler must know of a GPU; sizes in bytes.

  From NVIDIA's architecture white papers, and the CUDA programming guide,
  "Compute Capabilities".
  """

  capability: int  # major version of the compute capability
  multiprocessors: int
  lanes: int  # float32 lanes of a multiprocessor
  shared_memory: int  # of a multiprocessor; a block can have 1 KiB less
  l2_cache: int
  clock_ghz: float


_HOPPER = _GpuArchitecture(9, 132, 128, 228 * 2**10, 50 * 2**20, 1.98)
_ARCHITECTURES = {
  'a100': _GpuArchitecture(8, 108, 64, 164 * 2**10, 40 * 2**20, 1.41),
  'h100': _HOPPER,
  'h200': _HOPPER,
  'b200': _GpuArchitecture(10, 148, 128, 228 * 2**10, 126 * 2**20, 1.965),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """JAX devices to compile for, which need not be attached."""

  chip: Chip
  devices: Sequence[Any]

  @property
  def link(self) -> float:
    """Bytes/s that a device sends to others."""
    if self.chip.network and len(self.devices) > GPUS_PER_MACHINE:
      return self.chip.network
    return self.chip.link


def check_topology(topology: str) -> tuple[str, str]:
  """Returns the chip of a topology, and the shape of the slice or a number.

  It does not import JAX, which takes a second.

  Raises:
    UserError: The devices do not exist, or their compiler is not installed.
  """
  name, _, shape = topology.partition(':')
  if name not in CHIPS or not shape:
    raise UserError(
      f'--topology={topology}: expected a TPU (v4, v5e, v5p or v6e) and the '
      'shape of the slice in chips, such as v5e:4x4 or v5p:2x2x4; or a GPU '
      '(a100, h100, h200 or b200) and their number, such as h100:8'
    )
  if name not in _ARCHITECTURES:
    require('planning for TPUs', 'plan', 'libtpu')
    return name, shape
  number = int(shape) if shape.isdecimal() else 0
  if not number or number > GPUS_PER_MACHINE and number % GPUS_PER_MACHINE:
    raise UserError(
      f'--topology={topology}: expected 1 to {GPUS_PER_MACHINE} GPUs, or a '
      f'multiple of {GPUS_PER_MACHINE}, such as {name}:8'
    )
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  if not any('cuda' in plugin.name for plugin in plugins):
    raise UserError(missing_extra('planning for GPUs', 'cuda'))
  return name, shape


def find_target(topology: str, memory: float | None = None) -> Target:
  """Returns the devices of a TPU slice ('v5e:4x4') or of GPUs ('h100:8').

  More than 8 GPUs are on several machines of 8. `memory` replaces that of the
  chip, in bytes. Raises UserError, as `check_topology` does.
  """
  from jax.experimental import topologies

  name, shape = check_topology(topology)
  options: dict[str, Any] = {'platform': 'tpu', 'topology_name': topology}
  if name in _ARCHITECTURES:
    number = int(shape)
    per_machine = min(number, GPUS_PER_MACHINE)
    options = {
      'platform': 'cuda',
      'topology_name': '',
      'target_config': _gpu_target_config(name),
      # slices x machines x GPUs of a machine
      'topology': f'1x{number // per_machine}x{per_machine}',
    }
  elif name == 'v4':  # its two cores work as one device
    options['chip_config_name'] = 'megacore'
  try:
    description = topologies.get_topology_desc(**options)
  except (RuntimeError, ValueError) as error:
    raise UserError(f'--topology={topology}: {error}') from error
  chip = CHIPS[name]
  if memory is not None:
    chip = dataclasses.replace(chip, memory=memory)
  return Target(chip, description.devices)


def _gpu_target_config(name: str) -> str:
  """Returns a GpuTargetConfigProto of XLA, as text."""
  gpu, chip = _ARCHITECTURES[name], CHIPS[name]
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: {48 * 2**10}
      shared_memory_per_block_optin: {gpu.shared_memory - 2**10}
      shared_memory_per_core: {gpu.shared_memory}
      threads_per_core_limit: 2048
      core_count: {gpu.multiprocessors}
      fpus_per_core: {gpu.lanes}
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.bandwidth)}
      l2_cache_size: {gpu.l2_cache}
      clock_rate_ghz: {gpu.clock_ghz}
      device_memory_size: {int(chip.memory)}
      cuda_compute_capability {{ major: {gpu.capability} }}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{chip.name}"
  """
