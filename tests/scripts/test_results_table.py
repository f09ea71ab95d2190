"""The table of results, and the published accuracies that it compares with."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from scripts import results_table

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = results_table.PUBLISHED_TOP1


def make_report(recipe: str = 'hmdb51_small', **changes: Any) -> dict[str, Any]:
  """Returns what the table needs of a report."""
  fields = {}
  if recipe in results_table.recipes():
    fields = results_table.recipe_config(recipe)
  return {
    'recipe': recipe,
    'top1': 0.75,
    'num_videos': 1530,
    'views': {'num_clips': 4, 'num_crops': 3},
    'view_budget': [
      {'interval': [0.1, 0.2]},
      {'interval': [0.7278, 0.7711]},
    ],
    'dataset': {'split': 'test', 'fingerprint': '0123456789abcdef'},
    'checkpoint_sha256': 'fedcba9876543210',
    'training': {
      'hours': 2.5,
      'hardware': ['8 x NVIDIA H200'],
      'config': json.loads(json.dumps(fields)),
    },
    'config': {'dataset': {'name': 'hmdb51/split1'}} | fields,
    **changes,
  }


@pytest.fixture(name='update')
def _update(tmp_path):
  """Returns a function that adds reports to a table and returns its rows."""
  table = tmp_path / 'results.md'

  def run(*reports: dict[str, Any] | str) -> tuple[list[list[str]], str]:
    paths = []
    for number, report in enumerate(reports):
      folder = tmp_path / f'run {number}'
      folder.mkdir(exist_ok=True)
      text = report if isinstance(report, str) else json.dumps(report)
      (folder / 'report.json').write_text(text)
      paths.append(folder)
    done = subprocess.run(
      [
        sys.executable,
        ROOT / 'scripts' / 'results_table.py',
        f'--out={table}',
        *paths,
      ],
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )
    if done.returncode:
      assert done.returncode == 2
      return [], done.stderr
    lines = table.read_text().splitlines()
    rows = [line for line in lines if line.startswith('| ')][2:]
    return [row[2:-2].split(' | ') for row in rows], done.stdout

  return run


def test_published_accuracies_are_those_of_the_readme():
  lines = (ROOT / 'README.md').read_text('utf-8').splitlines()
  start = lines.index('| config | data | frames x interval | published top-1 |')
  found = {}
  for line in lines[start + 2 : lines.index('', start)]:
    names, _, _, values = (cell.strip() for cell in line.split('|')[1:-1])
    for name, value in zip(names.split(', '), values.split(', '), strict=True):
      found[name] = None if value == 'none' else float(value)
  assert found == PUBLISHED


@pytest.mark.parametrize('recipe', sorted(results_table.recipes()))
def test_published_accuracies_are_those_of_the_recipes(recipe):
  text = results_table.recipes()[recipe].read_text('utf-8')
  found = re.search(r'Published top-1: ([\d.]+)%', text)
  assert (float(found[1]) if found else None) == PUBLISHED.get(recipe)


def test_committed_table_is_complete():
  path = ROOT / 'docs' / 'results.md'
  measured = list(results_table.read_table(path))
  assert results_table.format_table(measured) == path.read_text('utf-8')
  text = path.read_text('utf-8')
  for recipe in PUBLISHED:
    assert f'\n| {recipe} |' in text


def test_report_becomes_a_row(update):
  rows, output = update(make_report())
  assert [row[0] for row in rows] == list(PUBLISHED)
  by_recipe = {row[0]: row[1:] for row in rows}
  assert by_recipe['hmdb51_small'] == [
    '76.4%',
    '75.00% (72.78% to 77.11%)',
    '4 x 3',
    'hmdb51/split1 test, 1,530 videos, 0123456789ab',
    'fedcba987654',
    '8 x NVIDIA H200',
    '2.50',
    'none',
  ]
  assert by_recipe['k400_tiny'][:2] == ['79.5%', 'not measured']
  assert 'the published 76.4% is inside the interval' in output


def test_rows_of_other_reports_stay(update):
  first = make_report()
  rows, _ = update(first)
  assert update(first)[0] == rows
  # Another checkpoint, and a recipe without a published accuracy.
  second = make_report(checkpoint_sha256='0' * 64, top1=0.76)
  motion = make_report('motion')
  both, output = update(second, motion)
  assert [row[0] for row in both if '%' in row[2]] == [
    'hmdb51_small',
    'hmdb51_small',
    'motion',
  ]
  assert [row for row in both if row in rows] == rows
  assert 'motion: top-1 75.00%' in output
  assert 'there is no published top-1' in output
  # The same test again replaces its row.
  third, _ = update(make_report(checkpoint_sha256='0' * 64, top1=0.77))
  assert len(third) == len(both)
  assert sum('77.00%' in row[2] for row in third) == 1


@pytest.mark.parametrize(
  ('interval', 'expected'),
  [((0.5, 0.7), 'above'), ((0.77, 0.8), 'below'), ((0.76, 0.764), 'inside')],
)
def test_comparison_with_the_published_accuracy(interval, expected):
  report = make_report(view_budget=[{'interval': interval}])
  message = results_table.compare(report)
  assert f'the published 76.4% is {expected} the interval' in message


def test_changed_fields_are_named():
  report = make_report()
  report['training']['config']['num_epochs'] = 2
  report['training']['config']['dataset']['data_dir'] = '/elsewhere'
  report['config']['test']['num_crops'] = 1
  assert list(results_table.changed_fields(report)) == [
    'num_epochs=2',
    'test.num_crops=1',
  ]
  converted = make_report(training=None)
  assert list(results_table.changed_fields(converted)) == []
  assert results_table.make_row(converted).hours == 'unknown'


def test_recipe_outside_the_repository_is_not_run(tmp_path):
  (tmp_path / 'evil.py').write_text('raise SystemExit("was run")')
  report = make_report(recipe=str(tmp_path / 'evil'))
  (changed,) = results_table.changed_fields(report)
  assert 'not one of this repository' in changed


@pytest.mark.parametrize(
  'report', ['', '[]', '{"top1": 0.5}', make_report(view_budget=[])]
)
def test_other_files_are_an_error_in_one_line(update, report):
  rows, message = update(report)
  assert not rows
  assert message.startswith('error: ')
  assert message.count('\n') == 1


def test_text_of_a_report_stays_in_its_cell():
  row = results_table.make_row(
    make_report('a|b\n<i>', training={'hours': 1, 'hardware': ['x | y\\']})
  )
  assert row.recipe == 'a\\|b &lt;i>'
  assert row.hardware == 'x \\| y/'


@pytest.mark.parametrize('arguments', [(), ('motion',), ('unknown', 'data')])
def test_reproduce_states_its_usage(arguments):
  done = subprocess.run(
    [ROOT / 'scripts' / 'reproduce.sh', *arguments],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 2
  expected = 'no recipe unknown' if len(arguments) > 1 else 'RECIPE DATA'
  assert expected in done.stderr
