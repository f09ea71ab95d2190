"""Fast decoding of the MP4 files that video_writer writes, from memory.

In such a file, no frame depends on a frame of odd index, so these are decoded
only if they are wanted. The tables of the file are read here (the
boxes of ISO/IEC 14496-12), and packets are given to the decoder: FFmpeg takes
as long to open a file as to decode five of its frames.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import re
import struct
from typing import Any

import av
import av.error
from jaxtyping import Int, Int64
import numpy as np

from dualformer_jax.input_pipeline.video_container import (
  MAX_PIXELS,
  FrameIndex,
)

Content = bytes | bytearray | memoryview
Box = tuple[int, int, int, int]  # top, left, height, width
# Options of x264, which it writes into the first packet. From a keyframe to the
# next, B-frames are at odd positions, and so is the last frame, if there is an
# even number. No other frame is predicted from those.
_REQUIRED_OPTIONS = {
  b'bframes=1',
  b'b_pyramid=0',
  b'b_adapt=0',
  b'open_gop=0',
  b'scenecut=0',
  b'intra_refresh=0',
  b'interlaced=0',
}
_IDENTITY = struct.pack('>9i', 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


class DamagedError(Exception):
  """The content of a file does not match its tables."""


@dataclasses.dataclass(frozen=True)
class ReencodedVideo:
  """A file of video_writer. Samples are its packets, in decoding order.

  Attributes:
    content: of the file.
    size: height and width of the pictures.
    decoder_config: avcC, the decoder's parameters.
    times: presentation time of each frame in seconds, rising.
    frame_index: times in ticks, and keyframes, whose indices are also their
      samples.
    index: the index of each sample's frame.
    sample: the sample of each frame.
    offsets: position of each sample in the file.
    sizes: number of bytes of each sample.
  """

  content: Content
  size: tuple[int, int]
  decoder_config: bytes
  times: np.ndarray
  frame_index: FrameIndex
  index: Int64[np.ndarray, ' n']
  sample: Int64[np.ndarray, ' n']
  offsets: Int64[np.ndarray, ' n']
  sizes: Int64[np.ndarray, ' n']

  @classmethod
  def parse(cls, content: Content) -> ReencodedVideo | None:
    """Reads the tables of a file; returns None for one of another kind."""
    options = re.search(
      rb'x264 - core [ -~]*? options: ([ -~]*)', content[:2048]
    )
    if not options or not set(options[1].split()) >= _REQUIRED_OPTIONS:
      return None
    try:
      return cls._parse(content)
    except (struct.error, ValueError, KeyError, IndexError, OverflowError):
      return None

  @classmethod
  def _parse(cls, content: Content) -> ReencodedVideo | None:
    movie = _Boxes(content).inside('moov')
    track = movie.inside('trak')
    media = track.inside('mdia')
    table = media.inside('minf').inside('stbl')
    timescale = _timescale(media.body('mdhd'))
    entry = table.body('stsd')[8:]  # after version, flags and number of entries
    height, width = struct.unpack_from('>HH', entry, 32)[::-1]
    config = _Boxes(entry[86:]).body('avcC')

    (size_of_all,) = struct.unpack_from('>I', table.body('stsz'), 4)
    if size_of_all:
      return None  # One frame, or an unusual file.
    sizes = _integers(table.body('stsz')[8:], 1)[:, 0]
    chunks = _integers(table.body('stco')[4:], 1)[:, 0]
    runs = _integers(table.body('stsc')[4:], 3)  # first chunk, samples in each
    num_chunks = [*runs[1:, 0] - 1, len(chunks)] - (runs[:, 0] - 1)
    in_chunk = _repeat(runs[:, 1], num_chunks, len(chunks))
    start = np.cumsum(sizes) - sizes
    first = np.cumsum(in_chunk) - in_chunk
    offsets = start + _repeat(chunks - start[first], in_chunk, len(sizes))

    steps = _integers(table.body('stts')[4:], 2)
    steps = _repeat(steps[:, 1], steps[:, 0], len(sizes))
    times = np.cumsum(steps) - steps
    if 'ctts' in table.names:
      delays = _integers(table.body('ctts')[4:], 2)
      times = times + _repeat(delays[:, 1], delays[:, 0], len(sizes))
    sample = np.argsort(times, kind='stable')
    index = np.empty_like(sample)
    index[sample] = np.arange(len(sample))
    times = times[sample]
    if 'stss' in table.names:
      keyframes = _integers(table.body('stss')[4:], 1)[:, 0] - 1
    else:
      keyframes = np.arange(len(sizes))

    is_valid = (
      0 < height * width <= MAX_PIXELS
      and movie.names.count('trak') == 1
      and 'mvex' not in movie.names
      and _matrix(movie.body('mvhd'), 36) == _IDENTITY
      and _matrix(track.body('tkhd'), 40) == _IDENTITY
      and _shows_all(movie, track, times, timescale)
      and (np.diff(times) > 0).all()
      and (offsets >= 0).all()
      and (offsets + sizes <= len(content)).all()
      and keyframes[0] == 0
      and (keyframes % 2 == 0).all()
      and (index[keyframes] == keyframes).all()
    )
    if not is_valid:
      return None
    return cls(
      content=content,
      size=(height, width),
      decoder_config=bytes(config),
      times=(times - times[0]) / timescale,
      frame_index=FrameIndex(times.tolist(), keyframes.tolist()),
      index=index,
      sample=sample,
      offsets=offsets,
      sizes=sizes,
    )

  def decode(
    self, wanted: list[int], box: Box | None = None
  ) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (index, picture) of each wanted frame, in order.

    Args:
      wanted: indices of frames, rising.
      box: the part of the frames to return, of even numbers; all by default.

    Raises:
      DamagedError: a frame cannot be decoded.
    """
    size = self.size if box is None else box[2:]
    context: Any = av.CodecContext.create('h264', 'r')
    context.extradata = self.decoder_config if box is None else self._crop(box)
    context.thread_count = 1
    context.thread_type = 'NONE'
    # By default, FFmpeg moves the left side of a crop to an aligned address.
    context.options = {'max_pixels': str(MAX_PIXELS), 'flags': '+unaligned'}
    for run in self.frame_index.runs(wanted):
      missing = set(run)
      for packet in [*self._packets(run), None]:
        try:
          pictures = context.decode(packet)
        except (av.error.FFmpegError, ValueError, MemoryError) as error:
          raise DamagedError from error
        for picture in pictures:
          if picture.is_corrupt or (picture.height, picture.width) != size:
            raise DamagedError
          index = picture.pts
          if index in missing:
            missing.remove(index)
            yield index, picture
      if missing:
        raise DamagedError
      context.flush_buffers()

  def _packets(self, run: list[int]) -> list[av.Packet]:
    """Returns the packets that a run needs, each with its index as its time."""
    start = self.frame_index.keyframe_before(run[0])
    part = slice(start, int(self.sample[run].max()) + 1)
    packets, wanted = [], set(run)
    for index, offset, size in zip(
      self.index[part].tolist(),
      self.offsets[part].tolist(),
      self.sizes[part].tolist(),
      strict=True,
    ):
      if index % 2 == 0 or index in wanted:
        packet = av.Packet(bytes(self.content[offset : offset + size]))
        packet.pts = index
        packets.append(packet)
    return packets

  def _crop(self, box: Box) -> bytes:
    """Returns decoder_config with the crop of a box.

    It is in the sequence parameter set (ITU-T H.264, 7.3.2.1.1). The pictures
    are then views of whole frames, so that the crop costs no time.
    """
    config = self.decoder_config
    end = 8 + int.from_bytes(config[6:8])
    content = config[8:end].replace(b'\0\0\3', b'\0\0')
    bits = ''.join(f'{byte:08b}' for byte in content)
    position = 32

    def read() -> int:  # an Exp-Golomb code
      nonlocal position
      first = bits.index('1', position)
      position, start = 2 * first - position + 1, first
      return int(bits[start:position], 2) - 1

    try:
      read()
      if content[1] >= 100:  # High profile: chroma format and bit depths
        _ = read(), read(), read()
        position += 2
      read()
      if read() == 0:  # order of the frames
        read()
      read()
      position += 1
      width, height = 16 * (read() + 1), 16 * (read() + 1)
      position += 2
      start, position = position, position + 1
      old = [read() for _ in range(4)] if bits[start] == '1' else [0] * 4
      if (height - 2 * old[3], width - 2 * old[1]) != self.size:
        raise DamagedError
    except (ValueError, IndexError) as error:
      raise DamagedError from error
    top, left, rows, columns = box
    crop = left, width - left - columns, top, height - top - rows
    codes = (f'{number // 2 + 1:b}' for number in crop)
    codes = ''.join('0' * (len(code) - 1) + code for code in codes)
    bits = f'{bits[:start]}1{codes}{bits[position:].rstrip("0")}'
    bits += '0' * (-len(bits) % 8)
    content = int(bits, 2).to_bytes(len(bits) // 8)
    content = re.sub(b'\0\0(?=[\0-\3])', b'\0\0\3', content)
    return config[:6] + len(content).to_bytes(2) + content + config[end:]


class _Boxes:
  """The boxes that follow each other in a part of a file."""

  def __init__(self, data: Content):
    self._data = data
    self.names: list[str] = []
    self._bodies: list[slice] = []
    start = 0
    while start < len(data):
      length, name = struct.unpack_from('>I4s', data, start)
      header = 8
      if length == 1:
        (length,) = struct.unpack_from('>Q', data, start + 8)
        header = 16
      stop = start + length if length else len(data)
      if stop < start + header or stop > len(data):
        raise ValueError(f'box {name!r} of {length} bytes')
      self.names.append(name.decode('latin-1'))
      self._bodies.append(slice(start + header, stop))
      start = stop

  def body(self, name: str) -> Content:
    """Returns the content of the first box of a name.

    Raises:
      ValueError: there is none.
    """
    return self._data[self._bodies[self.names.index(name)]]

  def inside(self, name: str) -> _Boxes:
    """Returns the boxes in the first box of a name."""
    return _Boxes(self.body(name))


def _integers(data: Content, columns: int) -> Int[np.ndarray, 'rows columns']:
  """Reads a table: its number of rows, then big-endian numbers of 32 bits."""
  (rows,) = struct.unpack_from('>I', data)
  numbers = np.frombuffer(data, '>i4', rows * columns, 4)
  return numbers.reshape(rows, columns).astype(np.int64)


def _repeat(
  values: Int64[np.ndarray, ' n'], counts: Int64[np.ndarray, ' n'], total: int
) -> Int64[np.ndarray, ' total']:
  """Repeats each value, `total` in all; refuses the counts of other totals."""
  if counts.sum() != total:
    raise ValueError(f'{counts.sum()} entries, expected {total}')
  return np.repeat(values, counts)  # raises ValueError if one is negative


def _timescale(header: Content) -> int:
  """Returns the ticks per second of a mvhd or mdhd box."""
  (timescale,) = struct.unpack_from('>I', header, 20 if header[0] else 12)
  if not timescale:
    raise ValueError('timescale 0')
  return timescale


def _matrix(header: Content, offset: int) -> bytes:
  """Returns the matrix of a mvhd or tkhd box; `offset` is that of version 0."""
  offset += 12 if header[0] else 0
  return bytes(header[offset : offset + 36])


def _shows_all(
  movie: _Boxes, track: _Boxes, times: np.ndarray, timescale: int
) -> bool:
  """Whether the track has no edit list, or one that shows all of its frames."""
  if 'edts' not in track.names:
    return True
  edits = track.inside('edts').body('elst')
  (count,) = struct.unpack_from('>I', edits, 4)
  form = '>Qq2h' if edits[0] else '>Ii2h'
  duration, start, rate, fraction = struct.unpack_from(form, edits, 8)
  seconds = duration / _timescale(movie.body('mvhd'))
  return (
    (count, start, rate, fraction) == (1, int(times[0]), 1, 0)
    and seconds > float(times[-1] - times[0]) / timescale
  )  # fmt: skip


def crop(picture: Any, box: Box) -> Any:
  """Returns a part of a frame; or of planes, for which its box must be even."""
  top, left, height, width = box
  if isinstance(picture, tuple):
    luma, *chroma = picture
    half = top // 2, left // 2, height // 2, width // 2
    return crop(luma, box), *(crop(plane, half) for plane in chroma)
  return picture[top : top + height, left : left + width]
