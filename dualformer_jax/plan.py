r"""Tells what training a recipe would need, on devices that need not be here.

python -m dualformer_jax.plan --config=configs/k400_base.py \
    --topology=v5e:16x16 [--config.FIELD=VALUE ...]
python -m dualformer_jax.plan --config=configs/k400_base.py \
    --devices=8 [--chip=a100|h100] [--memory=80]

The training step is compiled ahead of time, on a CPU: for TPUs by their own
compiler (pip install "dualformer_jax[plan]"), for GPUs as if each were a device
of the CPU. Of the meshes, passes and remats that the batch allows, the fastest
that fits is searched; --nosearch plans for those of the config.
"""

import json
import logging
import os
from typing import Any

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line
from dualformer_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe, a file such as configs/k400_base.py.'
)
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'A TPU slice, such as v5e:4x4, v6e:16x16, v5p:2x2x4.'
)
_DEVICES = flags.DEFINE_integer('devices', None, 'GPUs, instead of TPUs.', 1)
_CHIP = flags.DEFINE_enum('chip', 'a100', ['a100', 'h100'], 'What GPUs.')
_MEMORY = flags.DEFINE_float('memory', 80.0, 'Of each GPU, in GB (10^9).', 1.0)
_SEARCH = flags.DEFINE_bool(
  'search', True, 'Whether to search mesh, passes and remat.'
)
_COMPILES = flags.DEFINE_integer(
  'compiles', 4, 'Settings to compile at most, in the search.', 1
)
_EFFORT = flags.DEFINE_float(
  'effort',
  -1.0,
  'How hard the compiler for TPUs tries to make a fast program: -1 takes '
  'least time, and what it makes is slower and larger; 0 is as in training.',
  -1.0,
  1.0,
)
_VIDEOS = flags.DEFINE_integer(
  'videos', None, 'Videos for training, where they are not known.', 1
)
_JSON = flags.DEFINE_bool('json', False, 'Whether to print JSON.')
_LOG = logging.getLogger(__name__)


def main() -> None:
  """Plans and prints."""
  if (_TOPOLOGY.value is None) == (_DEVICES.value is None):
    raise UserError(
      'either --topology (of a TPU slice) or --devices (how many GPUs) must be '
      'given; --help tells the flags'
    )
  # No question to where TPUs would be, and no claim to those of this machine.
  os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_SKIP_MDS_QUERY='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5litepod-1',
  )
  import jax

  jax.config.update('jax_platforms', 'cpu')
  count = _DEVICES.value or 1
  jax.config.update('jax_num_cpu_devices', count)
  from dualformer_jax.training import planning

  if _TOPOLOGY.value:
    target = planning.tpu(_TOPOLOGY.value)
  else:
    target = planning.gpus(
      planning.CHIPS[_CHIP.value], count, _MEMORY.value * 1e9
    )
  config = _CONFIG.value
  videos, source = _count_videos(config)
  labels = config.token_labels
  if config.model.token_label and not (labels.teacher or labels.stored):
    _LOG.info(
      'planned with a DualFormer-B as teacher; --config.token_labels.teacher '
      'names another, --config.token_labels.stored plans without'
    )
  if _SEARCH.value:
    plan = planning.search(config, target, _COMPILES.value, _EFFORT.value)
  else:
    settings = planning.own_settings(config, target)
    plan = planning.compile_step(config, settings, target, _EFFORT.value)
  report = _report(config, target, plan, videos, source)
  if _JSON.value:
    print(json.dumps(report, indent=1))
  else:
    _print(report)


def _count_videos(config: Any) -> tuple[int, str]:
  """Returns the number of training videos, and who says so.

  Also sets the number of classes, where the config leaves it to the dataset.
  """
  from dualformer_jax.training import loop, planning

  try:
    data = loop.open_split(config, config.dataset.train_split)
  except UserError as error:
    if not config.model.num_classes:
      raise UserError(
        'the number of classes is not known: give --config.model.num_classes, '
        f'or the dataset ({error})'
      ) from error
    name = config.dataset.name.split('/')[0]
    videos = _VIDEOS.value or planning.PUBLISHED_VIDEOS.get(name)
    if videos is None:
      raise UserError(
        f'the number of videos is not known: give --videos ({error})'
      ) from error
    return videos, '--videos' if _VIDEOS.value else 'as published'
  config.model.num_classes = len(data.class_names)
  return _VIDEOS.value or len(data), str(data.folder)


