"""Views agree with the published implementation; crops with their docs."""

from __future__ import annotations

from collections.abc import Sequence
import copy
import pathlib

import cv2
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import transforms, video_reader, video_writer
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from tests import reference_arrays, tfds_command
from tests.input_pipeline import videos

FIGURES = sorted(
  (pathlib.Path(__file__).parents[1] / 'reference/views').iterdir()
)
# Of each recipe, what to take and the short side before the crop.
RECIPES = {
  'k400_val': (transforms.Preprocessing(32, 2, 224), 256),
  'k400_test_4x1': (transforms.Preprocessing(32, 2, 224, num_clips=4), 224),
  'ucf101_test_4x3': (
    transforms.Preprocessing(32, 4, 224, num_clips=4, num_crops=3),
    224,
  ),
}


@pytest.mark.parametrize('path', FIGURES, ids=lambda path: path.stem)
def test_views_of_real_clips_match_the_reference(clips_dir, path):
  clip, recipe = path.stem.split('.')
  figure = reference_arrays.load(path)
  (video,) = clips_dir.glob(f'{clip}.*')
  preprocessing, short_side = RECIPES[recipe]
  found = transforms.eval_views(video, preprocessing, short_side=short_side)
  assert found.dtype == np.uint8
  assert found.shape == tuple(figure['shape'])
  pixels = found[:, ::8, ::16, ::16].astype(int)
  assert np.abs(pixels - figure['pixels']).mean() < 0.5
  means = found.mean((1, 2, 3))
  np.testing.assert_allclose(means, figure['mean'], rtol=1e-5)


@pytest.mark.slow
def test_views_from_verbatim_datasets_match_the_reference(clips_dir, tmp_path):
  names = sorted({path.stem.split('.')[0] for path in FIGURES})
  for name in names:
    (video,) = clips_dir.glob(f'{name}.*')
    folder = tmp_path / 'videos' / name
    folder.mkdir(parents=True)
    (folder / video.name).symlink_to(video)
  done = tfds_command.tfds_build(
    'data/video_folder',
    f'--manual_dir={tmp_path / "videos"}',
    f'--data_dir={tmp_path}',
    '--config=verbatim',
    '--file_format=array_record',
  )
  assert done.returncode == 0, done.stderr
  # Of each class one video, which is for training.
  dataset = PreparedDataset('video_folder/verbatim', 'train', str(tmp_path))
  assert list(dataset.folder.glob('*.array_record-*'))
  examples = [dataset[index] for index in range(len(dataset))]
  found = {
    dataset.class_names[e.label]: e.video
    for e in examples
    if isinstance(e.label, int)
  }
  assert sorted(found) == names
  for path in FIGURES:
    clip, recipe = path.stem.split('.')
    figure = reference_arrays.load(path)
    preprocessing, short_side = RECIPES[recipe]
    pixels = transforms.eval_views(
      found[clip], preprocessing, short_side=short_side
    )[:, ::8, ::16, ::16]
    assert np.abs(pixels.astype(int) - figure['pixels']).mean() < 0.5


def numbered(count: int, height: int, width: int) -> np.ndarray:
  """Frames whose pixels hold their frame, row and column."""
  frame, row, column = np.meshgrid(
    np.arange(count), np.arange(height), np.arange(width), indexing='ij'
  )
  return np.stack([frame, row, column], -1).astype(np.uint8)


def test_views_are_ordered_by_crop_then_by_time():
  frames = numbered(40, 20, 31)
  preprocessing = transforms.Preprocessing(4, 2, 20, num_clips=2, num_crops=3)
  found = transforms.eval_views(frames, preprocessing)
  assert found.shape == (6, 4, 20, 20, 3)
  # avg = (40 - 8 + 1) / 2 = 16.5; offsets int(8.25), int(24.75).
  starts = found[:, 0, 0, 0]
  np.testing.assert_array_equal(starts[:, 0], [8, 24, 8, 24, 8, 24])
  # 11 columns too many: middle at 5, right at twice that, left at 0.
  np.testing.assert_array_equal(starts[:, 2], [0, 0, 10, 10, 5, 5])
  np.testing.assert_array_equal(found[0, :, 0, 0, 0], [8, 10, 12, 14])


