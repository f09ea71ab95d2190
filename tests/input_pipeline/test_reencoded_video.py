"""The tables of our MP4 files are read as FFmpeg reads them, or not at all."""

from __future__ import annotations

import struct

import av
import numpy as np
import pytest

from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.reencoded_video import (
  DamagedError,
  ReencodedVideo,
)
from dualformer_jax.input_pipeline.video_reader import VideoReader
from tests.input_pipeline import videos


@pytest.mark.parametrize('count', [2, 3, 16, 17, 40])
@pytest.mark.parametrize('timed', [False, True])
def test_tables_are_those_of_ffmpeg(tmp_path, count, timed):
  frames = videos.moving(count)
  steps = np.random.default_rng(0).uniform(0.01, 0.1, count - 1)
  times = np.cumsum([0.0, *steps])
  video = video_writer.encode_mp4(
    list(zip(times, frames, strict=True)) if timed else frames, fps=25
  )
  parsed = ReencodedVideo.parse(video)
  assert parsed is not None
  path = tmp_path / 'video.mp4'
  path.write_bytes(video)
  with VideoReader(path) as reader:
    np.testing.assert_allclose(parsed.times, reader.frame_times, atol=1e-9)
  packets = videos.packets(video)
  assert parsed.offsets.tolist() == [packet.pos for packet in packets]
  assert parsed.sizes.tolist() == [packet.size for packet in packets]
  keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
  assert parsed.frame_index.keyframes == keyframes
  assert parsed.size == frames.shape[1:3]


def test_files_with_other_tables_are_left_to_ffmpeg():
  frames = videos.moving(20)
  video = video_writer.encode_mp4(frames, fps=25)
  assert ReencodedVideo.parse(video) is not None
  # An edit list that begins at the fifth frame, or ends before the last.
  start = video.index(b'elst') + 4
  _, _, duration, first, _ = struct.unpack_from('>2I3i', video, start)
  for numbers in ((duration, first + 4 * 512), (duration // 2, first)):
    cut = bytearray(video)
    struct.pack_into('>2i', cut, start + 8, *numbers)
    assert ReencodedVideo.parse(cut) is None
  # One that is turned, and one that lost its end.
  turned = videos.with_matrix(video, *videos.ORIENTATIONS['clockwise'][0])
  assert ReencodedVideo.parse(turned) is None
  assert ReencodedVideo.parse(video[:-1]) is None
  # Other encoders and containers.
  for encode in videos.FORMATS.values():
    if (other := encode(frames)) != video:
      assert ReencodedVideo.parse(other) is None


def test_damaged_tables_give_frames_or_an_error():
  video = video_writer.encode_mp4(videos.moving(20), fps=25)
  tables = range(video.index(b'moov') - 4, len(video))
  rng = np.random.default_rng(0)
  outcomes = set()
  for number in range(500):
    box = (8, 10, 32, 40) if number % 2 else None
    damaged = bytearray(video)
    for position in rng.choice(tables, size=rng.integers(1, 4)):
      damaged[position] = rng.integers(256)
    parsed = ReencodedVideo.parse(damaged)
    try:
      frames = list(parsed.decode([0, 9, 10], box)) if parsed else []
      assert all(isinstance(frame, av.VideoFrame) for _, frame in frames)
      outcomes.add(len(frames))
    except DamagedError:
      outcomes.add('damaged')
  assert outcomes == {0, 3, 'damaged'}
