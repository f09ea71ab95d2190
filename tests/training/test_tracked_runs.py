"""An interrupted and resumed run is one run in W&B, MLflow and trackio."""

from __future__ import annotations

from collections.abc import Iterator
import gc
import json
import os
import pathlib
import signal
import struct
from typing import Any
import warnings

import pytest

from dualformer_jax.stop_signals import stop_signals
from dualformer_jax.training import logging, trackers
from tests import training_command

pytestmark = pytest.mark.slow
NUM_STEPS = 12  # two epochs; a validation after each
LAST_BEFORE_STOP = 8
FLAGS = (
  *training_command.TINY,
  '--config.num_epochs=2',
  '--config.validation.every_epochs=1',
  '--config.log_every_steps=1',
  '--config.trackers=wandb,mlflow,trackio',
  '--config.tracker_project=motions',
)


@pytest.fixture(scope='module', name='workdir')
def _workdir(motion_dataset, tmp_path_factory) -> Iterator[pathlib.Path]:
  """The workdir of a run that was interrupted and resumed."""
  folder = tmp_path_factory.mktemp('tracked')
  flags = (*FLAGS, f'--config.dataset.data_dir={motion_dataset}')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('WANDB_MODE', 'offline')
    patch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{folder}/mlflow.db')
    patch.setenv('TRACKIO_DIR', str(folder / 'trackio'))
    patch.chdir(folder)  # where MLflow keeps artifacts
    patch.setattr(trackers, '_STOP_SECONDS', 100)  # creating the database
    with patch.context() as interrupt:
      interrupt.setattr(stop_signals, 'received', None)
      write = logging.MetricWriter.write

      def write_and_stop(self, step, prefix, metrics):
        write(self, step, prefix, metrics)
        if step == LAST_BEFORE_STOP:
          stop_signals.received = signal.SIGTERM

      interrupt.setattr(logging.MetricWriter, 'write', write_and_stop)
      done = training_command.run_here(*flags, workdir=folder / 'my run')
      assert done.returncode == 128 + signal.SIGTERM, done.stderr
    gc.collect()  # the exception has the frame that has the lock
    done = training_command.run_here(*flags, workdir=folder / 'my run')
    assert done.returncode == 0, done.stderr
    assert 'does not receive' not in done.stderr
    assert 'resumed' in done.stderr
    yield folder / 'my run'


def run_id(workdir: pathlib.Path, name: str) -> str:
  return json.loads((workdir / 'trackers.json').read_text())[name]['run_id']