def test_three_crops_of_a_portrait_are_top_bottom_center():
  crops = transforms.three_crops(numbered(1, 34, 20), 16)
  np.testing.assert_array_equal(crops[:, 0, 0, 0, 1], [0, 18, 9])
  np.testing.assert_array_equal(crops[:, 0, 0, 0, 2], [2, 2, 2])
  assert crops.shape == (3, 1, 16, 16, 3)


def test_center_crop_rounds_its_offset_down():
  crop = transforms.center_crop(numbered(2, 21, 30), 16)
  np.testing.assert_array_equal(crop[:, 0, 0], [[0, 2, 7], [1, 2, 7]])
  np.testing.assert_array_equal(crop[1, -1, -1], [1, 17, 22])


@pytest.mark.parametrize(
  ('size', 'short_side', 'expected'),
  [
    # int(side * scale + 0.5), worked out by hand.
    ((240, 320), 256, (256, 341)),
    ((256, 340), 224, (224, 298)),
    ((426, 320), 224, (298, 224)),
    ((50, 50), 224, (224, 224)),
  ],
)
def test_resizing_rounds_the_long_side(size, short_side, expected):
  frames = np.random.default_rng(0).integers(
    0, 256, (2, *size, 3), dtype=np.uint8
  )
  found = transforms.resize_short_side(frames, short_side)
  assert found.shape[1:3] == expected
  np.testing.assert_array_equal(found[1], cv2.resize(frames[1], expected[::-1]))


def test_frames_of_the_target_size_are_unchanged():
  frames = numbered(2, 20, 30)
  np.testing.assert_array_equal(
    transforms.resize_short_side(frames, 20), frames
  )


def corners(crops: Sequence[np.ndarray] | np.ndarray, size: int) -> np.ndarray:
  """Top, left, height and width of crops of numbered(1, h, w), found again."""
  found = []
  for crop in crops:
    first = crop[0, 0, 0, 1:].astype(float)
    last = crop[0, -1, -1, 1:].astype(float)
    # Bilinear, pixel centers at halves: ends are (scale - 1) / 2 inside.
    scale = 1 + (last - first + 1 - size) / (size - 1)
    found.append([*(first - (scale - 1) / 2), *(scale * size)])
  return np.array(found)


def test_random_resized_crops_have_the_documented_distribution():
  frames = numbered(1, 160, 240)
  rng = np.random.default_rng(0)
  size = 24
  crops, _ = transforms.train_clips(
    frames, transforms.Preprocessing(1, 1, size), [rng] * 1500, short_side=160
  )
  top, left, height, width = corners(crops, size).T
  area, aspect = height * width / (160 * 240), width / height
  # Corners are found to about a pixel.
  assert 0.06 < area.min() < 0.1
  # The widest that is as high as the frame: 213 of 240 columns, 0.889.
  assert 0.85 < area.max() < 0.91
  assert 0.7 < aspect.min() < 0.79
  assert 1.27 < aspect.max() < 1.45
  # Uniform up to where not all aspect ratios fit into the frame (3:2).
  share = np.mean((area > 0.2) & (area < 0.4)) / np.mean(
    (area > 0.1) & (area < 0.2)
  )
  assert share == pytest.approx(2, abs=0.35)
  assert np.mean(np.log(aspect[area < 0.4])) == pytest.approx(0, abs=0.03)
  small = area < 0.3
  for offset, room in ((top, 160 - height), (left, 240 - width)):
    middle = np.mean(offset[small] / room[small])
    assert middle == pytest.approx(0.5, abs=0.05)


def test_frame_that_fits_no_random_crop_gives_the_center():
  frames = numbered(2, 8, 200)
  (clip,), _ = transforms.train_clips(
    frames,
    transforms.Preprocessing(2, 1, 8),
    [np.random.default_rng(0)],
    short_side=8,
  )
  np.testing.assert_array_equal(clip, frames[:, :, 96:104])


def test_frames_of_a_train_clip_have_the_same_crop():
  frames = numbered(30, 40, 60)
  preprocessing = transforms.Preprocessing(8, 3, 32)
  seen = set()
  for seed in range(20):
    (clip,), _ = transforms.train_clips(
      frames, preprocessing, [np.random.default_rng(seed)], short_side=40
    )
    assert clip.shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(np.diff(clip[:, 0, 0, 0].astype(int)), 3)
    assert (clip[..., 1:] == clip[0, ..., 1:]).all()
    seen.add(clip[0, 0, 0].tobytes())
  assert len(seen) > 15


