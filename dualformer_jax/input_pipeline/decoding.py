"""Video bytes to RGB frames and back, with PyAV (FFmpeg); exact or an error.

A frame's index is its place in a decode from the first frame to the last. All
functions here agree on it. Rotation metadata is not applied.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import fractions
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import av
import av.container
import av.stream
import av.video.stream
import numpy as np
from jaxtyping import UInt8

from dualformer_jax import errors

Source = bytes | bytearray | memoryview | str | os.PathLike[str]
Frame = UInt8[np.ndarray, 'h w 3']

# Larger frames are refused: such a claim costs memory before it is checked.
MAX_PIXELS = 8192 * 8192
# More than this at once is refused by decode_all; stream_frames has no limit.
MAX_BYTES = 8 << 30
# The container formats that are opened. Playlists (HLS, DASH, concat), devices
# and image patterns are left out: they make FFmpeg open other files and URLs.
FORMATS = (
    'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,'
    'asf,flv,ogg,rm,m4v,h264,hevc,ivf,nut,mxf,dv,apng,webp_anim'
)
# One access unit, one frame: for these, packets can be counted for frames.
_ONE_FRAME_A_PACKET = frozenset({'h264', 'hevc', 'av1', 'vp9'})
_DEFAULT_FPS = 25.0
_MAX_FPS = 1000.0


class VideoError(errors.UserError):
  """A video that cannot be decoded.

  Attributes:
    reason: one line that does not name the file. The message is the same,
      after the file's path where there is one.
  """

  def __init__(self, reason: str, path: str = ''):
    self.reason = ' '.join(reason.split())
    super().__init__(f'{path}: {self.reason}' if path else self.reason)


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """What a full decode found.

  Attributes:
    num_frames: number of frames that can be decoded.
    height: of a frame, in pixels.
    width: of a frame, in pixels.
    fps: average frames per second; 25 where the file does not say.
  """

  num_frames: int
  height: int
  width: int
  fps: float


@dataclasses.dataclass(frozen=True)
class _Timetable:
  """When each frame is shown, in the stream's time base, from packet headers.

  Attributes:
    times: presentation times, rising; the place in it is the frame's index.
    keyframes: indices of the frames that decoding can start at, rising; the
      first is 0.
  """

  times: list[int]
  keyframes: list[int]


@contextlib.contextmanager
def _open(
    video: Source,
) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
  """The container and its video stream; any failure within is a VideoError."""
  if isinstance(video, (bytes, bytearray, memoryview)):
    path, file = '', io.BytesIO(video)
    size = len(video)
  else:
    # The prefix keeps FFmpeg from taking a name for a URL.
    path = os.fspath(video)
    file = f'file:{os.path.abspath(path)}'
    if os.path.isdir(path):
      raise VideoError('is a folder, not a video', path)
    size = os.path.getsize(path) if os.path.exists(path) else -1
  try:
    if not size:
      raise VideoError('is empty (0 bytes)', path)
    with av.open(
        file, metadata_errors='ignore', options={'format_whitelist': FORMATS}
    ) as container:
      stream = next(
          (
              stream
              for stream in container.streams.video
              if not stream.disposition & av.stream.Disposition.attached_pic
          ),
          None,
      )
      if stream is None:
        raise VideoError('holds no video stream', path)
      context = stream.codec_context
      if context.width * context.height > MAX_PIXELS:
        raise VideoError(
            f'claims frames of {context.width}x{context.height} pixels;'
            f' at most {MAX_PIXELS} pixels are read',
            path,
        )
      # Threads here would only contend with the loader's, which decodes one
      # video on each of its own.
      stream.thread_type = 'NONE'
      context.thread_count = 1
      # Holds for sizes that change on the way, too.
      context.options = {'max_pixels': str(MAX_PIXELS)}
      yield container, stream
  except VideoError as error:
    raise VideoError(error.reason, path) from error.__cause__
  except av.FFmpegError as error:
    reason = error.strerror or str(error)
    raise VideoError(f'cannot be decoded: {reason}', path) from error
  except (ValueError, TypeError, OverflowError, MemoryError) as error:
    # What PyAV itself raises, for a pixel format it cannot convert say.
    raise VideoError(f'cannot be decoded: {error}', path) from error


def _timetable(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
) -> _Timetable | None:
  """Reads the packets without decoding; None where times would not be exact.

  Only MP4-like files have it: elsewhere times may be missing or out of order
  (AVI), or a packet need not hold one frame (WebM). Leaves the container at
  its end.
  """
  if 'mp4' not in container.format.name.split(','):
    return None
  if stream.codec_context.name not in _ONE_FRAME_A_PACKET:
    return None
  times, keyframes = [], []
  for packet in container.demux(stream):
    if packet.size == 0:  # The one that flushes the decoder.
      continue
    if packet.is_corrupt:
      raise VideoError(f'is cut short after {len(times)} frames')
    if packet.pts is None:
      return None
    if packet.is_discard:  # Before the start that an edit list sets.
      return None
    times.append(packet.pts)
    if packet.is_keyframe:
      keyframes.append(packet.pts)
  times.sort()
  place = {time: index for index, time in enumerate(times)}
  if not times or len(place) != len(times):
    return None
  starts = sorted(place[time] for time in keyframes)
  if not starts or starts[0] != 0:
    return None
  return _Timetable(times, starts)


def _decoded(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
) -> Iterator[av.VideoFrame]:
  """The frames from the container's position on, and how far it came."""
  count = 0
  size = None
  try:
    for packet in container.demux(stream):
      if packet.is_corrupt:
        raise VideoError(f'is cut short after {count} frames')
      for frame in packet.decode():
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
          raise VideoError(
              f'changes from {size[0]}x{size[1]} to'
              f' {frame.width}x{frame.height} pixels after {count} frames'
          )
        yield frame
        count += 1
  except av.FFmpegError as error:
    reason = error.strerror or str(error)
    raise VideoError(
        f'cannot be decoded after {count} frames: {reason}'
    ) from error


