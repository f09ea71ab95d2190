"""Decoding: exact frames from any entry, and one line for what is broken."""

from __future__ import annotations

import fractions
import io
import os
import pathlib
import struct
from typing import Any
import wave

import av
import av.container
import cv2
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import decoding

# From the list that comes with the clips: frames, fps, width, height.
CLIPS = {
  'k400_arm_wrestling_demo.mp4': (280, 28, 340, 256),
  'k400_cleaning_pool_test.mp4': (300, 30, 340, 256),
  'k400_cleaning_pool_part0_32f.mp4': (32, 30, 340, 256),
  'k400_hitting_baseball.mp4': (300, 30, 426, 320),
  'k400_yoga_Tw2yXa6CzWE.mp4': (300, 30, 426, 320),
  'k400_making_a_cake_portrait.mp4': (300, 30, 320, 426),
  'ucf101_ApplyEyeMakeup_test.avi': (164, 25, 320, 240),
  'ucf101_Archery_example.avi': (131, 25, 320, 240),
  'ucf101_v_CricketShot_g04_c01_rgb.gif': (79, 25, 224, 224),
  'edge_unordered_4f.mov': (4, 32, 50, 50),
}


def levels(count: int, height: int = 48, width: int = 64) -> np.ndarray:
  """Frames, each of one brightness, 6 more than that of the one before."""
  frames = 10 + 6 * np.arange(count, dtype=np.uint8)[:, None, None, None]
  return np.broadcast_to(frames, (count, height, width, 3))


def packets(video: bytes) -> list[Any]:
  with av.open(io.BytesIO(video)) as container:
    assert isinstance(container, av.container.InputContainer)
    return [p for p in container.demux(video=0) if p.size]


def index_of(frame: np.ndarray) -> int:
  return round((float(frame.mean()) - 10) / 6)


def write(
  frames: np.ndarray, codec: str, container: str, **options: str
) -> bytes:
  """Encodes as others might."""
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


FORMATS = {
  'ours.mp4': lambda f: decoding.encode_mp4(f, fps=25),
  'b_frames.mp4': lambda f: write(
    f, 'libx264', 'mp4', **{'x264-params': 'keyint=8:bframes=3:b-adapt=0'}
  ),
  'open_gop.mp4': lambda f: write(
    f,
    'libx264',
    'mp4',
    **{'x264-params': 'keyint=8:bframes=3:b-adapt=0:open-gop=1:scenecut=0'},
  ),
  'h265.mp4': lambda f: write(
    f, 'libx265', 'mp4', **{'x265-params': 'keyint=8:log-level=none'}
  ),
  'mpeg4.mp4': lambda f: write(f, 'mpeg4', 'mp4', g='8', bf='2', b='9M'),
  'mpeg4.avi': lambda f: write(f, 'mpeg4', 'avi', g='8', bf='2', b='9M'),
  'vp8.webm': lambda f: write(
    f, 'libvpx', 'webm', **{'auto-alt-ref': '1', 'lag-in-frames': '8'}
  ),
  'vp9.webm': lambda f: write(f, 'libvpx-vp9', 'webm', g='8'),
  'h264.mkv': lambda f: write(f, 'libx264', 'matroska', g='8'),
  'h264.ts': lambda f: write(f, 'libx264', 'mpegts', g='8'),
}


@pytest.fixture(scope='module')
def encoded() -> dict[str, bytes]:
  return {name: encode(levels(36)) for name, encode in FORMATS.items()}


@pytest.mark.parametrize('name', FORMATS)
def test_every_index_gives_the_frame_of_that_place(encoded, name):
  video = encoded[name]
  assert decoding.count_frames(video) == 36
  assert decoding.probe(video) == decoding.VideoInfo(36, 48, 64, 25.0)
  assert [index_of(f) for f in decoding.decode_all(video)] == list(range(36))
  for index in range(36):
    (frame,) = decoding.decode_frames(video, [index])
    assert index_of(frame) == index
  order = [35, 3, 3, 20, 0, 21, 35]
  frames = decoding.decode_frames(video, np.array(order))
  assert [index_of(f) for f in frames] == order


@pytest.mark.parametrize('name', FORMATS)
def test_frames_found_by_seeking_are_those_of_a_full_decode(encoded, name):
  everything = decoding.decode_all(encoded[name])
  for start in range(36):
    indices = range(start, 36, 7)
    np.testing.assert_array_equal(
      decoding.decode_frames(encoded[name], indices), everything[indices]
    )