def test_train_clip_without_random_crop_is_the_center():
  (clip,), _ = transforms.train_clips(
    numbered(8, 40, 60),
    transforms.Preprocessing(8, 1, 32),
    [np.random.default_rng(0)],
    short_side=40,
    random_crop=False,
  )
  np.testing.assert_array_equal(
    clip, transforms.center_crop(numbered(8, 40, 60), 32)
  )


def test_uniform_sampling_spreads_over_the_video():
  preprocessing = transforms.Preprocessing(16, 1, 8, sampling='uniform')
  frames = numbered(30, 8, 8)
  found = transforms.eval_views(frames, preprocessing)
  # The reference's figure for 16 of 30 frames.
  expected = [1, 3, 4, 6, 8, 10, 12, 13, 15, 17, 19, 21, 23, 24, 26, 28]
  np.testing.assert_array_equal(found[0, :, 0, 0, 0], expected)
  (clip,), _ = transforms.train_clips(
    frames, preprocessing, [np.random.default_rng(0)], short_side=8
  )
  assert (np.diff(clip[:, 0, 0, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize('short_side', [48, 56])
def test_bytes_path_and_frames_give_the_same_clips(tmp_path, short_side):
  rng = np.random.default_rng(0)
  video = video_writer.encode_mp4(
    rng.integers(0, 256, (50, 48, 64, 3), dtype=np.uint8), fps=25
  )
  path = tmp_path / 'clip.mp4'
  path.write_bytes(video)
  sources = (video, path, str(path), videos.decode_all(video))
  preprocessing = transforms.Preprocessing(8, 2, 32, num_clips=2, num_crops=3)
  tests = [transforms.eval_views(source, preprocessing) for source in sources]
  rngs = np.random.default_rng(3).spawn(2)
  clips = [
    transforms.train_clips(
      source, preprocessing, copy.deepcopy(rngs), short_side=short_side
    )[0]
    for source in sources
  ]
  for found in (tests, clips):
    for other in found[1:]:
      np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize('count', [1, 4])
def test_short_video_is_looped(count):
  frames = numbered(count, 48, 64)
  preprocessing = transforms.Preprocessing(8, 3, 48, num_clips=2)
  rng = np.random.default_rng(0)
  bright = (frames * [60, 0, 0]).astype(np.uint8)
  for video in (frames, video_writer.encode_mp4(bright, fps=25)):
    found = transforms.eval_views(video, preprocessing)
    (clip,), _ = transforms.train_clips(
      video, preprocessing, [rng], short_side=48, random_crop=False
    )
    unit = 1 if video is frames else 60
    for shown in (found[0], found[1], clip):
      numbers = np.rint(shown[..., 0].mean((1, 2)) / unit)
      np.testing.assert_array_equal(numbers, np.arange(8) * 3 % count)


def test_video_without_frames_raises():
  preprocessing = transforms.Preprocessing(8, 3, 48)
  for video in (np.zeros((0, 48, 64, 3), np.uint8), b''):
    with pytest.raises(video_reader.VideoError):
      transforms.eval_views(video, preprocessing)
    with pytest.raises(video_reader.VideoError):
      transforms.train_clips(video, preprocessing, [np.random.default_rng(0)])


def test_frames_too_narrow_to_be_resized_raise():
  frames = np.zeros((2, 2, 20000, 3), np.uint8)
  with pytest.raises(video_reader.VideoError, match='too narrow'):
    transforms.eval_views(frames, transforms.Preprocessing(8, 3, 224))


def test_invalid_preprocessing_raises():
  with pytest.raises(errors.UserError, match="'dense' or 'uniform'"):
    transforms.Preprocessing(8, 3, 48, sampling='random')
  with pytest.raises(errors.UserError, match='num_crops must be 1 or 3'):
    transforms.Preprocessing(8, 3, 48, num_crops=2)
  with pytest.raises(errors.UserError, match='num_clips must be 1'):
    transforms.Preprocessing(8, 3, 48, sampling='uniform', num_clips=2)
  with pytest.raises(ValueError, match='smaller than the crop'):
    transforms.center_crop(numbered(1, 8, 8), 9)


def test_clips_drawn_together_equal_clips_drawn_alone():
  frames = np.random.default_rng(0).integers(0, 256, (30, 36, 48, 3), np.uint8)
  preprocessing = transforms.Preprocessing(8, 2, 24)

  def rngs() -> list[np.random.Generator]:
    return [np.random.default_rng((7, i)) for i in range(4)]

  for video in (frames, video_writer.encode_mp4(frames, fps=25)):
    together, _ = transforms.train_clips(
      video, preprocessing, rngs(), short_side=30
    )
    assert together.shape == (4, 8, 24, 24, 3)
    for rng, clip in zip(rngs(), together, strict=True):
      (alone,), _ = transforms.train_clips(
        video, preprocessing, [rng], short_side=30
      )
      np.testing.assert_array_equal(alone, clip)
    assert len({clip.tobytes() for clip in together}) == 4


def test_clip_locations_give_frames_and_crop():
  # A pixel holds its frame, row and column.
  frames = numbered(10, 40, 60)
  preprocessing = transforms.Preprocessing(8, 3, 32)
  rngs = [np.random.default_rng(seed) for seed in range(20)]
  clips, locations = transforms.train_clips(
    frames, preprocessing, rngs, short_side=40
  )
  for clip, location in zip(clips, locations, strict=True):
    # Not looped: indices continue past the last of the 10 frames.
    np.testing.assert_array_equal(np.diff(location.frame_indices), 3)
    np.testing.assert_array_equal(clip[:, 0, 0, 0], location.frame_indices % 10)
    top, left, height, width = np.array(location.box) * [40, 60, 40, 60]
    np.testing.assert_allclose(clip[0, 0, 0, 1:], [top, left], atol=1)
    np.testing.assert_allclose(
      clip[0, -1, -1, 1:], [top + height - 1, left + width - 1], atol=1
    )


def yuv_to_rgb(clips: np.ndarray) -> np.ndarray:
  """Converts YUV of train_clips with OpenCV."""
  frames = clips.reshape(-1, *clips.shape[2:])
  rgb = [cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_I420) for frame in frames]
  return np.stack(rgb).reshape(*clips.shape[:2], *rgb[0].shape)


@pytest.mark.parametrize('short_side', [80, 72])
@pytest.mark.parametrize('random_crop', [True, False])
def test_clips_in_yuv_show_their_location(short_side, random_crop):
  """Also where frames must be resized first: to 72 from 80."""
  smooth = np.stack([cv2.blur(f, (25, 25)) for f in videos.moving(40)])
  video = video_writer.encode_mp4(smooth, fps=25, crf=10)
  clips, locations = transforms.train_clips(
    video,
    transforms.Preprocessing(8, 2, 64),
    [np.random.default_rng(seed) for seed in range(12)],
    short_side=short_side,
    random_crop=random_crop,
    start_multiple=2,
    yuv420=True,
  )
  assert clips.shape == (12, 8, 96, 64)
  frames = transforms.resize_short_side(videos.decode_all(video), short_side)
  height, width = frames.shape[1:3]
  expected = []
  for location in locations:
    assert location.frame_indices[0] % 2 == 0
    box = np.array(location.box) * [height, width, height, width]
    top, left, rows, columns = np.rint(box).astype(int)
    crop = frames[location.frame_indices, top : top + rows]
    expected.append(
      [cv2.resize(f[:, left : left + columns], (64, 64)) for f in crop]
    )
  difference = yuv_to_rgb(clips).astype(int) - expected
  assert np.abs(difference).mean() < 2
  assert np.abs(difference.mean()) < 1.5


def test_crops_in_yuv_have_whole_pixels_of_chroma():
  video = video_writer.encode_mp4(videos.moving(20), fps=25)
  rngs = [np.random.default_rng(seed) for seed in range(30)]
  _, locations = transforms.train_clips(
    video,
    transforms.Preprocessing(4, 1, 32),
    rngs,
    short_side=80,
    yuv420=True,
  )
  pixels = np.array([location.box for location in locations]) * [80, 96, 80, 96]
  np.testing.assert_allclose(pixels / 2, np.rint(pixels / 2), atol=1e-9)
  assert (pixels[:, :2] + pixels[:, 2:] <= [80, 96]).all()
  assert (pixels[:, 2:] >= 2).all()
