r"""Converts a PyTorch .pth file to a checkpoint folder, or the other way.

  python -m dualformer_jax.convert --config=configs/k400_tiny.py \
    --src=model.pth --dst=DIR [--class_names=FILE] [--config.FIELD=VALUE ...]

  python -m dualformer_jax.convert --inflate --config=configs/k400_tiny.py \
    --src=images.pth --dst=DIR

  python -m dualformer_jax.convert --src=DIR --dst=model.pth

The config says what the .pth file does not: heads, frames, normalisation, test
views. PyTorch is not needed, and no code in a .pth file is run.
"""

from collections.abc import Mapping
import math
import pathlib
import re
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from dualformer_jax import command_line, pytorch, transfer
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.records import PreparedDataset
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import checkpoint, loop

_SRC = flags.DEFINE_string(
  'src',
  None,
  'What to convert: a .pth file, or a checkpoint folder or the workdir of a '
  'training run.',
  required=True,
)
_DST = flags.DEFINE_string(
  'dst',
  None,
  'What to make: a folder, or a file that ends in .pth.',
  required=True,
)
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe that a .pth file was trained with.'
)
_CLASS_NAMES = flags.DEFINE_string(
  'class_names',
  '',
  'A text file with the name of each class, one a line. Without it the names '
  "are those of the config's dataset, where that is prepared.",
)

_INFLATE = flags.DEFINE_bool(
  'inflate',
  False,
  'Make a model of videos of one of images; its head is made anew.',
)

# Part of a PyTorch name -> row of the table that is printed.
_GROUPS = (
  (
    r'.*\.(running_mean|running_var|num_batches_tracked)',
    'BatchNorm statistics',
  ),
  (r'backbone\.(?:patch_embeds|blocks|pos_block)\.(\d+)\..*', r'stage \1'),
  (r'backbone\.norm\..*', 'last norm'),
  (r'cls_head\.fc_cls\..*', 'head'),
  (r'cls_head\.token_linear\..*', 'token-label head'),
)


def pth_to_folder(
  src: pathlib.Path,
  dst: pathlib.Path,
  config: Any,
  class_names_file: str = '',
  inflate: bool = False,
) -> str:
  """Converts a .pth file to a checkpoint folder.

  Args:
    src: the .pth file.
    dst: the folder, which must not exist or be empty.
    config: as in configs/common.py. `model` says what the file holds; the file
      says whether there is a token-label head, and how many classes where that
      is 0. `dataset` and `test` say how videos are prepared.
    class_names_file: text with a name a line, or '' for the names of the
      prepared dataset or, failing that, 'class 0', 'class 1' ...
    inflate: whether the file holds a model of images, to be made one of videos
      with a head made anew; see transfer.transfer.

  Returns:
    What was done, in lines for the user.

  Raises:
    UserError: the file is damaged, hostile or of another model, the names do
      not fit, or `dst` is taken. Then nothing is written.
  """
  dropped: list[str] = []
  state_dict = pytorch.read_pth(src, dropped)
  if transfer.is_image_model(state_dict) != inflate:
    raise UserError(
      f'{src} is a model of videos: leave --inflate out'
      if inflate
      else f'{src} is a model of images: add --inflate to make one of videos '
      'of it, or train from it with --config.init_from'
    )
  found = None if inflate else pytorch.num_classes(state_dict)
  wanted = config.model.num_classes
  if found is not None and wanted not in (0, found):
    raise UserError(
      f'{src} has {found} classes, config.model.num_classes is {wanted}; if '
      f'the file is right, add --config.model.num_classes={found}'
    )
  names, names_note = _class_names(
    found or wanted or 1, class_names_file, config
  )
  fields = {
    **config.model.to_dict(),
    'num_classes': len(names),
    'token_label': config.model.token_label
    if inflate
    else pytorch.has_token_head(state_dict),
  }
  model = DualFormer(**fields)
  shapes = checkpoint.variable_shapes(model, 'config.model')
  became: list[str] = []
  if inflate:
    start: Any = jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes
    )
    # The head alone: all else is taken from the images.
    start['params']['cls_head'] = jax.jit(
      lambda key, clips: model.init(key, clips)['params']['cls_head']
    )(jax.random.key(config.seed), np.zeros(model.input_shape(), np.float32))
    result = transfer.transfer(
      state_dict, pytorch.to_pytorch(start), keep_head=False, name=str(src)
    )
    state_dict, became = result.state_dict, ['', *result.table()]
  variables, notes = pytorch.from_pytorch(state_dict, shapes, source=str(src))
  preprocessing = loop.make_preprocessing(config, config.test)
  description = checkpoint.Description(
    fields, preprocessing, names, config.dataset.multi_label
  )
  checkpoint.save_model(dst, variables, description)

  p = preprocessing
  facts = [
    ('classes', f'{len(names)}, from {names[0]!r} to {names[-1]!r}'),
    (
      'token-label head',
      ('made anew' if inflate else 'yes, as in the file')
      if fields['token_label']
      else 'none',
    ),
    (
      'clips',
      f'{p.num_frames} frames of {p.image_size} x {p.image_size} pixels, '
      + (
        'spread evenly'
        if p.sampling == 'uniform'
        else f'{p.frame_interval} apart'
      ),
    ),
    ('pixels', f'mean {_row(p.pixel_mean)}, deviation {_row(p.pixel_std)}'),
    (
      'test views',
      f'{p.num_clips * p.num_crops} ({p.num_clips} x {p.num_crops})',
    ),
    ('dropped', ', '.join(dropped) or 'nothing'),
  ]
  return '\n'.join(
    [
      f'{src} -> {dst}',
      '',
      *_table(state_dict),
      *became,
      '',
      *(f'{name + ":":18}{value}' for name, value in facts),
      *(f'note: {note}' for note in (names_note, *notes)),
      '',
      f"To use it, in Python:  dualformer_jax.load('{dst}').predict('VIDEO')",
    ]
  )


