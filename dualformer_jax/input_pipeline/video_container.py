"""Video files opened safely with PyAV (FFmpeg): packets and decoded pictures.

VideoReader in video_reader.py is the interface for everyone else.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import fractions
import io
import itertools
import math
import os
import stat
from typing import Any

import av
import av.container
import av.error
import av.stream

from dualformer_jax import errors

Source = bytes | bytearray | memoryview | str | os.PathLike[str]

# Larger frames are refused before memory is allocated for them.
MAX_PIXELS = 8192 * 8192
# File name extensions of the formats below.
SUFFIXES = frozenset({
  '.3g2', '.3gp', '.asf', '.avi', '.divx', '.dv', '.f4v', '.flv', '.gif',
  '.h264', '.ivf', '.m2ts', '.m2v', '.m4v', '.mkv', '.mov', '.mp4', '.mpe',
  '.mpeg', '.mpg', '.mts', '.mxf', '.nut', '.ogg', '.ogv', '.qt', '.rm',
  '.rmvb', '.ts', '.vob', '.webm', '.webp', '.wmv',
})  # fmt: skip
# Playlists (HLS, DASH, concat), devices and image patterns are excluded: they
# make FFmpeg open other files and URLs.
_FORMATS = (
  'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpeg,mpegts,mpegvideo,'
  'asf,flv,ogg,rm,m4v,h264,hevc,ivf,nut,mxf,dv,webp_anim'
)
# Codecs whose packets in an MP4 file hold one frame each.
_ONE_FRAME_PER_PACKET = frozenset({'h264', 'hevc', 'av1', 'vp9', 'mjpeg'})
# PyAV 19 replaces characters in tags that are not UTF-8; before, they raise
# unless this option is given.
_PYAV_OPTIONS: dict[str, Any] = (
  {'metadata_errors': 'ignore'}
  if int(av.__version__.split('.')[0]) < 19
  else {}
)
# Decoding up to this many unwanted frames is faster than another seek.
_MAX_SKIPPED = 8
# What PyAV raises. Most FFmpegErrors are one of the others as well.
FAILURES = (av.error.FFmpegError, OSError, ValueError, MemoryError)


class VideoError(errors.UserError):
  """A video that cannot be decoded.

  Attributes:
    reason: the message without the path, in one line.
  """

  def __init__(self, reason: str, path: str = ''):
    self.reason = ' '.join(reason.split())
    super().__init__(f'{path}: {self.reason}' if path else self.reason)


@dataclasses.dataclass(frozen=True)
class FrameIndex:
  """Presentation times and keyframes of a file whose frames can be sought.

  Attributes:
    times: presentation time of each frame in the stream's time base, rising.
    keyframes: indices of the frames at which decoding can start, rising. The
      first is 0.
  """

  times: list[int]
  keyframes: list[int]

  def keyframe_before(self, index: int) -> int:
    """Returns the last keyframe at or before a frame."""
    return self.keyframes[bisect.bisect_right(self.keyframes, index) - 1]

  def runs(self, wanted: Sequence[int]) -> Iterator[list[int]]:
    """Splits rising indices into those to decode after one seek each."""
    run: list[int] = []
    for index in wanted:
      if run and self.keyframe_before(index) - run[-1] > _MAX_SKIPPED:
        yield run
        run = []
      run.append(index)
    yield run


class VideoContainer:
  """A video file, open until `close`, and its main video stream.

  Attributes:
    path: of the file; '' where only its content is given.
    av: PyAV's container. Reading packets and seeking move its position.
    stream: PyAV's video stream: the default one, or else the largest.
    size: height and width of the stored pictures, before they are oriented.
  """

  def __init__(self, source: Source):
    """Opens a file.

    Args:
      source: the file's content, or its path.

    Raises:
      VideoError: the file cannot be opened, or has no video stream that FFmpeg
        can decode.
    """
    self.path = ''
    if isinstance(source, (str, os.PathLike)):
      self.path = os.fspath(source)
    with contextlib.ExitStack() as stack:
      try:
        if isinstance(source, (bytes, bytearray, memoryview)):
          file = stack.enter_context(io.BytesIO(source))
        else:
          if stat.S_ISFIFO(os.stat(self.path).st_mode):  # opening it may block
            raise self.error('is a pipe; expected a file')
          file = stack.enter_context(open(self.path, 'rb'))
      except OSError as error:
        raise self.error('cannot be opened', error) from error
      num_bytes = file.seek(0, io.SEEK_END)
      if not num_bytes:
        raise self.error('is empty (0 bytes)')
      self._is_complete = _is_complete(file, num_bytes)
      file.seek(0)
      try:
        # FFmpeg itself reads a path faster. The prefix keeps it from
        # interpreting a name as a URL.
        opened: Any = av.open(
          f'file:{os.path.abspath(self.path)}' if self.path else file,
          # Passed to the decoder, too, which decodes frames while opening.
          options={
            'format_whitelist': _FORMATS,
            'max_pixels': str(MAX_PIXELS),
            'threads': '1',
          },
          **_PYAV_OPTIONS,
        )
      except FAILURES as error:
        raise self.error('cannot be decoded', error) from error
      self.av: av.container.InputContainer = stack.enter_context(opened)
      streams = [
        s
        for s in self.av.streams.video
        if not s.disposition & av.stream.Disposition.attached_pic
      ]
      if not streams:
        raise self.error('has no video stream')
      self.stream = max(streams, key=_preference)
      # None, despite its annotation, where FFmpeg has no decoder.
      context: Any = self.stream.codec_context
      if context is None:
        raise self.error('uses a codec that FFmpeg cannot decode')
      self.size = (context.height, context.width)
      if context.width * context.height > MAX_PIXELS:
        raise self.error(
          f'has frames of {context.width}x{context.height} pixels; expected at'
          f' most {MAX_PIXELS} pixels'
        )
      # Only the index of an MP4 file gives the positions of its frames.
      ends = (entry.pos + entry.size for entry in self.stream.index_entries)
      self._is_complete &= max(ends, default=0) <= num_bytes
      # The loader decodes one video per thread; more threads would contend.
      self.stream.thread_type = 'NONE'
      context.thread_count = 1
      # For streams that change their size.
      context.options = {'max_pixels': str(MAX_PIXELS)}
      self._resources = stack.pop_all()

  def close(self) -> None:
    """Closes the file."""
    self._resources.close()

  def error(
    self, reason: str, cause: BaseException | None = None
  ) -> VideoError:
    """Returns an error that names the file, and the cause if given."""
    if cause is not None:
      detail = getattr(cause, 'strerror', None) or str(cause)
      reason = f'{reason}: {detail or type(cause).__name__}'
    return VideoError(reason, self.path)

  def packets(self) -> Iterator[av.Packet]:
    """Yields the packets from the current position to the end.

    Raises:
      VideoError: the file cannot be read, or is truncated.
    """
    count = 0
    is_cut = False
    try:
      for packet in self.av.demux(self.stream):
        if packet.size:  # Others flush the decoder.
          is_cut = packet.is_corrupt  # The last packet's value remains.
          count += 1
        yield packet
    except FAILURES as error:
      raise self.error(f'cannot be read after {count} frames', error) from error
    # An AVI file that only lost the index at its end has all of its frames.
    has_all = self.av.format.name == 'avi' and 0 < self.stream.frames <= count
    if is_cut or not (self._is_complete or has_all):
      raise self.error(f'is truncated after {count} frames')

  def decode(self) -> Iterator[av.VideoFrame]:
    """Yields the pictures from the current position to the end.

    Raises:
      VideoError: a picture cannot be decoded, or the file is truncated.
    """
    count = 0
    for packet in self.packets():
      pictures = self.decode_packet(packet, count)
      yield from pictures
      count += len(pictures)

  def decode_packet(
    self, packet: av.Packet | None, count: int = 0
  ) -> list[av.VideoFrame]:
    """Returns the pictures that a packet completes, or for None all others.

    Args:
      packet: the next one to decode.
      count: number of pictures decoded before, for the error.

    Raises:
      VideoError: the packet cannot be decoded.
    """
    context: Any = self.stream.codec_context
    try:
      return context.decode(packet)
    except FAILURES as error:
      raise self.error(
        f'cannot be decoded after {count} frames', error
      ) from error

  def decode_between(
    self, start: float, end: float, step: float
  ) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields times and pictures from `start` on and before `end`.

    Args:
      start: in seconds after the first picture.
      end: likewise.
      step: seconds from a picture to the next that has no time in the file.

    Raises:
      VideoError: see decode; or a range is given and pictures have no times.
    """
    # Integers are subtracted: differences of floats would not be exactly those
    # times that users give, such as 0.4.
    base = self.stream.time_base or fractions.Fraction(1)
    first = None
    # These formats seek to a keyframe at or before the time. Others may not, or
    # lack the time of their first frame.
    can_seek = {'mp4', 'matroska'} & set(self.av.format.name.split(','))
    pictures = self.decode()
    if start > 0.0 and can_seek and self.stream.time_base:
      first = self.stream.start_time or 0
      # Files with B-frames may seek to a keyframe that is shown after the time,
      # and lack frames before it: seeks further back until none are missing.
      margin = 0.0
      while True:
        target = max(0.0, start - margin)
        with contextlib.suppress(*FAILURES):
          self.av.seek(first + int(target / base), stream=self.stream)
        pictures = self.decode()
        picture = next(pictures, None)
        shown = None if picture is None else self._shown_at(picture)
        is_late = shown is not None and (shown - first) * base > start
        if picture is not None:
          pictures = itertools.chain([picture], pictures)
        if not is_late or not target:
          break
        margin = 2 * margin + 1
    time = -step
    for picture in pictures:
      shown = self._shown_at(picture)
      if shown is not None:
        first = shown if first is None else first
        time = max(time, float((shown - first) * base))
      elif first is None and (start > 0.0 or end < math.inf):
        raise self.error('has no frame times')
      else:
        time += step
      if time >= end:
        return
      if time >= start:
        yield time, picture

  def _shown_at(self, picture: av.VideoFrame) -> int | None:
    """Returns when a picture is shown, in units of the stream's time base."""
    # AVI files have decoding times only. FFmpeg makes up the others, which are
    # out of order in files with B-frames.
    return picture.dts if self.av.format.name == 'avi' else picture.pts

  def frame_index(self) -> FrameIndex | None:
    """Returns the frame index, or None where packets do not give it exactly.

    Only MP4 files have one: other formats may lack times or have them out of
    order (AVI), and a packet may hold several frames (WebM). Reads from the
    current position, so call it before reading packets.

    Raises:
      VideoError: the file cannot be read, or is truncated.
    """
    if 'mp4' not in self.av.format.name.split(','):
      return None
    if self.stream.codec_context.name not in _ONE_FRAME_PER_PACKET:
      return None
    return self._index_from_header() or self._index_from_packets()

  def _index_from_packets(self) -> FrameIndex | None:
    times, keyframe_times = [], []
    for packet in self.packets():
      if packet.size == 0:  # Flushes the decoder.
        continue
      # Discarded packets are before the start that an edit list sets.
      if packet.pts is None or packet.is_discard:
        return None
      times.append(packet.pts)
      if packet.is_keyframe:
        keyframe_times.append(packet.pts)
    times.sort()
    keyframes = [bisect.bisect_left(times, t) for t in sorted(keyframe_times)]
    if len(set(times)) != len(times) or keyframes[:1] != [0]:
      return None
    return FrameIndex(times, keyframes)

  def _index_from_header(self) -> FrameIndex | None:
    """Builds the index ten times faster, without reading packets.

    The header has decoding times. This returns None unless they are also the
    presentation times.
    """
    context = self.stream.codec_context
    if context.name not in ('h264', 'mjpeg') or context.has_b_frames:
      return None
    entries = list(self.stream.index_entries)
    times = [entry.timestamp for entry in entries]
    keyframes = [i for i, entry in enumerate(entries) if entry.is_keyframe]
    if (
      not self._is_complete
      or not 0 < self.stream.frames == len(entries)
      or times[0] != self.stream.start_time
      or any(entry.is_discard for entry in entries)
      or any(a >= b for a, b in itertools.pairwise(times))
      or keyframes[:1] != [0]
    ):
      return None
    return FrameIndex(times, keyframes)


