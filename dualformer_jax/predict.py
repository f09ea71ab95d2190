r"""Says what videos show.

  python -m dualformer_jax.predict --checkpoint=DIR VIDEO [VIDEO ...]

VIDEO is a file, a folder (all videos below it), a pattern in quotes ('*.mp4'),
the number of a camera (0), or an address (rtsp://, rtmp://, http://, https://).
A file with a number for its name is ./0.

Each video is scored as a whole, by the test views of the checkpoint; or, with
--sliding, window by window, in the order of time. Cameras and addresses are
always scored by windows, until they end or are interrupted.

The exit status is 0 if all videos could be scored, 1 if some could not, and 2
if none could.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import io
import itertools
import json
import logging
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from absl import flags
import cv2
import numpy as np

from dualformer_jax import command_line, scoring, sources, timeline
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding

if TYPE_CHECKING:
  from dualformer_jax.recognizer import Recognizer

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'A checkpoint folder, or the workdir of a training run.',
  required=True,
)
_TOP_K = flags.DEFINE_integer(
  'top_k', 5, 'How many classes to tell of.', lower_bound=1
)
_JSON = flags.DEFINE_bool(
  'json', False, 'Print one JSON object a line, and nothing else, to stdout.'
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 4, 'Views scored at a time, of any videos.', lower_bound=1
)
_NUM_THREADS = flags.DEFINE_integer(
  'num_threads', 4, 'Videos decoded at a time.', lower_bound=1
)
_SLIDING = flags.DEFINE_bool('sliding', False, 'Score windows, one by one.')
_WINDOW = flags.DEFINE_float(
  'window',
  None,
  'Seconds that a window lasts, from which the frames of a clip are taken '
  'evenly; by default as many frames as a clip spans. Implies --sliding.',
)
_STRIDE = flags.DEFINE_float(
  'stride',
  None,
  'Seconds from the start of a window to that of the next; by default a '
  'window begins where the last one ends. Implies --sliding.',
)
_SECONDS = flags.DEFINE_float(
  'seconds', None, 'Stop after so many seconds of video; with --sliding.'
)
_TIMELINE = flags.DEFINE_multi_string(
  'timeline',
  [],
  'Files to write the windows of a video to, .json, .csv or .png: commas '
  'between them, or a flag for each. Implies --sliding.',
)
_SAVE = flags.DEFINE_string(
  'save',
  None,
  'Where to write a copy, without sound, with the classes drawn on it: a name '
  'that ends in .mp4, or for several videos a folder.',
)
_FEATURES = flags.DEFINE_string(
  'features',
  None,
  'An .npz file for the features of each video, the mean over its views: '
  'arrays `names` and `features`, [videos, channels].',
)
_FEATURES_PER_TOKEN = flags.DEFINE_bool(
  'features_per_token',
  False,
  'Write to --features also `tokens`, [videos, d, h, w, channels], of the '
  'middle view of each video.',
)
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace existing files.')

_LOG = logging.getLogger('dualformer_jax.predict')
_SECONDS_BETWEEN_LINES = 10


# --- What to write


def _output_files(
  names: list[str],
) -> tuple[list[pathlib.Path], dict[str, pathlib.Path], pathlib.Path | None]:
  """Returns the timelines, the copy of each video, and the features.

  Raises:
    UserError: they do not fit the videos, or would replace a file.
  """
  timelines = [
    pathlib.Path(path).expanduser()
    for value in _TIMELINE.value
    for path in value.split(',')
  ]
  for path in timelines:
    if path.suffix not in timeline.SUFFIXES:
      raise UserError(
        f'--timeline={path}: expected a name that ends in one of '
        f'{", ".join(timeline.SUFFIXES)}'
      )
  if timelines and len(names) > 1:
    raise UserError(
      f'--timeline is of one video, and there are {len(names)}; give one, or '
      '--sliding --json instead, which tells of all'
    )
  copies = _copies(_SAVE.value, names) if _SAVE.value else {}
  features = None
  if _FEATURES.value:
    features = pathlib.Path(_FEATURES.value).expanduser()
    if features.suffix != '.npz':
      raise UserError(
        f'--features={features}: expected a name that ends in .npz'
      )
  inputs = {pathlib.Path(name).resolve() for name in names}
  for path in [*timelines, *copies.values(), *filter(None, [features])]:
    if path.resolve() in inputs:
      raise UserError(f'{path} is a video to be read; choose another name')
    if path.is_dir():
      raise UserError(f'{path} is a folder; expected the name of a file')
    parent = next(parent for parent in path.parents if parent.exists())
    if not parent.is_dir():
      raise UserError(f'{path} cannot be written: {parent} is no folder')
    if path.exists() and not _OVERWRITE.value:
      raise UserError(
        f'{path} exists already; nothing was written: choose another name, or '
        'add --overwrite'
      )
  return timelines, copies, features


def _copies(save: str, names: list[str]) -> dict[str, pathlib.Path]:
  """Returns where the labelled copy of each video goes."""
  target = pathlib.Path(save).expanduser()
  if not save.endswith('/') and not target.is_dir():
    if target.suffix != '.mp4' or len(names) > 1:
      raise UserError(
        f'--save={save}: expected a name that ends in .mp4 for one video, or '
        f'in / for a folder of several; there are {len(names)}'
      )
    return dict.fromkeys(names, target)
  # They lie in it as the videos do in the folder that these share.
  absolute = [os.path.abspath(name) for name in names]
  shared = os.path.commonpath([os.path.dirname(path) for path in absolute])
  copies = {}
  for name, path in zip(names, absolute, strict=True):
    relative = os.path.relpath(path, shared)
    suffix = '' if relative.lower().endswith('.mp4') else '.mp4'
    copies[name] = target / (relative + suffix)
  return copies


@contextlib.contextmanager
def _whole_file(path: pathlib.Path) -> Iterator[io.BufferedIOBase]:
  """A file to write, which gets its name once it is whole."""
  partial = path.with_name(f'.{path.name}.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, 'wb') as file:
      yield file
    partial.replace(path)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error}') from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def _save_copy(
  path: pathlib.Path, video: str, windows: Sequence[timeline.Window]
) -> None:
  fps, frames = _open(video)
  with _whole_file(path) as file:
    labelled = timeline.labelled(frames, fps, windows)
    decoding.write_mp4(file, labelled, fps=fps)


# --- What to print


class _Printer:
  """Prints what is found, as it is found, and counts it."""

  def __init__(self):
    self.num_scored = 0
    self.num_failed = 0
    self._title = ''
    is_terminal = sys.stdout.isatty()
    is_utf8 = (sys.stdout.encoding or '').lower() in ('utf-8', 'utf8')
    self._bar = ('\u2588' if is_utf8 else '#') if is_terminal else ''
    is_colored = is_terminal and 'NO_COLOR' not in os.environ
    self._color = ('\x1b[36m', '\x1b[0m') if is_colored else ('', '')

  def video(self, name: str, predictions: timeline.Predictions) -> None:
    """Prints the classes of a video."""
    if _JSON.value:
      _print_json({'video': name, 'predictions': predictions})
      return
    lines = [_printable(name)]
    labels = [_printable(label) for label, _ in predictions]
    width = max(map(len, labels))
    for label, (_, probability) in zip(labels, predictions, strict=True):
      bar = (self._bar * round(30 * probability)).join(self._color)
      lines.append(f'  {probability:.4f}  {label:{width}}  {bar}'.rstrip())
    print('\n'.join(lines), flush=True)

  def window(self, name: str, window: timeline.Window) -> None:
    """Prints the classes of a window of a video."""
    if _JSON.value:
      _print_json({'video': name, **timeline.as_dict(window)})
      return
    if self._title != name:
      self._title = name
      print(_printable(name))
    times = f'{timeline.clock(window.start)} - {timeline.clock(window.end)}'
    classes = ', '.join(f'{label} {p:.2f}' for label, p in window.predictions)
    print(f'  {times}  {_printable(classes)}', flush=True)

  def error(self, name: str, reason: str) -> None:
    """Prints why a video cannot be scored."""
    self.num_failed += 1
    if _JSON.value:
      _print_json({'video': name, 'error': reason})
    line = _printable(f'error: {name}: {reason}')
    print(line, file=sys.stderr, flush=True)


def _print_json(content: dict[str, Any]) -> None:
  print(json.dumps(content), flush=True)


def _printable(text: str) -> str:
  """The text without what a terminal would obey."""
  return ''.join(c if c.isprintable() else '?' for c in text)


class _Progress:
  """Logs how far it is, every ten seconds and where told."""

  def __init__(self, total: float | None, unit: str):
    self._total, self._unit = total, unit
    self._start = self._last = time.monotonic()

  def __call__(self, done: float, is_last: bool = False) -> None:
    now = time.monotonic()
    if now - self._last < _SECONDS_BETWEEN_LINES and not is_last:
      return
    self._last = now
    rate = done / max(now - self._start, 1e-9)
    whole, left = '', ''
    if self._total is not None:
      seconds = max(self._total - done, 0) / max(rate, 1e-9)
      whole = f' of {self._total:.0f}'
      left = f', {timeline.clock(seconds, 0)} left'
    unit = self._unit
    _LOG.info('%.0f%s %s, %.2f %s/s%s', done, whole, unit, rate, unit, left)


# --- The command


def _predict_videos(
  recognizer: Recognizer,
  videos: list[tuple[str, str]],
  printer: _Printer,
  copies: dict[str, pathlib.Path],
  features: pathlib.Path | None,
) -> None:
  """Scores videos as a whole.

  Args:
    recognizer: the model.
    videos: as sources.find_videos returns them.
    printer: of the results.
    copies: name of a video -> its copy to write.
    features: the file to write, if any.
  """
  p = recognizer.preprocessing
  num_readable = sum(not error for _, error in videos)
  results = scoring.score_videos(
    recognizer,
    videos,
    batch_size=min(_BATCH_SIZE.value, num_readable * p.num_clips * p.num_crops),
    num_threads=_NUM_THREADS.value,
    with_tokens=_FEATURES_PER_TOKEN.value,
  )
  embedded: list[str] = []
  arrays: dict[str, np.ndarray] = {}
  progress = _Progress(len(videos), 'videos')
  for done, result in enumerate(results, 1):
    try:
      if result.error:
        raise UserError(result.error)
      predictions = recognizer.top(
        np.mean(result.probabilities, axis=0), _TOP_K.value
      )
      if result.name in copies:
        window = timeline.Window(0.0, 0.0, predictions)
        _save_copy(copies[result.name], result.name, [window])
    except UserError as error:
      printer.error(result.name, _reason(error))
    else:
      printer.video(result.name, predictions)
      printer.num_scored += 1
      if features:
        rows = {'features': np.mean(result.features, axis=0)}
        if result.tokens is not None:
          rows['tokens'] = result.tokens
        for name, row in rows.items():
          if name not in arrays:
            arrays[name] = _array_on_disk((len(videos), *row.shape))
          arrays[name][len(embedded)] = row
        embedded.append(result.name)
    if len(videos) > 1:
      progress(done, is_last=done == len(videos))
  if features and embedded:
    found: dict[str, Any] = {
      name: array[: len(embedded)] for name, array in arrays.items()
    }
    with _whole_file(features) as file:
      np.savez(file, names=np.array(embedded), **found)


def _array_on_disk(shape: tuple[int, ...]) -> np.ndarray:
  """Zeros; tokens of very many videos would not fit into memory."""
  with tempfile.TemporaryFile() as file:
    return np.memmap(file, np.float32, 'w+', shape=shape)


def _predict_windows(
  recognizer: Recognizer,
  videos: list[tuple[str, str]],
  printer: _Printer,
  timelines: list[pathlib.Path],
  copies: dict[str, pathlib.Path],
  stop: threading.Event | None,
) -> None:
  """Scores the windows of videos, one video after the other.

  Args:
    recognizer: the model.
    videos: as sources.find_videos returns them.
    printer: of the windows.
    timelines: files to write.
    copies: name of a video -> its copy to write.
    stop: ends a live source once it is set; None if the videos are files.
  """
  for name, error in videos:
    windows: list[timeline.Window] = []
    window = None
    try:
      if error:
        raise UserError(error)
      fps, frames = _open(name, stop)
      total = None if stop else decoding.duration(name)
      progress = _Progress(total, 's of video')
      for window in scoring.score_windows(
        recognizer,
        frames,
        fps,
        window=_WINDOW.value,
        stride=_STRIDE.value,
        batch_size=1 if stop else _BATCH_SIZE.value,
        top_k=_TOP_K.value,
      ):
        printer.window(name, window)
        progress(window.end)
        if timelines or copies:
          windows.append(window)
      if window is None:
        raise UserError('sends no frames')
      for path in timelines:
        with _whole_file(path) as file:
          file.write(timeline.encode(path.suffix, name, windows))
      if name in copies:
        _save_copy(copies[name], name, windows)
    except UserError as caught:
      printer.error(name, _reason(caught))
    else:
      printer.num_scored += 1


def _open(
  video: str, stop: threading.Event | None = None
) -> tuple[float, Iterator[decoding.Frame]]:
  """Returns frames per second and frames, as many as --seconds says."""
  if stop:
    fps, frames = sources.live_frames(video, stop)
  else:
    fps, frames = decoding.frame_rate(video), decoding.stream_frames(video)
  if _SECONDS.value is not None:
    frames = itertools.islice(frames, max(1, round(_SECONDS.value * fps)))
  return fps, frames


def _reason(error: UserError) -> str:
  return getattr(error, 'reason', str(error))


def _check_flags(is_sliding: bool, is_live: bool, num_videos: int) -> None:
  """Raises a UserError where flags do not fit each other."""
  for flag in (_WINDOW, _STRIDE, _SECONDS):
    if flag.value is not None and not 0 < flag.value < 1e6:
      raise UserError(
        f'--{flag.name}={flag.value:g}: expected seconds, more than 0'
      )
  if _SECONDS.value is not None and not is_sliding:
    raise UserError('--seconds has no effect without --sliding')
  if _FEATURES.value and is_sliding:
    raise UserError('--features is of whole videos; leave out what is sliding')
  if _FEATURES_PER_TOKEN.value and not _FEATURES.value:
    raise UserError('--features_per_token needs --features=FILE.npz')
  if is_live and num_videos > 1:
    raise UserError('a camera or an address must be the only VIDEO')
  if is_live and _SAVE.value:
    raise UserError('--save is of files; record the camera or address first')


def _predict(arguments: Sequence[str]) -> int:
  """Does what the flags say; returns the exit status."""
  videos = sources.find_videos(arguments)
  names = [name for name, error in videos if not error]
  is_live = any(map(sources.is_live, names))
  is_sliding = bool(
    _SLIDING.value
    or _WINDOW.value is not None
    or _STRIDE.value is not None
    or _TIMELINE.value
    or is_live
  )
  _check_flags(is_sliding, is_live, len(videos))
  printer = _Printer()
  if not names:
    for name, error in videos:
      printer.error(name, error)
    return 2
  timelines, copies, features = _output_files(names)
  # Late, as it takes seconds, and mistakes are to be told at once.
  import jax

  from dualformer_jax.recognizer import Recognizer

  # What was compiled once is not compiled again.
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.path.expanduser('~/.cache/dualformer_jax')
    jax.config.update('jax_compilation_cache_dir', cache)
  recognizer = Recognizer.load(_CHECKPOINT.value)
  cv2.setNumThreads(0)  # threads of its own would contend with those here
  if is_sliding:
    stop = _set_by_interrupt() if is_live else None
    _predict_windows(recognizer, videos, printer, timelines, copies, stop)
  else:
    _predict_videos(recognizer, videos, printer, copies, features)
  if not printer.num_scored:
    return 2
  return 1 if printer.num_failed else 0


def _set_by_interrupt() -> threading.Event:
  """Returns what the first Ctrl-C sets; the second one ends the process."""
  stop = threading.Event()

  def handle(*_: Any) -> None:
    stop.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)

  signal.signal(signal.SIGINT, handle)
  return stop


def main(arguments: list[str]) -> None:
  """Says what the videos show."""
  # `| head` ends it without a word.
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  try:
    status = _predict(arguments)
  except KeyboardInterrupt:
    status = 130
  if status:
    sys.exit(status)


def cli() -> None:
  """Runs the command."""
  command_line.run(main, arguments='VIDEO')


if __name__ == '__main__':
  cli()
