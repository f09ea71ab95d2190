"""Small videos for the tests of reading and writing."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import fractions
import io
import pathlib
import struct
from typing import Any

import av
import av.container
import cv2
import numpy as np

from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.video_reader import Source, VideoReader

# Small files made for tests: a moving picture with orientations, two tracks, or
# a variable frame rate.
CASES = pathlib.Path(__file__).parents[1] / 'cases'


def levels(count: int, height: int = 48, width: int = 64) -> np.ndarray:
  """Returns uniform frames, each 6 levels brighter than the one before."""
  frames = 10 + 6 * np.arange(count, dtype=np.uint8)[:, None, None, None]
  return np.broadcast_to(frames, (count, height, width, 3))


def moving(count: int, height: int = 80, width: int = 96) -> np.ndarray:
  """Returns frames of a picture that moves, with little noise.

  Encoders predict them from each other.
  """
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 220, (height // 8, width // 4, 3), np.uint8)
  large = cv2.resize(coarse, (width + 2 * count, height + count))
  return np.stack(
    [
      large[i : i + height, 2 * i : 2 * i + width]
      + rng.integers(0, 32, (height, width, 3), np.uint8)
      for i in range(count)
    ]
  )


def index_of(frame: np.ndarray) -> int:
  """Returns the index of a frame of `levels`."""
  return round((float(frame.mean()) - 10) / 6)


# Of a display matrix: a, b, c and d, which place a stored pixel (x, y) at
# (a x + c y, b x + d y); and the same orientation of frames [t, h, w, 3].
ORIENTATIONS: dict[str, tuple[tuple[float, ...], Callable[..., np.ndarray]]] = {
  'identity': ((1, 0, 0, 1), lambda f: f),
  'clockwise': ((0, 1, -1, 0), lambda f: np.rot90(f, -1, (1, 2))),
  'half turn': ((-1, 0, 0, -1), lambda f: np.rot90(f, 2, (1, 2))),
  'counterclockwise': ((0, -1, 1, 0), lambda f: np.rot90(f, 1, (1, 2))),
  'left-right': ((-1, 0, 0, 1), lambda f: f[:, :, ::-1]),
  'top-bottom': ((1, 0, 0, -1), lambda f: f[:, ::-1]),
  'main diagonal': ((0, 1, 1, 0), lambda f: f.transpose(0, 2, 1, 3)),
  'other diagonal': (
    (0, -1, -1, 0),
    lambda f: f[:, ::-1, ::-1].transpose(0, 2, 1, 3),
  ),
  'zero': ((0, 0, 0, 0), lambda f: f),
  'singular': ((1, 0, 0, 0), lambda f: f),
  'shearing': ((1, 0, 0.5, 1), lambda f: f),
  'rounded': ((1e-5, 1, -1, 1e-5), lambda f: np.rot90(f, -1, (1, 2))),
}


def with_matrix(video: bytes, *numbers: float) -> bytes:
  """Returns an MP4 file with a, b, c and d of ORIENTATIONS in its track."""
  a, b, c, d = (round(number * 65536) for number in numbers)
  content = bytearray(video)
  start = video.index(b'tkhd') + 4 + 40  # Past version, times, id and so on.
  assert content[start : start + 36] == struct.pack(
    '>9i', 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30
  )
  content[start : start + 20] = struct.pack('>5i', a, b, 0, c, d)
  return bytes(content)


def decode_all(source: Source) -> np.ndarray:
  """Returns all frames of a video."""
  with VideoReader(source) as reader:
    return np.stack(list(reader))


@dataclasses.dataclass
class VideoInfo:
  """Properties of a video: number and size of frames, rate in its header."""

  num_frames: int
  height: int
  width: int
  fps: float


def probe(source: Source) -> VideoInfo:
  """Decodes a whole video."""
  with VideoReader(source) as reader:
    return VideoInfo(sum(1 for _ in reader), *reader.size, reader.fps)


def encode(
  frames: np.ndarray, codec: str, container: str, **options: str
) -> bytes:
  """Encodes frames at 25 fps, independently of video_writer."""
  file = io.BytesIO()
  with av.open(file, 'w', format=container) as output:
    stream: Any = output.add_stream(
      codec, rate=fractions.Fraction(25), options=options
    )
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = 'rgb8' if codec == 'gif' else 'yuv420p'
    for index, frame in enumerate(frames):
      picture = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(frame), format='rgb24'
      )
      picture.pts = index
      output.mux(stream.encode(picture.reformat(format=stream.pix_fmt)))
    output.mux(stream.encode())
  return file.getvalue()


def packets(video: bytes) -> list[Any]:
  """Returns the packets of a video."""
  with av.open(io.BytesIO(video)) as container:
    assert isinstance(container, av.container.InputContainer)
    return [p for p in container.demux(video=0) if p.size]


# Encodings that readers find differently, by name.
FORMATS: dict[str, Callable[[np.ndarray], bytes]] = {
  'ours.mp4': lambda f: video_writer.encode_mp4(f, fps=25),
  'b_frames.mp4': lambda f: encode(
    f, 'libx264', 'mp4', **{'x264-params': 'keyint=8:bframes=3:b-adapt=0'}
  ),
  'open_gop.mp4': lambda f: encode(
    f,
    'libx264',
    'mp4',
    **{'x264-params': 'keyint=8:bframes=3:b-adapt=0:open-gop=1:scenecut=0'},
  ),
  'h265.mp4': lambda f: encode(
    f, 'libx265', 'mp4', **{'x265-params': 'keyint=8:log-level=none'}
  ),
  'mpeg4.mp4': lambda f: encode(f, 'mpeg4', 'mp4', g='8', bf='2', b='9M'),
  'mpeg4.avi': lambda f: encode(f, 'mpeg4', 'avi', g='8', bf='2', b='9M'),
  'h264.avi': lambda f: encode(
    f, 'libx264', 'avi', **{'x264-params': 'keyint=8:bframes=3:b-adapt=0'}
  ),
  'vp8.webm': lambda f: encode(
    f, 'libvpx', 'webm', **{'auto-alt-ref': '1', 'lag-in-frames': '8'}
  ),
  'vp9.webm': lambda f: encode(f, 'libvpx-vp9', 'webm', g='8'),
  'h264.mkv': lambda f: encode(f, 'libx264', 'matroska', g='8'),
  'h264.ts': lambda f: encode(f, 'libx264', 'mpegts', g='8'),
}