def _preference(stream: Any) -> tuple[bool, bool, int]:
  """Orders streams as players do; the highest is shown."""
  context = stream.codec_context
  is_default = bool(stream.disposition & av.stream.Disposition.default)
  pixels = context.width * context.height if context else 0
  return context is not None, is_default, pixels


def _is_complete(file: io.BufferedIOBase, num_bytes: int) -> bool:
  """Returns False for an AVI, Matroska or GIF file that lacks its end.

  FFmpeg reads such files without an error.
  """
  file.seek(0)
  head = file.read(64)
  if head.startswith(b'RIFF'):
    return 8 + int.from_bytes(head[4:8], 'little') <= num_bytes
  if head.startswith(b'\x1aE\xdf\xa3'):  # EBML: a header, then one segment.
    header_size, position = _ebml_size(head, 4)
    position += header_size
    if head[position : position + 4] != b'\x18S\x80g':
      return True
    segment_size, position = _ebml_size(head, position + 4)
    return position + segment_size <= num_bytes
  if head.startswith(b'GIF'):
    file.seek(max(0, num_bytes - 64))
    return file.read().rstrip(b'\0').endswith(b';')
  return True


def _ebml_size(data: bytes, position: int) -> tuple[int, int]:
  """Returns the size of an element (0 if unknown) and where its data begins."""
  length = 9 - data[position].bit_length() if position < len(data) else 1
  mask = (1 << 7 * length) - 1
  value = int.from_bytes(data[position : position + length], 'big') & mask
  return (0 if value == mask else value), position + length
