"""MP4 files of RGB frames or JPEG files, with PyAV (FFmpeg)."""

from __future__ import annotations

from collections.abc import Iterable
import fractions
import io
import itertools
from typing import IO, Any

import av
from jaxtyping import UInt8
import numpy as np

from dualformer_jax.input_pipeline.video_reader import (
  MAX_FPS,
  Frame,
  VideoError,
)

# Frames, each with its time in seconds if the rate is not constant.
Frames = (
  Iterable[Frame] | Iterable[tuple[float, Frame]] | UInt8[np.ndarray, 't h w 3']
)
_TICKS = 90_000  # Per second, of frames with times.


def encode_mp4(frames: Frames, *, fps: float, crf: int = 18) -> bytes:
  """Returns an MP4 file; see write_mp4.

  The same frames give the same bytes.
  """
  file = io.BytesIO()
  write_mp4(file, frames, fps=fps, crf=crf)
  return file.getvalue()


def write_mp4(
  file: io.BufferedIOBase | IO[bytes],
  frames: Frames,
  *,
  fps: float,
  crf: int = 18,
) -> None:
  """Writes H.264 in MP4 that seeks and decodes fast, one frame at a time.

  The stream has a keyframe every 16 frames, no deblocking and no CABAC. Frames
  of odd indices can be left out in decoding. Colors have half the resolution
  (4:2:0), which needs even sides: the last row or column of an odd side is
  dropped (a side of one pixel is doubled).

  Args:
    file: a seekable file.
    frames: RGB, all of one size; an iterable is read one frame at a time. Of
      (seconds, frame) pairs, each frame is shown from its time on; the times
      begin at 0 and rise.
    fps: frames per second; with times, only the nominal rate.
    crf: 0 (lossless) to 51; at 18 the loss is hardly visible.

  Raises:
    VideoError: there are no frames.
    ValueError: `fps` is not in (0, 1000], or a frame is not uint8 [h, w, 3] of
      the size of the first.
  """
  if not 0.0 < fps <= MAX_FPS:
    raise ValueError(f'fps must be in (0, {MAX_FPS:g}], got {fps}')
  iterator = iter(frames)
  first = next(iterator, None)
  if first is None:
    raise VideoError('has no frames')
  is_timed = isinstance(first, tuple)
  height, width = (first[1] if is_timed else first).shape[:2]
  with av.open(file, 'w', format='mp4') as container:
    stream = container.add_stream(
      'libx264',
      rate=_rate(fps),
      options={
        'crf': str(crf),
        'preset': 'veryfast',
        'tune': 'fastdecode',
        'x264-params': (
          'keyint=16:min-keyint=16:scenecut=0:threads=1'
          # Every second frame is a B-frame, from which no other is predicted:
          # see video_container.
          ':bframes=1:b-adapt=0:b-pyramid=none:open-gop=0'
          # Quantization that adapts to the eye takes a fifth more bytes at
          # equal PSNR.
          ':aq-mode=0'
          # At equal PSNR a seventh fewer bytes, which decoding time follows,
          # for twice the encoding time.
          ':subme=8:no-psy=1:chroma-qp-offset=-3'
          # Fewer motion vectors: 6% less decoding time for 4% more bytes.
          ':partitions=i8x8'
          # x264's macroblock tree reads uninitialized memory, so that the same
          # frames gave different bytes. Without it files are about a tenth
          # larger.
          ':mbtree=0:rc-lookahead=0'
        ),
      },
    )
    stream.height, stream.width = (max(2, s - s % 2) for s in (height, width))
    stream.pix_fmt = 'yuv420p'
    stream.thread_type = 'NONE'
    if is_timed:
      stream.codec_context.time_base = fractions.Fraction(1, _TICKS)
    pts, duration = -1, round(_TICKS / fps)
    first_dts: Any = None
    for index, item in enumerate(itertools.chain([first], iterator)):
      time, frame = item if isinstance(item, tuple) else (index, item)
      if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
        raise ValueError(
          f'frame {index} is {frame.dtype} {frame.shape}, expected uint8'
          f' {(height, width, 3)}'
        )
      padding = ((0, height == 1), (0, width == 1), (0, 0))
      frame = np.pad(frame, padding, mode='edge') if 1 in frame.shape else frame
      frame = np.ascontiguousarray(frame[: stream.height, : stream.width])
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      # By default the conversion starts threads for every frame.
      picture = picture.reformat(format='yuv420p', threads=1)
      last, pts = pts, max(pts + 1, round(time * _TICKS) if is_timed else index)
      picture.pts = pts
      if is_timed:
        picture.time_base = stream.codec_context.time_base
        duration = pts - last if index else duration
      for packet in stream.encode(picture):
        first_dts = packet.dts if first_dts is None else first_dts
        container.mux(packet)
    for packet in stream.encode():
      first_dts = packet.dts if first_dts is None else first_dts
      if is_timed:  # The last frame is shown as long as the one before.
        # The file's duration is that of decoding, which begins before 0.
        packet.duration = pts + duration - (packet.dts - first_dts)
      container.mux(packet)


def mux_jpegs(
  jpegs: Iterable[bytes], *, fps: float, height: int, width: int
) -> bytes:
  """Returns an MP4 file whose frames are JPEG files, stored unchanged.

  Args:
    jpegs: the content of the files, in order.
    fps: frames per second.
    height: of the frames, in pixels.
    width: of the frames, in pixels.
  """
  rate = _rate(fps)
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


def _rate(fps: float) -> fractions.Fraction:
  return fractions.Fraction(fps).limit_denominator(1001)
