"""Sends metrics, reports and pictures to Weights & Biases, MLflow and trackio.

Each tracker has a process (tracker_process.py). Writing to it never waits; if
it fails or hangs, one warning is logged and training continues without it.
"""

import atexit
from collections.abc import Iterable, Mapping, Sequence
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from flax import traverse_util

from dualformer_jax.errors import UserError, missing_extra
from dualformer_jax.files import atomic_write
from dualformer_jax.training import tracker_process

# An ml_collections.ConfigDict, whose fields type checkers cannot know.
Config = Any

NAMES = tuple(tracker_process.WRITERS)
# In the workdir: the ID of the run by tracker, and output of the libraries.
STATE_FILE = 'trackers.json'
LOG_FILE = 'trackers.log'
_DEFAULT_PROJECT = 'dualformer'
_PROJECT_VARIABLES = {
  'wandb': 'WANDB_PROJECT',
  'mlflow': 'MLFLOW_EXPERIMENT_NAME',
  'trackio': 'TRACKIO_PROJECT',
}
# How long trackers may take to send the rest when a run is complete, and when
# it is interrupted: a preempted machine is taken away soon.
_FINISH_SECONDS = 60
_STOP_SECONDS = 15
_QUIET_SECONDS = 2
# Metrics that differ between two runs of the same steps.
_TIMES = ('train/clips_per_second', 'train/wait_for_data')
_LOG = logging.getLogger(__name__)


def split(value: str) -> list[str]:
  """Returns the names of config.trackers, each once."""
  found = (name.strip() for name in value.split(','))
  return [name for name in dict.fromkeys(found) if name]


def check_installed(config: Config) -> None:
  """Raises UserError if a tracker of the config is not installed."""
  for name in split(config.trackers):
    spec = importlib.util.find_spec(name)
    # Without an origin it is a folder of this name, such as W&B writes.
    if spec is None or spec.origin is None:
      raise UserError(missing_extra(f'config.trackers={name}', name))


class Trackers:
  """The trackers of a run. No method raises or waits, except `close`."""

  def __init__(self, config: Config, workdir: pathlib.Path):
    """Starts the processes, which continue the runs of the workdir."""
    self._known: dict[tuple[str, int], float] = {}
    self._state = _State(workdir / STATE_FILE)
    hparams = traverse_util.flatten_dict(config.to_dict(), sep='.')
    self._writers = [
      _Process(
        tracker_process.Run(
          tracker=name,
          project=config.tracker_project
          or os.environ.get(_PROJECT_VARIABLES[name])
          or _DEFAULT_PROJECT,
          name=config.tracker_run or workdir.name,
          run_id=self._state.run_ids.get(name),
          workdir=str(workdir),
        ),
        self._state,
      )
      for name in split(config.trackers)
    ]
    self._call('write_hparams', hparams)
    atexit.register(self.close, is_complete=False)  # after an error

  def write_earlier(
    self, points: Iterable[tuple[int, Mapping[str, float]]]
  ) -> None:
    """Writes the metrics of earlier processes to trackers that are new."""
    for step, scalars in points:
      self._known |= {(name, step): value for name, value in scalars.items()}
      for writer in self._writers:
        if writer.is_new:
          writer.call('write_scalars', step, scalars)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes values by name, unless an earlier process has written them."""
    known = self._known
    new = {n: v for n, v in scalars.items() if known.get((n, step)) != v}
    # A step that is repeated after resuming takes another time.
    if any(n not in _TIMES or (n, step) not in known for n in new):
      self._call('write_scalars', step, new)

  def write_images(
    self, step: int, images: Mapping[str, tracker_process.Images]
  ) -> None:
    """Writes series of images by name."""
    self._call('write_images', step, dict(images))

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes Markdown texts by name."""
    self._call('write_texts', step, dict(texts))

  def write_files(self, paths: Sequence[pathlib.Path]) -> None:
    """Stores files with the run."""
    self._call('write_files', [str(path) for path in paths])

  def close(self, is_complete: bool = True) -> None:
    """Ends the runs, and waits for at most a minute."""
    atexit.unregister(self.close)
    self._call('close', is_complete)
    seconds = _FINISH_SECONDS if is_complete else _STOP_SECONDS
    deadline = time.monotonic() + seconds
    for writer in self._writers:
      writer.join(deadline)

  def _call(self, method: str, *arguments: Any) -> None:
    for writer in self._writers:
      writer.call(method, *arguments)


