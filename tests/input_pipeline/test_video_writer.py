"""Written videos keep pictures, seek everywhere, and are reproducible."""

from __future__ import annotations

import fractions
import io
from typing import Any

import av
import cv2
import numpy as np
import pytest

from dualformer_jax.input_pipeline import video_reader, video_writer
from tests.input_pipeline import videos


def noise(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_encoding_has_a_keyframe_every_16_frames():
  video = video_writer.encode_mp4(videos.levels(40), fps=29.97)
  with av.open(io.BytesIO(video)) as container:
    stream = container.streams.video[0]
    assert stream.codec_context.name == 'h264'
    assert stream.average_rate == fractions.Fraction(2997, 100)
  packets = videos.packets(video)
  times = sorted(p.pts for p in packets)
  keyframes = [times.index(p.pts) for p in packets if p.is_keyframe]
  assert keyframes == [0, 16, 32]


@pytest.mark.parametrize('count', [40, 45])
@pytest.mark.parametrize('timed', [False, True])
def test_even_frames_do_not_depend_on_odd_ones(count, timed):
  frames = videos.moving(count)
  rng = np.random.default_rng(0)
  times = np.cumsum([0.0, *rng.uniform(0.01, 0.1, count - 1)])
  video = video_writer.encode_mp4(
    zip(times, frames, strict=True) if timed else frames, fps=25
  )
  expected = videos.decode_all(video)
  container: Any
  with av.open(io.BytesIO(video)) as container:
    context = container.streams.video[0].codec_context
    packets = [p for p in container.demux(video=0) if p.size]
    order = sorted(p.pts for p in packets)
    found = []
    for packet in packets:
      if order.index(packet.pts) % 2 == 0:
        found += context.decode(packet)
    found += context.decode(None)
  assert [order.index(f.pts) for f in found] == list(range(0, count, 2))
  for frame, other in zip(found, expected[::2], strict=True):
    np.testing.assert_array_equal(frame.to_ndarray(format='rgb24'), other)


def test_encoding_keeps_pictures():
  rng = np.random.default_rng(0)
  coarse = rng.integers(40, 216, (20, 3, 4, 3), dtype=np.uint8)
  frames = np.stack([cv2.resize(f, (96, 72)) for f in coarse])
  video = video_writer.encode_mp4(frames, fps=25)
  decoded = videos.decode_all(video)
  assert np.abs(decoded.astype(int) - frames).mean() < 3
  smaller = video_writer.encode_mp4(frames, fps=25, crf=40)
  assert len(smaller) < len(video) / 2


def test_encoding_is_reproducible_and_takes_iterables():
  frames = noise(20, 32, 32, 3)
  video = video_writer.encode_mp4(frames, fps=25)
  assert video_writer.encode_mp4(iter(frames), fps=25) == video


@pytest.mark.parametrize(
  ('size', 'expected'),
  [
    ((31, 45), (30, 44)),
    ((32, 45), (32, 44)),
    ((3, 2), (2, 2)),
    ((1, 1), (2, 2)),
    ((1, 9), (2, 8)),
  ],
)
def test_odd_side_loses_its_last_row_or_column(size, expected):
  height, width = size
  frame = noise(height, width, 1).repeat(3, 2)
  video = video_writer.encode_mp4(np.stack([frame] * 3), fps=25, crf=0)
  decoded = videos.decode_all(video)
  assert decoded.shape == (3, *expected, 3)
  doubled = np.pad(frame, ((0, height == 1), (0, width == 1), (0, 0)), 'edge')
  difference = decoded - doubled[: expected[0], : expected[1]].astype(int)
  assert np.abs(difference).mean() < 2


def test_frames_are_written_as_they_are_read(tmp_path):
  rng = np.random.default_rng(0)
  sizes = []
  path = tmp_path / 'long.mp4'

  def frames():
    for _ in range(30):
      sizes.append(path.stat().st_size)
      yield rng.integers(0, 256, (96, 128, 3), np.uint8)

  with open(path, 'wb') as file:
    video_writer.write_mp4(file, frames(), fps=20)
  # Noise takes about 10 kB per frame: most is on disk before the end.
  assert sizes[-1] > 0.8 * path.stat().st_size
  assert videos.probe(path) == videos.VideoInfo(30, 96, 128, 20.0)


def test_invalid_frames_and_rates_raise():
  frames = videos.levels(2)
  with pytest.raises(video_reader.VideoError, match='has no frames'):
    video_writer.encode_mp4([], fps=25)
  for fps in (0, -1, float('nan'), float('inf'), 1e9):
    with pytest.raises(ValueError, match='fps must be'):
      video_writer.encode_mp4(frames, fps=fps)
  with pytest.raises(ValueError, match='frame 1 is'):
    video_writer.encode_mp4([frames[0], frames[1, :-2]], fps=25)


@pytest.mark.parametrize('count', [2, 3, 6, 7])
def test_frames_are_shown_at_their_times(count):
  times = np.array([0, 0.04, 0.08, 0.5, 0.52, 1.5, 2.0])[:count]
  timed = zip(times, videos.levels(count), strict=True)
  video = video_writer.encode_mp4(timed, fps=25)
  container: Any
  with av.open(io.BytesIO(video)) as container:
    stream = container.streams.video[0]
    duration = float(stream.duration * stream.time_base)
    assert duration == pytest.approx(2 * times[-1] - times[-2])
    found = [
      (f.time, f.to_ndarray(format='rgb24')) for f in container.decode(stream)
    ]
  np.testing.assert_allclose([time for time, _ in found], times, atol=1e-5)
  assert [videos.index_of(frame) for _, frame in found] == list(range(count))


def test_muxed_jpegs_decode_to_the_pixels_of_the_files():
  frames = noise(5, 32, 48, 3)
  jpegs, expected = [], []
  for frame in frames:
    _, encoded = cv2.imencode('.jpg', frame)
    bgr = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert bgr is not None
    jpegs.append(encoded.tobytes())
    expected.append(bgr[..., ::-1])
  video = video_writer.mux_jpegs(jpegs, fps=12, height=32, width=48)
  assert all(p.is_keyframe for p in videos.packets(video))
  assert videos.probe(video) == videos.VideoInfo(5, 32, 48, 12.0)
  with video_reader.VideoReader(video) as reader:
    found = reader.get_frames([4, 0, 2])
  np.testing.assert_array_equal(found, [expected[i] for i in (4, 0, 2)])
