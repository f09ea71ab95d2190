"""Compiles the training step of a config for devices that are not attached."""

from collections.abc import Collection
import dataclasses
import re
import time
from typing import Any

import jax

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.checkpoints.metadata import read_metadata
from dualformer_jax.distributed import sharding
from dualformer_jax.models import variants
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.planning import costs, program
from dualformer_jax.planning.chips import Target
from dualformer_jax.training import setup, teacher

# Purposes of collectives.
GRADIENTS = 'sums of gradients'
PARAMETERS = 'gathers of parameters'
PARTIAL_SUMS = 'sums over `tensor`'
STATISTICS = 'statistics'
UNEXPECTED = 'UNEXPECTED'
# Statistics, losses and norms are smaller.
_MAX_STATISTICS_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Settings:
  """Fields of a config that the search changes, named as in the config."""

  data: int
  fsdp: int
  tensor: int
  accumulation_steps: int
  remat: str

  @classmethod
  def from_config(cls, config: setup.Config, target: Target) -> 'Settings':
    """Returns the settings of a config.

    Raises UserError if they do not fit the devices or the batch.
    """
    mesh = sharding.make_mesh(
      config.mesh.to_dict(),
      config.batch_size,
      config.accumulation_steps,
      target.devices,
    )
    return cls(
      **mesh.shape,
      accumulation_steps=config.accumulation_steps,
      remat=config.model.remat,
    )

  def apply(self, config: setup.Config) -> setup.Config:
    """Returns a copy of a config with these settings."""
    config = config.copy_and_resolve_references()
    config.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
    config.accumulation_steps = self.accumulation_steps
    config.model.remat = self.remat
    return config

  def flags(self) -> str:
    """Returns the command-line flags of these settings."""
    mesh = (f'--config.mesh.{a}={getattr(self, a)}' for a in sharding.AXES)
    return (
      f'{" ".join(mesh)} --config.accumulation_steps={self.accumulation_steps} '
      f'--config.model.remat={self.remat}'
    )


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a training step needs on each device.

  Attributes:
    memory: Bytes of memory. If the program does not fit, the compiler's figure.
    state_bytes: Bytes of parameters and optimizer state, part of `memory`.
    model_flops: FLOPs of matrix products, counted from the model's fields.
    work: Work of the compiled program; None if it does not fit.
  """

  settings: Settings
  memory: float
  state_bytes: int
  model_flops: float
  compile_seconds: float
  work: program.Program | None = None
  purposes: tuple[str, ...] = ()

  def fits(self, target: Target) -> bool:
    """Whether the step fits into the memory of the devices."""
    return self.work is not None and self.memory <= target.chip.memory

  def seconds(self, target: Target) -> dict[str, float]:
    """Returns lower bounds of the time of a step that fits, by their cause."""
    assert self.work is not None
    sent = sum(collective.bytes_sent() for collective in self.work.collectives)
    return {
      'arithmetic': self.work.flops / target.chip.flops,
      'memory': self.work.bytes_accessed / target.chip.bandwidth,
      'links': sent / target.link,
    }


def compile_step(
  config: setup.Config,
  settings: Settings,
  target: Target,
  effort: float = 0.0,
) -> Plan:
  """Compiles the training step with settings that replace those of the config.

  `effort` is that of the TPU compiler, -1 to 1; 0 is that of training.
  """
  started = time.monotonic()
  config = settings.apply(config)
  model = setup.make_model(config)
  labels, teacher_model = _make_teacher(config, model)
  training = setup.make_training(config, teacher=labels, devices=target.devices)
  mesh = training.mesh
  teacher_variables = setup.with_shardings(
    training.teacher.variables if training.teacher else None, mesh
  )
  options = _compiler_options(target, effort)
  compiled = None
  with jax.set_mesh(mesh):
    step: Any = training.train_step
    lowered = step.lower(
      training.abstract_state, training.abstract_batch(), teacher_variables
    )
    try:
      compiled = lowered.compile(compiler_options=options)
      memory = _total_memory(compiled.memory_analysis())
    except jax.errors.JaxRuntimeError as error:
      memory = _parse_out_of_memory(str(error))
      if memory is None:
        raise
  seconds = time.monotonic() - started
  state, work, purposes = training.abstract_state, None, ()
  if compiled is not None:
    work = program.read(compiled.as_text(), mesh)
    sizes = _parameter_sizes((state.params, teacher_variables))
    purposes = tuple(find_purpose(c, sizes) for c in work.collectives)
  state_bytes = costs.bytes_per_device(state)
  model_flops = costs.training_flops(model, teacher_model)
  model_flops *= config.batch_size / mesh.size
  return Plan(
    settings, memory, state_bytes, model_flops, seconds, work, purposes
  )


def find_purpose(
  collective: program.Collective, parameter_sizes: Collection[int]
) -> str:
  """Returns the purpose of a collective of a training step.

  No activation has as many elements as a parameter, sharded or gathered: tokens
  come in multiples of 7 x 7.
  """
  if collective.elements in parameter_sizes:
    is_sum = collective.kind in ('all-reduce', 'reduce-scatter')
    return GRADIENTS if is_sum else PARAMETERS
  if collective.kind == 'all-reduce' and collective.axes == ('tensor',):
    return PARTIAL_SUMS
  # XLA for GPUs may sum several arrays as one, and then joins their names by
  # colons. Of a backward pass, those are gradients of parameters.
  is_joined = 'transpose(jvp' in collective.name and ':' in collective.name
  if collective.kind == 'all-reduce' and is_joined:
    return GRADIENTS
  if collective.count * collective.bytes <= _MAX_STATISTICS_BYTES:
    return STATISTICS
  return UNEXPECTED


def _parameter_sizes(tree: Any) -> set[int]:
  """Returns numbers of elements: of each shard, and gathered along `fsdp`."""
  sizes = set()
  for leaf in jax.tree.leaves(tree):
    shard = costs.shard_size(leaf)
    spec, mesh = leaf.sharding.spec, leaf.sharding.mesh
    shards = mesh.shape['fsdp'] if 'fsdp' in spec else 1
    sizes |= {shard, shard * shards}
  return sizes


def _make_teacher(
  config: setup.Config, model: DualFormer
) -> tuple[teacher.Teacher | None, DualFormer | None]:
  """Returns the source of token labels, without arrays, and its model.

  Without a checkpoint it is a DualFormer-B with as many frames as the student,
  as published.
  """
  options = config.token_labels
  if not model.token_label:
    return None, None
  if options.stored:
    return teacher.teacher_from_labels(config, model), None
  if options.teacher:
    metadata = read_metadata(checkpoint.find(options.teacher))
    teacher_model = metadata.build_model(dtype=options.dtype)
  else:
    fields: dict[str, Any] = dict(
      variants.BASE,
      num_classes=model.num_classes,
      num_frames=model.num_frames,
      image_size=model.image_size,
      dtype=options.dtype,
    )
    teacher_model = DualFormer(**fields)
  variables = checkpoint.variable_shapes(teacher_model, 'the teacher')
  rescale = (1.0,) * 3, (0.0,) * 3
  labels = teacher.teacher_from_model(
    config, model, teacher_model, variables, rescale
  )
  return labels, teacher_model


def _compiler_options(target: Target, effort: float) -> dict[str, int] | None:
  """Returns XLA's options for an effort; None for those of training.

  On TPUs, it is the level O0, O1 or O3 instead of the default, O2: see
  openxla.org/xla/effort_levels. jax 0.10 to 0.12 accept integers. Without a
  GPU, there is nothing to tune on.
  """
  platform = target.devices[0].platform
  if platform != 'tpu':
    return None if platform == 'cpu' else {'xla_gpu_autotune_level': 0}
  if not effort:
    return None
  level = 39 if effort > 0 else 9 if effort < -0.5 else 19
  return {'optimization_level': level}


def _total_memory(analysis: Any) -> int:
  kinds = ('argument', 'output', 'temp', 'generated_code')
  total = sum(getattr(analysis, f'{kind}_size_in_bytes') for kind in kinds)
  return total - analysis.alias_size_in_bytes


def _parse_out_of_memory(message: str) -> float | None:
  """Returns the bytes that a rejected program needs; None for other errors."""
  found = re.search(r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm', message)
  if not found:
    return None
  return float(found[1]) * 1024 ** ' KMGT'.index(found[2] or ' ')
