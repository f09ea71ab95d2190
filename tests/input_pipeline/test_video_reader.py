"""VideoReader finds exact frames by index, time and order, in every format."""

from __future__ import annotations

import io
import os
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image
import pytest

from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.reencoded_video import ReencodedVideo
from dualformer_jax.input_pipeline.video_reader import VideoError, VideoReader
from tests.input_pipeline import videos

# Of the optional real clips: frames, fps, width, height.
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


@pytest.fixture(scope='module')
def encoded() -> dict[str, bytes]:
  frames = videos.levels(36)
  return {name: encode(frames) for name, encode in videos.FORMATS.items()}


@pytest.mark.parametrize('name', videos.FORMATS)
def test_size_rate_and_times_are_those_of_the_video(encoded, name):
  assert videos.probe(encoded[name]) == videos.VideoInfo(36, 48, 64, 25.0)
  with VideoReader(encoded[name]) as reader:
    assert len(reader) == 36
    assert (*reader.size, reader.fps) == (48, 64, 25.0)
    np.testing.assert_allclose(
      reader.frame_times, np.arange(36) / 25, atol=1e-3
    )


@pytest.mark.parametrize('name', videos.FORMATS)
def test_every_index_gives_its_frame(encoded, name):
  with VideoReader(encoded[name]) as reader:
    assert [videos.index_of(f) for f in reader] == list(range(36))
    for index in (35, *range(36)):
      (frame,) = reader.get_frames([index])
      assert videos.index_of(frame) == index
    order = [35, 3, 3, 20, 0, 21, 35]
    frames = reader.get_frames(np.array(order))
    assert [videos.index_of(f) for f in frames] == order


@pytest.mark.parametrize('name', videos.FORMATS)
def test_seeking_gives_the_pixels_of_a_full_decode(encoded, name):
  everything = videos.decode_all(encoded[name])
  for start in range(0, 36, 3):
    indices = range(start, 36, 7)
    with VideoReader(encoded[name]) as reader:
      np.testing.assert_array_equal(
        reader.get_frames(indices), everything[indices]
      )


def test_reads_of_one_reader_do_not_disturb_each_other(encoded):
  for name in ('ours.mp4', 'b_frames.mp4', 'mpeg4.avi'):
    with VideoReader(encoded[name]) as reader:
      for index, frame in enumerate(reader):
        assert videos.index_of(frame) == index
        if index in (5, 35):
          found = reader.get_frames([35, 2])
          assert [videos.index_of(f) for f in found] == [35, 2]
          assert len(reader) == 36
          assert reader.size == (48, 64)


def test_gif_is_decoded_with_its_palette():
  frames = np.zeros((3, 16, 16, 3), np.uint8)
  frames[0, ..., 0], frames[1, ..., 1], frames[2, ..., 2] = 255, 100, 255
  first, *others = (Image.fromarray(frame) for frame in frames)
  file = io.BytesIO()
  first.save(file, 'gif', save_all=True, append_images=others, duration=40)
  decoded = videos.decode_all(file.getvalue())
  np.testing.assert_array_equal(decoded, frames)
  with VideoReader(file.getvalue()) as reader:
    np.testing.assert_array_equal(reader.get_frames([2, 0]), frames[[2, 0]])


def test_animated_webp_is_decoded():
  frames = np.zeros((3, 16, 16, 3), np.uint8)
  frames[0, ..., 0], frames[1, ..., 1], frames[2, ..., 2] = 200, 200, 200
  first, *others = (Image.fromarray(frame) for frame in frames)
  file = io.BytesIO()
  first.save(
    file,
    'webp',
    save_all=True,
    append_images=others,
    duration=40,
    lossless=True,
  )
  try:
    decoded = videos.decode_all(file.getvalue())
  except VideoError:
    if int(av.__version__.split('.')[0]) >= 19:
      raise
    pytest.skip(
      'ANIMATED WEBP WAS NOT TESTED: FFmpeg before 8.1 cannot decode it'
    )
  assert np.abs(decoded.astype(int) - frames).max() <= 8


def test_transform_is_applied_once_per_frame(encoded):
  seen = []

  def halve(frame: np.ndarray) -> np.ndarray:
    seen.append(videos.index_of(frame))
    return frame[::2, ::2]

  with VideoReader(encoded['ours.mp4']) as reader:
    frames = reader.get_frames([9, 2, 9, 19], halve)
  assert frames.shape == (4, 24, 32, 3)
  assert seen == [2, 9, 19]


