"""The report as one HTML page: pictures in it, no scripts, nothing loaded."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
import dataclasses
import html
from typing import Any

import cv2
from jaxtyping import UInt8
import numpy as np

Picture = UInt8[np.ndarray, 'h w 3']

# Differences between two runs that the page names; report.json has them all.
_MAX_DIFFERENCES = 200


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5b6470;
  --paper: #fff; --line: #d8dce2; --bar: #cfe0f5; --bad: #a83c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a4adb8;
  --paper: #16181c; --line: #3a4049; --bar: #234469; --bad: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
p { max-width: 45rem; }
.soft, figcaption { color: var(--soft); }
.headline { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.headline div { flex: 1 1 9rem; padding: .75rem 1rem;
  border: 1px solid var(--line); border-radius: .5rem; }
dt { color: var(--soft); } dd { margin: 0; }
.headline dd { font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.headline small { display: block; font-size: .85rem; color: var(--soft); }
.about { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
.wide { overflow-x: auto; }
.tall { max-height: 32rem; overflow: auto; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: .25rem .75rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--paper); }
td.n, th.n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
td.bar { background: linear-gradient(to right, var(--bar) var(--part),
  transparent var(--part)); }
figure { margin: 0; }
figcaption { width: 0; min-width: 100%; margin-top: .5rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 2rem; align-items: start; }
.pictures figure { max-width: 100%; }
.pictures img { display: block; background: #fff; border-radius: .5rem; }
.reliability img { max-width: 100%; height: auto; }
.mistakes { display: grid; gap: 1.25rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.mistakes img { max-width: 100%; height: auto; border-radius: .25rem; }
.none { display: grid; place-items: center; height: 5.6rem; color: var(--soft);
  border: 1px dashed var(--line); border-radius: .25rem; }
.wrong { color: var(--bad); }
@media (max-width: 30rem) { th, td { padding: .25rem .3rem; }
  th.n { white-space: normal; }
  table { font-size: .8rem; } .about { grid-template-columns: 1fr; } }
"""
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""
_METRICS = {
  'top1': 'top-1 accuracy',
  'top5': 'top-5 accuracy',
  'mean_class_accuracy': 'mean class accuracy',
  'mAP': 'mAP, over classes',
  'mmit_mAP': 'mAP, over videos',
  'expected_calibration_error': 'expected calibration error',
}


@dataclasses.dataclass(frozen=True)
class Mistake:
  """A video whose class was wrong.

  Attributes:
    video: its name.
    true: its class.
    true_probability: of this class, 0..1.
    predicted: the most probable class.
    predicted_probability: of that one, 0..1.
    picture: frames of it, RGB; None where it cannot be read.
  """

  video: str
  true: str
  true_probability: float
  predicted: str
  predicted_probability: float
  picture: Picture | None


def page(
  report: dict[str, Any],
  mistakes: Sequence[Mistake] = (),
  confusion: Picture | None = None,
  reliability: UInt8[np.ndarray, 'h2 w2 3'] | None = None,
) -> str:
  """Returns the page, which needs no other file.

  Args:
    report: what report.json holds.
    mistakes: the worst ones first.
    confusion: of report_pictures.draw_confusion.
    reliability: of report_pictures.draw_reliability.
  """
  parts = [
    _headline(report),
    _comparison(report['comparison']) if 'comparison' in report else '',
    _view_budget(report['view_budget']),
    _pictures(report, confusion, reliability),
    _confused(report.get('most_confused', [])),
    _mistakes(mistakes),
    _classes(report['classes']),
    _failed(report['failed_videos']),
  ]
  title = f'Test on {_dataset(report)}'
  return (
    _HEAD.format(title=_text(title), style=_STYLE)
    + f'<header>\n<h1>{_text(title)}</h1>\n</header>\n<main>\n'
    + '\n'.join(filter(None, parts))
    + '\n</main>\n</body>\n</html>\n'
  )


def _headline(report: dict[str, Any]) -> str:
  boxes = []
  for name, text in _METRICS.items():
    if name not in report:
      continue
    value = f'{report[name]:.3f}'
    if not name.startswith('expected'):
      value = _percent(report[name])
    if name == 'top1':
      # The last budget is that of the test.
      value += f'<small>{_interval(report["view_budget"][-1])}</small>'
    boxes.append((text, value))
  failed = len(report['failed_videos'])
  boxes.append(
    (
      'videos',
      f'{report["num_videos"]:,}<small>{failed:,} could not be read</small>',
    )
  )
  views, dataset = report['views'], report['dataset']
  about = (
    ('checkpoint', report['checkpoint']),
    ('dataset', f'{dataset["folder"]}, split {dataset["split"]}'),
    (
      'views',
      f'{views["num_clips"]} clips x {views["num_crops"]} crops of each video',
    ),
    ('finished', report['time']['finished']),
  )
  return (
    '<section aria-label="Headline figures">\n<dl class="headline">'
    + ''.join(
      f'<div><dt>{_text(name)}</dt><dd>{value}</dd></div>\n'
      for name, value in boxes
    )
    + '</dl>\n<dl class="about">'
    + ''.join(
      f'<dt>{name}</dt><dd>{_text(value)}</dd>\n' for name, value in about
    )
    + '</dl>\n</section>'
  )


