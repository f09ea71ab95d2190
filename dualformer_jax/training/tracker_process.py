"""Process that sends a run to one tracker: Weights & Biases, MLflow or trackio.

Each tracker runs in a separate process, so that none can delay a step, handle
the signals of training or keep it from ending. trackers.py starts this module
and writes pickled messages to its stdin: ('open', fields of Run), then calls of
the writer, (method, *arguments), until ('close', whether complete). The answers
on stdout are JSON objects: `run_id` and `url`, once the run is open; `error`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import html
import json
import os
import pickle
import queue
import re
import signal
import sys
import threading
import time
import traceback
from typing import IO, Any
import warnings

from jaxtyping import UInt8
import numpy as np

# How long this process may work after the training process has ended.
_MAX_SECONDS_ALONE = 60
# Trackers report their own use over the network, unless the user has set these.
_NO_TELEMETRY = {
  'GRADIO_ANALYTICS_ENABLED': 'False',
  'HF_HUB_DISABLE_TELEMETRY': '1',
  'MLFLOW_DISABLE_TELEMETRY': 'true',
  'WANDB_ERROR_REPORTING': 'false',
}
_MAX_PARAMS = 100  # of one request to MLflow

Images = UInt8[np.ndarray, 'n h w 3']  # RGB


@dataclasses.dataclass(frozen=True)
class Run:
  """A run to be opened; `run_id` is that of an earlier process, if any."""

  tracker: str
  project: str
  name: str
  run_id: str | None
  workdir: str


class Writer:
  """A run of a tracker.

  The methods are those of clu.metric_writers.MetricWriter. It is not a base
  class because clu imports it together with TensorFlow, which is optional.
  The methods of subclasses do what is documented here.
  """

  run_id: str
  url: str = ''  # of its page, if it has one

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes values by name."""
    raise NotImplementedError

  def write_images(self, step: int, images: Mapping[str, Images]) -> None:
    """Writes series of images by name."""
    raise NotImplementedError

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes Markdown texts by name."""
    raise NotImplementedError

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the config, with names such as 'model.dtype'."""
    raise NotImplementedError

  def write_files(self, paths: list[str]) -> None:
    """Stores files with the run."""
    raise NotImplementedError

  def flush(self) -> None:
    """Writes what is buffered."""

  def close(self, is_complete: bool = True) -> None:
    """Ends the run, which is complete or will be resumed."""
    raise NotImplementedError


class WandbWriter(Writer):
  """A run of Weights & Biases, or with WANDB_MODE=offline its local files.

  A row of W&B's history has the metrics of a step. As its rows have increasing
  numbers and cannot be changed, `step` is stored as a metric, too: it is the x
  axis, and that of the few rows that come later, such as those of the test.
  """

  def __init__(self, run: Run):
    import wandb

    self._wandb = wandb
    self._run = wandb.init(
      project=run.project,
      name=run.name,
      id=run.run_id,
      resume='allow' if run.run_id else None,
      dir=os.environ.get('WANDB_DIR') or run.workdir,
      settings=wandb.Settings(console='off'),
    )
    self.run_id = self._run.id
    self.url = self._run.url or ''
    self._next_row = self._run.step
    self._is_row_open = False
    self._run.define_metric('step', hidden=True)
    self._run.define_metric('*', step_metric='step')

  def _log(self, step: int, values: Mapping[str, Any]) -> None:
    values = {**values, 'step': step}
    if step >= self._next_row:  # The row stays open for others of this step.
      self._run.log(values, step=step)
      self._next_row, self._is_row_open = step, True
      return
    if self._is_row_open:
      self._run.log({}, commit=True)
      self._next_row, self._is_row_open = self._next_row + 1, False
    self._run.log(values, commit=True)
    self._next_row += 1

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._log(step, scalars)

  def write_images(self, step: int, images: Mapping[str, Images]) -> None:
    series = {
      name: [
        self._wandb.Image(image, caption=str(number))
        for number, image in enumerate(pixels, 1)
      ]
      for name, pixels in images.items()
    }
    self._log(step, series)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    pages = {n: f'<pre>{html.escape(text)}</pre>' for n, text in texts.items()}
    self._log(step, {n: self._wandb.Html(page) for n, page in pages.items()})

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    self._run.config.update(dict(hparams), allow_val_change=True)

  def write_files(self, paths: list[str]) -> None:
    artifact = self._wandb.Artifact(f'report-{self.run_id}', type='report')
    for path in paths:
      artifact.add_file(path)
    self._run.log_artifact(artifact)

  def close(self, is_complete: bool = True) -> None:
    self._run.finish(exit_code=0 if is_complete else 1)


