"""Conversion between .pth files and checkpoint folders."""

import collections
from collections.abc import Mapping
import contextlib
import pathlib
import re
from typing import Any

import jax
import numpy as np

from dualformer_jax.checkpoints import (
  checkpoint,
  pth_file,
  pytorch_names,
  transfer,
  weights,
)
from dualformer_jax.checkpoints.messages import listed
from dualformer_jax.checkpoints.metadata import CheckpointMetadata
from dualformer_jax.errors import UserError
from dualformer_jax.files import check_writable, read_text, unfinished
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer

# PyTorch name (regex) -> row of the printed table.
_ROWS = {
  r'.*\.(running_mean|running_var|num_batches_tracked)': 'BatchNorm statistics',
  r'backbone\.(?:patch_embeds|blocks|pos_block)\.(\d+)\..*': r'stage \1',
  r'backbone\.norm\..*': 'last norm',
  r'cls_head\.token_linear\..*': 'token-label head',
  r'cls_head\..*': 'head',
}


def pth_to_folder(
  src: pathlib.Path,
  dst: pathlib.Path,
  config: Any,
  preprocessing: Preprocessing,
  class_names: str = '',
  inflate: bool = False,
  ema: bool = False,
) -> str:
  """Converts a .pth or .safetensors file to a folder; returns a summary.

  The file determines model.token_label and model.head of the config, and
  model.num_classes if that is 0. Class names are read from the text file
  `class_names`, or else from the config's dataset if it is prepared. If
  `inflate`, the file must hold an image model, which becomes a video model with
  a new head. If `ema`, averages of the weights are chosen.

  Raises:
    UserError: the file is damaged, malicious or does not fit the config, or
      `dst` is not empty. Nothing is written then.
  """
  state_dict, dropped, choices = weights.read(src, ema)
  # Orbax has threads that report a full disk once it is full, at length.
  count = sum(array.size for array in state_dict.values())
  check_writable(dst, round(1.1 * 4 * count))
  if transfer.is_image_model(state_dict) != inflate:
    raise UserError(
      f'{src} is a video model: leave out --inflate'
      if inflate
      else f'{src} is an image model: add --inflate to make it a video model, '
      'or start training from it with --config.init_from'
    )
  in_file = None if inflate else pytorch_names.num_classes(state_dict)
  wanted = config.model.num_classes
  if in_file is not None and wanted not in (0, in_file):
    raise UserError(
      f'{src} has {in_file} classes, config.model.num_classes is {wanted}; if '
      f'the file is right, add --config.model.num_classes={in_file}'
    )
  names, note = _class_names(config.dataset, class_names, in_file or wanted)
  fields = {**config.model.to_dict(), 'num_classes': len(names)}
  if not inflate:
    fields |= pytorch_names.head_fields(state_dict)
  model = DualFormer(**fields)
  shapes = checkpoint.variable_shapes(model, 'config.model')
  origins: list[str] = []
  if inflate:
    initial: Any = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    # Only the head is initialized; everything else comes from the file.
    initial['params']['cls_head'] = jax.jit(
      lambda key, clips: model.init(key, clips)['params']['cls_head']
    )(jax.random.key(config.seed), np.zeros(model.input_shape(), np.float32))
    start = pytorch_names.to_pytorch(initial)
    result = transfer.adapt(state_dict, start, keep_head=False, name=str(src))
    state_dict, origins = result.state_dict, ['', *result.table()]
  variables, notes = pytorch_names.from_pytorch(
    state_dict, shapes, source=str(src)
  )
  metadata = CheckpointMetadata(
    fields, preprocessing, names, config.dataset.multi_label
  )
  with unfinished(dst.with_name(f'{dst.name}.orbax-checkpoint-tmp')):
    checkpoint.save_model(dst, variables, metadata)
  return '\n'.join(
    [
      f'{src} -> {dst}',
      '',
      *_parameter_table(state_dict),
      *origins,
      '',
      *_facts(metadata),
      f'{"dropped:":18}{listed(dropped) or "nothing"}',
      *(f'note: {text}' for text in (note, *choices, *notes)),
      '',
      f"Usage in Python:  dualformer_jax.load('{dst}').predict('VIDEO')",
    ]
  )


