"""Which videos the arguments of a command mean: files, or what is live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import glob
import os
import re
import threading

import cv2

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding

# Only what looks like this: a file is never taken for an address.
_LIVE = re.compile(r'\d{1,3}|(rtsps?|rtmps?|https?)://.+', re.IGNORECASE)


def is_live(source: str) -> bool:
  """Whether it is the number of a camera or an address, and no file."""
  return _LIVE.fullmatch(source) is not None


def find_videos(arguments: Sequence[str]) -> list[tuple[str, str]]:
  """Returns what the arguments mean, each video once, in their order.

  Args:
    arguments: files, folders (for all videos below them), patterns, cameras
      and addresses.

  Returns:
    A name and '' for each video; for an argument that means none, itself and
    the reason.
  """
  found: dict[str, tuple[str, str]] = {}
  for argument in arguments:
    if is_live(argument):
      found[argument] = (argument, '')
      continue
    try:
      for path in _files(argument):
        found.setdefault(os.path.abspath(path), (path, ''))
    except UserError as error:
      found[argument] = (argument, str(error))
  return list(found.values())


def _files(argument: str) -> list[str]:
  path = os.path.expanduser(argument)
  paths = [path] if os.path.exists(path) else []
  paths = paths or sorted(glob.glob(path, recursive=True))
  if not paths and glob.has_magic(path):
    raise UserError('no file has a name of this pattern')
  if not paths:
    raise UserError('there is no such file or folder')
  files = []
  for path in paths:
    if not os.path.isdir(path):
      files.append(path)
      continue
    files += sorted(
      os.path.join(folder, name)
      for folder, _, names in os.walk(path)
      for name in names
      if os.path.splitext(name)[1].lower() in decoding.SUFFIXES
      and not name.startswith('.')
    )
  if not files:
    raise UserError('there is no video in this folder, nor below it')
  return files


def live_frames(
  source: str, stop: threading.Event
) -> tuple[float, Iterator[decoding.Frame]]:
  """Opens a camera or an address.

  Args:
    source: the number of the camera, or the address.
    stop: ends the frames once it is set.

  Returns:
    Frames per second, and the frames.

  Raises:
    UserError: it cannot be opened.
  """
  # Neither OpenCV nor its FFmpeg is to print errors of its own.
  os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
  if source.isdecimal():
    capture = cv2.VideoCapture(int(source))
  else:
    capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG)
  if not capture.isOpened():
    raise UserError('cannot be opened, or sends no video')
  fps = capture.get(cv2.CAP_PROP_FPS)

  def frames() -> Iterator[decoding.Frame]:
    while not stop.is_set():
      is_frame, bgr = capture.read()
      if not is_frame:
        return
      yield cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)

  return fps if 0 < fps <= 1000 else 25.0, frames()