def test_a_gif_is_decoded_with_its_palette():
  frames = np.zeros((3, 16, 16, 3), np.uint8)
  frames[0, ..., 0], frames[1, ..., 1], frames[2, ..., 2] = 255, 255, 255
  video = write(frames, 'gif', 'gif')
  # Eight levels of red and green, four of blue: the brightest are not 255.
  decoded = decoding.decode_all(video)
  np.testing.assert_allclose(decoded, frames, atol=3)
  np.testing.assert_array_equal(
    decoding.decode_frames(video, [2, 0]), decoded[[2, 0]]
  )


def test_indices_may_be_picked_when_the_number_of_frames_is_known(encoded):
  for name in ('ours.mp4', 'mpeg4.avi'):
    asked = []

    def pick(total: int, asked: list[int] = asked) -> list[int]:
      asked.append(total)
      return [total - 1, total // 2]

    frames = decoding.decode_frames(encoded[name], pick)
    assert asked == [36]
    assert [index_of(f) for f in frames] == [35, 18]


def test_a_transform_is_applied_once_to_each_frame():
  video = decoding.encode_mp4(levels(20), fps=25)
  seen = []

  def halve(frame: np.ndarray) -> np.ndarray:
    seen.append(index_of(frame))
    return frame[::2, ::2]

  frames = decoding.decode_frames(video, [9, 2, 9, 19], halve)
  assert frames.shape == (4, 24, 32, 3)
  assert seen == [2, 9, 19]


def test_a_mistake_in_a_transform_is_not_taken_for_a_broken_video():
  video = decoding.encode_mp4(levels(4), fps=25)

  def fail(frame: np.ndarray) -> np.ndarray:
    raise ValueError('mistake')

  with pytest.raises(ValueError, match='^mistake$') as caught:
    decoding.decode_frames(video, [0], fail)
  assert not isinstance(caught.value, decoding.VideoError)


def test_only_the_part_that_is_needed_is_decoded():
  frames = np.random.default_rng(0).integers(
    0, 256, (48, 48, 64, 3), dtype=np.uint8
  )
  video = decoding.encode_mp4(frames, fps=25)
  places = [(p.pos, p.size) for p in packets(video)]
  expected = decoding.decode_all(video)[20:24]
  broken = bytearray(video)
  for place, size in [*places[1:16], *places[32:]]:
    broken[place : place + size] = bytes(size)
  with pytest.raises(decoding.VideoError):
    decoding.probe(bytes(broken))
  np.testing.assert_array_equal(
    decoding.decode_frames(bytes(broken), range(20, 24)), expected
  )


def test_our_encoding_can_be_entered_every_16_frames_and_has_no_b_frames():
  video = decoding.encode_mp4(levels(40), fps=29.97)
  with av.open(io.BytesIO(video)) as container:
    stream = container.streams.video[0]
    assert stream.codec_context.name == 'h264'
    assert stream.average_rate == fractions.Fraction(2997, 100)
  keyframes = [i for i, p in enumerate(packets(video)) if p.is_keyframe]
  assert keyframes == [0, 16, 32]
  assert all(p.pts == p.dts for p in packets(video))


def test_encoding_keeps_pictures():
  rng = np.random.default_rng(0)
  coarse = rng.integers(40, 216, (20, 3, 4, 3), dtype=np.uint8)
  frames = np.stack([cv2.resize(f, (96, 72)) for f in coarse])
  decoded = decoding.decode_all(decoding.encode_mp4(frames, fps=25))
  assert np.abs(decoded.astype(int) - frames).mean() < 3
  smaller = decoding.encode_mp4(frames, fps=25, crf=40)
  assert len(smaller) < len(decoding.encode_mp4(frames, fps=25)) / 2


def test_encoding_is_repeatable_and_takes_iterables():
  frames = np.random.default_rng(0).integers(
    0, 256, (20, 32, 32, 3), dtype=np.uint8
  )
  video = decoding.encode_mp4(frames, fps=25)
  assert decoding.encode_mp4(iter(frames), fps=25) == video


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
def test_an_odd_side_loses_its_last_row_or_column(size, expected):
  rng = np.random.default_rng(0)
  height, width = size
  frame = rng.integers(0, 256, (height, width, 1)).repeat(3, 2).astype(np.uint8)
  video = decoding.encode_mp4(np.stack([frame] * 3), fps=25, crf=0)
  decoded = decoding.decode_all(video)
  assert decoded.shape == (3, *expected, 3)
  doubled = np.pad(frame, ((0, height == 1), (0, width == 1), (0, 0)), 'edge')
  difference = decoded - doubled[: expected[0], : expected[1]].astype(int)
  assert np.abs(difference).mean() < 2


def test_a_video_is_written_while_its_frames_come(tmp_path):
  rng = np.random.default_rng(0)
  sizes = []
  path = tmp_path / 'long.mp4'

  def frames():
    for _ in range(30):
      sizes.append(path.stat().st_size)
      yield rng.integers(0, 256, (96, 128, 3), np.uint8)

  with open(path, 'wb') as file:
    decoding.write_mp4(file, frames(), fps=20)
  # Noise takes about 10 kB a frame: most of it is not kept until the end.
  assert sizes[-1] > 0.8 * path.stat().st_size
  assert decoding.probe(path) == decoding.VideoInfo(30, 96, 128, 20.0)


def test_the_duration_is_what_the_file_says(tmp_path):
  assert decoding.duration(decoding.encode_mp4(levels(36), fps=24)) == 1.5
  raw = write(levels(36), 'libx264', 'h264')  # of no container, so of no time
  assert decoding.duration(raw) is None
  with pytest.raises(decoding.VideoError, match='cannot be opened'):
    decoding.duration(tmp_path / 'none.mp4')


def test_what_cannot_be_encoded_is_refused():
  frames = levels(2)
  with pytest.raises(decoding.VideoError, match='holds no frames'):
    decoding.encode_mp4([], fps=25)
  for fps in (0, -1, float('nan'), float('inf'), 1e9):
    with pytest.raises(ValueError, match='fps must be'):
      decoding.encode_mp4(frames, fps=fps)
  with pytest.raises(ValueError, match='frame 1 is'):
    decoding.encode_mp4([frames[0], frames[1, :-2]], fps=25)


@pytest.mark.parametrize(
  ('degrees', 'corner'),
  # Where the bright upper left corner of the stored frames is to be shown.
  [(90, 'lower left'), (-90, 'upper right'), (180, 'lower right')],
)
def test_frames_are_turned_as_they_are_to_be_shown(degrees, corner):
  frames = np.full((3, 48, 64, 3), 30, np.uint8)
  frames[:, :16, :16] = 220
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as container:
    stream = container.add_stream('libx264', rate=25)
    stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
    stream.set_display_rotation(degrees)
    for frame in frames:
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  shown = decoding.decode_all(file.getvalue())
  height, width = (48, 64) if degrees == 180 else (64, 48)
  assert shown.shape == (3, height, width, 3)
  info = decoding.probe(file.getvalue())
  assert (info.height, info.width) == (height, width)
  upper, left = 'upper' in corner, 'left' in corner
  rows = slice(0, 16) if upper else slice(height - 16, height)
  columns = slice(0, 16) if left else slice(width - 16, width)
  assert shown[:, rows, columns].mean() > 200
  assert shown.mean() < 60
  picked = decoding.decode_frames(file.getvalue(), [2, 0])
  np.testing.assert_array_equal(picked, shown[[2, 0]])


def test_frames_that_change_size_all_get_the_first_one(tmp_path):
  path = tmp_path / 'changes.h264'
  path.write_bytes(sizes_change())
  shown = decoding.decode_all(path)
  assert shown.shape == (6, 48, 64, 3)
  # The level of each frame, whatever its size was.
  expected = decoding.decode_all(write(levels(3, 32, 32), 'libx264', 'h264'))
  for frame, own in zip(shown[3:], expected, strict=True):
    assert abs(frame.mean() - own.mean()) < 3


def test_a_part_of_a_video_has_the_frames_shown_in_that_time(encoded):
  frames = decoding.decode_all(encoded['ours.mp4'])
  fps = decoding.frame_rate(encoded['ours.mp4'])
  for name in ('ours.mp4', 'mpeg4.avi'):
    whole = decoding.decode_all(encoded[name])
    assert len(whole) == len(frames)
    part = list(decoding.stream_frames(encoded[name], (3.9 / fps, 7.9 / fps)))
    np.testing.assert_array_equal(part, whole[4:8])
  with pytest.raises(decoding.VideoError, match='shows no frame'):
    list(decoding.stream_frames(encoded['ours.mp4'], (1e4, 2e4)))


def test_a_path_is_never_taken_for_a_url(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = pathlib.Path('concat:a|b?c #%d.mp4')
  path.write_bytes(decoding.encode_mp4(levels(3), fps=25))
  assert decoding.probe(path).num_frames == 3
  assert decoding.probe(str(path)).num_frames == 3


def sound() -> bytes:
  file = io.BytesIO()
  with wave.open(file, 'wb') as output:
    output.setnchannels(1)
    output.setsampwidth(2)
    output.setframerate(8000)
    output.writeframes(bytes(8000))
  return file.getvalue()


def huge_gif() -> bytes:
  video = bytearray(write(levels(2), 'gif', 'gif'))
  video[6:10] = struct.pack('<HH', 60000, 60000)
  return bytes(video)


def without(video: bytes, share: float) -> bytes:
  return video[: int(len(video) * (1 - share))]


def sizes_change() -> bytes:
  small = write(levels(3, 32, 32), 'libx264', 'h264')
  return write(levels(3), 'libx264', 'h264') + small


def no_frames(container: str, codec: str) -> bytes:
  file = io.BytesIO()
  with av.open(file, 'w', format=container) as output:
    stream: Any = output.add_stream(codec, rate=25)
    stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
    output.start_encoding()
  return file.getvalue()


@pytest.mark.parametrize(
  ('make', 'reason'),
  [
    (lambda e: b'', 'is empty'),
    (lambda e: b'no video\nat all' * 99, 'cannot be decoded'),
    (lambda e: sound(), 'holds no video|cannot be decoded'),
    (lambda e: huge_gif(), 'cannot be decoded|claims frames'),
    (lambda e: without(e['ours.mp4'], 0.5), 'cannot be decoded'),
    (lambda e: without(e['mpeg4.avi'], 0.3), 'cut short'),
    (lambda e: without(e['vp9.webm'], 0.5), 'cut short'),
    (lambda e: without(e['h264.mkv'], 0.1), 'cut short'),
    (lambda e: without(write(levels(9), 'gif', 'gif'), 0.3), 'cut short'),
    (lambda e: no_frames('mp4', 'libx264'), 'holds no video stream'),
    (lambda e: no_frames('avi', 'mpeg4'), 'holds no frames'),
  ],
  ids=[
    'empty',
    'text',
    'sound',
    'huge',
    'mp4',
    'avi',
    'webm',
    'mkv',
    'gif',
    'no_frames_mp4',
    'no_frames_avi',
  ],
)
def test_what_is_broken_is_told_in_one_line(encoded, tmp_path, make, reason):
  path = tmp_path / 'clip.mp4'
  path.write_bytes(make(encoded))
  for video in (path, path.read_bytes()):
    for function in (decoding.probe, decoding.decode_all):
      with pytest.raises(decoding.VideoError, match=reason) as caught:
        function(video)
      error = caught.value
      assert isinstance(error, errors.UserError)
      assert '\n' not in str(error)
      named = f'{path}: ' if video is path else ''
      assert str(error) == named + error.reason


def test_files_that_cannot_be_opened_are_told(tmp_path):
  for path in (tmp_path, tmp_path / 'absent.mp4'):
    with pytest.raises(decoding.VideoError, match=f'^{path}: ') as caught:
      decoding.decode_frames(path, [0])
    assert '\n' not in str(caught.value)


def test_an_mp4_file_with_its_index_first_is_known_to_be_cut_short(tmp_path):
  path = tmp_path / 'clip.mp4'
  with av.open(path, 'w', options={'movflags': 'faststart'}) as container:
    stream = container.add_stream('libx264', rate=25)
    stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
    for frame in levels(30):
      picture = av.VideoFrame.from_ndarray(np.array(frame), format='rgb24')
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  video = path.read_bytes()
  assert decoding.probe(video).num_frames == 30
  last = packets(video)[-1].size
  for missing in (1, last - 1, last, last + 1, 100):
    for function in (decoding.probe, decoding.count_frames):
      with pytest.raises(decoding.VideoError, match='after [0-9]+ frames'):
        function(video[:-missing])


def test_an_avi_file_that_lost_its_index_only_has_all_frames(encoded):
  video = encoded['mpeg4.avi']
  assert decoding.probe(video[: video.rindex(b'idx1')]).num_frames == 36


@pytest.mark.parametrize(
  'text',
  [
    '#EXTM3U\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n',
    'ffconcat version 1.0\nfile {path}\n',
  ],
  ids=['hls', 'concat'],
)
def test_a_playlist_does_not_lead_to_other_files(tmp_path, text):
  secret = tmp_path / 'other.mp4'
  secret.write_bytes(decoding.encode_mp4(levels(3), fps=25))
  playlist = tmp_path / 'clip.m3u8'
  playlist.write_text(text.format(path=secret.name))
  for video in (playlist, playlist.read_bytes()):
    with pytest.raises(decoding.VideoError, match='cannot be decoded'):
      decoding.probe(video)


def test_frames_that_are_not_there_are_told(encoded):
  for name in ('ours.mp4', 'mpeg4.avi'):
    with pytest.raises(decoding.VideoError, match='36 frames, and frame 36'):
      decoding.decode_frames(encoded[name], [2, 36])
    with pytest.raises(ValueError, match='0 or more'):
      decoding.decode_frames(encoded[name], [-1])
    with pytest.raises(ValueError, match='0 or more'):
      decoding.decode_frames(encoded[name], [])


def test_a_video_larger_than_memory_is_streamed_only(monkeypatch):
  video = decoding.encode_mp4(levels(30), fps=25)
  monkeypatch.setattr(decoding, 'MAX_BYTES', 20 * 48 * 64 * 3)
  with pytest.raises(decoding.VideoError, match='takes more than'):
    decoding.decode_all(video)
  assert sum(1 for _ in decoding.stream_frames(video)) == 30


def test_large_frames_are_refused(monkeypatch):
  video = decoding.encode_mp4(levels(3), fps=25)
  monkeypatch.setattr(decoding, 'MAX_PIXELS', 48 * 64 - 1)
  with pytest.raises(decoding.VideoError, match='64x48|cannot be decoded'):
    decoding.probe(video)


def test_damage_anywhere_gives_frames_or_an_error(encoded):
  rng = np.random.default_rng(0)
  outcomes = set()
  for name in ('ours.mp4', 'mpeg4.avi', 'vp9.webm'):
    for _ in range(60):
      video = bytearray(encoded[name])
      for place in rng.integers(len(video), size=rng.integers(1, 20)):
        video[place] = rng.integers(256)
      try:
        frames = decoding.decode_frames(bytes(video), [1, 30])
        assert frames.dtype == np.uint8
        assert len(frames) == 2
        outcomes.add('frames')
      except decoding.VideoError as error:
        assert '\n' not in str(error)
        outcomes.add('error')
  assert outcomes == {'frames', 'error'}


@pytest.mark.skipif(
  not os.path.isdir('/proc/self/fd'), reason='NOT TESTED: needs /proc'
)
def test_files_are_closed_again(tmp_path):
  good, bad = tmp_path / 'good.mp4', tmp_path / 'bad.avi'
  good.write_bytes(decoding.encode_mp4(levels(20), fps=25))
  bad.write_bytes(without(write(levels(20), 'mpeg4', 'avi'), 0.5))
  before = len(os.listdir('/proc/self/fd'))
  for _ in range(5):
    decoding.decode_frames(good, [0, 19])
    next(decoding.stream_frames(good))
    with pytest.raises(decoding.VideoError):
      decoding.probe(bad)
  assert len(os.listdir('/proc/self/fd')) == before


@pytest.mark.parametrize('name', CLIPS)
def test_real_clips_are_decoded_as_opencv_does(clips_dir, name):
  count, fps, width, height = CLIPS[name]
  path = clips_dir / name
  assert decoding.probe(path) == decoding.VideoInfo(count, height, width, fps)
  assert decoding.count_frames(path) == count
  capture = cv2.VideoCapture(str(path))
  frames = []
  for frame in decoding.stream_frames(path):
    found, expected = capture.read()
    assert found
    assert np.array_equal(frame, expected[..., ::-1])
    frames.append(frame)
  assert not capture.read()[0]
  capture.release()
  assert len(frames) == count
  indices = np.random.default_rng(0).integers(count, size=4)
  np.testing.assert_array_equal(
    decoding.decode_frames(path.read_bytes(), indices),
    [frames[i] for i in indices],
  )


def test_the_broken_clip_is_told(clips_dir):
  path = clips_dir / 'broken_corrupted.mp4'
  with pytest.raises(decoding.VideoError, match='cannot be decoded after'):
    decoding.probe(path)
