r"""Prints parameters and multiply-adds of a model, part by part.

python -m dualformer_jax.complexity --config=configs/k400_tiny.py [--json] \
    [--config.model.FIELD=VALUE ...]

Nothing is computed; dualformer_jax/models/complexity.py says what counts.
"""

import dataclasses
import itertools
import json

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line
from dualformer_jax.models import complexity
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import checkpoint

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe, a file such as configs/k400_tiny.py.'
)
_JSON = flags.DEFINE_bool(
  'json', False, 'Whether to print JSON, with every layer by itself.'
)


def main() -> None:
  """Counts and prints."""
  config = _CONFIG.value
  model = DualFormer(**config.model.to_dict())
  checkpoint.variable_shapes(model, 'config.model')  # UserError if it is none
  rows = complexity.count(model)
  views = config.test.num_clips * config.test.num_crops
  totals = {
    'backbone': [row for row in rows if row.module.startswith('backbone/')],
    'with the head': [row for row in rows if row.part != complexity.TOKEN_HEAD],
  }
  if model.token_label:
    totals['with the token-label head'] = rows
  if _JSON.value:
    result = {
      'views': views,
      'view': {name: _sums(part) for name, part in totals.items()},
      'layers': [dataclasses.asdict(row) for row in rows],
    }
    print(json.dumps(result, indent=1))
    return

  def line(name: str, layers: list[complexity.Row]) -> str:
    sums = _sums(layers)
    billions = sums['multiply_adds'] / 1e9
    return (
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
      print(line(f'stage {stage}', layers))
      indent = '  '
    for part in dict.fromkeys(row.part for row in layers):
      print(line(indent + part, [row for row in layers if row.part == part]))
  print()
  for name, layers in totals.items():
    print(line(name, layers))


def _sums(rows: list[complexity.Row]) -> dict[str, int]:
  return {
    'parameters': sum(row.parameters for row in rows),
    'multiply_adds': sum(row.multiply_adds for row in rows),
  }


def cli() -> None:
  """Runs the command."""
  flags.mark_flags_as_required(['config'])
  command_line.run(main)


if __name__ == '__main__':
  cli()