def test_error_of_a_transform_is_not_a_video_error(encoded):
  def fail(frame: np.ndarray) -> np.ndarray:
    raise ValueError('mistake')

  for name in ('ours.mp4', 'mpeg4.avi'):
    with (
      VideoReader(encoded[name]) as reader,
      pytest.raises(ValueError, match='^mistake$') as caught,
    ):
      reader.get_frames([0], fail)
    assert not isinstance(caught.value, VideoError)


def test_get_frames_decodes_only_from_the_keyframe_before():
  frames = np.random.default_rng(0).integers(
    0, 256, (48, 48, 64, 3), dtype=np.uint8
  )
  video = video_writer.encode_mp4(frames, fps=25)
  positions = [(p.pos, p.size) for p in videos.packets(video)]
  expected = videos.decode_all(video)[20:24]
  damaged = bytearray(video)
  for position, size in [*positions[1:16], *positions[32:]]:
    damaged[position : position + size] = bytes(size)
  with pytest.raises(VideoError):
    videos.probe(bytes(damaged))
  with VideoReader(bytes(damaged)) as reader:
    np.testing.assert_array_equal(reader.get_frames(range(20, 24)), expected)


def test_any_frames_of_our_files_have_the_pixels_of_a_full_decode():
  frames = videos.moving(77)
  rng = np.random.default_rng(0)
  steps = rng.uniform(0.01, 0.1, len(frames) - 1)
  timed = zip(np.cumsum([0.0, *steps]), frames, strict=True)
  for video in (
    video_writer.encode_mp4(frames, fps=25),
    video_writer.encode_mp4(timed, fps=25),
  ):
    expected = videos.decode_all(video)
    for count in (1, 2, 5, 20, 60):
      indices = rng.integers(0, len(frames), count)
      with VideoReader(video) as reader:
        np.testing.assert_array_equal(
          reader.get_frames(indices), expected[indices]
        )


