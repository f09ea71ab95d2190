"""Video bytes to RGB frames and back, with PyAV (FFmpeg); exact or an error.

A frame's index is its place in a decode from the first frame to the last. All
functions here agree on it. Frames are turned as the file says that they are to
be shown; where their size changes on the way, all get that of the stream.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import fractions
import io
import itertools
import os
from typing import Any

import av
import av.container
import av.error
import av.stream
import av.video.stream
import cv2
from jaxtyping import UInt8
import numpy as np

from dualformer_jax import errors

Source = bytes | bytearray | memoryview | str | os.PathLike[str]
Frame = UInt8[np.ndarray, 'h w 3']
Indices = Sequence[int] | np.ndarray

# Larger frames are refused: such a claim costs memory before it is checked.
MAX_PIXELS = 8192 * 8192
# More than this at once is refused by decode_all; stream_frames has no limit.
MAX_BYTES = 8 << 30
# The container formats that are opened. Playlists (HLS, DASH, concat), devices
# and image patterns are left out: they make FFmpeg open other files and URLs.
_FORMATS = (
  'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpeg,mpegts,mpegvideo,'
  'asf,flv,ogg,rm,m4v,h264,hevc,ivf,nut,mxf,dv'
)
# How names of such files end, in small letters.
SUFFIXES = frozenset({
  '.3g2', '.3gp', '.asf', '.avi', '.divx', '.dv', '.f4v', '.flv', '.gif',
  '.h264', '.ivf', '.m2ts', '.m2v', '.m4v', '.mkv', '.mov', '.mp4', '.mpe',
  '.mpeg', '.mpg', '.mts', '.mxf', '.nut', '.ogg', '.ogv', '.qt', '.rm',
  '.rmvb', '.ts', '.vob', '.webm', '.wmv',
})  # fmt: skip
# Codecs whose packets in an MP4 file hold one frame each.
_ONE_FRAME_A_PACKET = frozenset({'h264', 'hevc', 'av1', 'vp9', 'mjpeg'})
# Frames between two wanted ones that are sooner decoded than sought past.
_MAX_SKIPPED = 8
_DEFAULT_FPS = 25.0
_MAX_FPS = 1000.0
# What PyAV raises, most of it as an FFmpegError that is one of these too.
_FAILURES = (av.error.FFmpegError, OSError, ValueError, MemoryError)


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


def probe(video: Source) -> VideoInfo:
  """Decodes everything once, to know that it can be.

  Damage that the decoder conceals, as players do, is not an error.

  Args:
    video: the file's content, or its path.

  Raises:
    VideoError: the video cannot be decoded to its end, or has no frame.
  """
  with _open(video) as reader:
    count, height, width = 0, 0, 0
    for frame in reader.frames():
      if not count:
        height, width = reader.shown_size(frame)
      count += 1
    reader.check_holds(0, count)
    return VideoInfo(count, height, width, reader.fps())


def count_frames(video: Source) -> int:
  """The number of frames: from an MP4 file's packets, else by decoding.

  Raises:
    VideoError: the video cannot be read, or has no frame.
  """
  with _open(video) as reader:
    timetable = reader.timetable()
    if timetable is not None:
      return len(timetable.times)
  with _open(video) as reader:
    count = sum(1 for _ in reader.frames())
    reader.check_holds(0, count)
    return count


def frame_rate(video: Source) -> float:
  """Average frames per second as the file says; 25 where it does not.

  Raises:
    VideoError: the video cannot be opened.
  """
  with _open(video) as reader:
    return reader.fps()


def duration(video: Source) -> float | None:
  """How many seconds it lasts as the file says; None where it does not.

  Raises:
    VideoError: the video cannot be opened.
  """
  with _open(video) as reader:
    length = reader.container.duration
    return length / av.time_base if length and length > 0 else None


def stream_frames(
  video: Source, seconds: tuple[float, float] | None = None
) -> Iterator[Frame]:
  """All frames in order, RGB, one at a time.

  Args:
    video: the file's content, or its path.
    seconds: only the frames that are shown from the first of these times on
      and before the second, counted from the first frame.

  Raises:
    VideoError: while iterating, where the video cannot be decoded; or it has
      no frame, or none between the times.
  """
  with _open(video) as reader:
    count = 0
    frames = reader.frames()
    for frame in frames if seconds is None else reader.part(frames, *seconds):
      yield reader.rgb(frame)
      count += 1
    if not count and seconds is not None:
      raise VideoError(
        f'shows no frame from {seconds[0]:g} s to {seconds[1]:g} s', reader.path
      )
    reader.check_holds(0, count)


def decode_all(video: Source) -> UInt8[np.ndarray, 't h w 3']:
  """All frames, RGB; for videos that fit into memory (8 GiB at most).

  Raises:
    VideoError: the video cannot be decoded, has no frame or is too large.
  """
  frames = []
  for frame in stream_frames(video):
    frames.append(frame)
    if len(frames) * frame.nbytes > MAX_BYTES:
      raise VideoError(
        f'takes more than {MAX_BYTES >> 30} GiB when decoded', _path(video)
      )
  return np.stack(frames)


def decode_frames(
  video: Source,
  indices: Indices | Callable[[int], Indices],
  transform: Callable[[Frame], Frame] | None = None,
) -> UInt8[np.ndarray, 't h w 3']:
  """The frames of the given indices, RGB, decoding no more than needed.

  MP4 files are entered at the last keyframe before a wanted frame; all others
  are decoded from their start, since seeking would not be exact.

  Args:
    video: the file's content, or its path.
    indices: which frames, from 0; in any order, with repetitions. Or what
      picks them, given the number of frames, as count_frames tells it.
    transform: applied to each frame as it is decoded (a resize, a crop), so
      that frames of full size never stand in memory together.

  Raises:
    VideoError: the video cannot be decoded, or has no such frame.
    ValueError: an index is negative, or there is none.
  """
  picked = None if callable(indices) else _checked(indices)
  with _open(video) as reader:
    timetable = reader.timetable()
    if timetable is not None:
      total = len(timetable.times)
      if callable(indices):
        picked = _checked(indices(total))
      assert picked
      reader.check_holds(max(picked), total)
      decode = _decode_by_seeking
      if reader.stream.codec_context.name == 'mjpeg':
        decode = _decode_jpegs
      frames = decode(reader, timetable, picked, transform)
      if frames is not None:
        return np.stack([frames[index] for index in picked])
  if callable(indices) and picked is None:
    picked = _checked(indices(count_frames(video)))
  assert picked
  with _open(video) as reader:
    frames = _decode_by_counting(reader, picked, transform)
    return np.stack([frames[index] for index in picked])


def encode_mp4(
  frames: Iterable[Frame] | UInt8[np.ndarray, 't h w 3'],
  *,
  fps: float,
  crf: int = 18,
  keyframe_interval: int = 16,
) -> bytes:
  """H.264 in MP4, made to be entered anywhere and decoded fast.

  Takes the arguments of write_mp4 and raises what it does; the same frames give
  the same bytes.
  """
  file = io.BytesIO()
  write_mp4(file, frames, fps=fps, crf=crf, keyframe_interval=keyframe_interval)
  return file.getvalue()


def write_mp4(
  file: io.BufferedIOBase,
  frames: Iterable[Frame] | UInt8[np.ndarray, 't h w 3'],
  *,
  fps: float,
  crf: int = 18,
  keyframe_interval: int = 16,
) -> None:
  """Writes a video of any length as encode_mp4 does, a frame at a time.

  A keyframe every `keyframe_interval` frames, no B-frames, no deblocking, no
  CABAC. Colours are stored at half resolution (4:2:0), which needs even sides:
  the last row or column of an odd side is left out (a side of one pixel is
  doubled).

  Args:
    file: where to; it must be seekable.
    frames: RGB, all of one size; an iterable is read one frame at a time.
    fps: frames per second, as the file will say.
    crf: 0 (lossless) to 51; 18 can hardly be told from the original.
    keyframe_interval: number of frames from one keyframe to the next.

  Raises:
    VideoError: there are no frames.
    ValueError: `fps` is not in (0, 1000], or a frame is not uint8 [h, w, 3] of
      the size of the first.
  """
  if not 0.0 < fps <= _MAX_FPS:
    raise ValueError(f'fps must be in (0, {_MAX_FPS:g}], got {fps}')
  iterator = iter(frames)
  first = next(iterator, None)
  if first is None:
    raise VideoError('holds no frames')
  height, width = first.shape[:2]
  with av.open(file, 'w', format='mp4') as container:
    stream = container.add_stream(
      'libx264',
      rate=fractions.Fraction(fps).limit_denominator(1001),
      options={
        'crf': str(crf),
        # A third of the default's time for 4 to 8% fewer bytes, and pictures
        # about 0.7 dB farther from the original.
        'preset': 'veryfast',
        'tune': 'fastdecode',
        'x264-params': (
          f'keyint={keyframe_interval}:min-keyint={keyframe_interval}'
          ':scenecut=0:bframes=0:threads=1'
          # x264's macroblock tree reads memory that it never wrote: the same
          # frames, mostly small ones, gave other bytes in some threads. Without
          # it files are about a tenth larger.
          ':mbtree=0:rc-lookahead=0'
        ),
      },
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
      missing = ((0, height == 1), (0, width == 1), (0, 0))
      frame = np.pad(frame, missing, mode='edge') if 1 in frame.shape else frame
      frame = np.ascontiguousarray(frame[: stream.height, : stream.width])
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      # Left to itself the conversion starts threads of its own, every time.
      picture = picture.reformat(format='yuv420p', threads=1)
      picture.pts = index
      container.mux(stream.encode(picture))
    container.mux(stream.encode())


def mux_jpegs(
  jpegs: Iterable[bytes], *, fps: float, height: int, width: int
) -> bytes:
  """JPEG files as the frames of an MP4 file, unchanged.

  Each frame can be entered by itself, and decodes to what its file does.

  Args:
    jpegs: the content of the files, in order.
    fps: frames per second, as the file will say.
    height: of the frames, in pixels.
    width: of the frames, in pixels.
  """
  rate = fractions.Fraction(fps).limit_denominator(1001)
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as container:
    stream = container.add_mux_stream(
      'mjpeg', rate=rate, width=width, height=height
    )
    for index, jpeg in enumerate(jpegs):
      packet = av.Packet(jpeg)
      packet.stream = stream
      packet.time_base = 1 / rate
      packet.pts = packet.dts = index
      packet.duration = 1
      packet.is_keyframe = True
      container.mux(packet)
  return file.getvalue()


@dataclasses.dataclass(frozen=True)
class _Timetable:
  """When each frame is shown, in the stream's time base.

  Attributes:
    times: presentation times, rising; the place in it is the frame's index.
    keyframes: indices of the frames that decoding can start at, rising; the
      first is 0.
  """

  times: list[int]
  keyframes: list[int]

  def start(self, index: int) -> int:
    """The keyframe that a frame is decoded from."""
    place = bisect.bisect_right(self.keyframes, index)
    return self.keyframes[place - 1]


@dataclasses.dataclass(frozen=True)
class _Reader:
  """An open video file; whatever fails in it is a VideoError.

  Attributes:
    container: what packets are read from, moving on as they are.
    stream: the video stream in it.
    size: height and width of its frames before they are turned.
    is_whole: False when the file is shorter than its format says.
    path: of the file; empty where only its content is known.
  """

  container: av.container.InputContainer
  stream: av.video.stream.VideoStream
  size: tuple[int, int]
  is_whole: bool
  path: str

  def check_holds(self, index: int, count: int) -> None:
    """Raises a VideoError unless there is a frame of that index."""
    if not count:
      raise VideoError('holds no frames', self.path)
    if index >= count:
      raise VideoError(
        f'holds {count} frames, and frame {index} is wanted', self.path
      )

  def fps(self) -> float:
    rate = float(self.stream.average_rate or self.stream.guessed_rate or 0)
    return rate if 0.0 < rate <= _MAX_FPS else _DEFAULT_FPS

  def shown_size(self, frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width of what `rgb` makes of the frame."""
    height, width = self.size
    return (width, height) if _quarter_turns(frame) % 2 else (height, width)

  def rgb(self, frame: av.VideoFrame) -> Frame:
    height, width = self.size
    try:
      # Without threads=1 the conversion starts threads, and is slower.
      rgb = frame.to_ndarray(
        format='rgb24', height=height, width=width, threads=1
      )
    except _FAILURES as error:
      raise VideoError(
        f'cannot be converted to RGB: {_reason(error)}', self.path
      ) from error
    turns = _quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb

  def part(
    self, frames: Iterator[av.VideoFrame], start: float, end: float
  ) -> Iterator[av.VideoFrame]:
    """Those of the frames that are shown from `start` on and before `end`."""
    first = None
    # These go back to a keyframe at or before the time; others may not, nor
    # tell when their first frame is shown.
    if {'mp4', 'matroska'} & set(self.container.format.name.split(',')):
      first = (self.stream.start_time or 0) * float(self.stream.time_base or 0)
      with contextlib.suppress(*_FAILURES):
        self.container.seek(round((first + start) * av.time_base))
    for frame in frames:
      if frame.time is None:
        raise VideoError('does not say when its frames are shown', self.path)
      first = frame.time if first is None else first
      if frame.time - first >= end:
        return
      if frame.time - first >= start:
        yield frame

  def frames(self) -> Iterator[av.VideoFrame]:
    """The frames from the container's position to its end."""
    count = 0
    is_cut = False
    packets = self.container.demux(self.stream)
    while True:
      try:
        packet = next(packets, None)
        if packet is None:
          break
        decoded = packet.decode()
      except _FAILURES as error:
        raise VideoError(
          f'cannot be decoded after {count} frames: {_reason(error)}',
          self.path,
        ) from error
      if packet.size:
        is_cut = packet.is_corrupt  # In the end, that of the last packet.
      for frame in decoded:
        yield frame
        count += 1
    # An AVI file that only lost the index at its end has all of its frames.
    has_all = (
      self.container.format.name == 'avi' and 0 < self.stream.frames <= count
    )
    if is_cut or not (self.is_whole or has_all):
      raise VideoError(f'is cut short after {count} frames', self.path)

  def timetable(self) -> _Timetable | None:
    """Reads all packets undecoded; None where they do not tell frames exactly.

    Only MP4 files have it: elsewhere times may be missing or out of order
    (AVI), and a packet need not hold one frame (WebM).
    """
    if 'mp4' not in self.container.format.name.split(','):
      return None
    if self.stream.codec_context.name not in _ONE_FRAME_A_PACKET:
      return None
    indexed = self._indexed_timetable()
    if indexed is not None:
      return indexed
    times, keyframes = [], []
    is_cut = False
    packets = self.container.demux(self.stream)
    while True:
      try:
        packet = next(packets, None)
      except _FAILURES as error:
        raise VideoError(
          f'cannot be read after {len(times)} frames: {_reason(error)}',
          self.path,
        ) from error
      if packet is None:
        break
      if packet.size == 0:  # The one that flushes the decoder.
        continue
      is_cut = packet.is_corrupt
      # An edit list discards what lies before the start that it sets.
      if packet.pts is None or packet.is_discard:
        return None
      times.append(packet.pts)
      if packet.is_keyframe:
        keyframes.append(packet.pts)
    if is_cut or not self.is_whole:
      raise VideoError(f'is cut short after {len(times)} frames', self.path)
    times.sort()
    place = {time: index for index, time in enumerate(times)}
    starts = sorted(place[time] for time in keyframes)
    if len(place) != len(times) or not starts or starts[0] != 0:
      return None
    return _Timetable(times, starts)

  def _indexed_timetable(self) -> _Timetable | None:
    """The same from the file's index alone, in a tenth of the time.

    None unless frames are shown in the order they are stored in: the index has
    the times of decoding.
    """
    context = self.stream.codec_context
    if context.name not in ('h264', 'mjpeg') or context.has_b_frames:
      return None
    entries = list(self.stream.index_entries)
    times = [entry.timestamp for entry in entries]
    keyframes = [i for i, entry in enumerate(entries) if entry.is_keyframe]
    if (
      not self.is_whole
      or not 0 < self.stream.frames == len(entries)
      or times[0] != self.stream.start_time
      or any(entry.is_discard for entry in entries)
      or any(b <= a for a, b in itertools.pairwise(times))
      or keyframes[:1] != [0]
    ):
      return None
    return _Timetable(times, keyframes)


