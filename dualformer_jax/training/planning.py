"""What a training step would need on devices that are not here.

The step is the real one, of loop.make_train_step, compiled ahead of time. For
TPUs that is what would run there. For GPUs it is compiled for as many virtual
devices of this machine's CPU.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib.util
import itertools
import logging
import math
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.models import complexity, explain, variants
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import (
  checkpoint,
  loop,
  program,
  sharding,
  token_labels,
)
from dualformer_jax.training import step as steps

_LOG = logging.getLogger(__name__)
_AXES = sharding.AXES
_REMATS = ('none', 'elementwise', 'block')
# Sums of statistics, of a loss, of a norm; and what is as small.
_SMALL_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the maker says of a chip.

  Attributes:
    name: of the chip.
    flops: of bfloat16 matrix products, a second.
    memory: in bytes.
    bandwidth: of that memory, in bytes a second.
    link: bytes a second that it sends along one axis of the mesh. On TPUs, by
      both directions of a ring.
    network: the same between machines, where that differs.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  link: float
  network: float | None = None


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, "System architecture";
# links: jax-ml.github.io/scaling-book/tpus, "TPU specs". GPUs: NVIDIA's data
# sheets of the A100 80GB SXM and the H100 SXM without sparsity (NVLink 3 and 4,
# one direction; between machines InfiniBand of 200 and 400 Gbit/s a GPU).
_GIB = 2**30
CHIPS = {
  'v4': Chip('TPU v4', 275e12, 32 * _GIB, 1.2e12, 9e10),
  'v5e': Chip('TPU v5e', 197e12, 16 * _GIB, 0.82e12, 9e10),
  'v5p': Chip('TPU v5p', 459e12, 95 * _GIB, 2.77e12, 18e10),
  'v6e': Chip('TPU v6e', 918e12, 32 * _GIB, 1.64e12, 18e10),
  'a100': Chip('NVIDIA A100', 312e12, 80e9, 2.04e12, 3e11, 2.5e10),
  'h100': Chip('NVIDIA H100', 989e12, 80e9, 3.35e12, 4.5e11, 5e10),
}
_GPUS_A_MACHINE = 8

# Videos for training, as published; see data/README.md.
PUBLISHED_VIDEOS = {
  'activitynet': 10_024,
  'diving48': 15_027,
  'hmdb51': 3_570,
  'hvu': 481_000,
  'jester': 118_562,
  'kinetics400': 246_534,
  'kinetics600': 383_393,
  'kinetics700': 542_357,
  'moments_in_time': 802_264,
  'multi_moments_in_time': 1_000_000,
  'omnisource': 76_030,
  'something_something_v1': 86_017,
  'something_something_v2': 168_913,
  'ucf101': 9_537,
}


@dataclasses.dataclass(frozen=True)
class Target:
  """The devices to plan for.

  Attributes:
    chip: what each of them is.
    devices: to compile for.
    is_exact: whether they are of the kind that will run it.
  """

  chip: Chip
  devices: Sequence[Any]
  is_exact: bool

  @property
  def link(self) -> float:
    """Bytes a second that a device sends to others."""
    if self.chip.network and len(self.devices) > _GPUS_A_MACHINE:
      return self.chip.network
    return self.chip.link


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the search changes of a config; the fields are the config's."""

  data: int
  fsdp: int
  tensor: int
  accumulation_steps: int
  remat: str

  def apply(self, config: loop.Config) -> Any:
    """Returns a copy of the config with these settings."""
    config = config.copy_and_resolve_references()
    config.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
    config.accumulation_steps = self.accumulation_steps
    config.model.remat = self.remat
    return config

  def flags(self) -> str:
    """Returns the flags that set them."""
    return ' '.join(
      [
        *(f'--config.mesh.{axis}={getattr(self, axis)}' for axis in _AXES),
        f'--config.accumulation_steps={self.accumulation_steps}',
        f'--config.model.remat={self.remat}',
      ]
    )


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step needs of each device.

  Attributes:
    settings: that it is for.
    memory: bytes, all together; of a program that is too large for its devices
      what the compiler says that it would take.
    state: bytes of parameters and optimiser state among them.
    work: what the program does; None where it is too large to be one.
    analytic_flops: of its matrix products, counted from the model's fields.
    purposes: what each of work.collectives moves.
    compile_seconds: how long it took to compile.
  """

  settings: Settings
  memory: float
  state: int
  work: program.Program | None
  analytic_flops: float
  purposes: tuple[str, ...]
  compile_seconds: float

  def seconds(self, target: Target) -> dict[str, float]:
    """Returns the least time that a step takes, by what bounds it."""
    assert self.work is not None
    sent = sum(collective.sent() for collective in self.work.collectives)
    return {
      'arithmetic': self.work.flops / target.chip.flops,
      'memory': self.work.bytes / target.chip.bandwidth,
      'links': sent / target.link,
    }

  def unexpected(self) -> list[program.Collective]:
    """Returns the collectives that should not be there."""
    assert self.work is not None
    pairs = zip(self.work.collectives, self.purposes, strict=True)
    return [collective for collective, purpose in pairs if purpose == _OTHER]


_GRADIENTS, _PARAMETERS = 'sums of gradients', 'gathers of parameters'
_PARTIAL, _STATISTICS = 'sums over `tensor`', 'statistics'
_OTHER = 'UNEXPECTED'


def tpu(topology: str) -> Target:
  """Returns a TPU slice that need not exist, such as 'v5e:4x4'.

  Raises:
    UserError: there is no such slice, or libtpu is missing.
  """
  generation = topology.split(':')[0]
  chip = CHIPS.get(generation)
  if chip is None or chip.network or ':' not in topology:
    raise UserError(
      f'--topology={topology}: expected v4, v5e, v5p or v6e and the chips of '
      'the slice along each axis, such as v5e:4x4 or v5p:2x2x4'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      'planning for TPUs needs libtpu; pip install "dualformer_jax[plan]"'
    )
  # A chip of this has two cores, which work as one device.
  options = {'chip_config_name': 'megacore'} if generation == 'v4' else {}
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(f'--topology={topology}: {error}') from error
  return Target(chip, found.devices, is_exact=True)


def gpus(chip: Chip, count: int, memory: float) -> Target:
  """Returns virtual devices of this CPU that stand for GPUs.

  Args:
    chip: what the GPUs are.
    count: how many; as many CPU devices must have been asked of JAX.
    memory: of each, in bytes.
  """
  chip = dataclasses.replace(chip, memory=memory)
  return Target(chip, jax.devices('cpu')[:count], is_exact=False)


def own_settings(config: loop.Config, target: Target) -> Settings:
  """Returns the settings of the config itself.

  Raises:
    UserError: the mesh does not fit the devices.
  """
  mesh = _mesh(config, target)
  return Settings(
    **mesh.shape,
    accumulation_steps=config.accumulation_steps,
    remat=config.model.remat,
  )


def compile_step(
  config: loop.Config,
  settings: Settings,
  target: Target,
  effort: float | None = None,
) -> Plan:
  """Compiles the training step of a config and returns what it needs.

  Args:
    config: as configs/common.py has it.
    settings: to be used instead of the config's.
    target: devices to compile for.
    effort: how hard the compiler tries, -1 to 1; None: as in training.
  """
  config = settings.apply(config)
  began = time.monotonic()
  model = DualFormer(**config.model.to_dict())
  mesh = _mesh(config, target)
  optimizer, _ = loop.make_optimizer(config, model, steps_per_epoch=1000)
  abstract_state = _abstract_state(config, model, optimizer)
  shardings = sharding.tree_shardings(abstract_state, mesh)
  asked = _teacher_model(config, model)
  teacher = _teacher(config, model, asked)
  train_step: Any = loop.make_train_step(
    config, model, optimizer, shardings, mesh, teacher
  )
  state = _placed(abstract_state, mesh)
  held = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state)
  )
  analytic = config.batch_size / mesh.size * matrix_flops(model, asked)
  options = None
  if effort is not None and target.is_exact:
    options = {'exec_time_optimization_effort': effort}
  with jax.set_mesh(mesh):
    lowered = train_step.lower(
      state,
      _batch(config, model, mesh, teacher),
      _placed(teacher.variables, mesh) if teacher else None,
    )
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      memory = _too_large(str(error))
      if memory is None:
        raise
      seconds = time.monotonic() - began
      return Plan(settings, memory, held, None, analytic, (), seconds)
  m = compiled.memory_analysis()
  memory = (
    m.argument_size_in_bytes
    + m.output_size_in_bytes
    - m.alias_size_in_bytes
    + m.temp_size_in_bytes
    + m.generated_code_size_in_bytes
  )
  work = program.read(compiled.as_text(), mesh)
  sizes = _parameter_sizes(
    (abstract_state.params, teacher.variables if teacher else None), mesh
  )
  return Plan(
    settings,
    memory,
    held,
    work,
    analytic,
    tuple(_purpose(c, sizes) for c in work.collectives),
    time.monotonic() - began,
  )


def search(
  config: loop.Config,
  target: Target,
  most: int,
  effort: float | None = None,
) -> Plan:
  """Returns the plan of the fastest settings that fit.

  Settings are ordered by the time that they must take at least: arithmetic, and
  what the devices must send each other. What fits is estimated, and the
  fastest that should fit is compiled; the estimate is then corrected by what
  the compiler says, until no faster one is left that might fit.

  Args:
    config: as configs/common.py has it.
    target: the devices.
    most: how many may be compiled.
    effort: as in compile_step.

  Raises:
    UserError: no mesh can split the batch, or nothing fits.
  """
  candidates = list(_candidates(config, len(target.devices)))
  if not candidates:
    raise UserError(
      f'batch_size={config.batch_size} cannot be split over '
      f'{len(target.devices)} devices, with heads {config.model.num_heads} '
      'along mesh.tensor; make it a multiple of the devices (and '
      'optimizer.learning_rate fit it)'
    )
  estimates = _estimates(config, candidates, target)
  order = sorted(
    range(len(candidates)),
    key=lambda i: (
      estimates[i][0],
      _REMATS.index(candidates[i].remat),
      candidates[i].accumulation_steps,
      candidates[i].fsdp,
    ),
  )
  scale = 1.0
  plans: dict[int, Plan] = {}
  best: Plan | None = None
  for _ in range(most):
    chosen = None
    for i in order:
      if i in plans:
        if plans[i] is best:
          break  # none that is faster may fit
        continue
      if scale * estimates[i][1] <= target.chip.memory:
        chosen = i
        break
    if chosen is None:
      if best is None and not plans:
        chosen = min(order, key=lambda i: estimates[i][1])
      else:
        break
    _LOG.info(
      'compiling %d of at most %d: %s ...',
      len(plans) + 1,
      most,
      candidates[chosen].flags(),
    )
    plan = compile_step(config, candidates[chosen], target, effort)
    plans[chosen] = plan
    _LOG.info(
      '%.1f GB of %.1f a device, %.0f s to compile',
      plan.memory / 1e9,
      target.chip.memory / 1e9,
      plan.compile_seconds,
    )
    scale = plan.memory / estimates[chosen][1]
    if plan.work is not None and plan.memory <= target.chip.memory:
      best = plan
  if best is None:
    least = min(plan.memory for plan in plans.values())
    raise UserError(
      f'no settings were found that fit {target.chip.memory / 1e9:.1f} GB a '
      f'device; the least takes {least / 1e9:.1f} GB: use more devices, or a '
      'smaller batch_size'
    )
  return best


def matrix_flops(model: DualFormer, teacher: DualFormer | None = None) -> float:
  """Returns the operations of all matrix products in training on one clip.

  Two for each multiply-add. Training does each product once forward and twice
  backward; but the first layer needs no gradient of its input, and attention
  makes its scores anew, whatever model.remat says. With remat='block' all of a
  block is made anew, but for its last product, which nothing needs. A teacher
  that scores the tokens of the clip does each product once.
  """
  total = 0.0
  for row in complexity.count(model):
    *parents, name = ('', *row.module.split('/'))
    if name == 'attn':
      times, anew = 3.5, 1
    elif _is_linear(name):
      times, anew = 3.0, int(name != 'fc2')
    else:
      continue  # sums of products of another kind, and norms
    if parents[-1] == 'patch_embeds_0':
      times = 2.0
    if model.remat == 'block' and 'blocks_' in row.module:
      times += anew
    total += 2 * row.multiply_adds * times
  if teacher is not None:
    tokens = math.prod(explain.token_grid(teacher, len(teacher.depths) - 1))
    for row in complexity.count(teacher):
      name = row.module.split('/')[-1]
      if name == 'attn' or _is_linear(name):
        scored = tokens if name == 'fc_cls' else 1  # and the clip, which is not
        total += 2 * row.multiply_adds * scored
  return total


def _is_linear(layer: str) -> bool:
  linear = ('qkv', 'q', 'kv', 'proj', 'fc1', 'fc2', 'fc_cls')
  return layer in linear or layer.startswith('token_linear')


def _teacher_model(config: loop.Config, model: DualFormer) -> DualFormer | None:
  """Returns the model that labels tokens in each step, if one does.

  That of the checkpoint which the config names; without one, a base of as many
  frames, as published.
  """
  options = config.token_labels
  if not model.token_label or options.stored:
    return None
  if options.teacher:
    folder = checkpoint.find(options.teacher)
    description = checkpoint.read_description(folder)
    return description.build_model(dtype=options.dtype)
  fields: dict[str, Any] = dict(
    variants.BASE,
    num_classes=model.num_classes,
    num_frames=model.num_frames,
    image_size=model.image_size,
    dtype=options.dtype,
  )
  return DualFormer(**fields)


def _teacher(
  config: loop.Config, model: DualFormer, asked: DualFormer | None
) -> token_labels.Teacher | None:
  """Returns what labels tokens, with shapes for variables."""
  if not model.token_label:
    return None
  if asked is None:
    return loop.teacher_as_stored(config, model)
  variables = checkpoint.variable_shapes(asked, 'the teacher')
  rescale = (1.0,) * 3, (0.0,) * 3
  return loop.teacher_to_ask(config, model, asked, variables, rescale)


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns shapes with the shardings that arrays of a model have."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    tree,
    sharding.tree_shardings(tree, mesh),
  )


def _mesh(config: loop.Config, target: Target) -> jax.sharding.Mesh:
  return sharding.make_mesh(
    config.mesh, config.batch_size, config.accumulation_steps, target.devices
  )


def _abstract_state(config: loop.Config, model: DualFormer, optimizer: Any):
  return jax.eval_shape(
    functools.partial(
      steps.init_state, model, optimizer, config.seed, config.ema_decay > 0
    )
  )


def _batch(
  config: loop.Config,
  model: DualFormer,
  mesh: jax.sharding.Mesh,
  teacher: token_labels.Teacher | None,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns what stands for a batch as the loader makes it."""
  where = jax.NamedSharding(mesh, sharding.BATCH)
  size, ops = config.batch_size, config.augment.rand_augment_ops
  shape = model.input_shape()[1:]
  if teacher is not None:
    shape = (teacher.clip_frames, *shape[1:])

  def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *shape), np.dtype(dtype), sharding=where)

  batch = {
    'clips': array(shape, 'uint8'),
    'labels': array((), 'int32'),
  }
  if config.dataset.multi_label:
    batch['labels'] = array((model.num_classes,), 'float32')
  if ops:
    batch['color_ops'] = array((ops,), 'int32')
    batch['magnitudes'] = array((ops,), 'float32')
  if teacher is not None and teacher.variables is None:
    # As for stored labels of as many tokens as the model has.
    grid = explain.token_grid(model, len(model.depths) - 1)
    top = loop.num_token_scores(config, model)
    batch['token_values'] = array((*grid, top), 'float32')
    batch['token_classes'] = array((*grid, top), 'int32')
    batch['token_boxes'] = array((4,), 'float32')
  return batch