class _State:
  """The IDs of the runs, which are stored in the workdir."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._lock = threading.Lock()
    self.run_ids: dict[str, str] = {}
    try:
      stored = json.loads(path.read_text('utf-8'))
      self.run_ids = {n: str(run['run_id']) for n, run in stored.items()}
    except FileNotFoundError:
      pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
      raise UserError(
        f'{path}: cannot be read ({type(error).__name__}: {error}); remove it '
        'to start new runs in the trackers'
      ) from error

  def set(self, name: str, run_id: str) -> None:
    """Stores the ID of a run."""
    with self._lock:
      self.run_ids[name] = run_id
      stored = {n: {'run_id': i} for n, i in sorted(self.run_ids.items())}
      with atomic_write(self._path) as file:
        file.write(f'{json.dumps(stored, indent=2)}\n'.encode())


class _Process:
  """The process of a tracker, and the threads that talk to it."""

  def __init__(self, run: tracker_process.Run, state: _State):
    self._run, self._state = run, state
    self.is_new = run.run_id is None
    self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._has_failed = False
    with open(pathlib.Path(run.workdir, LOG_FILE), 'ab') as log:
      self._process = subprocess.Popen(
        [sys.executable, '-m', tracker_process.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        # Ctrl-C goes to all processes of the terminal's session.
        start_new_session=True,
      )
    self._threads = [
      threading.Thread(target=target, daemon=True)
      for target in (self._send, self._receive)
    ]
    for thread in self._threads:
      thread.start()
    self._calls.put(('open', dataclasses.asdict(run)))

  def call(self, method: str, *arguments: Any) -> None:
    """Calls a method of the writer, later."""
    if not self._has_failed:
      self._calls.put((method, *arguments))

  def join(self, deadline: float) -> None:
    """Waits until the process ends; at the deadline, ends it."""
    if not self._has_ended(_QUIET_SECONDS):
      name, left = self._run.tracker, deadline - time.monotonic()
      _LOG.info('waiting for %s to send the rest, up to %.0f s', name, left)
      if not self._has_ended(max(0, left)):
        self._fail('it did not finish in time and was killed')
        with contextlib.suppress(ProcessLookupError):
          os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    for thread in self._threads:
      thread.join(1)

  def _has_ended(self, seconds: float) -> bool:
    try:
      self._process.wait(seconds)
    except subprocess.TimeoutExpired:
      return False
    return True

  def _send(self) -> None:
    assert self._process.stdin is not None
    # If the process has ended, _receive reports why.
    with contextlib.suppress(OSError), self._process.stdin as stdin:
      while True:
        message = self._calls.get()
        pickle.dump(message, stdin)
        stdin.flush()
        if message[0] == 'close':
          break

  def _receive(self) -> None:
    assert self._process.stdout is not None
    with self._process.stdout as stdout:
      for answer in map(json.loads, stdout):
        if 'error' in answer:
          self._fail(answer['error'])
          continue
        name, run_id = self._run.tracker, answer['run_id']
        _LOG.info('%s has the run %s  %s', name, run_id, answer['url'])
        try:
          self._state.set(name, run_id)
        except OSError as error:
          self._fail(f'the ID of the run cannot be stored: {error.strerror}')
    if self._process.wait():
      self._fail(f'its process ended with status {self._process.returncode}')

  def _fail(self, reason: str) -> None:
    """Warns once, and drops what is not sent."""
    with self._lock:
      if self._has_failed:
        return
      self._has_failed = True
    self._calls.put(('close', False))  # ends _send
    _LOG.warning(
      '%s does not receive the rest of this run: %s (see %s); metrics are in '
      'the workdir as well',
      self._run.tracker,
      reason,
      pathlib.Path(self._run.workdir, LOG_FILE),
    )