@pytest.mark.parametrize('kind', ['content', 'path', 'damaged'])
def test_parts_have_the_pixels_of_a_full_decode(tmp_path, monkeypatch, kind):
  """Also where the file is not, or cannot be, decoded without FFmpeg."""
  video = video_writer.encode_mp4(videos.moving(20, 84, 100), fps=25)
  source = path = tmp_path / 'video.mp4'
  path.write_bytes(video)
  if kind != 'path':
    source = video
  if kind == 'damaged':
    monkeypatch.setattr(ReencodedVideo, '_crop', lambda *_: b'damaged')
  container: Any
  with av.open(path) as container:
    pictures = list(container.decode(video=0))
  rgb = videos.decode_all(video)
  rng = np.random.default_rng(0)
  with VideoReader(source) as reader:
    for _ in range(20):
      top, bottom = 2 * np.sort(rng.choice(43, 2, replace=False))
      left, right = 2 * np.sort(rng.choice(51, 2, replace=False))
      box = int(top), int(left), int(bottom - top), int(right - left)
      wanted = [2, 6, 7, 19]
      for index, part in reader.iter_frames(wanted, box):
        assert index == wanted.pop(0)
        expected = rgb[index, top:bottom, left:right]
        np.testing.assert_array_equal(part, expected)
      assert not wanted
      for index, (luma, *chroma) in reader.iter_planes([3, 8], box):
        rows = pictures[index].to_ndarray()
        np.testing.assert_array_equal(luma, rows[top:bottom, left:right])
        whole = rows[84:].reshape(2, 42, 50)
        half = whole[:, top // 2 : bottom // 2, left // 2 : right // 2]
        np.testing.assert_array_equal(chroma, half)


@pytest.mark.parametrize(
  ('wanted', 'needed'),
  [
    (range(20, 41, 2), range(16, 41, 2)),  # from the keyframe on
    ([31], [*range(16, 31, 2), 31]),  # the last of its group
    ([33], [32, 33, 34]),  # predicted from both its neighbors
    ([2, 40], [0, 2, *range(32, 41, 2)]),
  ],
)
def test_only_needed_frames_of_our_files_are_decoded(wanted, needed):
  video = video_writer.encode_mp4(videos.moving(48), fps=25)
  expected = videos.decode_all(video)[list(wanted)]
  packets = videos.packets(video)
  damaged = bytearray(video)
  order = sorted(packet.pts for packet in packets)
  for packet in packets[1:]:  # The first has the encoder's options.
    if order.index(packet.pts) not in needed:
      damaged[packet.pos : packet.pos + packet.size] = bytes(packet.size)
  with VideoReader(damaged) as reader:
    np.testing.assert_array_equal(reader.get_frames(wanted), expected)


def test_unwanted_frames_that_no_other_needs_are_skipped():
  frames = videos.moving(48)
  video = videos.encode(
    frames, 'libx264', 'mp4', **{'x264-params': 'keyint=48:bframes=2:b-adapt=0'}
  )
  wanted = [20, 21, 22, 40]
  expected = videos.decode_all(video)[wanted]
  packets = videos.packets(video)
  order = sorted(packet.pts for packet in packets)
  damaged = bytearray(video)
  count = 0
  for packet in packets[1:]:  # The first has the encoder's options.
    # nal_ref_idc is 0 where no other frame refers to this one.
    is_reference = bytes(packet)[4] & 0x60
    if not is_reference and order.index(packet.pts) not in wanted:
      damaged[packet.pos + 5 : packet.pos + packet.size] = bytes(
        packet.size - 5
      )
      count += 1
  assert count > 10
  with pytest.raises(VideoError):
    videos.probe(bytes(damaged))
  with VideoReader(damaged) as reader:
    np.testing.assert_array_equal(reader.get_frames(wanted), expected)


@pytest.mark.parametrize(
  'changed',
  [
    'bframes=0',
    'bframes=2',
    'b-pyramid=normal:bframes=3',
    'b-adapt=1',
    'scenecut=40',
    'open-gop=1',
    'keyint=15:min-keyint=15',
  ],
)
def test_other_structures_are_not_taken_for_ours(changed):
  ours = 'keyint=16:min-keyint=16:scenecut=0:bframes=1:b-adapt=0:b-pyramid=none'
  frames = videos.moving(64)
  video = videos.encode(
    frames, 'libx264', 'mp4', **{'x264-params': f'{ours}:{changed}'}
  )
  with VideoReader(video) as reader:
    assert reader.frame_size is None
    found = reader.get_frames(range(0, 64, 2))
  np.testing.assert_array_equal(found, videos.decode_all(video)[::2])
  video = videos.encode(frames, 'libx264', 'mp4', **{'x264-params': ours})
  with VideoReader(video) as reader:
    assert reader.frame_size == (80, 96)


@pytest.mark.parametrize('name', videos.ORIENTATIONS)
def test_planes_are_oriented_for_display(name):
  numbers, orient = videos.ORIENTATIONS[name]
  video = video_writer.encode_mp4(videos.moving(3), fps=25)
  with VideoReader(video) as reader:
    expected = [planes for _, planes in reader.iter_planes(range(3))]
  with VideoReader(videos.with_matrix(video, *numbers)) as reader:
    found = [planes for _, planes in reader.iter_planes(range(3))]
  for planes, others in zip(found, expected, strict=True):
    for plane, other in zip(planes, others, strict=True):
      turned = orient(
        np.broadcast_to(other[None, ..., None], (1, *other.shape, 3))
      )
      np.testing.assert_array_equal(plane, turned[0, ..., 0])


def test_frame_times_of_a_variable_frame_rate():
  times = [0, 1, 2, 10, 11, 30]  # in 1/25 s
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as container:
    stream = container.add_stream('libx264', rate=25, options={'bf': '2'})
    stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
    for time, frame in zip(times, videos.levels(6), strict=True):
      picture = av.VideoFrame.from_ndarray(np.array(frame), format='rgb24')
      picture.pts = time
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  with VideoReader(file.getvalue()) as reader:
    np.testing.assert_allclose(reader.frame_times, np.array(times) / 25)
    shown = [videos.index_of(f) for _, f in reader.iter_timed(0.3, 1.0)]
  assert shown == [3, 4]


def _own_times(source) -> np.ndarray:
  """Returns PyAV's times of the frames, relative to the first."""
  container: Any
  with av.open(source) as container:
    times = [frame.time for frame in container.decode(video=0)]
  return np.array(times) - times[0]


def _in_format(container: str) -> bytes:
  """Returns vfr.mp4, decoded and encoded in another format."""
  file = io.BytesIO()
  source: Any
  with (
    av.open(videos.CASES / 'vfr.mp4') as source,
    av.open(file, 'w', format=container) as output,
  ):
    stream = output.add_stream('libx264', rate=25)
    stream.height, stream.width, stream.pix_fmt = 120, 160, 'yuv420p'
    for picture in source.decode(video=0):
      picture.pict_type = 0
      output.mux(stream.encode(picture))
    output.mux(stream.encode())
  return file.getvalue()


@pytest.mark.parametrize('container', ['mp4', 'matroska', 'mpegts'])
def test_times_of_a_variable_frame_rate_are_those_of_the_file(container):
  if container == 'mp4':
    source = (videos.CASES / 'vfr.mp4').read_bytes()
  else:
    source = _in_format(container)
  expected = _own_times(io.BytesIO(source))
  # 25 frames a second for ten seconds, then 5.
  made = np.concatenate([np.arange(250) / 25, 10 + np.arange(50) / 5])
  np.testing.assert_allclose(expected, made, atol=1e-3)
  with VideoReader(source) as reader:
    np.testing.assert_allclose(reader.frame_times, expected, atol=1e-6)
    timed = [(time, frame.mean()) for time, frame in reader.iter_timed()]
    times, means = np.transpose(timed)
    np.testing.assert_allclose(times, expected, atol=1e-6)
    part = list(reader.iter_timed(9.5, 11.1))
  # 13 frames of the fast part (9.52 to 9.96 s... 10 s) and 10.2, ..., 11.0.
  chosen = (expected >= 9.5) & (expected < 11.1)
  np.testing.assert_allclose(
    [time for time, _ in part], expected[chosen], atol=1e-6
  )
  np.testing.assert_allclose(
    [frame.mean() for _, frame in part], means[chosen], atol=1e-9
  )


@pytest.mark.parametrize('name', videos.FORMATS)
def test_frame_times_of_a_constant_frame_rate(encoded, name):
  with VideoReader(encoded[name]) as reader:
    np.testing.assert_allclose(
      reader.frame_times, np.arange(36) / 25, atol=1e-6
    )
    times = [time for time, _ in reader.iter_timed()]
  np.testing.assert_allclose(times, np.arange(36) / 25, atol=1e-6)


def test_frame_times_without_times_in_the_file_follow_the_frame_rate():
  raw = videos.encode(videos.levels(36), 'libx264', 'h264')
  with VideoReader(raw) as reader:
    np.testing.assert_allclose(
      np.diff(reader.frame_times), 1 / reader.fps, atol=1e-6
    )


def test_duration_is_that_of_the_header():
  video = video_writer.encode_mp4(videos.levels(36), fps=24)
  with VideoReader(video) as reader:
    assert reader.duration == 1.5
  raw = videos.encode(videos.levels(36), 'libx264', 'h264')
  with VideoReader(raw) as reader:
    assert reader.duration is None


@pytest.mark.parametrize('name', videos.ORIENTATIONS)
def test_frames_are_oriented_for_display(name):
  matrix, orient = videos.ORIENTATIONS[name]
  stored = (videos.CASES / 'base.mp4').read_bytes()
  expected = orient(videos.decode_all(stored))
  source = videos.with_matrix(stored, *matrix)
  np.testing.assert_array_equal(videos.decode_all(source), expected)
  with VideoReader(source) as reader:
    assert reader.size == expected.shape[1:3]
    np.testing.assert_array_equal(
      reader.get_frames([70, 2, 33]), expected[[70, 2, 33]]
    )


@pytest.mark.parametrize('name', videos.ORIENTATIONS)
def test_jpeg_frames_are_oriented_for_display(name):
  matrix, orient = videos.ORIENTATIONS[name]
  frames = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
  jpegs = [cv2.imencode('.jpg', frame)[1].tobytes() for frame in frames]
  stored = video_writer.mux_jpegs(jpegs, fps=12, height=32, width=48)
  with VideoReader(stored) as reader:
    expected = orient(reader.get_frames(range(3)))
  with VideoReader(videos.with_matrix(stored, *matrix)) as reader:
    np.testing.assert_array_equal(reader.get_frames(range(3)), expected)


def test_zero_matrix_is_ignored_and_a_mirrored_one_mirrors():
  base, zero, mirrored = (
    videos.decode_all(videos.CASES / f'{name}.mp4')
    for name in ('base', 'zero', 'hflip')
  )
  np.testing.assert_array_equal(zero, base)
  np.testing.assert_array_equal(mirrored, base[:, :, ::-1])


@pytest.mark.parametrize(
  ('defaults', 'size'),
  # The first track has 64x48 pixels, the second 160x120.
  [
    ((True, False), (48, 64)),
    ((False, True), (120, 160)),
    ((False, False), (120, 160)),
    ((True, True), (120, 160)),
  ],
)
def test_default_track_or_else_the_largest_is_shown(defaults, size):
  content = bytearray((videos.CASES / 'twostreams.mp4').read_bytes())
  position = 0
  for is_default in defaults:
    position = content.index(b'tkhd', position) + 8
    content[position - 1] = 2 | is_default  # In the movie, and enabled.
  source = bytes(content)
  container: Any
  with av.open(io.BytesIO(source)) as container:
    [track] = [s for s in container.streams.video if s.height == size[0]]
    picture = next(container.decode(track))
  with VideoReader(source) as reader:
    assert reader.size == size
    assert len(reader) == 50
    np.testing.assert_array_equal(
      reader.get_frames([0])[0], picture.to_ndarray(format='rgb24')
    )


def test_frames_that_change_size_are_resized_to_the_first_size(tmp_path):
  small = videos.encode(videos.levels(3, 32, 32), 'libx264', 'h264')
  path = tmp_path / 'changes.h264'
  path.write_bytes(videos.encode(videos.levels(3), 'libx264', 'h264') + small)
  shown = videos.decode_all(path)
  assert shown.shape == (6, 48, 64, 3)
  expected = videos.decode_all(small)
  for frame, original in zip(shown[3:], expected, strict=True):
    assert abs(frame.mean() - original.mean()) < 3


@pytest.mark.parametrize('name', videos.FORMATS)
def test_time_range_gives_the_frames_shown_in_it(encoded, name):
  whole = videos.decode_all(encoded[name])
  for first in range(33):
    with VideoReader(encoded[name]) as reader:
      timed = reader.iter_timed((first - 0.1) / 25, (first + 2.5) / 25)
      part = [frame for _, frame in timed]
    np.testing.assert_array_equal(part, whole[first : first + 3])
  with VideoReader(encoded[name]) as reader:
    part = [f for _, f in reader.iter_timed(3.9 / 25, 7.9 / 25)]
    np.testing.assert_array_equal(part, whole[4:8])
    # Times that are exactly those of frames.
    part = [f for _, f in reader.iter_timed(0.4, 0.52)]
    np.testing.assert_array_equal(part, whole[10:13])
    assert len(list(reader.iter_timed(start=30.9 / 25))) == 5
    with pytest.raises(VideoError, match='no frame between 1000 s and inf s'):
      list(reader.iter_timed(1e3))


def test_index_out_of_range_raises(encoded):
  for name in ('ours.mp4', 'mpeg4.avi'):
    with VideoReader(encoded[name]) as reader:
      with pytest.raises(VideoError, match='36 frames, but frame 36'):
        reader.get_frames([2, 36])
      with pytest.raises(ValueError, match='0 or more'):
        reader.get_frames([-1])
      with pytest.raises(ValueError, match='0 or more'):
        reader.get_frames([])


def test_random_damage_gives_frames_or_a_video_error(encoded):
  rng = np.random.default_rng(0)
  outcomes = set()
  for name in ('ours.mp4', 'mpeg4.avi', 'vp9.webm'):
    for _ in range(60):
      video = bytearray(encoded[name])
      for position in rng.integers(len(video), size=rng.integers(1, 20)):
        video[position] = rng.integers(256)
      try:
        with VideoReader(video) as reader:
          frames = reader.get_frames([1, 30])
        assert frames.dtype == np.uint8
        assert len(frames) == 2
        outcomes.add('frames')
      except VideoError as error:
        assert '\n' not in str(error)
        outcomes.add('error')
  assert outcomes == {'frames', 'error'}


@pytest.mark.skipif(
  not os.path.isdir('/proc/self/fd'), reason='NOT TESTED: needs /proc'
)
def test_files_are_closed(encoded, tmp_path):
  good, bad = tmp_path / 'good.mp4', tmp_path / 'bad.avi'
  good.write_bytes(encoded['ours.mp4'])
  bad.write_bytes(encoded['mpeg4.avi'][:9000])
  before = len(os.listdir('/proc/self/fd'))
  for _ in range(5):
    with VideoReader(good) as reader:
      reader.get_frames([0, 19])
      next(iter(reader))
    with pytest.raises(VideoError):
      videos.probe(bad)
  assert len(os.listdir('/proc/self/fd')) == before


@pytest.mark.parametrize('name', CLIPS)
def test_real_clips_agree_with_opencv(clips_dir, name):
  count, fps, width, height = CLIPS[name]
  path = clips_dir / name
  assert videos.probe(path) == videos.VideoInfo(count, height, width, fps)
  capture = cv2.VideoCapture(str(path))
  indices = np.random.default_rng(0).integers(count, size=4)
  with VideoReader(path.read_bytes()) as reader:
    assert len(reader) == count
    found = reader.get_frames(indices)
    for index, frame in enumerate(reader):
      is_frame, expected = capture.read()
      assert is_frame
      assert np.array_equal(frame, expected[..., ::-1])
      for match in found[indices == index]:
        np.testing.assert_array_equal(match, frame)
  assert not capture.read()[0]
  capture.release()
