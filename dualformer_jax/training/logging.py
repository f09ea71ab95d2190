"""Timing and logging of training steps."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import logging
import os
import pathlib
import re
import struct
import time
from typing import Any

import jax
import numpy as np

from dualformer_jax.checkpoints.metadata import CheckpointMetadata
from dualformer_jax.distributed import processes
from dualformer_jax.errors import UserError, missing_extra
from dualformer_jax.evaluation import report as reports
from dualformer_jax.evaluation.curves import METRICS_FILE, read_metrics
from dualformer_jax.files import atomic_write, output_file
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training.trackers import Trackers

_LOG = logging.getLogger(__name__)


class StepTimer:
  """Measures the time of a step, and the share of it spent on input."""

  def __init__(self, step: int):
    self.restart(step)

  def restart(self, step: int) -> None:
    """Starts a new interval at a step."""
    self.step = step
    self._start = time.monotonic()
    self._waited = 0.0

  def wait_for(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Returns the next batch, and counts the time as waiting for input."""
    start = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - start
    return batch

  def measure(self, step: int) -> tuple[float, float]:
    """Starts a new interval; returns seconds per step and share of waiting."""
    seconds = time.monotonic() - self._start
    result = seconds / (step - self.step), self._waited / seconds
    self.restart(step)
    return result


class MetricWriter:
  """Writes metrics to METRICS_FILE, trackers and, with TensorFlow, TensorBoard.

  Only process 0 writes. A run that resumes first removes what it will
  write again. All methods raise UserError if a file cannot be written.
  """

  def __init__(self, workdir: pathlib.Path, step: int, config: Any = None):
    """Opens the files of a run that is at a step, and the config's trackers."""
    self._workdir = workdir
    self._writer: Any = None
    self._trackers: Trackers | None = None
    self._path = None
    if jax.process_index():
      return
    self._path = workdir / METRICS_FILE
    earlier = list(read_metrics(workdir))
    if config is not None and config.trackers:
      self._trackers = Trackers(config, workdir)
      self._trackers.write_earlier(earlier)
    kept = [
      json.dumps({'step': at, **metrics}) + '\n'
      for at, metrics in earlier
      if not all(_is_repeated(name, at, step) for name in metrics)
    ]
    with output_file(self._path) as file:
      file.write(''.join(kept).encode())
    # Otherwise TensorFlow's C++ code logs the instructions of the CPU, and
    # errors that it also raises.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    try:
      from clu import metric_writers
    except ImportError as error:
      _LOG.warning(
        'metrics are logged here only, not to TensorBoard (%s): %s',
        error,
        missing_extra('TensorBoard', 'prepare'),
      )
    else:
      with self._writing():
        for path in workdir.glob('events.out.tfevents.*'):
          _remove_events(path, step)
        self._writer = metric_writers.SummaryWriter(str(workdir))

  def write(self, step: int, prefix: str, metrics: Mapping[str, float]) -> None:
    """Writes metrics as PREFIX/NAME."""
    scalars = {f'{prefix}/{name}': value for name, value in metrics.items()}
    if self._path is not None:
      with self._writing(), self._path.open('a') as file:
        file.write(json.dumps({'step': step, **scalars}) + '\n')
    if self._writer is not None:
      with self._writing():
        self._writer.write_scalars(step, scalars)
    if self._trackers is not None:
      self._trackers.write_scalars(step, scalars)

  def write_text(self, step: int, name: str, text: str) -> None:
    """Writes a text to TensorBoard."""
    if self._writer is not None:
      with self._writing():
        self._writer.write_texts(step, {name: text})

  def write_report(
    self, step: int, mistakes: Sequence[Mapping[str, Any]]
  ) -> None:
    """Sends the report of the test, with its mistakes, to the trackers."""
    if self._trackers is None:
      return
    names = (reports.JSON_FILE, reports.PAGE_FILE)
    self._trackers.write_files([self._workdir / name for name in names])
    pictures = [m['picture'] for m in mistakes if m['picture'] is not None]
    if pictures:
      width = max(picture.shape[1] for picture in pictures)
      images = [
        np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)))
        for picture in pictures
      ]
      self._trackers.write_images(step, {'test/mistakes': np.stack(images)})
      text = _describe([m for m in mistakes if m['picture'] is not None])
      self._trackers.write_texts(step, {'test/mistakes_text': text})

  def flush(self) -> None:
    """Writes what is buffered."""
    if self._writer is not None:
      with self._writing():
        self._writer.flush()

  def close(self, is_complete: bool = True) -> None:
    """Writes what is buffered, and closes the file.

    For trackers, the run is complete or will be resumed. It may take a minute
    until they have received all.
    """
    if self._writer is not None:
      with self._writing():
        self._writer.close()
    self.close_trackers(is_complete)

  def close_trackers(self, is_complete: bool) -> None:
    """Lets trackers receive what is left; what is written later is dropped."""
    if self._trackers is not None:
      self._trackers.close(is_complete)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      if not isinstance(error, OSError) and not hasattr(error, 'error_code'):
        raise  # neither of the system nor of TensorFlow
      # It names the file before the reason, and lists the consequences after.
      found = re.search(r'; ([^\n]+)', str(error))
      reason = found[1] if found else getattr(error, 'strerror', None) or error
      raise UserError(
        f'metrics in {self._workdir} cannot be written: {reason}'
      ) from error


