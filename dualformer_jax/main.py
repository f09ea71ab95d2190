r"""Trains a DualFormer and tests it.

  python -m dualformer_jax.main --config=configs/k400_tiny.py --workdir=DIR \
    [--mode=test|profile] [--compare=OTHER] [--config.FIELD=VALUE ...]

The same command resumes training from the latest checkpoint in the workdir.
"""

import functools
import pathlib

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line
from dualformer_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    'config', None, 'Config file, such as configs/k400_tiny.py.'
  )
  flags.DEFINE_string(
    'workdir',
    None,
    'Folder of checkpoints, TensorBoard files and the report, also at gs:// or '
    's3://.',
  )
  flags.DEFINE_enum(
    'mode',
    'train',
    ['train', 'test', 'profile'],
    "train: train or resume, then test. test: test the workdir's checkpoint "
    '(see config.test.checkpoint) or, if it has none, that of '
    'config.init_from. profile: measure input and training step, and find the '
    'bottleneck, without training.',
  )
  flags.DEFINE_string(
    'compare',
    '',
    'With --mode=test: workdir of another test, or its report.json, to compare '
    'with video by video.',
  )
  # On TPU pods, under SLURM and Open MPI these three are found automatically.
  flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of process 0 of several.'
  )
  flags.DEFINE_integer(
    'num_processes', None, 'Number of processes.', lower_bound=1
  )
  flags.DEFINE_integer(
    'process_id', None, 'Index of this process, from 0.', lower_bound=0
  )
  flags.mark_flags_as_required(['config', 'workdir'])


def main() -> None:
  """Trains and tests, tests, or profiles a model."""
  if FLAGS.mode == 'train':
    command_line.stop_signals.exit_message = '; run the same command to resume'
  command_line.enable_compilation_cache()

  from dualformer_jax.distributed import processes
  from dualformer_jax.training import (
    cpu_memory,
    hub_revisions,
    loop,
    object_store_workdir,
    profile,
    testing,
  )

  if FLAGS.compare and FLAGS.mode != 'test':
    raise UserError(
      f'--compare needs --mode=test, got --mode={FLAGS.mode}; change one'
    )
  with (
    processes.joined(
      FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    ),
    object_store_workdir.opened(
      FLAGS.workdir, FLAGS.mode, FLAGS.config.checkpoint.keep
    ) as (workdir, mirror),
  ):
    cpu_memory.keep_memory()
    config = hub_revisions.pinned(
      FLAGS.config, workdir, record=FLAGS.mode == 'train'
    )
    path = config_flags.get_config_filename(FLAGS['config'])
    recipe = pathlib.Path(path).stem
    if FLAGS.mode == 'train':
      loop.train_and_test(config, workdir, recipe, mirror)
    elif FLAGS.mode == 'test':
      testing.test(config, workdir, FLAGS.compare, recipe=recipe)
    else:
      profile.profile(config, workdir)


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
