"""An interrupted and resumed run is one run in W&B, MLflow and trackio."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import signal
import struct
import subprocess
import time
from typing import Any
import warnings

import pytest

from tests import training_command

pytestmark = [
  pytest.mark.slow,
  # MLflow uses what the newest SQLAlchemy deprecates.
  pytest.mark.filterwarnings('ignore:The ``noload``:DeprecationWarning'),
]
NUM_STEPS = 60
STOP_AFTER = 20
FLAGS = (
  *training_command.TINY,
  '--config.num_epochs=10',
  '--config.validation.every_epochs=4',
  '--config.log_every_steps=1',
  '--config.trackers=wandb,mlflow,trackio',
  '--config.tracker_project=motions',
)


@pytest.fixture(scope='module', name='workdir')
def _workdir(
  motion_dataset, compilation_cache, tmp_path_factory
) -> Iterator[pathlib.Path]:
  """The workdir of a run that was interrupted and resumed."""
  folder = tmp_path_factory.mktemp('tracked')
  workdir = folder / 'my run'
  flags = (*FLAGS, f'--config.dataset.data_dir={motion_dataset}')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('WANDB_MODE', 'offline')
    patch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{folder}/mlflow.db')
    patch.setenv('TRACKIO_DIR', str(folder / 'trackio'))
    patch.chdir(folder)  # where MLflow keeps artifacts
    import mlflow  # takes seconds

    mlflow.MlflowClient().create_experiment('motions')  # and the database
    with open(folder / 'log', 'wb') as log:
      process = subprocess.Popen(
        training_command.command(*flags, workdir=workdir),
        env=training_command.environment(compilation_cache),
        stderr=log,
      )
    state, metrics = workdir / 'trackers.json', workdir / 'metrics.jsonl'
    while not (state.exists() and state.read_text().count('run_id') == 3):
      assert process.poll() is None, (folder / 'log').read_text()
      time.sleep(0.1)
    while f'"step": {STOP_AFTER}' not in metrics.read_text():
      time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    status = process.wait(120)
    assert status == 128 + signal.SIGTERM, (folder / 'log').read_text()
    done = training_command.run_here(*flags, workdir=workdir)
    assert done.returncode == 0, done.stderr
    assert 'resumed' in done.stderr
    assert 'does not receive' not in done.stderr
    yield workdir


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
      if isinstance(value, int | float):
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
  files = sorted(workdir.glob('wandb/offline-run-*/*.wandb'))
  assert len(files) == 2
  assert {file.name for file in files} == {
    f'run-{run_id(workdir, "wandb")}.wandb'
  }
  points, media, config, artifacts = [], {}, {}, []
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
          tuple(item.nested_key) or (item.key,): json.loads(item.value_json)
          for item in record.history.item
        }
        for (name, *part), value in row.items():
          if part:  # of a picture or a text
            media[name, *part] = value
          elif not name.startswith('_') and name != 'step':
            points.append(((name, row[('step',)]), value))
  assert len(points) == len(dict(points))
  assert dict(points) == expected_points(workdir)
  assert config['model.embed_dims'] == [16]
  assert sorted(artifacts[-1]) == ['report.html', 'report.json']
  page = (workdir / 'report.html').read_text()
  assert media['test/mistakes', 'count'] == page.count('<img')


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