@contextlib.contextmanager
def _open(video: Source) -> Iterator[_Reader]:
  """Opens a video, and closes it in any case."""
  path = _path(video)
  # These reach the decoder too, which tries the first frames while opening.
  options = {
    'format_whitelist': _FORMATS,
    'max_pixels': str(MAX_PIXELS),
    'threads': '1',
  }
  with contextlib.ExitStack() as stack:
    try:
      if isinstance(video, (bytes, bytearray, memoryview)):
        file = stack.enter_context(io.BytesIO(video))
      else:
        file = stack.enter_context(open(path, 'rb'))
    except OSError as error:
      reason = f'cannot be opened: {_reason(error)}'
      raise VideoError(reason, path) from error
    size = file.seek(0, io.SEEK_END)
    if not size:
      raise VideoError('is empty (0 bytes)', path)
    is_whole = _is_whole(file, size)
    file.seek(0)
    try:
      # A path is read faster by FFmpeg itself; the prefix keeps it from taking
      # a name for a URL.
      container = av.open(
        f'file:{os.path.abspath(path)}' if path else file,
        metadata_errors='ignore',
        options=options,
      )
    except _FAILURES as error:
      raise VideoError(f'cannot be decoded: {_reason(error)}', path) from error
    stack.enter_context(container)
    assert isinstance(container, av.container.InputContainer)
    pictures = av.stream.Disposition.attached_pic
    streams = (
      s for s in container.streams.video if not s.disposition & pictures
    )
    stream = next(streams, None)
    if stream is None:
      raise VideoError('holds no video stream', path)
    # None, against its annotation, where FFmpeg has no decoder for it.
    context: Any = stream.codec_context
    if context is None:
      raise VideoError('is in a codec that FFmpeg cannot decode', path)
    if context.width * context.height > MAX_PIXELS:
      raise VideoError(
        f'claims frames of {context.width}x{context.height} pixels; at most'
        f' {MAX_PIXELS} pixels are read',
        path,
      )
    # An MP4 file's index says where each frame lies.
    ends = (entry.pos + entry.size for entry in stream.index_entries)
    is_whole = is_whole and max(ends, default=0) <= size
    # Threads here would only contend with the loader's, which decodes one
    # video on each of its own.
    stream.thread_type = 'NONE'
    context.thread_count = 1
    # For sizes that change on the way.
    context.options = {'max_pixels': str(MAX_PIXELS)}
    size = (context.height, context.width)
    yield _Reader(container, stream, size, is_whole, path)


