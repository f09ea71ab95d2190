r"""Trains heads on the features of a frozen model, such as for a new dataset.

  python -m dualformer_jax.probe --checkpoint=DIR --workdir=WORKDIR \
    --config=configs/video_folder.py --config.dataset.data_dir=DATA

Computes the features of all videos once and stores them. Then trains linear and
attentive heads with many learning rates and weight decays at once, chooses by
validation, tests, and saves the best model in the workdir. The same command
resumes an interrupted run.
"""

import functools

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line
from dualformer_jax.command_line import CHECKPOINT_HELP

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('checkpoint', None, CHECKPOINT_HELP)
  config_flags.DEFINE_config_file(
    'config', None, 'Config file, which names the dataset and the views.'
  )
  flags.DEFINE_string(
    'workdir', None, 'Folder to write: report, checkpoint and features.'
  )
  flags.DEFINE_string(
    'features', '', 'Folder of the features; by default WORKDIR/features.'
  )
  flags.DEFINE_enum(
    'head', 'all', ['all', 'linear', 'attentive'], 'Kinds of heads to train.'
  )
  flags.DEFINE_integer(
    'views',
    0,
    'Random clips of each training video, cropped and flipped as in training; '
    '0: its center clip.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'overwrite', False, 'Replace the report and checkpoint of the workdir.'
  )
  flags.mark_flags_as_required(['checkpoint', 'config', 'workdir'])


def main() -> None:
  """Computes features, and trains and tests heads."""
  command_line.stop_signals.exit_message = '; run the same command to resume'
  command_line.enable_compilation_cache()

  from dualformer_jax.probing import probe
  from dualformer_jax.training import cpu_memory

  cpu_memory.keep_memory()
  probe.probe(
    FLAGS.config,
    FLAGS.checkpoint,
    FLAGS.workdir,
    features=FLAGS.features,
    kinds=probe.KINDS if FLAGS.head == 'all' else (FLAGS.head,),
    views=FLAGS.views,
    overwrite=FLAGS.overwrite,
  )


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
