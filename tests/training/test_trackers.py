"""Trackers that fail, hang or are missing do not disturb a run."""

from __future__ import annotations

import inspect
import logging
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import pytest

from configs import common
from dualformer_jax.errors import UserError
from dualformer_jax.training import logging as metric_logging
from dualformer_jax.training import loop, tracker_process, trackers

# Stands in for trackio, and logs what it is called with.
FAKE = """
import os, signal, time

def record(*what):
  with open(os.environ['FAKE_LOG'], 'a') as file:
    print(*what, file=file)

class Run:
  id = 'new'
  config = {}
  def log(self, values, step):
    FAIL_LOG
    record(self.id, step, *sorted(values))

def init(project, name, embed):
  FAIL_INIT
  record('init', project, name)
  return Run()

def finish():
  record('finish')
"""


@pytest.fixture(name='fake')
def _fake(tmp_path, monkeypatch):
  """Returns a function that replaces trackio in processes that start."""

  def write(fail_init: str = 'pass', fail_log: str = 'pass') -> pathlib.Path:
    text = FAKE.replace('FAIL_INIT', fail_init).replace('FAIL_LOG', fail_log)
    folder = tmp_path / 'fake'
    folder.mkdir(exist_ok=True)
    (folder / 'trackio.py').write_text(text)
    path = f'{folder}{os.pathsep}{pathlib.Path(__file__).parents[2]}'
    monkeypatch.setenv('PYTHONPATH', path)
    monkeypatch.setenv('FAKE_LOG', str(tmp_path / 'fake.log'))
    return tmp_path / 'fake.log'

  return write


def make_config(**fields: Any) -> Any:
  config = common.get_config()
  config.update({'trackers': 'trackio', **fields})
  return config


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
  return [
    record.getMessage()
    for record in caplog.records
    if record.levelno >= logging.WARNING
  ]


def write_and_close(workdir: pathlib.Path) -> float:
  """Writes to the trackers of a run; returns the seconds that close took."""
  workdir.mkdir(exist_ok=True)
  writer = trackers.Trackers(make_config(), workdir)
  start = time.monotonic()
  for step in range(1, 1001):
    writer.write_scalars(step, {'train/loss': 1 / step})
  assert time.monotonic() - start < 1
  start = time.monotonic()
  writer.close()
  return time.monotonic() - start


def test_run_has_project_name_and_id(fake, tmp_path, monkeypatch):
  log = fake()
  workdir = tmp_path / 'my run'
  write_and_close(workdir)
  lines = log.read_text().splitlines()
  assert lines[0] == 'init dualformer my run'
  assert lines[1:-1] == [f'new {step} train/loss' for step in range(1, 1001)]
  assert lines[-1] == 'finish'
  state = (workdir / 'trackers.json').read_text()
  assert '"new"' in state
  # The ID of the file is used, and names of the environment and the config.
  (workdir / 'trackers.json').write_text(state.replace('new', 'old'))
  monkeypatch.setenv('TRACKIO_PROJECT', 'theirs')
  writer = trackers.Trackers(make_config(tracker_run='mine'), workdir)
  writer.write_scalars(1, {'a': 1.0})
  writer.close()
  lines = log.read_text().splitlines()[1002:]
  assert lines == ['init theirs mine', 'old 1 a', 'finish']


def test_new_tracker_gets_earlier_metrics(fake, tmp_path):
  log = fake()
  earlier = [(1, {'train/loss': 3.0}), (2, {'train/loss': 2.0})]
  for _ in range(2):  # Only the first time.
    writer = trackers.Trackers(make_config(), tmp_path)
    writer.write_earlier(earlier)
    # Step 2 is repeated after resuming, with the same loss in another time.
    writer.write_scalars(2, {'train/loss': 2.0})
    writer.close()
  assert log.read_text().splitlines() == [
    f'init dualformer {tmp_path.name}',
    'new 1 train/loss',
    'new 2 train/loss',
    'finish',
    f'init dualformer {tmp_path.name}',
    'finish',
  ]


@pytest.mark.parametrize(
  ('failure', 'where', 'reason'),
  [
    ("raise OSError('the server\\n is down')", 'init', 'the server is down'),
    ("raise OSError('the server\\n is down')", 'log', 'the server is down'),
    ('os.kill(os.getpid(), signal.SIGKILL)', 'log', 'status -9'),
    ("raise SystemExit('bye')", 'init', 'status 1'),
  ],
)
def test_tracker_that_fails_warns_once(
  fake, tmp_path, caplog, failure, where, reason
):
  fake(**{f'fail_{where}': failure})
  assert write_and_close(tmp_path / 'run') < 10
  (warning,) = warnings_of(caplog)
  assert warning.startswith('trackio does not receive the rest of this run: ')
  assert reason in warning
  assert '\n' not in warning