def _quarter_turns(frame: av.VideoFrame) -> int:
  """How often a frame is turned left by 90 degrees to be shown."""
  return round(frame.rotation / 90) % 4


def _checked(indices: Indices) -> list[int]:
  checked = [int(index) for index in indices]
  if not checked or min(checked) < 0:
    raise ValueError(f'expected indices of 0 or more, got {checked}')
  return checked


def _path(video: Source) -> str:
  return os.fspath(video) if isinstance(video, (str, os.PathLike)) else ''


def _reason(error: BaseException) -> str:
  return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def _is_whole(file: io.BufferedIOBase, size: int) -> bool:
  """Whether nothing is missing at the end, as far as the format tells.

  FFmpeg reads AVI, WebM and GIF files that were cut short without a word; of
  MP4 files it has an index.
  """
  file.seek(0)
  head = file.read(64)
  if head.startswith(b'RIFF'):
    return 8 + int.from_bytes(head[4:8], 'little') <= size
  if head.startswith(b'\x1aE\xdf\xa3'):  # EBML: a header, then one segment.
    header, place = _ebml_size(head, 4)
    place += header
    if head[place : place + 4] != b'\x18S\x80g':
      return True
    segment, place = _ebml_size(head, place + 4)
    return place + segment <= size
  if head.startswith(b'GIF'):
    file.seek(max(0, size - 64))
    return file.read().rstrip(b'\0').endswith(b';')
  return True