def _rgb(frame: av.VideoFrame) -> Frame:
  # Without threads=1 the colour conversion starts threads, and is slower.
  return frame.to_ndarray(format='rgb24', threads=1)


def _count(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
) -> int:
  count = sum(1 for _ in _decoded(container, stream))
  if not count:
    raise VideoError('holds no frames')
  return count


def probe(video: Source) -> VideoInfo:
  """Decodes everything once, to know that it can be.

  Args:
    video: the file's content, or its path.

  Raises:
    VideoError: the video cannot be decoded to its end, or has no frame.
  """
  with _open(video) as (container, stream):
    frames = _decoded(container, stream)
    first = next(frames, None)
    if first is None:
      raise VideoError('holds no frames')
    count = 1 + sum(1 for _ in frames)
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    if not 0.0 < fps <= _MAX_FPS:
      fps = _DEFAULT_FPS
    return VideoInfo(count, first.height, first.width, fps)


def count_frames(video: Source) -> int:
  """The number of frames: from MP4 packet headers, else by decoding.

  Raises:
    VideoError: the video cannot be read, or has no frame.
  """
  with _open(video) as (container, stream):
    timetable = _timetable(container, stream)
    if timetable is not None:
      return len(timetable.times)
  with _open(video) as (container, stream):
    return _count(container, stream)


def stream_frames(video: Source) -> Iterator[Frame]:
  """All frames in order, RGB, one at a time.

  Raises:
    VideoError: while iterating, where the video cannot be decoded; or it has
      no frame.
  """
  with _open(video) as (container, stream):
    frames = _decoded(container, stream)
    first = next(frames, None)
    if first is None:
      raise VideoError('holds no frames')
    yield _rgb(first)
    for frame in frames:
      yield _rgb(frame)


def decode_all(video: Source) -> UInt8[np.ndarray, 't h w 3']:
  """All frames, RGB; for videos that fit into memory (8 GiB at most).

  Raises:
    VideoError: the video cannot be decoded, has no frame or is too large.
  """
  frames: list[Frame] = []
  for frame in stream_frames(video):
    frames.append(frame)
    if len(frames) * frame.nbytes > MAX_BYTES:
      raise VideoError(
          f'is larger than {MAX_BYTES >> 30} GiB when decoded',
          '' if isinstance(video, (bytes, bytearray, memoryview))
          else os.fspath(video),
      )
  return np.stack(frames)


def decode_frames(
    video: Source,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[Frame], Frame] | None = None,
) -> UInt8[np.ndarray, 't h w 3']:
  """The frames of the given indices, RGB, decoding no more than needed.

  MP4 files are entered at the last keyframe before a wanted frame; all others
  are decoded from their start, where seeking would not be exact.

  Args:
    video: the file's content, or its path.
    indices: which frames, from 0; in any order, with repetitions.
    transform: applied to each frame as it is decoded (a resize, a crop), so
      that frames of full size never stand in memory together.

  Raises:
    VideoError: the video cannot be decoded, or has no such frame.
    ValueError: an index is negative, or there is none.
  """
  order = [int(index) for index in indices]
  if not order or min(order) < 0:
    raise ValueError(f'indices must be at least one, none negative: {order}')
  wanted = sorted(set(order))
  convert = _rgb if transform is None else lambda f: transform(_rgb(f))
  frames = None
  with _open(video) as (container, stream):
    timetable = _timetable(container, stream)
    if timetable is not None:
      _check_last(wanted[-1], len(timetable.times))
      frames = _by_seeking(container, stream, timetable, wanted, convert)
  if frames is None:
    with _open(video) as (container, stream):
      frames = _from_the_start(container, stream, wanted, convert)
  return np.stack([frames[index] for index in order])