def _comparison(comparison: dict[str, Any]) -> str:
  rows = []
  for row in comparison['differences'][:_MAX_DIFFERENCES]:
    right = 'neither'
    if row['predicted'] == row['true']:
      right = 'this run'
    elif row['other_predicted'] == row['true']:
      right = 'the other'
    names = ('video', 'true', 'predicted', 'other_predicted')
    rows.append([*(row[name] for name in names), right])
  left_out = len(comparison['differences']) - len(rows)
  table = _table(
    'Videos that the runs predict differently',
    ('video', 'true class', 'this run', 'the other', 'right'),
    rows,
  )
  if left_out:
    table += f'<p class="soft">{left_out:,} more are in report.json.</p>'
  if not rows:
    table = '<p>They predict the same class for every video.</p>'
  return _section(
    'Comparison with another run',
    f'<p class="soft">{_text(comparison["other"])}</p>\n'
    f'<p>{_text(comparison["in_words"])}</p>\n{table}',
  )


def _view_budget(budget: list[dict[str, Any]]) -> str:
  columns = {
    'accuracy': 'top-1',
    'interval': '95 % interval',
    'mAP': 'mAP, over classes',
    'mmit_mAP': 'mAP, over videos',
    'gflops': 'GFLOPs a video',
  }
  columns = {name: text for name, text in columns.items() if name in budget[0]}
  rows = []
  for row in budget:
    cells = [str(row['num_clips']), str(row['num_crops'])]
    for name in columns:
      if name == 'interval':
        cells.append('{} to {}'.format(*map(_percent, row[name])))
      elif name == 'gflops':
        cells.append(_gflops(row[name]))
      else:
        cells.append(_percent(row[name]))
    rows.append(cells)
  return _section(
    'View budget',
    '<p class="soft">What fewer views of each video would have given.</p>'
    + _table(
      'Quality by number of views',
      ('clips', 'crops', *columns.values()),
      rows,
      numbers=range(2 + len(columns)),
    ),
  )


def _gflops(count: float) -> str:
  # Small models take a fraction of one.
  return f'{count:,.1f}' if count >= 1 else f'{count:.2g}'


def _pictures(
  report: dict[str, Any],
  confusion: Picture | None,
  reliability: UInt8[np.ndarray, 'h2 w2 3'] | None,
) -> str:
  figures = ''
  if confusion is not None:
    alt = (
      f'Confusion matrix of {len(report["classes"])} classes; '
      f'{_percent(report["top1"])} of the videos lie on the diagonal. The most '
      'confused pairs are in the table below.'
    )
    figures += (
      f'<figure><div class="wide" {_scrolls("Confusion matrix")}>'
      f'{_image(confusion, ".png", alt)}</div>\n'
      '<figcaption>Rows are true classes, columns predictions, numbered as in '
      'the table of classes. Blue is right, orange wrong; the deeper, the '
      'larger the share of a row.</figcaption></figure>\n'
    )
  if reliability is not None:
    error = report['expected_calibration_error']
    alt = (
      'Reliability diagram: accuracy by confidence in 15 bins, and the number '
      f'of videos in each; the expected calibration error is {error:.3f}.'
    )
    figures += (
      f'<figure class="reliability">{_image(reliability, ".png", alt)}\n'
      '<figcaption>Blue: accuracy. Orange: mean confidence. Where the orange '
      'line is above its bar, the model is too sure.</figcaption></figure>\n'
    )
  if not figures:
    return ''
  return _section(
    'Confusion and calibration', f'<div class="pictures">\n{figures}</div>'
  )


def _confused(pairs: list[dict[str, Any]]) -> str:
  if not pairs:
    return ''
  rows = [[p['true'], p['predicted'], f'{p["count"]:,}'] for p in pairs]
  return _section(
    'Most confused classes',
    _table(
      'Most confused pairs of classes',
      ('true class', 'predicted', 'videos'),
      rows,
      numbers=(2,),
    ),
  )


