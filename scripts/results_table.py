"""Updates the table of results, docs/results.md, with reports of tests.

  python scripts/results_table.py [--out=docs/results.md] RUN_OR_REPORT ...

RUN_OR_REPORT is the workdir of a run, or its report.json. Rows of other reports
stay; a report that is in the table already replaces its row. For each report,
prints whether the published accuracy is inside the 95% interval.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import pathlib
import re
import runpy
from typing import Any

from absl import flags

from dualformer_jax import command_line, files
from dualformer_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# Top-1 accuracy in the paper, in percent; None if it has none. These recipes
# are always in the table, others once they are measured.
PUBLISHED_TOP1: dict[str, float | None] = {
  'k400_tiny': 79.5,
  'k400_small': 80.6,
  'k400_base': 81.1,
  'k600_base': 85.2,
  'diving48_small': 81.8,
  'hmdb51_small': 76.4,
  'ucf101_small': 97.5,
  'ucf101_tiny': None,
}
NOT_MEASURED = 'not measured'
# Fields that do not change what is learned or tested.
_FREE_FIELDS = re.compile(
  r'dataset\.(data_dir|cache_\w+|num_threads|prefetch)|mesh\..*|init_from'
  r'|token_labels\.(teacher|stored)|model\.remat|checkpoint\..*|tracker.*'
  r'|log_every_steps|overfit_steps'
)
# Fields that the dataset or the checkpoint sets if the recipe does not.
_RESOLVED_FIELDS = (
  'model.num_classes',
  'dataset.pixel_mean',
  'dataset.pixel_std',
)
_TEXT = """# Results

Accuracy of the recipes in `configs/`, trained and tested with this project,
and that of the paper. The interval is that of a 95% confidence level
(Wilson). Views are clips per video x crops per clip. The dataset is
identified by the fingerprint of its videos, the checkpoint by the SHA-256 of
its parameters; both are shortened. Hours are those of training, on the
hardware in the table. Rows with changed fields differ from the published
recipe.

`scripts/reproduce.sh RECIPE DATA` adds a row; this table is written by
`scripts/results_table.py`.

"""


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table, as text."""

  recipe: str
  published_top1: str
  measured_top1: str = NOT_MEASURED
  views: str = ''
  dataset: str = ''
  checkpoint: str = ''
  hardware: str = ''
  hours: str = ''
  changed_fields: str = ''

  def key(self) -> tuple[str, ...]:
    """Returns what identifies the test."""
    return self.recipe, self.views, self.dataset, self.checkpoint


_COLUMNS = [field.name for field in dataclasses.fields(Row)]


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
    'out', str(REPOSITORY / 'docs' / 'results.md'), 'The table to update.'
  )


def main(paths: list[str]) -> None:
  """Adds the rows, writes the table and prints the comparisons."""
  out = pathlib.Path(flags.FLAGS.out)
  rows = {row.key(): row for row in read_table(out)}
  messages = []
  for path in paths:
    report = read_report(path)
    try:
      row = make_row(report)
      messages.append(compare(report))
    except (KeyError, TypeError, IndexError, ValueError) as error:
      raise UserError(
        f'{path}: is not a report with a recipe and top-1 '
        f'({type(error).__name__}: {error}); write it again with --mode=test'
      ) from error
    rows[row.key()] = row
  with files.output_file(out) as file:
    file.write(format_table(list(rows.values())).encode())
  print(*messages, f'wrote {out}', sep='\n')


def read_report(path: str) -> dict[str, Any]:
  """Reads report.json of a workdir, or the file."""
  file = pathlib.Path(path).expanduser()
  if file.is_dir():
    file = file / 'report.json'
  try:
    return json.loads(files.read_text(file))
  except json.JSONDecodeError as error:
    raise UserError(f'{file}: is not JSON ({error})') from error