class MlflowWriter(Writer):
  """A run of MLflow, at MLFLOW_TRACKING_URI."""

  def __init__(self, run: Run):
    import mlflow
    from mlflow import entities

    self._entities = entities
    self._client = mlflow.MlflowClient()
    if run.run_id:
      self._client.update_run(run.run_id, status='RUNNING')
      info = self._client.get_run(run.run_id).info
    else:
      experiment = self._client.get_experiment_by_name(run.project)
      if experiment is None:
        number = self._client.create_experiment(run.project)
      else:
        number = experiment.experiment_id
      info = self._client.create_run(number, run_name=run.name).info
    self.run_id = info.run_id
    server = mlflow.get_tracking_uri()
    if server.startswith('http'):
      self.url = (
        f'{server}/#/experiments/{info.experiment_id}/runs/{info.run_id}'
      )

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    now = time.time_ns() // 1_000_000
    metrics = [
      self._entities.Metric(name, value, now, step)
      for name, value in scalars.items()
    ]
    self._client.log_batch(self.run_id, metrics=metrics)

  def write_images(self, step: int, images: Mapping[str, Images]) -> None:
    for name, image in _numbered(images):
      self._client.log_image(
        self.run_id, image, key=name, step=step, synchronous=True
      )

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      self._client.log_text(self.run_id, text, f'{name}.md')

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """MLflow's parameters keep the values of the first process."""
    known = self._client.get_run(self.run_id).data.params
    params = [
      self._entities.Param(name, str(value))
      for name, value in hparams.items()
      if name not in known
    ]
    for start in range(0, len(params), _MAX_PARAMS):
      some = params[start : start + _MAX_PARAMS]
      self._client.log_batch(self.run_id, params=some)
    self._client.log_dict(self.run_id, dict(hparams), 'config.json')

  def write_files(self, paths: list[str]) -> None:
    for path in paths:
      self._client.log_artifact(self.run_id, path, 'report')

  def close(self, is_complete: bool = True) -> None:
    status = 'FINISHED' if is_complete else 'KILLED'
    self._client.set_terminated(self.run_id, status)


class TrackioWriter(Writer):
  """A run of trackio: local, or of TRACKIO_SPACE_ID or TRACKIO_SERVER_URL."""

  def __init__(self, run: Run):
    import trackio

    # trackio reports errors as warnings, also from its threads.
    warnings.showwarning = self._show_warning
    self._warnings: list[str] = []
    self._trackio = trackio
    self._run: Any = trackio.init(run.project, run.name, embed=False)
    # trackio itself would resume the latest run of this name, which may be that
    # of another workdir.
    if run.run_id:
      self._run.id = run.run_id
    self.run_id = self._run.id
    self._raise_warning()

  def _show_warning(
    self, message: Any, category: Any, filename: str, *_: Any
  ) -> None:
    del category
    print(f'{filename}: {message}', file=sys.stderr)
    if f'{os.sep}trackio{os.sep}' in filename:
      self._warnings.append(str(message))

  def _raise_warning(self) -> None:
    if self._warnings:
      raise RuntimeError(self._warnings[0])

  def _log(self, step: int, values: Mapping[str, Any]) -> None:
    self._run.log(dict(values), step=step)
    self._raise_warning()

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._log(step, scalars)

  def write_images(self, step: int, images: Mapping[str, Images]) -> None:
    self._log(step, {n: self._trackio.Image(x) for n, x in _numbered(images)})

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    self._log(step, {n: self._trackio.Markdown(x) for n, x in texts.items()})

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Trackio stores the config with the next metrics."""
    self._run.config.update(json.loads(json.dumps(hparams)))

  def write_files(self, paths: list[str]) -> None:
    artifact = self._trackio.Artifact(f'report-{self.run_id}', type='report')
    for path in paths:
      artifact.add_file(path)
    self._run.log_artifact(artifact)
    self._raise_warning()

  def close(self, is_complete: bool = True) -> None:
    del is_complete  # Runs of trackio have no status.
    self._trackio.finish()
    self._raise_warning()


def _numbered(
  images: Mapping[str, Images],
) -> Iterator[tuple[str, UInt8[np.ndarray, 'h w 3']]]:
  for name, pixels in images.items():
    for number, image in enumerate(pixels, 1):
      yield f'{name}/{number:02d}', image


WRITERS = {
  'wandb': WandbWriter,
  'mlflow': MlflowWriter,
  'trackio': TrackioWriter,
}


def main() -> None:
  """Reads messages from stdin, and passes them on to the tracker."""
  # Training handles these, and ends this process.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  # What libraries print goes to stderr, which is a file in the workdir.
  messages, answers = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'w')
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(2, 1)
  for name, value in _NO_TELEMETRY.items():
    os.environ.setdefault(name, value)

  def answer(**fields: str) -> None:
    print(json.dumps(fields), file=answers, flush=True)

  calls: queue.Queue[Any] = queue.Queue()
  reader = threading.Thread(target=_read, args=(messages, calls), daemon=True)
  reader.start()
  try:
    _, fields = calls.get()
    run = Run(**fields)
    writer = WRITERS[run.tracker](run)
    answer(run_id=writer.run_id, url=writer.url)
    method = ''
    while method != 'close':
      method, *arguments = calls.get()
      getattr(writer, method)(*arguments)
  except Exception as error:
    traceback.print_exc()
    answer(error=_in_one_line(error))
    os._exit(1)  # What the library does at exit could fail for the same reason.


def _read(messages: IO[bytes], calls: queue.Queue[Any]) -> None:
  """Puts all messages into the queue, so that the sender never waits."""
  try:
    while True:
      calls.put(pickle.load(messages))
  except (EOFError, pickle.UnpicklingError):
    # Training has ended, and has closed the run unless it was killed.
    calls.put(('close', False))
    time.sleep(_MAX_SECONDS_ALONE)
    os.killpg(0, signal.SIGKILL)


def _in_one_line(error: Exception) -> str:
  text = ' '.join(re.sub(r'\x1b\[[\d;]*m', '', str(error)).split())
  return f'{type(error).__name__}: {text[:300]}'


if __name__ == '__main__':
  main()