def _mistakes(mistakes: Sequence[Mistake]) -> str:
  if not mistakes:
    return ''
  items = []
  for mistake in mistakes:
    picture = '<div class="none">no picture: cannot be read</div>'
    if mistake.picture is not None:
      alt = f'Three frames of {mistake.video}'
      picture = _image(mistake.picture, '.jpg', alt)
    items.append(
      f'<li><figure>{picture}<figcaption>{_text(mistake.video)}</figcaption>'
      f'</figure><div><span class="wrong">{_text(mistake.predicted)}</span> '
      f'{_percent(mistake.predicted_probability)}</div><div>is: '
      f'{_text(mistake.true)} {_percent(mistake.true_probability)}</div></li>\n'
    )
  return _section(
    'Worst mistakes',
    '<p class="soft">Wrong predictions, the most confident first: the '
    'predicted class and its probability, then the true one.</p>'
    f'<ul class="mistakes">\n{"".join(items)}</ul>',
  )


def _classes(classes: list[dict[str, Any]]) -> str:
  name = 'accuracy' if 'accuracy' in classes[0] else 'average_precision'
  order = sorted(
    range(len(classes)),
    key=lambda i: (classes[i][name] is None, classes[i][name]),
  )
  rows = []
  for i in order:
    value = classes[i][name]
    rows.append(
      [
        str(i),
        classes[i]['name'],
        f'{classes[i]["count"]:,}',
        'none' if value is None else _percent(value),
      ]
    )
  return _section(
    'Classes',
    '<p class="soft">The hardest first.</p>'
    + _table(
      'Quality by class',
      ('number', 'class', 'videos', name.replace('_', ' ')),
      rows,
      numbers=(0, 2, 3),
      parts=[classes[i][name] or 0.0 for i in order],
    ),
  )


def _failed(failed: list[dict[str, str]]) -> str:
  if not failed:
    return ''
  return _section(
    'Videos that could not be read',
    '<p class="soft">They are left out of all figures.</p>'
    + _table(
      'Videos that could not be read',
      ('video', 'reason'),
      [[f['video'], f['reason']] for f in failed],
    ),
  )


def _section(title: str, content: str) -> str:
  return f'<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>'


def _table(
  name: str,
  header: Iterable[str],
  rows: Iterable[Sequence[str]],
  *,
  numbers: Iterable[int] = (),
  parts: Sequence[float] = (),
) -> str:
  """Returns a table that scrolls by itself; all of it is escaped here.

  Args:
    name: for those who do not see it.
    header: of the columns.
    rows: of texts.
    numbers: the columns that hold numbers.
    parts: for each row, how long a bar is behind its last cell, 0..1.
  """
  kinds = dict.fromkeys(numbers, ' class="n"')
  lines = [
    ''.join(
      f'<th scope="col"{kinds.get(i, "")}>{_text(text)}</th>'
      for i, text in enumerate(header)
    )
  ]
  for number, row in enumerate(rows):
    cells = [
      f'<td{kinds.get(i, "")}>{_text(text)}</td>' for i, text in enumerate(row)
    ]
    if parts:
      cells[-1] = (
        f'<td class="n bar" style="--part: {parts[number]:.1%}">'
        f'{_text(row[-1])}</td>'
      )
    lines.append(''.join(cells))
  body = '\n'.join(f'<tr>{line}</tr>' for line in lines[1:])
  return (
    f'<div class="wide tall" {_scrolls(name)}>\n<table>\n<thead><tr>{lines[0]}'
    f'</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'
  )


def _scrolls(name: str) -> str:
  """What lets a keyboard scroll a part of the page."""
  return f'role="region" tabindex="0" aria-label="{_text(name)}"'


def _image(picture: Picture, suffix: str, alt: str) -> str:
  _, content = cv2.imencode(suffix, np.ascontiguousarray(picture[..., ::-1]))
  data = base64.b64encode(content.tobytes()).decode()
  kind = {'.png': 'png', '.jpg': 'jpeg'}[suffix]
  return (
    f'<img src="data:image/{kind};base64,{data}" alt="{_text(alt)}" '
    f'width="{picture.shape[1]}" height="{picture.shape[0]}">'
  )


def _interval(budget: dict[str, Any]) -> str:
  return '{} to {} (95 %)'.format(*map(_percent, budget['interval']))


def _dataset(report: dict[str, Any]) -> str:
  dataset = report['dataset']
  name = report['config']['dataset']['name']
  return f'{name}, split {dataset["split"]}'


def _percent(share: float) -> str:
  return f'{100 * share:.1f} %'


def _text(text: str) -> str:
  return html.escape(str(text), quote=True)