def _is_repeated(name: str, at: int, step: int) -> bool:
  """Returns whether a run that resumes after `step` writes a metric again."""
  kind = name.partition('/')[0]
  # It may validate this step, and it always tests.
  is_first = at == step and kind in ('config', 'validation')
  return at > step or kind == 'test' or is_first


def _remove_events(path: pathlib.Path, step: int) -> None:
  """Removes what a run that resumes after `step` writes to TensorBoard again.

  The file has TFRecords: the length, its checksum, an Event, and its checksum.
  """
  from tensorboard.compat.proto import event_pb2

  parse = vars(event_pb2)['Event'].FromString  # unknown to type checkers
  content, kept, start = path.read_bytes(), [], 0
  while start + 12 <= len(content):
    (length,) = struct.unpack_from('<Q', content, start)
    record = content[start : start + length + 16]
    start += len(record)
    if len(record) < length + 16:
      break  # the process was killed
    event = parse(record[12:-4])
    names = [value.tag for value in event.summary.value]
    if not names or not all(_is_repeated(n, event.step, step) for n in names):
      kept.append(record)
  if len(content) != sum(map(len, kept)):
    with atomic_write(path) as file:
      file.writelines(kept)


def _describe(mistakes: Sequence[Mapping[str, Any]]) -> str:
  """Returns a Markdown table of mistakes, numbered as their pictures are."""

  def cell(text: str) -> str:
    return ' '.join(text.replace('|', '\\|').split())

  rows = ['| | video | true class | predicted |', '|---|---|---|---|']
  rows += [
    f'| {number} | {cell(mistake["video"])} | {cell(mistake["true"])} | '
    f'{cell(mistake["predicted"])} ({mistake["predicted_probability"]:.0%}) |'
    for number, mistake in enumerate(mistakes, 1)
  ]
  return '\n'.join(rows) + '\n'


def training_record(
  resumed: CheckpointMetadata | None, seconds: float
) -> dict[str, Any] | None:
  """Returns hours and hardware of training, for the metadata of checkpoints.

  Args:
    resumed: The checkpoint that training was resumed from, if any.
    seconds: Time since then.

  Returns:
    The record, or None if the checkpoint has none, as those of older versions.
  """
  hours, used = seconds / 3600, [processes.hardware()]
  if resumed is not None:
    if resumed.training is None:
      return None
    hours += resumed.training['hours']
    used = list(dict.fromkeys([*resumed.training['hardware'], *used]))
  return {'hours': round(hours, 4), 'hardware': used}


def compile_time(model: DualFormer) -> str:
  """Returns roughly how long the training step of a model compiles.

  The time is in proportion to the blocks; it is that of two CPU cores.
  """
  seconds = 10 + 5 * sum(model.depths)
  rounded = f'{seconds} s' if seconds < 90 else f'{round(seconds / 60)} min'
  return f'about {rounded}, or seconds if it is in the compilation cache'


def format_metrics(metrics: Mapping[str, float]) -> str:
  """Returns 'NAME VALUE  NAME VALUE ...'."""
  return '  '.join(f'{name} {value:.4g}' for name, value in metrics.items())
