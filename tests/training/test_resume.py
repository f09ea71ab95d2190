"""A run that is killed many times ends like an uninterrupted one."""

from __future__ import annotations

from concurrent import futures
import dataclasses
import json
import pathlib
import random
import re
import signal
import subprocess
import threading
import time
from typing import Any
import warnings

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from tests import training_command

pytestmark = pytest.mark.slow
# 6 per epoch; more than the fastest machine does between kills.
NUM_STEPS = 54
FLAGS = (
  *training_command.TINY,
  f'--config.num_epochs={NUM_STEPS // 6}',
  '--config.validation.every_epochs=3',
  '--config.checkpoint.every_steps=8',
  '--config.log_every_steps=1',
  '--config.optimizer.learning_rate=0.005',
)
# The signals sent in a series of processes.
SERIES = {
  'killed': 3 * (signal.SIGKILL,),
  # Of these, at least two have something to save.
  'stopped': 2 * (signal.SIGINT, signal.SIGTERM),
}


@dataclasses.dataclass(frozen=True)
class Moment:
  """When to kill: `seconds` after so many lines of the log.

  With `saved`, not before there is a checkpoint.
  """

  lines: int
  seconds: float
  saved: bool = False


@dataclasses.dataclass(frozen=True)
class Death:
  moment: Moment
  sent: signal.Signals
  returncode: int
  log: str
  latest: int  # last saved step
  seconds: float  # from the signal to the end


def random_moments(seed: int, count: int) -> list[Moment]:
  """Returns one after a checkpoint, one before the first line, and others."""
  rng = random.Random(seed)
  early = [Moment(0, rng.uniform(0.0, 6.0))]
  late = [
    Moment(rng.randint(1, 10), rng.uniform(0.0, 0.2))
    for _ in range(count - len(early) - 1)
  ]
  moments = early + late
  rng.shuffle(moments)
  # At least one process resumes, however fast the steps are.
  return [Moment(1, 0.0, saved=True), *moments]


def latest_step(workdir: pathlib.Path) -> int:
  steps = [
    int(p.name) for p in workdir.glob('checkpoints/*') if p.name.isdigit()
  ]
  return max(steps, default=0)


def wait_until_handled(pid: int) -> None:
  """Waits for the handler of SIGTERM: Python itself has one of SIGINT."""
  status = pathlib.Path(f'/proc/{pid}/status')
  while True:
    (caught,) = re.findall(r'SigCgt:\s*(\w+)', status.read_text())
    if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
      return
    time.sleep(0.01)


