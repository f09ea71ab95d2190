"""Videos of all formats are stored completely; damaged ones are refused."""

import os
import pathlib

import cv2
import numpy as np
from PIL import Image
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import video_reader, video_writer
from dualformer_jax.input_pipeline.preparing import transcoding
from tests.input_pipeline import videos
from tests.input_pipeline.preparing import sample_videos
from tests.input_pipeline.preparing.sample_videos import film


def video(path: pathlib.Path, **fields) -> transcoding.Video:
  return transcoding.Video('v', path, ('x',), **fields)


@pytest.mark.parametrize('form', ('reencoded', 'jpeg'))
@pytest.mark.parametrize('kind', sample_videos.UNUSUAL)
def test_all_frames_are_stored_upright(kind, form, tmp_path):
  extension, make, count = sample_videos.UNUSUAL[kind]
  path = tmp_path / f'video{extension}'
  path.write_bytes(make(1))
  content, _ = transcoding.transcode(video(path), transcoding.Storage(form))
  frames = videos.decode_all(content)
  assert len(frames) == count
  height, width = frames.shape[1:3]
  if kind != 'odd sides':
    assert (height, width) == (sample_videos.HEIGHT, sample_videos.WIDTH)
  for index, frame in enumerate(frames):
    level = sample_videos.level(1, index)
    upper_left = frame[: height // 2 - 1, : width // 2 - 1].mean()
    assert abs(upper_left - 230) < 8
    assert abs(frame[height // 2 + 1 :].mean() - level) < 4
    assert abs(frame[:, width // 2 + 1 :].mean() - level) < 4


@pytest.mark.parametrize('form', transcoding.FORMS)
@pytest.mark.parametrize('kind', sample_videos.DAMAGED)
def test_damaged_video_raises(kind, form, tmp_path):
  extension, make, reason = sample_videos.DAMAGED[kind]
  path = tmp_path / f'video{extension}'
  path.write_bytes(make())
  with pytest.raises(video_reader.VideoError, match=reason or None):
    transcoding.transcode(video(path), transcoding.Storage(form))


def test_folder_and_pipe_raise(tmp_path):
  (tmp_path / 'folder.mp4').mkdir()
  os.mkfifo(tmp_path / 'pipe.mp4')  # Opening it would block for ever.
  for name in ('folder.mp4', 'pipe.mp4'):
    with pytest.raises(video_reader.VideoError):
      transcoding.transcode(video(tmp_path / name), transcoding.Storage())


def test_large_videos_are_downscaled_to_even_sides(tmp_path):
  path = tmp_path / 'large.mp4'
  path.write_bytes(video_writer.encode_mp4(film(0, 300, 401, frames=2), fps=12))
  for form in ('reencoded', 'jpeg'):
    storage = transcoding.Storage(form, short_side=128)
    content, _ = transcoding.transcode(video(path), storage)
    info = videos.probe(content)
    assert (info.height, info.width, info.fps) == (128, 170, 12)


def test_part_of_a_video_is_stored(tmp_path):
  path = tmp_path / 'video.mp4'
  path.write_bytes(video_writer.encode_mp4(film(0, frames=20), fps=5))
  part = video(path, seconds=(0.6, 2.0))
  content, _ = transcoding.transcode(part, transcoding.Storage())
  levels = [frame[-1, -1, 0] for frame in videos.decode_all(content)]
  expected = [sample_videos.level(0, index) for index in range(3, 10)]
  np.testing.assert_allclose(np.array(levels, float), expected, atol=4)
  with pytest.raises(video_reader.VideoError, match='verbatim'):
    transcoding.transcode(part, transcoding.Storage('verbatim'))


@pytest.mark.parametrize('form', transcoding.FORMS)
@pytest.mark.parametrize('name', videos.ORIENTATIONS)
def test_videos_are_stored_as_displayed(tmp_path, form, name):
  matrix, orient = videos.ORIENTATIONS[name]
  stored = (videos.CASES / 'base.mp4').read_bytes()
  path = tmp_path / 'video.mp4'
  path.write_bytes(videos.with_matrix(stored, *matrix))
  content, _ = transcoding.transcode(video(path), transcoding.Storage(form))
  found = videos.decode_all(content).astype(int)
  expected = orient(videos.decode_all(stored))
  assert found.shape == expected.shape
  # Colors lose half of their resolution; other orientations differ by 60.
  assert np.abs(found - expected).mean() < 8


@pytest.mark.parametrize('form', ['reencoded', 'jpeg'])
def test_part_of_a_variable_frame_rate_is_cut_by_times(form):
  path = videos.CASES / 'vfr.mp4'
  whole = videos.decode_all(path).astype(np.int16)
  # 25 frames a second for ten seconds, then 5: frames 200 to 249, then 250
  # at 10.0 s to 254 at 10.8 s; 270 at 14 s to 279.
  for seconds, indices in (
    ((8.0, 11.0), range(200, 255)),
    ((13.9, 16.0), range(270, 280)),
  ):
    content, _ = transcoding.transcode(
      video(path, seconds=seconds), transcoding.Storage(form)
    )
    nearest = [
      np.abs(whole - frame).mean((1, 2, 3)).argmin()
      for frame in videos.decode_all(content)
    ]
    assert nearest == list(indices)


def test_video_larger_than_a_record_raises(tmp_path, monkeypatch):
  path = tmp_path / 'video.mp4'
  path.write_bytes(video_writer.encode_mp4(film(0), fps=25))
  monkeypatch.setattr(transcoding, 'MAX_BYTES', path.stat().st_size - 1)
  with pytest.raises(video_reader.VideoError, match='too large'):
    transcoding.transcode(video(path), transcoding.Storage('verbatim'))


@pytest.mark.parametrize('form', transcoding.FORMS)
def test_folder_of_frames_is_a_video(tmp_path, form):
  clip = film(2)
  for index, frame in enumerate(clip):
    name = f'img_{index + 1:05d}.jpg'
    cv2.imwrite(os.fspath(tmp_path / name), frame[..., ::-1])
    cv2.imwrite(os.fspath(tmp_path / f'flow_x_{index:05d}.jpg'), frame)
  content, _ = transcoding.transcode(
    video(tmp_path, fps=12.0), transcoding.Storage(form)
  )
  info = videos.probe(content)
  assert (info.num_frames, info.fps) == (len(clip), 12)
  frames = videos.decode_all(content)
  for index, frame in enumerate(frames):
    original = cv2.imread(os.fspath(tmp_path / f'img_{index + 1:05d}.jpg'))
    assert original is not None
    difference = np.abs(frame.astype(int) - original[..., ::-1]).max()
    assert difference == 0 if form != 'reencoded' else difference < 30


@pytest.mark.parametrize('form', transcoding.FORMS)
@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_orientation_of_jpeg_files_is_applied(tmp_path, form, orientation):
  coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
  image = Image.fromarray(cv2.resize(coarse, (64, 48)))
  exif = Image.Exif()
  exif[274] = orientation
  for index in range(3):
    image.save(tmp_path / f'{index}.jpg', quality=95, exif=exif)
  turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]  # To the left.
  expected = np.rot90(np.array(image), turns).astype(int)
  content, _ = transcoding.transcode(video(tmp_path), transcoding.Storage(form))
  with video_reader.VideoReader(content) as reader:
    for frames in (np.stack(list(reader)), reader.get_frames([0, 1, 2])):
      assert frames.shape[1:] == expected.shape
      assert np.abs(frames - expected).mean() < 8


@pytest.mark.parametrize('form', transcoding.FORMS)
def test_damaged_frame_raises(tmp_path, form):
  with pytest.raises(video_reader.VideoError, match='without frames'):
    transcoding.transcode(video(tmp_path), transcoding.Storage(form))
  for index, frame in enumerate(film(2)):
    cv2.imwrite(os.fspath(tmp_path / f'{index:05d}.jpg'), frame)
  path = tmp_path / '00004.jpg'
  for content in (sample_videos.half(path.read_bytes()), b''):
    path.write_bytes(content)
    with pytest.raises(video_reader.VideoError, match='00004.jpg'):
      transcoding.transcode(video(tmp_path), transcoding.Storage(form))


def test_png_frames_are_stored_as_jpeg_but_not_verbatim(tmp_path):
  for index, frame in enumerate(film(2)):
    cv2.imwrite(os.fspath(tmp_path / f'{index}.png'), frame)
  content, _ = transcoding.transcode(
    video(tmp_path), transcoding.Storage('jpeg')
  )
  assert videos.probe(content).num_frames == len(film(2))
  with pytest.raises(video_reader.VideoError, match='0.png'):
    transcoding.transcode(video(tmp_path), transcoding.Storage('verbatim'))


@pytest.mark.parametrize(
  'fields',
  ({'form': 'avi'}, {'crf': 52}, {'jpeg_quality': 0}, {'short_side': 1}),
)
def test_invalid_storage_raises(fields):
  with pytest.raises(errors.UserError, match=next(iter(fields))):
    transcoding.Storage(**fields)
