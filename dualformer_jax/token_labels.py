r"""Stores token labels: a teacher's scores of every token of a dataset.

  python -m dualformer_jax.token_labels --checkpoint=TEACHER \
    --config=configs/k400_tiny_tokenlabel.py --config.dataset.data_dir=DATA

Training with --config.token_labels.stored then needs no teacher. The same
command resumes an interrupted run.
"""

import functools

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
    'checkpoint', None, f'Of the teacher. {command_line.CHECKPOINT_HELP}'
  )
  config_flags.DEFINE_config_file(
    'config', None, 'Config file of the student, which names the dataset.'
  )
  flags.DEFINE_string(
    'out', '', 'Folder to write; by default DATASET/token_labels/SPLIT.'
  )
  flags.DEFINE_integer(
    'top', 5, 'Number of logits to store of each token; 0 for all.', 0
  )
  flags.DEFINE_integer(
    'clips', 8, 'Number of clips in a batch over all devices.', 1
  )
  flags.mark_flags_as_required(['config', 'checkpoint'])


def main() -> None:
  """Stores token labels."""
  command_line.enable_compilation_cache()

  from dualformer_jax.training import store_token_labels

  store_token_labels.store_labels(
    FLAGS.config, FLAGS.checkpoint, FLAGS.out, FLAGS.top, FLAGS.clips
  )


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
