r"""Exports a checkpoint as one file, or uploads it to the Hugging Face Hub.

  python -m dualformer_jax.export --checkpoint=DIR --out=model.zip
  python -m dualformer_jax.export --checkpoint=DIR --out=model.onnx
  python -m dualformer_jax.export --check=model.zip
  python -m dualformer_jax.export --renew=model.zip --overwrite
  python -m dualformer_jax.export --checkpoint=DIR --push=hf://OWNER/NAME \
    [--private] [--license=cc-by-4.0] [--out=model.zip]

Exported files run without this package. A .zip file has a StableHLO program,
for CPUs, CUDA GPUs and TPUs, and its weights. It needs only JAX. The input is
uint8 views of any number of videos, the output is probabilities averaged over
views. JAX guarantees for six months that newer releases can read a program;
--renew exports it again, from the weights in the file.

A .onnx file needs the extra 'onnx'. The input is any number of uint8 views, the
output is the probabilities of each.

Both have the class names, the preprocessing, and a test input with its expected
output, which --check compares.

--push uploads the checkpoint with a model card, and the file if --out is given.
All commands then take hf://OWNER/NAME as --checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import logging
import pathlib
from typing import TYPE_CHECKING

from absl import flags

from dualformer_jax import command_line, progress
from dualformer_jax.command_line import CHECKPOINT_HELP
from dualformer_jax.errors import UserError, require
from dualformer_jax.files import check_target, check_writable

if TYPE_CHECKING:
  from dualformer_jax.inference.recognizer import Recognizer
  from dualformer_jax.inference.stored_weights import Weights

FLAGS = flags.FLAGS
_LOG = logging.getLogger(__name__)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('checkpoint', None, CHECKPOINT_HELP)
  flags.DEFINE_string('out', None, 'The .zip or .onnx file to write.')
  flags.DEFINE_string(
    'weights', None, 'A .safetensors file to write the float32 weights to.'
  )
  dtypes = ['float32', 'bfloat16']
  flags.DEFINE_enum(
    'dtype', dtypes[0], dtypes, 'Compute dtype of the program in a .zip file.'
  )
  flags.DEFINE_enum(
    'weights_dtype',
    'float32',
    ['float32', 'int8'],
    "Type of the weights in --out; int8 needs the extra 'int8'.",
  )
  flags.DEFINE_string(
    'check', None, 'An exported file to run on its test input.'
  )
  flags.DEFINE_string(
    'renew',
    None,
    'A .zip file to export again with the installed JAX and its own dtypes, '
    'to --out or, with --overwrite, to the same file.',
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
  """Exports, renews or checks."""
  modes = [
    name for name in ('check', 'renew', 'checkpoint') if FLAGS[name].value
  ]
  if len(modes) != 1:
    raise UserError(
      'expected one of --checkpoint, --check and --renew; see --help'
    )
  for name in ('weights', 'push'):
    if FLAGS[name].value and not FLAGS.checkpoint:
      raise UserError(f'--{name} needs --checkpoint')
  if FLAGS.check:
    _check(pathlib.Path(FLAGS.check))
  elif FLAGS.renew:
    _renew(pathlib.Path(FLAGS.renew))
  else:
    _export()


def _export() -> None:
  if not (FLAGS.out or FLAGS.weights or FLAGS.push):
    raise UserError('--out must be given, or --weights or --push; see --help')
  out, is_onnx = None, False
  if FLAGS.out:
    out = pathlib.Path(FLAGS.out)
    check_target(out, FLAGS.overwrite, ('.zip', '.onnx'))
    is_onnx = out.suffix.lower() == '.onnx'
    if is_onnx and FLAGS.dtype != 'float32':
      raise UserError('--dtype=bfloat16 is for .zip files; ONNX has float32')
  if FLAGS.weights:
    check_target(
      pathlib.Path(FLAGS.weights), FLAGS.overwrite, ('.safetensors',)
    )

  if FLAGS.weights_dtype == 'int8':
    require('--weights_dtype=int8', 'int8', 'qwix')
  # Imported late, so that --help and errors in flags do not wait for JAX.
  from dualformer_jax.inference import onnx_export

  if is_onnx:
    onnx_export.require_onnxruntime()

  from dualformer_jax.checkpoints import hub_upload
  from dualformer_jax.inference import exported, stored_weights
  from dualformer_jax.inference.recognizer import Recognizer

  target = None
  if FLAGS.push:
    target = hub_upload.find_target(FLAGS.push, FLAGS.overwrite, FLAGS.private)
  command_line.enable_compilation_cache()
  recognizer = Recognizer.load(FLAGS.checkpoint, dtype=FLAGS.dtype)
  weights = stored_weights.flatten(recognizer.variables)
  if FLAGS.weights:
    count = exported.save_weights(weights, pathlib.Path(FLAGS.weights))
    print(f'{FLAGS.weights}: {count} arrays')
  if out is not None:
    _export_program(recognizer, weights, out)
  if target is not None:
    from dualformer_jax.inference import publishing

    print(
      publishing.push(
        target,
        recognizer.folder,
        [out] if out else [],
        private=FLAGS.private,
        license_name=FLAGS.license,
      )
    )


def _export_program(
  recognizer: Recognizer, weights: Weights, out: pathlib.Path
) -> None:
  from dualformer_jax.inference import exported, onnx_export, stored_weights

  if FLAGS.weights_dtype == 'int8':
    with progress.waiting('quantizing'):
      recognizer, weights, difference = stored_weights.quantize_recognizer(
        recognizer
      )
    print(
      'int8 weights change the probabilities of the test input by up to '
      f'{difference:.2g}'
    )
  is_onnx = out.suffix.lower() == '.onnx'
  write = onnx_export.export_onnx if is_onnx else exported.export_program
  _write(write, recognizer, weights, out)


def _write(
  write: Callable[[Recognizer, Weights, pathlib.Path], str],
  recognizer: Recognizer,
  weights: Weights,
  out: pathlib.Path,
) -> None:
  """Writes an exported file, if there is room for its weights."""
  check_writable(out, sum(array.nbytes for array in weights.values()))
  with progress.waiting('exporting'):
    description = write(recognizer, weights, out)
  print(f'{out}: {out.stat().st_size / 1e6:.1f} MB, {description}')


def _renew(path: pathlib.Path) -> None:
  out = pathlib.Path(FLAGS.out or path)
  check_target(out, FLAGS.overwrite, ('.zip',))

  from dualformer_jax.inference import exported

  command_line.enable_compilation_cache()
  recognizer, weights = exported.read_for_renewal(path)
  _write(exported.export_program, recognizer, weights, out)


def _check(path: pathlib.Path) -> None:
  warning = None
  if path.suffix.lower() == '.onnx':
    from dualformer_jax.inference import onnx_export

    with progress.waiting('running the model'):
      difference = onnx_export.check_onnx(path)
  else:
    from dualformer_jax.inference import exported

    command_line.enable_compilation_cache()
    with progress.waiting('running the program'):
      difference, warning = exported.check_program(path)
  print(f'{path}: agrees with its expected output to {difference:.2g}')
  if warning:
    _LOG.warning('%s', warning)


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
