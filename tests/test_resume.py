"""A run that is killed again and again ends as if nothing had happened."""

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

NUM_KILLS = 10
# Of 8 clips, 6 an epoch; more than the fastest machine takes between kills.
NUM_STEPS = 120
FLAGS = (
  *training_command.TINY,
  f'--config.num_epochs={NUM_STEPS // 6}',
  '--config.validation.every_epochs=5',
  '--config.checkpoint.every_steps=4',
  '--config.log_every_steps=1',
  '--config.optimizer.learning_rate=0.005',
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Moment:
  """When to kill: some time after so many lines of the log.

  Or, if it is to have `saved`, after the next line when there is a checkpoint.
  """

  lines: int
  seconds: float
  saved: bool = False


@dataclasses.dataclass(frozen=True)
class Death:
  moment: Moment
  returncode: int
  log: str
  newest: int  # step that was saved


def random_moments(seed: int) -> list[Moment]:
  """One after a checkpoint, three before the first line, others after it."""
  rng = random.Random(seed)
  early = [Moment(0, rng.uniform(0.0, 6.0)) for _ in range(3)]
  late = [
    Moment(rng.randint(1, 10), rng.uniform(0.0, 0.2))
    for _ in range(NUM_KILLS - len(early) - 1)
  ]
  moments = early + late
  rng.shuffle(moments)
  # However fast steps are beside checkpoints, there is one to go on from.
  return [Moment(1, 0.0, saved=True), *moments]


def newest_step(workdir: pathlib.Path) -> int:
  steps = [
    int(p.name) for p in workdir.glob('checkpoints/*') if p.name.isdigit()
  ]
  return max(steps, default=0)


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
  # Orbax has lines of its own about a checkpoint that was half deleted.
  while sum('loop.py' in line for line in log) < moment.lines or (
    moment.saved and not newest_step(workdir)
  ):
    log.append(process.stderr.readline())
    assert log[-1], 'it ended by itself'
  time.sleep(moment.seconds)
  process.send_signal(sent)
  with process.stderr:
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    log += process.stderr.readlines()
    returncode = process.wait()
    watchdog.cancel()
  return Death(moment, returncode, ''.join(log), newest_step(workdir))


@dataclasses.dataclass(frozen=True)
class Run:
  workdir: pathlib.Path
  deaths: list[Death]
  log: str  # of the last process, that was let alone


@pytest.fixture(scope='module', name='runs')
def _runs(
  motion_dataset, compilation_cache, tmp_path_factory
) -> dict[signal.Signals | None, Run]:
  """By the signal that was sent; None for the uninterrupted one."""
  root = tmp_path_factory.mktemp('runs')
  flags = (*FLAGS, f'--config.dataset.data_dir={motion_dataset}')

  def finish(workdir: pathlib.Path) -> str:
    done = training_command.run(
      *flags, workdir=workdir, cache=compilation_cache
    )
    assert done.returncode == 0, done.stderr
    return done.stderr

  def interrupted(sent: signal.Signals) -> Run:
    workdir = root / sent.name
    deaths = [
      run_until(moment, sent, workdir, flags=flags, cache=compilation_cache)
      for moment in random_moments(int(sent))
    ]
    return Run(workdir, deaths, finish(workdir))

  # First, as the others then find what it has compiled.
  runs: dict[signal.Signals | None, Run] = {
    None: Run(root / 'whole', [], finish(root / 'whole'))
  }
  with futures.ThreadPoolExecutor(2) as pool:
    runs |= dict(zip(SIGNALS, pool.map(interrupted, SIGNALS), strict=True))
  return runs


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """All arrays of a checkpoint, by path, and what it says of itself."""
  with warnings.catch_warnings():
    # Orbax warns, as it is not told what to expect.
    warnings.simplefilter('ignore')
    tree = ocp.load_checkpointables(str(folder))
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  arrays = {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves}
  text = (folder / '_CHECKPOINT_METADATA').read_text()
  return arrays, json.loads(text)['custom_metadata']['dualformer']


@pytest.mark.parametrize('sent', SIGNALS, ids=lambda sent: sent.name)
@pytest.mark.parametrize('series', ['checkpoints', 'best'])
def test_what_is_learnt_is_bit_for_bit_that_of_an_uninterrupted_run(
  runs, sent, series
):
  folders = [
    sorted((runs[which].workdir / series).iterdir()) for which in (None, sent)
  ]
  names = [[folder.name for folder in these] for these in folders]
  assert len(names[0]) == 1
  assert names[0] == names[1]
  assert series == 'best' or names[0] == [str(NUM_STEPS)]
  (arrays, description), (resumed, resumed_description) = (
    read(folder) for (folder,) in folders
  )
  for kind in ('params', 'batch_stats', 'opt_state'):
    assert any(kind in name for name in arrays)
  assert arrays.keys() == resumed.keys()
  for name, array in arrays.items():
    assert array.dtype == resumed[name].dtype
    assert array.tobytes() == resumed[name].tobytes(), name
  assert description == resumed_description


@pytest.mark.parametrize('sent', SIGNALS, ids=lambda sent: sent.name)
def test_the_report_is_that_of_an_uninterrupted_run(runs, sent):
  reports = [
    json.loads((runs[which].workdir / 'report.json').read_text())
    for which in (None, sent)
  ]
  for name in ('top1', 'top5', 'mean_class_accuracy', 'num_videos', 'config'):
    assert reports[0][name] == reports[1][name]


@pytest.mark.parametrize('sent', SIGNALS, ids=lambda sent: sent.name)
def test_each_process_goes_on_from_what_the_one_before_has_saved(runs, sent):
  run = runs[sent]
  steps = [death.newest for death in run.deaths]
  assert steps == sorted(steps)
  assert 0 < steps[-1] < NUM_STEPS
  for before, death in zip(steps, run.deaths[1:], strict=False):
    if before and death.moment.lines:
      assert f'resumed {run.workdir}/checkpoints/{before}\n' in death.log
  assert f'resumed {run.workdir}/checkpoints/{steps[-1]}\n' in run.log


def test_sigkill_leaves_no_time_for_anything(runs):
  for death in runs[signal.SIGKILL].deaths:
    assert death.returncode == -signal.SIGKILL


def test_sigterm_saves_the_last_step_and_leaves(runs):
  stopped = 0
  for death in runs[signal.SIGTERM].deaths:
    assert 'Traceback' not in death.log
    if not death.moment.lines and death.returncode == -signal.SIGTERM:
      continue  # before there was anything to save
    assert death.returncode == 128 + signal.SIGTERM, death.log
    saved = re.search(r'stopped by SIGTERM; saved step (\d+):', death.log)
    assert saved
    assert int(saved[1]) == death.newest
    steps = re.findall(r'\bstep (\d+)/', death.log)
    assert not steps or int(steps[-1]) == death.newest
    stopped += 1
  assert stopped >= 7
