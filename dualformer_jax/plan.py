r"""Prints the memory and time that training needs on given devices.

python -m dualformer_jax.plan --config=configs/k400_base.py \
    --topology=v5e:16x16 [--config.FIELD=VALUE ...]
python -m dualformer_jax.plan --config=configs/k400_base.py --topology=h100:8

The devices need not be attached: the training step is compiled ahead of time on
a CPU, with the compiler of the devices. For TPUs, pip install -e '.[plan]'; for
GPUs, pip install -e '.[cuda]'. Searches mesh, accumulation_steps and remat for
the fastest settings that fit; --nosearch plans for those of the config.
--breakdown also prints which operations cause the memory traffic.
"""

import functools
import json
import logging
import os
from typing import Any

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line, progress
from dualformer_jax.errors import UserError

FLAGS = flags.FLAGS
_LOG = logging.getLogger(__name__)


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    'config', None, 'Config file, such as configs/k400_base.py.'
  )
  flags.DEFINE_string(
    'topology',
    None,
    'TPU slice, such as v5e:4x4 or v5p:2x2x4, or GPUs, such as h100:8, of '
    'a100, h100, h200 and b200.',
  )
  flags.DEFINE_float(
    'memory',
    None,
    "Memory of each device in GB (10^9); overrides the chip's.",
    1.0,
  )
  flags.DEFINE_integer(
    'breakdown', 0, 'Number of rows of a table of memory traffic.', 0
  )
  flags.DEFINE_integer('devices', None, 'Deprecated: use --topology.', 1)
  flags.DEFINE_enum(
    'chip', 'a100', ['a100', 'h100'], 'Deprecated: use --topology.'
  )
  flags.DEFINE_bool(
    'search', True, 'Whether to search mesh, accumulation_steps and remat.'
  )
  flags.DEFINE_integer(
    'compiles', 4, 'Maximum number of settings that the search compiles.', 1
  )
  flags.DEFINE_float(
    'effort',
    -1.0,
    'Optimization effort, for TPUs: -1 (level O0) compiles fastest, '
    'into a slower and larger program; 0 (O2) is that of training.',
    -1.0,
    1.0,
  )
  flags.DEFINE_integer(
    'videos', None, 'Number of training videos, if it is not known.', 1
  )
  flags.DEFINE_bool('json', False, 'Whether to print JSON.')
  flags.mark_flags_as_required(['config'])


def main() -> None:
  """Plans and prints."""
  topology = FLAGS.topology
  if topology is None and FLAGS.devices:
    topology = f'{FLAGS.chip}:{FLAGS.devices}'
    _LOG.warning('--devices is deprecated: use --topology=%s', topology)
  if topology is None:
    raise UserError(
      '--topology must be given: a TPU slice, such as v5e:4x4, or GPUs, such '
      'as h100:8'
    )
  from dualformer_jax.planning import chips

  chips.check_topology(topology)
  # libtpu asks no metadata server, and claims no TPU of this machine.
  os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_SKIP_MDS_QUERY='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5litepod-1',
    # The compiler for GPUs needs no libraries of CUDA.
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK='1',
  )
  import jax

  jax.config.update('jax_platforms', 'cpu')
  # Programs for devices that are not attached cannot be read from it.
  jax.config.update('jax_enable_compilation_cache', False)
  from dualformer_jax.planning import report, search
  from dualformer_jax.planning.compile import Settings, compile_step
  from dualformer_jax.training import config_check

  config_check.check(FLAGS.config)
  memory = FLAGS.memory and FLAGS.memory * 1e9
  target = chips.find_target(topology, memory)
  config, num_videos, source = read_dataset(FLAGS.config, FLAGS.videos)
  labels = config.token_labels
  if config.model.token_label and not (labels.teacher or labels.stored):
    _LOG.info(
      'planning with a DualFormer-B as teacher; --config.token_labels.teacher '
      'sets another, --config.token_labels.stored none'
    )
  if FLAGS.search:
    plan = search.search(config, target, FLAGS.compiles, FLAGS.effort)
  else:
    settings = Settings.from_config(config, target)
    with progress.waiting('compiling'):
      plan = compile_step(config, settings, target, FLAGS.effort)
  result = report.make_report(config, target, plan, num_videos, source)
  if FLAGS.json:
    print(json.dumps(result, indent=1))
  else:
    print(report.format_report(result, FLAGS.breakdown))


def read_dataset(config: Any, videos: int | None) -> tuple[Any, int, str]:
  """Looks up the number of classes and of training videos.

  Returns a copy of the config with the classes, the number of videos, and where
  that is from. Raises UserError if one is not known.
  """
  from dualformer_jax.planning import report
  from dualformer_jax.training import setup

  config = config.copy_and_resolve_references()
  try:
    data = setup.open_split(config, config.dataset.train_split)
  except UserError as error:
    name = config.dataset.name.split('/')[0]
    published = report.PUBLISHED_VIDEOS.get(name)
    count = videos or published
    if not config.model.num_classes or not count:
      raise UserError(
        'the dataset is not prepared: set --videos and '
        f'--config.model.num_classes ({error})'
      ) from error
    return config, count, '--videos' if videos else 'as published'
  config.model.num_classes = len(data.class_names)
  return config, videos or len(data), str(data.folder)


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