def _too_large(message: str) -> float | None:
  """Returns the bytes that a program would take, of the compiler's refusal."""
  found = re.search(r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm', message)
  if not found:
    return None
  return float(found[1]) * 1024 ** ' KMGT'.index(found[2] or ' ')


def _parameter_sizes(params: Any, mesh: jax.sharding.Mesh) -> set[int]:
  """Returns how many elements parameters have, on a device and gathered."""
  sizes = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = sharding.partition_spec(name, leaf.shape, mesh)
    gathered = leaf.size // math.prod(
      mesh.shape[axis] for axis in spec if axis == 'tensor'
    )
    sizes |= {
      gathered,
      gathered
      // math.prod(mesh.shape[axis] for axis in spec if axis == 'fsdp'),
    }
  return sizes


def _purpose(collective: program.Collective, sizes: set[int]) -> str:
  """Returns what a collective moves.

  No activation has as many elements as a parameter has: tokens come in
  multiples of 7 x 7.
  """
  if collective.elements in sizes:
    sums = ('all-reduce', 'reduce-scatter')
    return _GRADIENTS if collective.kind in sums else _PARAMETERS
  if collective.kind == 'all-reduce' and collective.axes == ('tensor',):
    return _PARTIAL
  if collective.count * collective.bytes <= _SMALL_BYTES:
    return _STATISTICS
  return _OTHER


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]


