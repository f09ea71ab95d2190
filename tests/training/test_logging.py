"""Metrics of a run that was interrupted are written once."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from dualformer_jax.checkpoints import metadata
from dualformer_jax.distributed import processes
from dualformer_jax.evaluation import curves, report_page
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.training import logging
from tests.evaluation import html_page, make_result


def read_points(workdir: pathlib.Path) -> list[tuple[str, int]]:
  """Returns name and step of all that TensorBoard reads, in order of names."""
  from tensorboard.backend.event_processing import event_file_loader

  return sorted(
    (value.tag, event.step)
    for path in workdir.glob('events.out.tfevents.*')
    for event in event_file_loader.EventFileLoader(str(path)).Load()
    for value in event.summary.value
  )


def write(writer: logging.MetricWriter, steps: range) -> None:
  for step in steps:
    writer.write(step, 'train', {'loss': 1 / step, 'top1': 0.5})
    if step % 4 == 0:
      writer.write(step, 'validation', {'top1': step / 20})


def test_resumed_run_writes_each_point_once(tmp_path):
  writer = logging.MetricWriter(tmp_path, 0)
  writer.write_text(0, 'config', 'text')
  write(writer, range(1, 11))
  writer.flush()
  # Killed at step 10, in the middle of a record; step 8 was saved.
  (path,) = tmp_path.glob('events.out.tfevents.*')
  path.write_bytes(path.read_bytes()[:-5])
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 11, "train/lo')
  writer = logging.MetricWriter(tmp_path, 8)
  writer.write(8, 'validation', {'top1': 0.4})  # validated again
  write(writer, range(9, 13))
  writer.write(12, 'test', {'top1': 0.6})
  writer.close()
  # The same command tests again.
  writer = logging.MetricWriter(tmp_path, 12)
  writer.write(12, 'validation', {'top1': 0.6})
  writer.write(12, 'test', {'top1': 0.6})
  writer.close()
  expected = [
    ('config', 0),
    ('test/top1', 12),
    *(('train/loss', step) for step in range(1, 13)),
    *(('train/top1', step) for step in range(1, 13)),
    *(('validation/top1', step) for step in (4, 8, 12)),
  ]
  assert read_points(tmp_path) == expected
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  kept = [
    (name, metrics['step'])
    for metrics in map(json.loads, lines)
    for name in metrics
    if name != 'step'
  ]
  assert sorted(kept) == expected[1:]
  loss, validation = curves.training_curves(tmp_path)
  assert loss['points'] == [(step, 1 / step) for step in range(1, 13)]
  assert validation['points'] == [(4, 0.2), (8, 0.4), (12, 0.6)]


def test_other_events_of_the_folder_are_kept(tmp_path):
  from clu import metric_writers  # imports TensorFlow, which takes seconds

  writer = metric_writers.SummaryWriter(str(tmp_path))
  writer.write_scalars(3, {'train/loss': 1.0})
  writer.close()
  (path,) = tmp_path.glob('events.out.tfevents.*')
  before = path.read_bytes()
  logging.MetricWriter(tmp_path, 3).close()
  assert path.read_bytes() == before


def test_curves_are_drawn_inside_their_axes():
  points = [(step, 2.0 / step) for step in range(1, 101)]
  page = html_page.Page(
    report_page.render(
      make_result.report_of(make_result.of([[1, 0, 0]], [0])),
      curves=[{'name': 'train loss', 'points': points}],
    )
  )
  ((_, line),) = [tag for tag in page.tags if tag[0] == 'polyline']
  drawn = [
    tuple(map(float, point.split(',')))
    for point in (line['points'] or '').split()
  ]
  assert len(drawn) == 100
  # From the top left to the bottom right; up is a smaller y.
  assert drawn[0] == (80, 15)
  assert drawn[-1] == (480, 215)
  assert all(a[1] <= b[1] for a, b in zip(drawn, drawn[1:], strict=False))
  labels = [
    attributes.get('aria-label') or ''
    for tag, attributes in page.tags
    if tag == 'svg'
  ]
  assert 'train loss by step: from 2 at step 1 to 0.02 at step 100.' in labels


def test_long_curves_are_thinned_out(tmp_path):
  lines = (json.dumps({'step': i, 'train/loss': i}) for i in range(1, 10001))
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  (loss,) = curves.training_curves(tmp_path)
  assert len(loss['points']) == 400
  assert loss['points'][-1] == (10000, 10000.0)


def test_training_hours_accumulate(monkeypatch):
  monkeypatch.setattr(processes, 'hardware', lambda: '8 x A')
  record = logging.training_record(None, 5400)
  assert record == {'hours': 1.5, 'hardware': ['8 x A']}
  resumed = metadata.CheckpointMetadata({}, Preprocessing(8, 2, 32), ())
  resumed = dataclasses.replace(resumed, training=record)
  expected = {'hours': 2.0, 'hardware': ['8 x A']}
  assert logging.training_record(resumed, 1800) == expected
  monkeypatch.setattr(processes, 'hardware', lambda: '4 x B')
  expected = {'hours': 2.0, 'hardware': ['8 x A', '4 x B']}
  assert logging.training_record(resumed, 1800) == expected
  # Earlier versions have not stored them.
  older = dataclasses.replace(resumed, training=None)
  assert logging.training_record(older, 1800) is None
