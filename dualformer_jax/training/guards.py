"""Checks during training: non-finite losses, stop signals, data leakage."""

from collections.abc import Sequence
import fcntl
import logging
import os
import pathlib
import signal
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.checkpoints.metadata import CheckpointMetadata
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.dataset import (
  PreparedDataset,
  near_duplicates,
)
from dualformer_jax.stop_signals import stop_signals
from dualformer_jax.training.logging import format_metrics
from dualformer_jax.training.setup import Training
from dualformer_jax.training.state import TrainState

_LOG = logging.getLogger(__name__)


class FiniteGuard:
  """Ends training after a step whose loss or gradient is not finite.

  A step is checked while the next one runs, so that devices never wait.
  """

  def __init__(self, checkpoints: checkpoint.Checkpoints):
    self._checkpoints = checkpoints
    self._unchecked = None

  def add(
    self, step: int, metrics: dict[str, jax.Array], video_ids: Sequence[str]
  ) -> None:
    """Records a step, after checking the previous one."""
    self.check()
    self._unchecked = step, metrics, video_ids

  def check(self) -> None:
    """Waits for the last step; raises UserError if it is not finite."""
    if self._unchecked is None:
      return
    (step, metrics, video_ids), self._unchecked = self._unchecked, None
    bad = {n: float(v) for n, v in metrics.items() if not np.isfinite(v)}
    if bad:
      self._checkpoints.wait()
      raise UserError(
        f'step {step}: {format_metrics(bad)}, after a batch of these videos: '
        f'{", ".join(video_ids)}. The last good checkpoint is '
        f'{self._checkpoints.latest() or "none yet"}; nothing was saved after '
        'it. Look at the videos, lower optimizer.learning_rate, or clip '
        'gradients (--config.optimizer.max_grad_norm=1)'
      )


def check_batch_size(batch_size: int, saved: CheckpointMetadata) -> None:
  """Raises UserError if a run to be resumed had batches of another size.

  Learning rate, epochs and the end of the run are computed from its steps.
  """
  position = (saved.data_position or {}).get('position')
  if not saved.step or not isinstance(position, int):
    return
  began_with = position // saved.step
  if began_with != batch_size:
    raise UserError(
      f'config.batch_size is {batch_size}, but this run began with'
      f' {began_with}; use that one (it takes less memory with'
      ' config.accumulation_steps), or begin in a new workdir'
    )


class WorkdirLock:
  """While it exists, no other process can train in a workdir.

  Two would remove each other's checkpoints. File systems without locks are not
  guarded. Of several hosts, process 0 has the lock.
  """

  def __init__(self, workdir: pathlib.Path):
    """Creates and locks the workdir.

    Raises:
      UserError: another process trains there.
    """
    self._folder: int | None = None
    if jax.process_index() != 0:
      return
    workdir.mkdir(parents=True, exist_ok=True)
    self._folder = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
    try:
      fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f'{workdir}: another process trains there; wait until it ends, or'
        ' choose another --workdir'
      ) from error
    except OSError:
      _LOG.debug('%s cannot be locked', workdir)

  def __del__(self):
    if self._folder is not None:
      os.close(self._folder)


class StopRequest:
  """Whether to stop after SIGINT or SIGTERM on any host.

  Before the first step there is nothing to save, and a signal ends the process.
  """

  def __init__(self):
    self._is_set = False
    self._is_forwarded = False
    self._num_requests = 0

  def is_set(self) -> bool:
    """Returns whether to stop: the same on all hosts at the same call."""
    received = stop_signals.received
    if jax.process_count() == 1:
      return received is not None
    if not self._is_set:
      self._num_requests += 1
      # JAX handles SIGTERM itself, and informs all hosts.
      if received is not None and not self._is_forwarded:
        self._is_forwarded = True
        os.kill(os.getpid(), signal.SIGTERM)
      self._is_set = multihost_utils.reached_preemption_sync_point(
        self._num_requests
      )
    return self._is_set

  def raise_exit(self, step: int) -> NoReturn:
    """Ends the process, whose state is saved."""
    number = stop_signals.received or signal.SIGTERM
    _LOG.info('stopped by %s%s', number.name, saved_step(step))
    raise SystemExit(128 + number)


def saved_step(step: int) -> str:
  """Returns the end of a message: the saved step, and how to resume."""
  return f'; saved step {step}: run the same command to resume'


def warn_of_near_duplicates(
  train_data: PreparedDataset, data: PreparedDataset, name: str
) -> None:
  """Warns if 'validation' or 'test' videos are also training videos."""
  if pairs := near_duplicates(train_data, data):
    _LOG.warning(
      '%d %s videos are also training videos, or near-duplicates of them: '
      '%s%s; they inflate accuracy',
      len(pairs),
      name,
      ', '.join(f'{b} of {a}' for a, b in pairs[:3]),
      ', ...' if len(pairs) > 3 else '',
    )


def overfit_one_batch(
  training: Training, state: TrainState, batch: Any, teacher_variables: Any
) -> None:
  """Trains a copy of the state on one batch, and logs how the loss falls.

  A model that cannot overfit one batch will not learn from many: labels,
  learning rate or initialization are wrong.
  """
  state = jax.tree.map(jnp.copy, state)  # the step donates it
  num_steps, curve = training.config.overfit_steps, []
  for step in range(1, num_steps + 1):
    state, metrics = training.train_step(state, batch, teacher_variables)
    curve.append(float(metrics['loss']))
    if (step - 1) % max(1, num_steps // 10) == 0 or step == num_steps:
      _LOG.info('one batch, step %d/%d: loss %.4g', step, num_steps, curve[-1])
  change = f'loss {curve[0]:.4g} -> {curve[-1]:.4g}'
  if curve[-1] < curve[0] / 2:
    _LOG.info('one batch is overfit: %s', change)
  else:
    _LOG.warning(
      'one batch is NOT overfit: %s, more than half. Try more steps, a higher '
      'learning rate or no warm-up; else check the labels',
      change,
    )