def run_until(
  moment: Moment, sent: signal.Signals, workdir: pathlib.Path, **options: Any
) -> Death:
  process = subprocess.Popen(
    training_command.command(*options['flags'], workdir=workdir),
    env=training_command.environment(options['cache']),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr is not None
  log = []
  # Orbax logs lines about partly deleted checkpoints, which do not count.
  while sum('loop.py' in line for line in log) < moment.lines or (
    moment.saved and not latest_step(workdir)
  ):
    log.append(process.stderr.readline())
    assert log[-1], f'the process ended early: {"".join(log)}'
  time.sleep(moment.seconds)
  if sent == signal.SIGINT:
    wait_until_handled(process.pid)
  process.send_signal(sent)
  start = time.monotonic()
  with process.stderr:
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    log += process.stderr.readlines()
    returncode = process.wait()
    watchdog.cancel()
  seconds = time.monotonic() - start
  text, latest = ''.join(log), latest_step(workdir)
  return Death(moment, sent, returncode, text, latest, seconds)


@dataclasses.dataclass(frozen=True)
class Run:
  workdir: pathlib.Path
  deaths: list[Death]
  log: str  # of the last start, which was not killed


@pytest.fixture(scope='module', name='runs')
def _runs(
  motion_dataset, compilation_cache, tmp_path_factory
) -> dict[str, Run]:
  """Runs by the name of their series; 'whole' was not interrupted."""
  root = tmp_path_factory.mktemp('runs')
  flags = (*FLAGS, f'--config.dataset.data_dir={motion_dataset}')

  def finish(workdir: pathlib.Path) -> str:
    done = training_command.run_here(*flags, workdir=workdir)
    assert done.returncode == 0, done.stderr
    return done.stderr

  def interrupt(name: str) -> list[Death]:
    moments = random_moments(
      seed=len(set(SERIES[name])), count=len(SERIES[name])
    )
    return [
      run_until(moment, sent, root / name, flags=flags, cache=compilation_cache)
      for moment, sent in zip(moments, SERIES[name], strict=True)
    ]

  # First, so that the others find its compiled programs in the cache.
  runs = {'whole': Run(root / 'whole', [], finish(root / 'whole'))}
  with futures.ThreadPoolExecutor(2) as pool:
    deaths = dict(zip(SERIES, pool.map(interrupt, SERIES), strict=True))
  for name in SERIES:
    runs[name] = Run(root / name, deaths[name], finish(root / name))
  return runs


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns the arrays of a checkpoint by path, and its metadata."""
  with warnings.catch_warnings():
    # Orbax warns that no target tree is given.
    warnings.simplefilter('ignore')
    tree = ocp.load_checkpointables(str(folder))
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  arrays = {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves}
  text = (folder / '_CHECKPOINT_METADATA').read_text()
  description = json.loads(text)['custom_metadata']['dualformer']
  del description['training']  # how long it took
  return arrays, description


@pytest.mark.parametrize('name', SERIES)
@pytest.mark.parametrize('kind', ['checkpoints', 'best'])
def test_checkpoints_are_bit_identical_to_an_uninterrupted_run(
  runs, name, kind
):
  folders = [
    sorted((runs[which].workdir / kind).iterdir()) for which in ('whole', name)
  ]
  names = [[folder.name for folder in these] for these in folders]
  assert len(names[0]) == 1
  assert names[0] == names[1]
  assert kind == 'best' or names[0] == [str(NUM_STEPS)]
  (arrays, description), (resumed, resumed_description) = (
    read(folder) for (folder,) in folders
  )
  for tree in ('params', 'batch_stats', 'opt_state'):
    assert any(tree in path for path in arrays)
  assert arrays.keys() == resumed.keys()
  for path, array in arrays.items():
    assert array.dtype == resumed[path].dtype
    assert array.tobytes() == resumed[path].tobytes(), path
  assert description == resumed_description


@pytest.mark.parametrize('name', SERIES)
def test_report_equals_that_of_an_uninterrupted_run(runs, name):
  reports = [
    json.loads((runs[which].workdir / 'report.json').read_text())
    for which in ('whole', name)
  ]
  for key in ('top1', 'top5', 'mean_class_accuracy', 'num_videos', 'config'):
    assert reports[0][key] == reports[1][key]


@pytest.mark.parametrize('name', SERIES)
def test_each_process_resumes_the_latest_checkpoint(runs, name):
  run = runs[name]
  steps = [death.latest for death in run.deaths]
  assert steps == sorted(steps)
  assert 0 < steps[-1] < NUM_STEPS
  for before, death in zip(steps, run.deaths[1:], strict=False):
    if before and death.moment.lines:
      assert f'resumed {run.workdir}/checkpoints/{before}\n' in death.log
  assert f'resumed {run.workdir}/checkpoints/{steps[-1]}\n' in run.log


def test_sigkill_ends_the_process_at_once(runs):
  for death in runs['killed'].deaths:
    assert death.returncode == -signal.SIGKILL


def test_signal_saves_the_last_step(runs):
  stopped = 0
  for death in runs['stopped'].deaths:
    sent = death.sent
    assert 'Traceback' not in death.log
    if sent == signal.SIGTERM and death.returncode == -sent:
      continue  # before the command had begun
    assert death.returncode == 128 + sent, death.log
    last_line = death.log.splitlines()[-1]
    assert f'stopped by {sent.name}' in last_line
    if death.moment.lines:
      assert 'run the same command to resume' in last_line
    steps = re.findall(r'\bstep (\d+)/', death.log)
    if saved := re.search(r'; saved step (\d+):', last_line):
      assert int(saved[1]) == death.latest
      stopped += 1
    assert not steps or int(steps[-1]) == death.latest
  assert stopped >= 2


@pytest.mark.parametrize('name', SERIES)
def test_process_leaves_within_seconds(runs, name):
  assert max(death.seconds for death in runs[name].deaths) < 30
