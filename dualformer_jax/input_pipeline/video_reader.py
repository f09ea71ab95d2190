"""RGB frames of video files, by index or in order.

A frame's index is its position in a decode from the first frame to the last;
all functions here agree on it exactly. Frames are oriented for display.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterator, Sequence
import contextlib
import functools
import math
from typing import Any, TypeVar

import av
from av.video import reformatter
import cv2
from jaxtyping import Float64, UInt8
import numpy as np

from dualformer_jax.input_pipeline.reencoded_video import (
  Box,
  DamagedError,
  ReencodedVideo,
  crop,
)
from dualformer_jax.input_pipeline.video_container import (
  FAILURES,
  FrameIndex,
  Source,
  VideoContainer,
)
from dualformer_jax.input_pipeline.video_container import (
  VideoError as VideoError,
)

Frame = UInt8[np.ndarray, 'h w 3']
# Luma, and chroma of half the height and width.
Planes = tuple[
  UInt8[np.ndarray, 'h w'],
  UInt8[np.ndarray, 'h2 w2'],
  UInt8[np.ndarray, 'h2 w2'],
]
_Converted = TypeVar('_Converted')
Transform = Callable[[Frame], UInt8[np.ndarray, 'h2 w2 3']]

_DEFAULT_FPS = 25.0
MAX_FPS = 1000.0


class _WrongIndexError(Exception):
  """A file does not match its index."""


class VideoReader:
  """Reads frames of a video file; use it as a context manager.

  Example:
    with VideoReader('video.mp4') as reader:
      frames = reader.get_frames(range(0, len(reader), 10))

  Where the file changes its frame size, all frames are resized to the size in
  its header.
  """

  def __init__(self, source: Source):
    """Opens a video.

    Args:
      source: the file's content, or its path.

    Raises:
      VideoError: the file cannot be opened, or has no video.
    """
    self._source = source
    self._opened: VideoContainer | None = None
    self._reencoded: ReencodedVideo | None = None
    if isinstance(source, (bytes, bytearray, memoryview)):
      self._reencoded = ReencodedVideo.parse(source)
    if self._reencoded is None:
      self._opened = VideoContainer(source)
    self._reformatter = reformatter.VideoReformatter()
    self._oriented: Any = None  # A decoded JPEG file; see _jpeg_to_rgb.

  def __enter__(self) -> VideoReader:
    return self

  def __exit__(self, *_: object) -> None:
    if self._opened is not None:
      self._opened.close()

  @property
  def _container(self) -> VideoContainer:
    """The file opened with FFmpeg, which a re-encoded video does not need."""
    if self._opened is None:
      self._opened = VideoContainer(self._source)
    return self._opened

  @property
  def fps(self) -> float:
    """Average frames per second in the header; 25 if it has none."""
    stream = self._container.stream
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    return rate if 0.0 < rate <= MAX_FPS else _DEFAULT_FPS

  @property
  def duration(self) -> float | None:
    """Seconds in the header; None if it has none."""
    length = self._container.av.duration
    return length / av.time_base if length and length > 0 else None

  @functools.cached_property
  def size(self) -> tuple[int, int]:
    """Height and width of a displayed frame, in pixels."""
    frame = next(iter(self))
    return frame.shape[0], frame.shape[1]

  @functools.cached_property
  def frame_times(self) -> Float64[np.ndarray, ' num_frames']:
    """Presentation time of each frame, in seconds after the first frame.

    Comes from the index of an MP4 file. Other files are decoded once; those
    without times get equal steps of 1 / fps.

    Raises:
      VideoError: the video cannot be read, or has no frames.
    """
    if self._reencoded is not None:
      return self._reencoded.times
    if self._index is not None:
      times = np.array(self._index.times, np.float64)
      times *= float(self._container.stream.time_base or 1)
    else:
      times = np.array([time for time, _ in self._pictures()])
    self._check_index(0, len(times))
    return times - times[0]

  def __len__(self) -> int:
    """Number of frames; see frame_times."""
    return len(self.frame_times)

  def __iter__(self) -> Iterator[Frame]:
    return (frame for _, frame in self.iter_timed())

  def iter_timed(
    self, start: float = 0.0, end: float = math.inf
  ) -> Iterator[tuple[float, Frame]]:
    """Yields times, as of frame_times, and RGB frames, in order.

    Holds one frame at a time. Opens the file separately, so that iterators are
    independent of each other and of the reader.

    Args:
      start: time of the first frame to yield, in seconds after the video's
        first frame.
      end: time before which the frames are shown, likewise.

    Raises:
      VideoError: while iterating, where the video cannot be decoded; there is
        no frame in the time range; or a range is given and the file has no
        frame times.
    """
    count = 0
    for time, picture in self._pictures(start, end):
      yield time, self._convert_whole(self._to_rgb, None, picture)
      count += 1
    if not count and (start > 0.0 or end < math.inf):
      raise self._container.error(
        f'has no frame between {start:g} s and {end:g} s'
      )
    self._check_index(0, count)

  def get_frames(
    self,
    indices: Sequence[int] | np.ndarray,
    transform: Transform = lambda frame: frame,
  ) -> UInt8[np.ndarray, 't h w 3']:
    """Returns the frames of the given indices, RGB.

    In MP4 files, decoding starts at the last keyframe before a frame. Seeking
    in other formats is not exact, so they are decoded from their start.

    Args:
      indices: of frames, from 0; in any order, with repetitions.
      transform: applied once to each frame as it is decoded (a resize, a
        crop), so that only the results are held in memory.

    Raises:
      VideoError: the video cannot be decoded, or has no such frame.
      ValueError: an index is negative, or there are no indices.
    """
    frames: Any = None
    places = collections.defaultdict(list)
    for place, index in enumerate(indices):
      places[int(index)].append(place)
    for index, frame in self.iter_frames(indices):
      frame = transform(frame)
      if frames is None:
        frames = np.empty((len(indices), *frame.shape), np.uint8)
      frames[places[index]] = frame
    return frames

  @property
  def frame_size(self) -> tuple[int, int] | None:
    """Height and width of all frames of a file of video_writer; None of others.

    Only such files have planes, and parts of their frames are decoded faster.
    """
    return self._reencoded.size if self._reencoded is not None else None

  def iter_frames(
    self, indices: Sequence[int] | np.ndarray, box: Box | None = None
  ) -> Iterator[tuple[int, Frame]]:
    """Yields (index, frame) of each of the given indices, as of get_frames.

    They come as they are decoded, in order. Where the file turns out not to
    match its index, all come again, and replace those before.

    Args:
      indices: of frames.
      box: the part of the frames to yield, of even numbers; all by default.
    """
    return self._decode(indices, self._to_rgb, box)

  def iter_planes(
    self, indices: Sequence[int] | np.ndarray, box: Box | None = None
  ) -> Iterator[tuple[int, Planes]]:
    """Yields frames as iter_frames does, with their colors as stored.

    Yields (index, (luma, blue, red)): BT.601 of limited range, the chroma with
    half the height and width.
    """
    return self._decode(indices, self._to_planes, box)

  def _decode(
    self,
    indices: Sequence[int] | np.ndarray,
    convert: Callable[[Any, tuple[int, int]], _Converted],
    box: Box | None,
  ) -> Iterator[tuple[int, _Converted]]:
    """Yields what `convert` makes of the picture, or JPEG file, of an index."""
    wanted = sorted({int(index) for index in indices})
    if not wanted or wanted[0] < 0:
      raise ValueError(f'expected indices of 0 or more, got {wanted}')
    if self._reencoded is not None:
      self._check_index(wanted[-1], len(self._reencoded.times))
      # Otherwise FFmpeg finds out whether the file is damaged.
      with contextlib.suppress(DamagedError):
        size = self._reencoded.size if box is None else box[2:]
        for index, picture in self._reencoded.decode(wanted, box):
          yield index, convert(picture, size)
        return
    whole: Any = functools.partial(self._convert_whole, convert, box)
    if self._index is not None:
      self._check_index(wanted[-1], len(self._index.times))
      with contextlib.suppress(_WrongIndexError):
        yield from self._decode_by_seeking(self._index, wanted, whole)
        return
    yield from self._decode_by_counting(set(wanted), whole)

  @functools.cached_property
  def _index(self) -> FrameIndex | None:
    return self._container.frame_index()

  def _pictures(
    self, start: float = 0.0, end: float = math.inf
  ) -> Generator[tuple[float, av.VideoFrame], None, None]:
    """Decodes, independently of other reads from the file."""
    with contextlib.closing(VideoContainer(self._source)) as container:
      yield from container.decode_between(start, end, 1 / self.fps)

  def _check_index(self, index: int, count: int) -> None:
    if not count:
      raise self._container.error('has no frames')
    if index >= count:
      raise self._container.error(
        f'has {count} frames, but frame {index} was requested'
      )

  def _convert_whole(
    self,
    convert: Callable[[Any, tuple[int, int]], Any],
    box: Box | None,
    picture: av.VideoFrame | av.Packet,
  ) -> Any:
    """Converts a picture that FFmpeg did not crop."""
    if isinstance(picture, av.Packet):
      converted = self._jpeg_to_rgb(picture)
    else:
      converted = _orient(convert(picture, self._container.size), picture)
    return converted if box is None else crop(converted, box)

  def _to_rgb(self, picture: av.VideoFrame, size: tuple[int, int]) -> Frame:
    height, width = size
    try:
      # By default the conversion starts threads, and is slower.
      rgb = self._reformatter.reformat(
        picture, width, height, 'rgb24', threads=1
      )
    except FAILURES as error:
      raise self._container.error(
        'cannot be converted to RGB', error
      ) from error
    plane: Any = rgb.planes[0]
    strides = plane.line_size, 3, 1
    return np.ndarray((height, width, 3), np.uint8, plane, 0, strides)

  def _to_planes(self, picture: av.VideoFrame, size: tuple[int, int]) -> Planes:
    height, width = size
    found = picture.format.name, picture.height, picture.width
    if found != ('yuv420p', height, width) or height % 2 or width % 2:
      raise self._container.error(
        f'has a frame that is {found}, expected yuv420p of even size'
      )
    planes: Any = picture.planes
    luma, blue, red = (
      np.ndarray((p.height, p.width), np.uint8, p, 0, (p.line_size, 1))
      for p in planes
    )
    return luma, blue, red

  def _decode_by_counting(
    self, missing: set[int], convert: Callable[[Any], _Converted]
  ) -> Iterator[tuple[int, _Converted]]:
    """Decodes from the start and counts frames."""
    last, count = max(missing), 0
    with contextlib.closing(self._pictures()) as pictures:
      for i, (_, picture) in enumerate(pictures):
        count = i + 1
        if i in missing:
          yield i, convert(picture)
        if i == last:
          return
    self._check_index(last, count)

  def _decode_by_seeking(
    self,
    index: FrameIndex,
    wanted: list[int],
    convert: Callable[[Any], _Converted],
  ) -> Iterator[tuple[int, _Converted]]:
    """Decodes from keyframes and identifies frames by their times.

    Raises:
      _WrongIndexError: the file does not match its index.
    """
    container = self._container
    index_at = {time: i for i, time in enumerate(index.times)}
    for run in index.runs(wanted):
      try:
        keyframe = index.keyframe_before(run[0])
        container.av.seek(index.times[keyframe], stream=container.stream)
      except FAILURES as error:
        raise _WrongIndexError from error
      missing = set(run)
      if container.stream.codec_context.name == 'mjpeg':
        items = container.packets()
      elif container.stream.codec_context.name == 'h264':
        items = self._decode_h264(index_at, run)
      else:
        items = container.decode()
      for item in items:
        i = None if item.pts is None else index_at.get(item.pts)
        if i is None or item.is_corrupt:
          raise _WrongIndexError
        if i in missing:
          yield i, convert(item)
          missing.remove(i)
        if i >= run[-1]:
          break
      if missing:
        raise _WrongIndexError

  def _decode_h264(
    self, index_at: dict[int, int], run: list[int]
  ) -> Iterator[av.VideoFrame]:
    """Decodes the frames of a run, and others that some may be predicted from.

    Frames marked as not used for reference, often more than half of all, are
    skipped by the decoder.
    """
    wanted = set(run)
    context: Any = self._container.stream.codec_context
    for packet in self._container.packets():
      index = None if packet.pts is None else index_at.get(packet.pts)
      is_wanted = index is None or index in wanted
      context.skip_frame = 'DEFAULT' if is_wanted else 'NONREF'
      yield from self._container.decode_packet(packet)

  def _jpeg_to_rgb(self, packet: av.Packet) -> Frame:
    """Decodes a JPEG file with OpenCV.

    OpenCV gives the pixels that readers of folders of JPEG files get.

    Raises:
      _WrongIndexError: it is not a JPEG file.
    """
    try:
      content = np.frombuffer(bytes(packet), np.uint8)
      flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
      bgr = cv2.imdecode(content, flags)
      if self._oriented is None:
        # FFmpeg decodes one frame for the orientation of all.
        [self._oriented] = packet.decode()
    except (*FAILURES, cv2.error) as error:
      raise _WrongIndexError from error
    if bgr is None or bgr.shape[:2] != self._container.size:
      raise _WrongIndexError
    return _orient(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), self._oriented)


def _orient(frame: Any, picture: av.VideoFrame) -> Any:
  """Rotates and mirrors a frame or planes by the display matrix of the file.

  The file has a matrix that maps stored to displayed coordinates: x a + y c and
  x b + y d. One that is not a multiple of right angles and flips is ignored.
  """
  if isinstance(frame, tuple):
    return tuple(_orient(plane, picture) for plane in frame)
  try:
    data: Any = picture.side_data.get('DISPLAYMATRIX')
  except ValueError:  # PyAV 18 does not know EXIF data, only its rotation.
    turns = round(picture.rotation / 90) % 4  # To the left.
    return np.ascontiguousarray(np.rot90(frame, turns))
  if data is None:
    return frame
  a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
  near_zero = max(map(abs, (a, b, c, d))) / 1000
  match [abs(number) <= near_zero for number in (a, b, c, d)]:
    case [False, True, True, False]:
      x_sign, y_sign = a, d
    case [True, False, False, True]:
      frame = frame.swapaxes(0, 1)
      x_sign, y_sign = c, b
    case _:
      return frame
  oriented = frame[:: 1 if y_sign > 0 else -1, :: 1 if x_sign > 0 else -1]
  return np.ascontiguousarray(oriented)