def _report(
  config: Any, target: Any, plan: Any, videos: int, source: str
) -> dict[str, Any]:
  """Returns all that is printed, by name."""
  devices = len(target.devices)
  clips = config.batch_size / (plan.settings.data * plan.settings.fsdp)
  report: dict[str, Any] = {
    'chip': target.chip.name,
    'devices': devices,
    'is_exact': target.is_exact,
    'batch_size': config.batch_size,
    'clips_per_device': clips,
    'flags': plan.settings.flags(),
    'memory': {
      'needed': plan.memory,
      'parameters_and_optimiser': plan.state,
      'has': target.chip.memory,
      'fits': plan.work is not None and plan.memory <= target.chip.memory,
    },
    'compile_seconds': plan.compile_seconds,
  }
  if plan.work is None:
    return report
  groups: dict[tuple[str, str, str], list[float]] = {}
  for collective, purpose in zip(
    plan.work.collectives, plan.purposes, strict=True
  ):
    key = (purpose, collective.kind, ' x '.join(collective.axes))
    sums = groups.setdefault(key, [0, 0, 0])
    sums[0] += collective.count
    sums[1] += collective.count * collective.bytes
    sums[2] += collective.sent()
  seconds = plan.seconds(target)
  steps = config.num_epochs * max(
    1, config.dataset.repeats * videos // config.batch_size
  )
  return report | {
    'flops': plan.work.flops,
    'analytic_flops': plan.analytic_flops,
    'bytes': plan.work.bytes,
    'unknown_loops': plan.work.unknown_loops,
    'collectives': [
      {
        'purpose': purpose,
        'kind': kind,
        'axes': axes,
        'times': sums[0],
        'bytes': sums[1],
        'sent': sums[2],
      }
      for (purpose, kind, axes), sums in sorted(groups.items())
    ],
    'unexpected': [
      {
        'kind': collective.kind,
        'axes': collective.axes,
        'times': collective.count,
        'bytes': collective.bytes,
        'name': collective.name,
      }
      for collective in plan.unexpected()
    ],
    'seconds': seconds,
    'videos': videos,
    'videos_source': source,
    'steps': steps,
    'hours': steps * max(seconds.values()) / 3600,
  }


def _print(report: dict[str, Any]) -> None:
  memory = report['memory']
  print(
    f'{report["devices"]} x {report["chip"]}, batch of {report["batch_size"]}: '
    f'{report["clips_per_device"]:g} clips a device'
  )
  if not report['is_exact']:
    print(
      'Compiled for devices of this CPU, which computes bfloat16 in float32\n'
      'and attention in smaller blocks: memory and its traffic are estimates,\n'
      'and what devices send each other is what this program sends.'
    )
  print(
    f'memory        {memory["needed"] / 1e9:.2f} GB of '
    f'{memory["has"] / 1e9:.2f} a device, of which parameters and optimiser '
    f'{memory["parameters_and_optimiser"] / 1e9:.2f}: '
    f'{"fits" if memory["fits"] else "DOES NOT FIT"}'
  )
  if 'flops' not in report:
    print(f'flags         {report["flags"]}')
    return
  ratio = report['flops'] / report['analytic_flops']
  print(
    f'arithmetic    {report["flops"] / 1e12:.3f} TFLOP a device, '
    f'{ratio:.1%} of what the model has'
  )
  for c in report['collectives']:
    kind = c['kind'] + ' '  # of which some are long
    print(
      f'{kind:14}{c["purpose"]}, along {c["axes"]}: {c["times"]} times, '
      f'{c["bytes"] / 1e6:.1f} MB ({c["sent"] / 1e6:.1f} MB sent)'
    )
  for c in report['unexpected']:
    print(
      f'  UNEXPECTED: {c["times"]} x {c["bytes"] / 1e6:.1f} MB for {c["name"]}'
    )
  if not report['unexpected']:
    print('              no activations are gathered')
  if report['unknown_loops']:
    print(
      f'              {report["unknown_loops"]} loops were counted as if they '
      'ran once'
    )
  seconds = report['seconds']
  print(
    'a step takes  at least '
    + ', '.join(f'{1e3 * s:.1f} ms by {name}' for name, s in seconds.items())
  )
  print(
    f'all of it     {report["steps"]:,} steps on {report["videos"]:,} videos '
    f'({report["videos_source"]}), at least {report["hours"]:.1f} hours'
  )
  print(f'flags         {report["flags"]}')


def cli() -> None:
  """Runs the command."""
  flags.mark_flags_as_required(['config'])
  command_line.run(main)


if __name__ == '__main__':
  cli()
