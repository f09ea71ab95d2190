"""Small videos in many formats, undamaged and damaged."""

from collections.abc import Callable, Iterable
import fractions
import io
from typing import Any

import av
import numpy as np

HEIGHT, WIDTH, FRAMES = 32, 48, 8


def level(number: int, index: int) -> int:
  """Brightness of a frame; differs between frames and between videos."""
  return 40 + (number % 3) * 8 + index * 9


def film(
  number: int, height: int = HEIGHT, width: int = WIDTH, frames: int = FRAMES
) -> np.ndarray:
  """Uniform frames with a bright upper left quarter."""
  levels = np.array([level(number, index) for index in range(frames)])
  clip = np.empty((frames, height, width, 3), np.uint8)
  clip[:] = levels[:, None, None, None]
  clip[:, : height // 2, : width // 2] = 230
  return clip


def encode(
  frames: Iterable[np.ndarray],
  container: str,
  codec: str = 'libx264',
  pix_fmt: str = 'yuv420p',
  times: Iterable[int] | None = None,
  rotation: int = 0,
  **options: str,
) -> bytes:
  """Encodes frames, at 25 frames per second unless times are given."""
  frames = list(frames)
  file = io.BytesIO()
  with av.open(file, 'w', format=container) as output:
    stream: Any = output.add_stream(codec, rate=25, options=options)
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt = pix_fmt
    stream.codec_context.time_base = fractions.Fraction(1, 25)
    if rotation:
      stream.set_display_rotation(rotation)
    times = range(len(frames)) if times is None else times
    for time, frame in zip(times, frames, strict=True):
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      picture.pts = time
      output.mux(stream.encode(picture))
    output.mux(stream.encode())
  return file.getvalue()


def half(content: bytes) -> bytes:
  return content[: len(content) // 2]


def _sound() -> bytes:
  """An MP4 file without a video stream."""
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as output:
    stream = output.add_stream('aac', rate=8000)
    silence = np.zeros((1, 8000), np.float32)
    frame = av.AudioFrame.from_ndarray(silence, format='fltp', layout='mono')
    frame.sample_rate = 8000
    output.mux([*stream.encode(frame), *stream.encode()])
  return file.getvalue()


def _no_frames() -> bytes:
  """An MP4 file with an empty video stream."""
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as output:
    stream: Any = output.add_stream('libx264', rate=12)
    stream.height = stream.width = 32
    stream.pix_fmt = 'yuv420p'
    output.start_encoding()
  return file.getvalue()


def _changing_size(number: int) -> bytes:
  small = film(number, HEIGHT // 2, WIDTH // 2)
  return encode(film(number)[:4], 'h264') + encode(small[4:], 'h264')


def _rotated(number: int) -> bytes:
  """Stored sideways, to be displayed upright."""
  return encode(np.rot90(film(number), 1, (1, 2)), 'mp4', rotation=-90)


# Extension, content by number of the video, number of frames.
UNUSUAL: dict[str, tuple[str, Callable[[int], bytes], int]] = {
  'wrong extension': (
    '.mp4',
    lambda n: encode(film(n), 'avi', 'mpeg4', b='8M'),
    8,
  ),
  'one frame': ('.mp4', lambda n: encode(film(n)[:1], 'mp4'), 1),
  'changing size': ('.h264', _changing_size, 8),
  'variable rate': (
    '.mp4',
    lambda n: encode(film(n), 'mp4', times=(0, 1, 5, 6, 20, 21, 22, 60)),
    8,
  ),
  'b-frames': (
    '.avi',
    lambda n: encode(film(n), 'avi', 'mpeg4', bf='2', b='8M'),
    8,
  ),
  'no frame count': (
    '.mkv',
    lambda n: encode(film(n), 'matroska', live='1'),
    8,
  ),
  'odd sides': (
    '.mp4',
    lambda n: encode(film(n, 31, 47), 'mp4', pix_fmt='yuv444p'),
    8,
  ),
  'rotation': ('.mov', _rotated, 8),
  '4:4:4': ('.mp4', lambda n: encode(film(n), 'mp4', pix_fmt='yuv444p'), 8),
  '10 bits': (
    '.mp4',
    lambda n: encode(film(n), 'mp4', pix_fmt='yuv420p10le'),
    8,
  ),
}

# Extension, content, and a pattern of the reason in the report.
DAMAGED: dict[str, tuple[str, Callable[[], bytes], str]] = {
  'truncated mp4': ('.mp4', lambda: half(encode(film(0), 'mp4')), ''),
  'truncated avi': ('.avi', lambda: half(encode(film(0), 'avi', 'mpeg4')), ''),
  'truncated webm': (
    '.webm',
    lambda: half(encode(film(0), 'webm', 'libvpx')),
    '',
  ),
  'empty': ('.mp4', lambda: b'', 'empty'),
  'sound': ('.mp4', _sound, 'video stream'),
  'no frames': ('.mp4', _no_frames, 'no '),
  'text': ('.mp4', lambda: b'This is not a video.\n' * 50, ''),
  'playlist': ('.mp4', lambda: b'#EXTM3U\n#EXTINF:1,\n../alone/x.mp4\n', ''),
}
