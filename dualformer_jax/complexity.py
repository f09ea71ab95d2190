r"""Prints parameters and multiply-adds of a model, part by part.

python -m dualformer_jax.complexity --config=configs/k400_tiny.py [--json] \
    [--config.model.FIELD=VALUE ...]

Counts without running the model; see dualformer_jax/models/flops.py.
"""

import dataclasses
import functools
import itertools
import json
from typing import Any

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
  flags.DEFINE_bool('json', False, 'Whether to print JSON, with every layer.')
  flags.mark_flags_as_required(['config'])


def main() -> None:
  """Counts and prints."""
  # Imported here, so that --help does not wait for JAX.
  from dualformer_jax.checkpoints import checkpoint
  from dualformer_jax.models import flops
  from dualformer_jax.models.dualformer import DualFormer

  config = FLAGS.config
  if config.model.num_classes < 1:
    raise UserError(
      f'config.model.num_classes is {config.model.num_classes}, expected at'
      ' least 1, as no dataset is read; add --config.model.num_classes=N'
    )
  model = DualFormer(**config.model.to_dict())
  checkpoint.variable_shapes(model, 'config.model')  # raises if it is invalid
  rows = flops.count(model)
  views = config.test.num_clips * config.test.num_crops
  totals = {
    'backbone': [row for row in rows if row.module.startswith('backbone/')],
    'with the head': [row for row in rows if row.part != flops.TOKEN_HEAD],
  }
  if model.token_label:
    totals['with the token-label head'] = list(rows)
  if FLAGS.json:
    result = {
      'views': views,
      'view': {name: _sum(part) for name, part in totals.items()},
      'layers': [dataclasses.asdict(row) for row in rows],
    }
    print(json.dumps(result, indent=1))
    return

  def print_line(name: str, layers: list[Any]) -> None:
    sums = _sum(layers)
    billions = sums['multiply_adds'] / 1e9
    print(
      f'{name:26}{sums["parameters"]:13,}{billions:14.3f}'
      f'{views * billions:14.3f}'
    )

  side = model.image_size
  size = f'{model.num_frames} x {side} x {side} pixels'
  print(
    f'{f"{size}, {model.num_classes} classes":39}{"10^9 multiply-adds":>28}'
  )
  print(f'{"":26}{"parameters":>13}{"1 view":>14}{f"{views} views":>14}')
  for stage, group in itertools.groupby(rows, lambda row: row.stage):
    layers = list(group)
    indent = ''
    if stage is not None:
      print_line(f'stage {stage}', layers)
      indent = '  '
    for part in dict.fromkeys(row.part for row in layers):
      print_line(indent + part, [row for row in layers if row.part == part])
  print()
  for name, layers in totals.items():
    print_line(name, layers)


def _sum(rows: list[Any]) -> dict[str, int]:
  return {
    'parameters': sum(row.parameters for row in rows),
    'multiply_adds': sum(row.multiply_adds for row in rows),
  }


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