def _candidates(config: loop.Config, devices: int) -> Iterator[Settings]:
  """Yields all settings that split heads, batch and devices evenly."""
  for tensor, remat in itertools.product(_divisors(devices), _REMATS):
    if any(heads % tensor for heads in config.model.num_heads):
      continue
    parts = devices // tensor
    if config.batch_size % parts:
      continue
    for fsdp in _divisors(parts):
      for passes in _divisors(config.batch_size // parts):
        yield Settings(parts // fsdp, fsdp, tensor, passes, remat)


def _estimates(
  config: loop.Config, candidates: Sequence[Settings], target: Target
) -> list[tuple[float, float]]:
  """Returns the seconds and bytes that each will take, about."""
  kept = {
    remat: _kept_bytes(config, remat)
    for remat in {settings.remat for settings in candidates}
  }
  model = DualFormer(**config.model.to_dict())
  optimizer, _ = loop.make_optimizer(config, model, steps_per_epoch=1000)
  state = _abstract_state(config, model, optimizer)
  tokens = _channels_moved(model)
  chip = target.chip
  results = []
  for s in candidates:
    mesh = jax.sharding.AbstractMesh((s.data, s.fsdp, s.tensor), _AXES)
    clips = config.batch_size / (s.data * s.fsdp)  # a device
    held = _held_bytes(state, mesh)
    # Gradients, float32, and with several passes their sum.
    grads = _held_bytes(state.params, mesh) * min(2, s.accumulation_steps)
    memory = held + grads + clips / s.accumulation_steps * kept[s.remat]
    flops = matrix_flops(
      DualFormer(**{**config.model.to_dict(), 'remat': s.remat})
    )
    params = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    params /= s.tensor
    sent = 0.0  # in each pass
    if s.data > 1:
      sent += 2 * params / s.fsdp
    if s.fsdp > 1:  # forward and backward in bfloat16, and back the gradients
      sent += 2 * params
    sent *= s.accumulation_steps
    if s.tensor > 1:  # two sums in each block, forward and backward
      sent += 2 * 4 * tokens * clips * 2
    results.append(
      (
        config.batch_size * flops / len(target.devices) / chip.flops
        + sent / target.link,
        memory,
      )
    )
  return results


def _held_bytes(tree: Any, mesh: Any) -> float:
  """Returns the bytes of a tree that each device holds."""
  total = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = sharding.partition_spec(name, leaf.shape, mesh)
    shares = math.prod(mesh.shape[axis] for axis in spec if axis)
    total += leaf.size * leaf.dtype.itemsize / shares
  return total


def _kept_bytes(config: loop.Config, remat: str) -> int:
  """Returns the bytes of one clip that are kept for the backward pass."""
  fields: Mapping[str, Any] = {**config.model.to_dict(), 'remat': remat}
  model = DualFormer(**fields)
  clips = jax.ShapeDtypeStruct(model.input_shape(), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), clips)

  def pull_back(params, rest, clips):
    def forward(params):
      output, _ = model.apply(
        {'params': params, **rest},
        clips,
        train=True,
        rngs={'dropout': jax.random.key(0)},
        mutable=['batch_stats'],
      )
      return output.logits

    return jax.vjp(forward, params)[1]

  rest = {name: v for name, v in variables.items() if name != 'params'}
  kept = jax.eval_shape(pull_back, variables['params'], rest, clips)
  parameters = {leaf.shape for leaf in jax.tree.leaves(variables)}
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(kept)
    if leaf.shape not in parameters
  )


def _channels_moved(model: DualFormer) -> float:
  """Returns the elements of all blocks' outputs for one clip."""
  rows = complexity.count(model)
  # A LayerNorm counts five operations an element.
  return sum(r.multiply_adds / 5 for r in rows if r.module.endswith('norm1'))
