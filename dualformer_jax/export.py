r"""Exports a checkpoint as one file, or uploads it to the Hugging Face Hub.

  python -m dualformer_jax.export --checkpoint=DIR --out=model.zip \
    [--weights=model.safetensors] [--dtype=float32]
  python -m dualformer_jax.export --check=model.zip
  python -m dualformer_jax.export --checkpoint=DIR --push=hf://OWNER/NAME \
    [--private] [--license=cc-by-4.0] [--out=model.zip]

The file has a StableHLO program with its weights, for CPUs, CUDA GPUs and TPUs.
The input is uint8 views of any number of videos, the output is probabilities
averaged over views. The file also has the class names, the preprocessing, and a
golden input with its expected output, which --check compares. It runs with JAX
alone.

--push uploads the checkpoint with a model card, and the file if --out is given.
All commands then take hf://OWNER/NAME as --checkpoint.
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
  flags.DEFINE_string(
    'push', None, 'Where to upload the checkpoint: hf://OWNER/NAME[@BRANCH].'
  )
  flags.DEFINE_bool(
    'private', False, 'With --push: a new repository is private, not public.'
  )
  flags.DEFINE_string(
    'license',
    'unknown',
    'With --push: the license of the weights, an identifier of the Hub such as '
    'apache-2.0 or cc-by-nc-4.0.',
  )
  flags.DEFINE_bool('overwrite', False, 'Replace existing files.')


def main() -> None:
  """Exports or checks."""
  targets = [name for name in (FLAGS.out, FLAGS.weights) if name]
  if not FLAGS.check and not (FLAGS.checkpoint and (targets or FLAGS.push)):
    raise UserError(
      '--checkpoint and --out must be given, or --checkpoint and --push, or '
      '--check; see --help'
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

  from dualformer_jax.checkpoints import hub_upload
  from dualformer_jax.inference import publishing
  from dualformer_jax.inference.recognizer import Recognizer

  target = None
  if FLAGS.push:
    target = hub_upload.find_target(FLAGS.push, FLAGS.overwrite, FLAGS.private)
  recognizer = Recognizer.load(FLAGS.checkpoint, dtype=FLAGS.dtype)
  if FLAGS.out:
    out = pathlib.Path(FLAGS.out)
    with progress.waiting('exporting'):
      description = exported.export_program(recognizer, out)
    print(f'{out}: {out.stat().st_size / 1e6:.1f} MB, {description}')
  if FLAGS.weights:
    count = exported.save_weights(recognizer, pathlib.Path(FLAGS.weights))
    print(f'{FLAGS.weights}: {count} arrays')
  if target is not None:
    exported_files = [pathlib.Path(FLAGS.out)] if FLAGS.out else []
    print(
      publishing.push(
        target,
        recognizer.folder,
        exported_files,
        private=FLAGS.private,
        license_name=FLAGS.license,
      )
    )


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