def make_row(report: dict[str, Any]) -> Row:
  """Returns the row of a report."""
  low, high = report['view_budget'][-1]['interval']
  views, dataset = report['views'], report['dataset']
  training = report['training'] or {}
  hours = training.get('hours')
  devices = training.get('hardware')
  return Row(
    recipe=_cell(report['recipe']),
    published_top1=_published(report['recipe']),
    measured_top1=f'{report["top1"]:.2%} ({low:.2%} to {high:.2%})',
    views=f'{views["num_clips"]:d} x {views["num_crops"]:d}',
    dataset=_cell(
      f'{report["config"]["dataset"]["name"]} {dataset["split"]}, '
      f'{report["num_videos"]:,} videos, {dataset["fingerprint"][:12]}'
    ),
    checkpoint=_cell(report['checkpoint_sha256'][:12]),
    hardware=_cell(', '.join(devices) if devices else 'unknown'),
    hours='unknown' if hours is None else f'{hours:.2f}',
    changed_fields=_cell(', '.join(changed_fields(report))) or 'none',
  )


def changed_fields(report: dict[str, Any]) -> Iterator[str]:
  """Yields the fields that differ from the recipe, in training or test."""
  if report['recipe'] not in recipes():
    yield 'the recipe is not one of this repository'
    return
  expected = dict(_flatten(recipe_config(report['recipe'])))
  tested = dict(_flatten(report['config']))
  trained = dict(_flatten((report['training'] or {}).get('config') or {}))
  for name, value in expected.items():
    is_resolved = name in _RESOLVED_FIELDS and value in (0, [])
    if is_resolved or _FREE_FIELDS.fullmatch(name):
      continue
    used = [config[name] for config in (trained, tested) if name in config]
    if different := [other for other in used if other != value]:
      yield f'{name}={different[0]}'


def compare(report: dict[str, Any]) -> str:
  """Compares a report with the published accuracy, in a sentence."""
  recipe, top1 = report['recipe'], 100 * report['top1']
  low, high = (100 * x for x in report['view_budget'][-1]['interval'])
  text = f'{recipe}: top-1 {top1:.2f}%, 95% interval {low:.2f}% to {high:.2f}%'
  published = PUBLISHED_TOP1.get(recipe)
  if published is None:
    return f'{text}; there is no published top-1'
  if low <= published <= high:
    where = 'inside the interval'
  else:
    where = f'{"above" if published > high else "below"} the interval'
  return f'{text}; the published {published}% is {where}'


def recipes() -> dict[str, pathlib.Path]:
  """Returns the config files of the repository by name."""
  return {path.stem: path for path in (REPOSITORY / 'configs').glob('*.py')}


def recipe_config(name: str) -> dict[str, Any]:
  """Returns the config of a recipe, as a report has it."""
  config = runpy.run_path(str(recipes()[name]))['get_config']().to_dict()
  return json.loads(json.dumps(config))


def read_table(path: pathlib.Path) -> Iterator[Row]:
  """Yields the measured rows of a table."""
  if not path.exists():
    return
  for line in files.read_text(path).splitlines():
    cells = [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
    is_row = len(cells) == len(_COLUMNS) and '%' in cells[2]
    if is_row:
      yield Row(*cells)


def format_table(measured: Sequence[Row]) -> str:
  """Returns the content of the file, with recipes that are not measured."""
  order = [*PUBLISHED_TOP1, *sorted({row.recipe for row in measured})]
  missing = set(PUBLISHED_TOP1) - {row.recipe for row in measured}
  rows = [*measured, *(Row(name, _published(name)) for name in missing)]
  rows.sort(key=lambda row: (order.index(row.recipe), row.key()))
  table = [
    [name.replace('_', ' ').replace('top1', 'top-1') for name in _COLUMNS],
    ['---'] * len(_COLUMNS),
    *(dataclasses.astuple(row) for row in rows),
  ]
  return _TEXT + ''.join(f'| {" | ".join(cells)} |\n' for cells in table)


def _published(recipe: str) -> str:
  published = PUBLISHED_TOP1.get(recipe)
  return 'none' if published is None else f'{published}%'


def _cell(text: str) -> str:
  text = ' '.join(text.split())
  return text.replace('<', '&lt;').replace('\\', '/').replace('|', '\\|')


def _flatten(
  fields: dict[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  for name, value in fields.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value


if __name__ == '__main__':
  command_line.run(main, define_flags, 'RUN_OR_REPORT')
