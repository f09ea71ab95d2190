"""Finds the videos that command-line arguments name, and opens them."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import errno
import glob
import itertools
import os
import pathlib
import re
import socket
from typing import NamedTuple
from urllib import parse

import av
import av.error
import cv2

from dualformer_jax import files
from dualformer_jax.errors import UserError
from dualformer_jax.inference.windows import TimedFrame
from dualformer_jax.input_pipeline import video_container
from dualformer_jax.input_pipeline.video_reader import VideoReader

# An argument of another form is a file, a folder or a pattern.
_LIVE = re.compile(r'\d{1,3}|(rtsps?|rtmps?|https?)://.+', re.IGNORECASE)
_DEFAULT_FPS, _MAX_FPS = 25.0, 1000.0
_SECONDS_TO_OPEN = 5.0  # an address, to find out why it could not be opened


class Source(NamedTuple):
  """A video, or an argument that names none."""

  name: str  # path of a file, number of a camera, or address
  error: str = ''  # why there is no such video, in one line


class FrameStream(NamedTuple):
  """Frames of an open video, with the times from which they are shown.

  Iterating raises UserError where the video is damaged.
  """

  frames: Iterator[TimedFrame]
  fps: float  # on average
  duration: float | None  # in seconds, if known


def is_live(name: str) -> bool:
  """Returns whether a name is the number of a camera or an address."""
  return _LIVE.fullmatch(name) is not None


def find_videos(arguments: Sequence[str]) -> list[Source]:
  """Returns the videos that arguments name, each once, in order.

  An argument is a file, a folder (for all videos in it and its subfolders), a
  pattern, a camera or an address. One that names no video has an error.
  """
  found: dict[str, Source] = {}
  for argument in arguments:
    if is_live(argument):
      found[argument] = Source(argument)
      continue
    try:
      for path in _find_files(argument):
        found.setdefault(os.path.abspath(path), Source(path))
    except UserError as error:
      found[argument] = Source(argument, str(error))
  return list(found.values())


def _find_files(argument: str) -> list[str]:
  path = os.path.expanduser(argument)
  paths = [path] if os.path.exists(path) else _match(path)
  if not paths and glob.has_magic(path):
    raise UserError('no file matches this pattern')
  if not paths:
    raise UserError('no such file or folder')
  found = []
  for path in sorted(paths):
    if not os.path.isdir(path):
      found.append(path)
      continue
    found += sorted(
      os.path.join(folder, name)
      for folder, _, names in files.walk(path)
      for name in names
      if os.path.splitext(name)[1].lower() in video_container.SUFFIXES
      and not name.startswith('.')
    )
  if not found:
    raise UserError('no videos in this folder')
  return found


def _match(pattern: str) -> list[str]:
  """Returns the paths that match a pattern, in which ** is any folders."""
  path = pathlib.Path(pattern)
  if '**' not in path.parts:
    return glob.glob(pattern)
  # That of glob follows links, which may loop.
  found = pathlib.Path(path.anchor).glob(str(path.relative_to(path.anchor)))
  named = path.parts.index('**')  # folders that the pattern names
  return [
    str(each)
    for each in found
    if not any(part.startswith('.') for part in each.parts[named:])
  ]


@contextlib.contextmanager
def open_stream(
  name: str,
  seconds: float | None = None,
  is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[FrameStream]:
  """Opens a video, or its first `seconds`, to be read once.

  The video ends early once `is_stopped`.

  Raises:
    UserError: the video cannot be opened.
  """
  with contextlib.ExitStack() as stack:
    if is_live(name):
      frames, fps, duration = _open_live(name)
    else:
      reader = stack.enter_context(VideoReader(name))
      frames, fps, duration = reader.iter_timed(), reader.fps, reader.duration
    if seconds is not None:
      limit = seconds - 1e-3  # times are rounded
      frames = itertools.takewhile(lambda frame: frame[0] < limit, frames)
      duration = min(seconds, duration or seconds)
    frames = itertools.takewhile(lambda _: not is_stopped(), frames)
    yield FrameStream(frames, fps, duration)


def _why_closed(address: str) -> str:
  """Returns why an address cannot be opened, which OpenCV does not report."""
  try:
    with av.open(address, timeout=_SECONDS_TO_OPEN):
      return 'it was opened at the second attempt'
  except av.error.ExitError:
    return f'no answer within {_SECONDS_TO_OPEN:g} seconds'
  except video_container.FAILURES as error:
    reason = getattr(error, 'strerror', None) or str(error)
    if getattr(error, 'errno', None) == errno.EIO:  # a name without an address?
      try:
        socket.getaddrinfo(parse.urlsplit(address).hostname, None)
      except OSError as unresolved:
        reason = unresolved.strerror or reason
    return reason


def _open_live(name: str) -> tuple[Iterator[TimedFrame], float, None]:
  # Errors are reported below; OpenCV and its FFmpeg would print their own.
  os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
  if name.isdecimal():
    capture = cv2.VideoCapture(int(name))
  else:
    capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
  if not capture.isOpened():
    reason = '' if name.isdecimal() else f': {_why_closed(name)}'
    raise UserError(f'cannot be opened, or sends no video{reason}')
  fps = capture.get(cv2.CAP_PROP_FPS)
  fps = fps if 0 < fps <= _MAX_FPS else _DEFAULT_FPS

  def frames() -> Iterator[TimedFrame]:
    for index in itertools.count():
      is_frame, bgr = capture.read()
      if not is_frame:
        return
      yield index / fps, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)

  return frames(), fps, None