def _check_last(index: int, count: int) -> None:
  if not count:
    raise VideoError('holds no frames')
  if index >= count:
    raise VideoError(f'holds {count} frames, and frame {index} is wanted')


def _from_the_start(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    wanted: list[int],
    convert: Callable[[av.VideoFrame], Frame],
) -> dict[int, Frame]:
  """Frames by counting."""
  wanted_set = set(wanted)
  frames: dict[int, Frame] = {}
  count = 0
  for index, frame in enumerate(_decoded(container, stream)):
    count = index + 1
    if index in wanted_set:
      frames[index] = convert(frame)
      if index == wanted[-1]:
        return frames
  _check_last(wanted[-1], count)
  raise AssertionError('unreachable')


def _by_seeking(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    timetable: _Timetable,
    wanted: list[int],
    convert: Callable[[av.VideoFrame], Frame],
) -> dict[int, Frame] | None:
  """Frames by their times; None where that turns out not to be exact."""
  place = {time: index for index, time in enumerate(timetable.times)}
  wanted_set = set(wanted)
  frames: dict[int, Frame] = {}

  def start(index: int) -> int:
    """The keyframe that decoding this frame starts at."""
    starts = timetable.keyframes
    return starts[bisect.bisect_right(starts, index) - 1]

  left = 0
  while left < len(wanted):
    # A run of wanted frames without a keyframe worth seeking to between them.
    right = left + 1
    while right < len(wanted) and start(wanted[right]) <= wanted[right - 1] + 8:
      right += 1
    first, last = start(wanted[left]), wanted[right - 1]
    container.seek(timetable.times[first], stream=stream)
    for frame in _decoded(container, stream):
      index = place.get(frame.pts)
      if index is None or frame.is_corrupt:
        return None
      if index in wanted_set:
        frames[index] = convert(frame)
      if index >= last:
        break
    if any(index not in frames for index in wanted[left:right]):
      return None
    left = right
  return frames


def encode_mp4(
    frames: Iterable[Frame] | UInt8[np.ndarray, 't h w 3'],
    *,
    fps: float,
    crf: int = 18,
    keyframe_interval: int = 16,
) -> bytes:
  """H.264 in MP4, made to be entered anywhere and decoded fast.

  A keyframe every `keyframe_interval` frames, no B-frames, no deblocking, no
  CABAC. The same frames give the same bytes. Colours are stored at half
  resolution (4:2:0), which needs even sides: the last row or column of an odd
  side is left out (a side of one pixel is doubled).

  Args:
    frames: RGB, all of one size; an iterable is read one frame at a time.
    fps: frames per second, as the file will say.
    crf: 0 (lossless) to 51; 18 can hardly be told from the original.
    keyframe_interval: number of frames from one keyframe to the next.

  Raises:
    VideoError: there are no frames.
    ValueError: `fps` is not in (0, 1000], or a frame is not uint8 [h, w, 3] of
      the size of the first.
  """
  if not 0.0 < fps <= _MAX_FPS or not math.isfinite(fps):
    raise ValueError(f'fps must be in (0, {_MAX_FPS:g}], not {fps}')
  iterator = iter(frames)
  first = next(iterator, None)
  if first is None:
    raise VideoError('there are no frames to encode')
  height, width = first.shape[:2]
  options = {
      'crf': str(crf),
      # Slower presets gave larger files here, and take four times as long.
      'preset': 'veryfast',
      'tune': 'fastdecode',
      'x264-params': (
          f'keyint={keyframe_interval}:min-keyint={keyframe_interval}'
          ':scenecut=0:bframes=0:threads=1'
      ),
  }
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as container:
    stream: Any = container.add_stream(
        'libx264',
        rate=fractions.Fraction(fps).limit_denominator(1001),
        options=options,
    )
    stream.height, stream.width = (max(2, s - s % 2) for s in (height, width))
    stream.pix_fmt = 'yuv420p'
    stream.thread_type = 'NONE'
    for index, frame in enumerate(itertools.chain([first], iterator)):
      if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
        raise ValueError(
            f'frame {index} is {frame.dtype} {frame.shape}, expected uint8'
            f' {(height, width, 3)}'
        )
      if 1 in (height, width):
        frame = np.pad(
            frame, ((0, height == 1), (0, width == 1), (0, 0)), mode='edge'
        )
      frame = np.ascontiguousarray(frame[: stream.height, : stream.width])
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      picture.pts = index
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  return file.getvalue()