def folder_to_pth(src: pathlib.Path, dst: pathlib.Path) -> str:
  """Writes the model of a folder to a .pth file, and returns a summary."""
  folder = checkpoint.find(src)
  variables, metadata = checkpoint.load_model(folder)
  state_dict = pytorch_names.to_pytorch(variables)
  pth_file.write_pth(dst, state_dict)
  dropped = 'class names and preprocessing, which a .pth file cannot hold'
  if metadata.step:
    dropped = f'the optimizer at step {metadata.step}, the config, {dropped}'
  return '\n'.join(
    [
      f'{folder} -> {dst}',
      '',
      *_parameter_table(state_dict),
      '',
      f'dropped: {dropped}',
      '',
      f"Usage in Python:  torch.load('{dst}', weights_only=True)",
    ]
  )


def _class_names(
  dataset: Any, file: str, count: int
) -> tuple[tuple[str, ...], str]:
  """Returns `count` class names (0: as many as there are), and a note."""
  names, origin = (), f'the dataset {dataset.name!r} is not prepared'
  if file:
    text = read_text(pathlib.Path(file).expanduser())
    names, origin = tuple(map(str.strip, text.strip().splitlines())), file
    if not names or not all(names):
      raise UserError(
        f'--class_names={file} has an empty line; expected one name per line'
      )
    [(name, number)] = collections.Counter(names).most_common(1)
    if number > 1:
      raise UserError(
        f'--class_names={file} has {name!r} {number} times; expected different'
        ' names'
      )
  else:
    with contextlib.suppress(UserError):
      split, folder = dataset.train_split, dataset.data_dir
      data = PreparedDataset(dataset.name, split, folder)
      names, origin = data.class_names, str(data.folder)
  if names and count in (0, len(names)):
    return names, f'the class names are those of {origin}'
  if names:
    origin = f'{origin} has {len(names)} classes, expected {count}'
  if file:
    raise UserError(f'--class_names: {origin}')
  placeholders = tuple(f'class {i}' for i in range(max(count, 1)))
  return placeholders, f'class names are unknown: {origin}; set --class_names'


def _parameter_table(state_dict: Mapping[str, np.ndarray]) -> list[str]:
  """Returns the lines of a table: tensors and numbers of each part."""
  sizes = collections.defaultdict[str, list[int]](list)
  for name, array in state_dict.items():
    matches = ((re.fullmatch(p, name), row) for p, row in _ROWS.items())
    row = next(match.expand(row) for match, row in matches if match)
    sizes[row].append(array.size)
  sizes['all'] = [array.size for array in state_dict.values()]
  return [
    f'{"":22}{"tensors":>8}{"numbers":>14}',
    *(f'{row:22}{len(n):8}{sum(n):14,}' for row, n in sizes.items()),
  ]


def _facts(metadata: CheckpointMetadata) -> list[str]:
  """Returns lines that summarize the metadata, for the user to check."""
  p, names = metadata.preprocessing, metadata.class_names
  facts = {
    'classes': f'{len(names)}, from {names[0]!r} to {names[-1]!r}',
    'token-label head': 'yes' if metadata.model['token_label'] else 'none',
    'frames': f'{p.num_frames}, {p.frame_interval} apart ({p.sampling})',
    'image size': f'{p.image_size} x {p.image_size}',
    'pixel mean': ' '.join(f'{value:g}' for value in p.pixel_mean),
    'pixel std': ' '.join(f'{value:g}' for value in p.pixel_std),
    'test views': f'{p.num_clips} clips x {p.num_crops} crops',
  }
  return [f'{name + ":":18}{value}' for name, value in facts.items()]