def expected_points(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
  """Returns what the run has written to metrics.jsonl."""
  points = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    metrics = json.loads(line)
    step = metrics.pop('step')
    points |= {(name, step): value for name, value in metrics.items()}
  assert {step for name, step in points if name == 'train/loss'} == set(
    range(1, NUM_STEPS + 1)
  )
  names = {name for name, _ in points}
  assert {'validation/top1', 'validation/loss', 'test/top1'} <= names
  return points


def test_mlflow_has_one_run(workdir):
  import mlflow

  client = mlflow.MlflowClient()
  experiment = client.get_experiment_by_name('motions')
  assert experiment is not None
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.info.run_id == run_id(workdir, 'mlflow')
  assert (run.info.run_name, run.info.status) == ('my run', 'FINISHED')
  points = [
    ((name, metric.step), metric.value)
    for name in run.data.metrics
    for metric in client.get_metric_history(run.info.run_id, name)
  ]
  assert len(points) == len(dict(points))  # each once
  assert dict(points) == expected_points(workdir)
  assert run.data.params['model.embed_dims'] == '(16,)'
  assert run.data.params['dataset.name'] == 'motion'
  location = run.info.artifact_uri
  assert location is not None
  artifacts = pathlib.Path(location.removeprefix('file://'))
  config = json.loads((artifacts / 'config.json').read_text())
  assert config['tracker_project'] == 'motions'
  for name in ('report.json', 'report.html'):
    stored = (artifacts / 'report' / name).read_bytes()
    assert stored == (workdir / name).read_bytes()
  page = (workdir / 'report.html').read_text()
  pictures = [*(artifacts / 'images').glob('test~mistakes~*.png')]
  assert len(pictures) == page.count('<img')
  table = (artifacts / 'test' / 'mistakes_text.md').read_text()
  assert table.count('\n') == len(pictures) + 2


def test_trackio_has_one_run(workdir):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of its dependencies
    from trackio.sqlite_storage import SQLiteStorage
  (record,) = SQLiteStorage.get_run_records('motions')
  assert record['id'] == run_id(workdir, 'trackio')
  assert record['name'] == 'my run'
  points, others = [], {}
  for log in SQLiteStorage.get_logs('motions', run_id=record['id']):
    del log['timestamp']
    step = log.pop('step')
    for name, value in log.items():
      if isinstance(value, float):
        points.append(((name, step), value))
      else:
        others[name] = value
  assert len(points) == len(dict(points))
  assert dict(points) == expected_points(workdir)
  assert others['test/mistakes/01']['_type'] == 'trackio.image'
  config = SQLiteStorage.get_run_config('motions', 'my run')
  assert config is not None
  assert config['model.embed_dims'] == [16]
  artifacts = SQLiteStorage.get_run_artifacts('motions', 'my run', record['id'])
  assert [artifact['type'] for artifact in artifacts['output']] == ['report']


def test_wandb_has_one_run(workdir):
  # The second process may start in the same second as no other.
  files = sorted(workdir.glob('wandb/offline-run-*/*.wandb'))
  assert len(files) == 2
  assert {file.name for file in files} == {
    f'run-{run_id(workdir, "wandb")}.wandb'
  }
  points, config, artifacts = [], {}, []
  for file in files:
    for record in read_wandb(file):
      if record.HasField('run'):
        assert record.run.display_name == 'my run'
        assert record.run.project == 'motions'
      if record.HasField('artifact'):
        artifacts.append([e.path for e in record.artifact.manifest.contents])
      for item in record.config.update:
        config[item.key] = json.loads(item.value_json)
      if record.HasField('history'):
        row = {
          item.key or '/'.join(item.nested_key): json.loads(item.value_json)
          for item in record.history.item
        }
        points += [
          ((name, row['step']), value)
          for name, value in row.items()
          if name.partition('/')[0] in ('train', 'validation', 'test')
        ]
  pictures = dict(points).pop(('test/mistakes', points[-1][0][1]), None)
  values = [point for point in points if isinstance(point[1], float)]
  assert len(values) == len(dict(values))
  assert dict(values) == expected_points(workdir)
  assert config['model.embed_dims'] == [16]
  assert sorted(artifacts[-1]) == ['report.html', 'report.json']
  page = (workdir / 'report.html').read_text()
  assert pictures is not None
  assert pictures['count'] == page.count('<img')


def read_wandb(path: pathlib.Path) -> Iterator[Any]:
  """Yields the records of a .wandb file: a LevelDB log after seven bytes.

  Blocks have 32 KiB. A record is in parts: checksum, length, kind (whole,
  first, middle, last), content.
  """
  from wandb.proto import wandb_internal_pb2

  parse = vars(wandb_internal_pb2)['Record'].FromString
  content, position, parts = path.read_bytes(), 7, b''
  while position + 7 <= len(content):
    if 32768 - position % 32768 < 7:
      position += 32768 - position % 32768
      continue
    _, length, kind = struct.unpack_from('<IHB', content, position)
    position += 7
    parts += content[position : position + length]
    position += length
    if kind in (1, 4):
      yield parse(parts)
      parts = b''


def test_no_tracker_is_left_running(workdir):
  commands = [
    pathlib.Path('/proc', pid, 'cmdline').read_bytes()
    for pid in os.listdir('/proc')
    if pid.isdigit() and pathlib.Path('/proc', pid, 'cmdline').exists()
  ]
  parents = str(workdir).encode()
  assert not [c for c in commands if b'tracker_process' in c and parents in c]
