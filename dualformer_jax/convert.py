r"""Converts a PyTorch file to a checkpoint folder, or back to a .pth file.

  python -m dualformer_jax.convert --config=configs/k400_tiny.py \
    --src=model.pth --dst=DIR [--config.FIELD=VALUE ...] \
    [--class_names=data/kinetics400/labels.txt]

  python -m dualformer_jax.convert --src=DIR --dst=model.pth

The file may also be a .safetensors file or a checkpoint of another trainer:
prefixes and wrappers of DistributedDataParallel, torch.compile, Lightning,
MMEngine and timm are recognized. The config provides what a file lacks: the
number of attention heads, frames, normalization, test views. PyTorch is not
needed, and no code of a file is run.
"""

import functools
import pathlib

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line, files
from dualformer_jax.checkpoints import hub, stored_folder
from dualformer_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
    'src',
    None,
    'The .pth or .safetensors file, checkpoint folder or workdir, also at '
    'gs:// or s3://, or hf://OWNER/NAME[@REVISION][/FILE].',
    required=True,
  )
  flags.DEFINE_string(
    'dst', None, 'The folder or .pth file to write.', required=True
  )
  config_flags.DEFINE_config_file(
    'config', None, 'The recipe that a .pth file was trained with.'
  )
  flags.DEFINE_string(
    'class_names',
    '',
    'A text file with one class name per line. By default, the names are those '
    "of the config's dataset, if it is prepared.",
  )
  flags.DEFINE_bool(
    'inflate', False, 'Make an image model a video model, with a new head.'
  )
  flags.DEFINE_bool(
    'ema', False, 'Choose the averages (EMA) of the weights in the file.'
  )


def main() -> None:
  """Converts in the direction that the flags imply."""
  dst = pathlib.Path(FLAGS.dst).expanduser()
  to_pth = dst.suffix == '.pth'
  for name in ('config', 'class_names', 'inflate', 'ema'):
    if to_pth and FLAGS[name].value:
      raise UserError(
        f'--{name} has no effect if --dst is a .pth file; omit it, or pass a '
        'folder as --dst'
      )
  src = FLAGS.src
  if stored_folder.is_address(src):
    src = str(stored_folder.local_path(src))
  if hub.is_address(src):
    is_checkpoint = not hub.Address.parse(src).file
  else:
    is_checkpoint = pathlib.Path(src).expanduser().is_dir()
  if not to_pth and is_checkpoint:
    raise UserError(
      f'--src={FLAGS.src} is a checkpoint, but --dst={dst} is not a file name '
      'that ends in .pth'
    )
  if not to_pth and FLAGS.config is None:
    raise UserError(
      '--config must be given to convert a .pth file: the recipe that it was '
      'trained with, such as --config=configs/k400_tiny.py'
    )
  files.check_writable(dst)
  src = stored_folder.local_path(src)
  # Imported late: --help and errors in flags do not wait for JAX.
  import jax

  from dualformer_jax.checkpoints import conversion
  from dualformer_jax.training import setup

  # Nothing is computed, and an accelerator may be in use.
  jax.config.update('jax_platforms', 'cpu')
  if to_pth:
    summary = conversion.folder_to_pth(src, dst)
  else:
    config = FLAGS.config
    preprocessing = setup.make_preprocessing(config, config.test)
    summary = conversion.pth_to_folder(
      src,
      dst,
      config,
      preprocessing,
      FLAGS.class_names,
      inflate=FLAGS.inflate,
      ema=FLAGS.ema,
    )
  print(summary)


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