def test_tracker_that_hangs_is_ended(fake, tmp_path, caplog, monkeypatch):
  log = fake(fail_log='record(os.getpid()); time.sleep(1000)')
  for name in ('_FINISH_SECONDS', '_QUIET_SECONDS'):
    monkeypatch.setattr(trackers, name, 2)
  assert write_and_close(tmp_path / 'run') < 5
  (warning,) = warnings_of(caplog)
  assert 'did not finish in time' in warning
  pid = int(log.read_text().splitlines()[1])
  assert not pathlib.Path(f'/proc/{pid}').exists()


def test_signals_do_not_reach_the_process(fake, tmp_path):
  log = fake()
  writer = trackers.Trackers(make_config(), tmp_path)
  writer.write_scalars(1, {'a': 1.0})
  while not log.exists() or 'new 1 a' not in log.read_text():
    time.sleep(0.05)
  (child,) = (
    int(pid)
    for pid in os.listdir('/proc')
    if pid.isdigit() and _is_child(int(pid), tracker_process.__name__)
  )
  assert os.getsid(child) == child  # Ctrl-C goes to the terminal's session.
  for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(child, number)
  writer.write_scalars(2, {'a': 1.0})
  writer.close()
  assert log.read_text().splitlines()[-2:] == ['new 2 a', 'finish']


def _is_child(pid: int, module: str) -> bool:
  try:
    command = pathlib.Path(f'/proc/{pid}/cmdline').read_text()
    status = pathlib.Path(f'/proc/{pid}/status').read_text()
  except OSError:
    return False
  return module in command and f'PPid:\t{os.getpid()}\n' in status


def test_error_of_training_closes_the_run(fake, tmp_path):
  log = fake()
  program = (
    'import pathlib, sys\n'
    'from configs import common\n'
    'from dualformer_jax.training import trackers\n'
    'config = common.get_config()\n'
    "config.trackers = 'trackio'\n"
    f'writer = trackers.Trackers(config, pathlib.Path({str(tmp_path)!r}))\n'
    "writer.write_scalars(1, {'a': 1.0})\n"
    'sys.exit(2)\n'
  )
  done = subprocess.run([sys.executable, '-c', program], check=False)
  assert done.returncode == 2
  assert log.read_text().splitlines()[1:] == ['new 1 a', 'finish']


@pytest.mark.parametrize('hangs', [False, True])
def test_process_ends_when_training_is_killed(fake, tmp_path, hangs):
  log = fake(fail_log='time.sleep(1000)' if hangs else 'pass')
  run = {
    'tracker': 'trackio',
    'project': 'p',
    'name': 'n',
    'run_id': None,
    'workdir': str(tmp_path),
  }
  messages = [('open', run), ('write_scalars', 1, {'a': 1.0})]
  program = (
    'from dualformer_jax.training import tracker_process as process\n'
    'process._MAX_SECONDS_ALONE = 1\n'
    'process.main()\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    input=b''.join(map(pickle.dumps, messages)),
    capture_output=True,
    start_new_session=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == (-signal.SIGKILL if hangs else 0), done.stderr
  assert done.stdout == b'{"run_id": "new", "url": ""}\n'
  assert log.read_text().endswith('init p n\n' if hangs else 'finish\n')


def test_damaged_state_is_an_error(tmp_path):
  (tmp_path / 'trackers.json').write_text('{"wandb": 3}')
  with pytest.raises(UserError, match=r'trackers\.json: cannot be read'):
    trackers.Trackers(make_config(), tmp_path)


def test_missing_extra_is_an_error_before_training(tmp_path, monkeypatch):
  config = make_config(trackers='mlflow')
  # Another folder of this name, as W&B's output, is no library.
  (tmp_path / 'mlflow').mkdir()
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  monkeypatch.delitem(sys.modules, 'mlflow', raising=False)
  with pytest.raises(
    UserError, match=r"pip install 'dualformer_jax\[mlflow\]'"
  ):
    loop.train_and_test(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_only_process_0_has_trackers(fake, tmp_path, monkeypatch):
  log = fake()
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  writer = metric_logging.MetricWriter(tmp_path, 0, make_config())
  writer.write(1, 'train', {'loss': 1.0})
  writer.close()
  assert not log.exists()
  assert not (tmp_path / 'trackers.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize('name', trackers.NAMES)
def test_writers_have_the_interface_of_clu(name):
  from clu.metric_writers import interface  # imports TensorFlow

  def parameters(method: Any) -> dict[str, Any]:
    found = inspect.signature(method).parameters
    return {n: p.kind for n, p in found.items() if p.default is p.empty}

  writer = tracker_process.WRITERS[name]
  for method in ('scalars', 'images', 'texts', 'hparams'):
    method = f'write_{method}'
    assert parameters(getattr(writer, method)) == parameters(
      getattr(interface.MetricWriter, method)
    )
  for method in ('flush', 'close'):
    assert parameters(getattr(writer, method)) == {
      'self': inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