def folder_to_pth(src: pathlib.Path, dst: pathlib.Path) -> str:
  """Writes the model in a checkpoint folder to a .pth file.

  The file holds a bare state_dict, which torch.load(weights_only=True) reads,
  with the names and the order of the PyTorch implementation.

  Args:
    src: a checkpoint folder, or the workdir of a training run.
    dst: the file, which must not exist.

  Returns:
    What was done, in lines for the user.

  Raises:
    UserError: there is no whole checkpoint, or `dst` exists or cannot be
      written.
  """
  folder = checkpoint.find(src)
  variables, description = checkpoint.load_model(folder)
  state_dict = pytorch.to_pytorch(variables)
  pytorch.write_pth(dst, state_dict)
  left_out = 'class names and preprocessing, which a .pth file has no place for'
  if description.step:
    left_out = (
      f'the optimizer at step {description.step}, the config; {left_out}'
    )
  return '\n'.join(
    [
      f'{folder} -> {dst}',
      '',
      *_table(state_dict),
      '',
      f'left out: {left_out}',
      '',
      f"To use it, in Python:  torch.load('{dst}', weights_only=True)",
    ]
  )


def _class_names(
  count: int, file: str, config: Any
) -> tuple[tuple[str, ...], str]:
  """Returns the names of `count` classes, and what to tell of them."""
  if file:
    path = pathlib.Path(file).expanduser()
    try:
      text = path.read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(
        f'--class_names={file} cannot be read: {error}'
      ) from error
    names = tuple(line.strip() for line in text.strip().splitlines())
    if len(names) != count or not all(names):
      raise UserError(
        f'--class_names={file} has {len([*filter(None, names)])} names on '
        f'{len(names)} lines; expected one a line for each of the {count} '
        'classes'
      )
    return names, f'the class names are those in {file}'
  placeholders = tuple(f'class {i}' for i in range(count))
  dataset = config.dataset
  try:
    data = PreparedDataset(dataset.name, dataset.train_split, dataset.data_dir)
  except UserError:
    reason = f'the dataset {dataset.name!r} is not prepared'
  else:
    if len(data.class_names) == count:
      return data.class_names, f'the class names are those of {data.folder}'
    reason = f'{data.folder} has {len(data.class_names)} classes'
  return placeholders, (
    f'the names of the classes are not known, because {reason}; '
    '--class_names=FILE gives them'
  )


def _table(state_dict: Mapping[str, np.ndarray]) -> list[str]:
  """Returns the lines of a table of what was converted, part by part."""
  tensors: dict[str, int] = {}
  numbers: dict[str, int] = {}
  for name, array in state_dict.items():
    for pattern, row in _GROUPS:
      if match := re.fullmatch(pattern, name):
        row = match.expand(row)
        for key in (row, 'all'):
          tensors[key] = tensors.get(key, 0) + 1
          numbers[key] = numbers.get(key, 0) + math.prod(array.shape)
        break
  rows = sorted(tensors, key=lambda row: row == 'all')
  return [
    f'{"":22}{"tensors":>8}{"numbers":>14}',
    *(f'{row:22}{tensors[row]:8}{numbers[row]:14,}' for row in rows),
  ]


def _row(values: tuple[float, ...]) -> str:
  return ' '.join(f'{value:g}' for value in values)


def main() -> None:
  """Converts what the flags name, in the direction that they say."""
  src = pathlib.Path(_SRC.value).expanduser()
  dst = pathlib.Path(_DST.value).expanduser()
  # Nothing is computed, and an accelerator may be busy with something else.
  jax.config.update('jax_platforms', 'cpu')
  to_pth = dst.suffix == '.pth'
  if to_pth and src.is_file():
    raise UserError(
      f'--src={src} and --dst={dst} are both files; expected a folder as one '
      'of them'
    )
  if to_pth:
    if _CONFIG.value is not None or _CLASS_NAMES.value or _INFLATE.value:
      raise UserError(
        '--config, --class_names and --inflate have no effect on a .pth file; '
        'leave them out, or give a folder as --dst'
      )
    print(folder_to_pth(src, dst))
    return
  if src.is_dir():
    raise UserError(
      f'--src={src} is a folder, so --dst is to be a file; expected a name '
      f'that ends in .pth, got {dst}'
    )
  if _CONFIG.value is None:
    raise UserError(
      '--config must be given to convert a .pth file: the recipe that it was '
      'trained with, such as --config=configs/k400_tiny.py'
    )
  print(
    pth_to_folder(src, dst, _CONFIG.value, _CLASS_NAMES.value, _INFLATE.value)
  )


def cli() -> None:
  """Runs the command."""
  command_line.run(main)


if __name__ == '__main__':
  cli()