def _ebml_size(data: bytes, place: int) -> tuple[int, int]:
  """An element's size (0 where it is not known) and the place after it."""
  length = 9 - data[place].bit_length() if place < len(data) else 1
  mask = (1 << 7 * length) - 1
  value = int.from_bytes(data[place : place + length], 'big') & mask
  return (0 if value == mask else value), place + length


def _decode_by_counting(
  reader: _Reader,
  wanted: list[int],
  transform: Callable[[Frame], Frame] | None,
) -> dict[int, Frame]:
  """The wanted frames, counted from the start."""
  left = set(wanted)
  frames: dict[int, Frame] = {}
  count = 0
  for index, frame in enumerate(reader.frames()):
    count = index + 1
    if index in left:
      rgb = reader.rgb(frame)
      frames[index] = rgb if transform is None else transform(rgb)
      left.remove(index)
      if not left:
        break
  if left:
    reader.check_holds(max(wanted), count)
  return frames


def _decode_by_seeking(
  reader: _Reader,
  timetable: _Timetable,
  wanted: list[int],
  transform: Callable[[Frame], Frame] | None,
) -> dict[int, Frame] | None:
  """The wanted frames, told by their times.

  Returns None where the file does not keep to its timetable.
  """
  place = {time: index for index, time in enumerate(timetable.times)}
  frames: dict[int, Frame] = {}
  pending = collections.deque(sorted(set(wanted)))
  while pending:
    # Frames that are decoded in one go.
    run = [pending.popleft()]
    while pending and timetable.start(pending[0]) - run[-1] <= _MAX_SKIPPED:
      run.append(pending.popleft())
    try:
      time = timetable.times[timetable.start(run[0])]
      reader.container.seek(time, stream=reader.stream)
    except _FAILURES:
      return None
    left = set(run)
    for frame in reader.frames():
      index = None if frame.pts is None else place.get(frame.pts)
      if index is None or frame.is_corrupt:
        return None
      if index in left:
        rgb = reader.rgb(frame)
        frames[index] = rgb if transform is None else transform(rgb)
        left.remove(index)
      if index >= run[-1]:
        break
    if left:
      return None
  return frames


def _decode_jpegs(
  reader: _Reader,
  timetable: _Timetable,
  wanted: list[int],
  transform: Callable[[Frame], Frame] | None,
) -> dict[int, Frame] | None:
  """The wanted frames of a file of which each packet is a JPEG file.

  Returns None where it is not so.
  """
  times = {timetable.times[index]: index for index in wanted}
  frames: dict[int, Frame] = {}
  try:
    reader.container.seek(min(times), stream=reader.stream)
    for packet in reader.container.demux(reader.stream):
      index = None if packet.pts is None else times.get(packet.pts)
      if index is None:
        continue
      # The decoder of those who read folders of JPEG files.
      content = np.frombuffer(bytes(packet), np.uint8)
      bgr = cv2.imdecode(content, cv2.IMREAD_COLOR)
      if bgr is None or bgr.shape[:2] != reader.size:
        return None
      rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
      frames[index] = rgb if transform is None else transform(rgb)
      if len(frames) == len(times):
        return frames
  except (*_FAILURES, cv2.error):
    return None
  return None
