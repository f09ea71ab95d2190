"""Opening videos: broken, truncated and unsafe files raise one-line errors."""

from __future__ import annotations

import io
import os
import pathlib
import struct
from typing import Any
import wave

import av
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import (
  video_container,
  video_writer,
)
from dualformer_jax.input_pipeline.video_reader import VideoError, VideoReader
from tests.input_pipeline import videos


@pytest.fixture(scope='module')
def video() -> bytes:
  return video_writer.encode_mp4(videos.levels(3), fps=25)


def sound() -> bytes:
  file = io.BytesIO()
  with wave.open(file, 'wb') as output:
    output.setnchannels(1)
    output.setsampwidth(2)
    output.setframerate(8000)
    output.writeframes(bytes(8000))
  return file.getvalue()


def huge_gif() -> bytes:
  video = bytearray(videos.encode(videos.levels(2), 'gif', 'gif'))
  video[6:10] = struct.pack('<HH', 60000, 60000)
  return bytes(video)


def truncated(name: str, share: float) -> bytes:
  video = videos.FORMATS[name](videos.levels(36))
  return video[: int(len(video) * (1 - share))]


def truncated_gif() -> bytes:
  video = videos.encode(videos.levels(9), 'gif', 'gif')
  return video[: int(len(video) * 0.7)]


def no_frames(container: str, codec: str) -> bytes:
  file = io.BytesIO()
  with av.open(file, 'w', format=container) as output:
    stream: Any = output.add_stream(codec, rate=25)
    stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
    output.start_encoding()
  return file.getvalue()


BROKEN = {
  'empty': (lambda: b'', 'is empty'),
  'text': (lambda: b'no video\nat all' * 99, 'cannot be decoded'),
  'sound': (sound, 'has no video|cannot be decoded'),
  'huge': (huge_gif, 'cannot be decoded|has frames of'),
  'mp4': (lambda: truncated('ours.mp4', 0.5), 'cannot be decoded'),
  'avi': (lambda: truncated('mpeg4.avi', 0.3), 'is truncated'),
  'webm': (lambda: truncated('vp9.webm', 0.5), 'is truncated'),
  'mkv': (lambda: truncated('h264.mkv', 0.1), 'is truncated'),
  'gif': (truncated_gif, 'is truncated'),
  'no_frames_mp4': (
    lambda: no_frames('mp4', 'libx264'),
    'has no video stream',
  ),
  'no_frames_avi': (lambda: no_frames('avi', 'mpeg4'), 'has no frames'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_file_raises_one_line(tmp_path, name):
  make, reason = BROKEN[name]
  path = tmp_path / 'clip.mp4'
  path.write_bytes(make())
  for source in (path, path.read_bytes()):
    for function in (videos.probe, videos.decode_all):
      with pytest.raises(VideoError, match=reason) as caught:
        function(source)
      error = caught.value
      assert isinstance(error, errors.UserError)
      assert '\n' not in str(error)
      prefix = f'{path}: ' if source is path else ''
      assert str(error) == prefix + error.reason


def test_missing_file_and_folder_raise(tmp_path):
  for path in (tmp_path, tmp_path / 'absent.mp4'):
    with pytest.raises(
      VideoError, match=f'^{path}: cannot be opened'
    ) as caught:
      VideoReader(path)
    assert '\n' not in str(caught.value)


def test_truncated_mp4_with_its_index_first_raises(tmp_path):
  path = tmp_path / 'clip.mp4'
  with av.open(path, 'w', options={'movflags': 'faststart'}) as container:
    stream = container.add_stream('libx264', rate=25)
    stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
    for frame in videos.levels(30):
      picture = av.VideoFrame.from_ndarray(np.array(frame), format='rgb24')
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  video = path.read_bytes()
  assert videos.probe(video).num_frames == 30
  last = videos.packets(video)[-1].size
  for missing in (1, last - 1, last, last + 1, 100):
    with pytest.raises(VideoError, match='after [0-9]+ frames'):
      videos.probe(video[:-missing])
    with (
      VideoReader(video[:-missing]) as reader,
      pytest.raises(VideoError, match='after [0-9]+ frames'),
    ):
      len(reader)


def test_avi_without_its_index_is_read():
  video = videos.FORMATS['mpeg4.avi'](videos.levels(36))
  assert videos.probe(video[: video.rindex(b'idx1')]).num_frames == 36


def test_path_is_not_interpreted_as_a_url(tmp_path, monkeypatch, video):
  monkeypatch.chdir(tmp_path)
  path = pathlib.Path('concat:a|b?c #%d.mp4')
  path.write_bytes(video)
  assert videos.probe(path).num_frames == 3
  assert videos.probe(str(path)).num_frames == 3


@pytest.mark.parametrize(
  'text',
  [
    '#EXTM3U\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n',
    'ffconcat version 1.0\nfile {path}\n',
  ],
  ids=['hls', 'concat'],
)
def test_playlist_does_not_open_other_files(tmp_path, text, video):
  secret = tmp_path / 'other.mp4'
  secret.write_bytes(video)
  playlist = tmp_path / 'clip.m3u8'
  playlist.write_text(text.format(path=secret.name))
  for source in (playlist, playlist.read_bytes()):
    with pytest.raises(VideoError, match='cannot be decoded'):
      videos.probe(source)


def test_large_frames_are_refused(monkeypatch, video):
  monkeypatch.setattr(video_container, 'MAX_PIXELS', 48 * 64 - 1)
  with pytest.raises(VideoError, match='64x48|cannot be decoded'):
    videos.probe(video)


def test_tags_that_are_not_utf8_are_ignored(video):
  # The name of the encoder is a tag.
  damaged = video.replace(b'Lavf', b'\xff\xfe\xfdf')
  assert damaged != video
  assert videos.probe(damaged).num_frames == 3


def test_damaged_real_clip_raises(clips_dir):
  path = clips_dir / 'broken_corrupted.mp4'
  with pytest.raises(VideoError, match='cannot be decoded after'):
    videos.probe(path)


def test_pipe_raises_at_once(tmp_path):
  os.mkfifo(tmp_path / 'pipe.mp4')  # Nobody writes to it.
  with pytest.raises(VideoError, match='is a pipe; expected a file'):
    VideoReader(tmp_path / 'pipe.mp4')
