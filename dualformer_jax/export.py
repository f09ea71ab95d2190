r"""Exports a checkpoint as one file that runs with JAX alone.

  python -m dualformer_jax.export --checkpoint=DIR --out=model.zip \
    [--weights=model.safetensors] [--dtype=float32]
  python -m dualformer_jax.export --check=model.zip

The file has a StableHLO program with its weights, for CPUs, CUDA GPUs and TPUs.
The input is uint8 views of any number of videos, the output is probabilities
averaged over views. The file also has the class names, the preprocessing, and a
golden input with its expected output, which --check compares.
"""

import functools
import pathlib

from absl import flags

from dualformer_jax import command_line, progress
from dualformer_jax.command_line import CHECKPOINT_HELP
from dualformer_jax.errors import UserError
from dualformer_jax.files import check_target

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('checkpoint', None, CHECKPOINT_HELP)
  flags.DEFINE_string('out', None, 'The .zip file to write.')
  flags.DEFINE_string(
    'weights', None, 'A .safetensors file to write the weights to.'
  )
  dtypes = ['float32', 'bfloat16']
  flags.DEFINE_enum('dtype', dtypes[0], dtypes, 'Compute dtype of the program.')
  flags.DEFINE_string(
    'check', None, 'An exported file to run on its golden input.'
  )
  flags.DEFINE_bool('overwrite', False, 'Replace existing files.')


def main() -> None:
  """Exports or checks."""
  targets = [name for name in (FLAGS.out, FLAGS.weights) if name]
  if not FLAGS.check and not (FLAGS.checkpoint and targets):
    raise UserError(
      '--checkpoint and --out must be given, or --check; see --help'
    )
  for name in targets:
    check_target(pathlib.Path(name), FLAGS.overwrite)

  # Imported late, so that --help and errors in flags do not wait for JAX.
  from dualformer_jax.inference import exported

  command_line.enable_compilation_cache()
  if FLAGS.check:
    with progress.waiting('running the program'):
      difference = exported.check_program(pathlib.Path(FLAGS.check))
    print(f'{FLAGS.check}: agrees with its golden input to {difference:.2g}')
    return

  from dualformer_jax.inference.recognizer import Recognizer

  recognizer = Recognizer.load(FLAGS.checkpoint, dtype=FLAGS.dtype)
  if FLAGS.out:
    out = pathlib.Path(FLAGS.out)
    with progress.waiting('exporting'):
      description = exported.export_program(recognizer, out)
    print(f'{out}: {out.stat().st_size / 1e6:.1f} MB, {description}')
  if FLAGS.weights:
    count = exported.save_weights(recognizer, pathlib.Path(FLAGS.weights))
    print(f'{FLAGS.weights}: {count} arrays')


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
