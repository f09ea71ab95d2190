"""Motion: classes that differ only in motion, built by the command."""

from concurrent import futures
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import cv2
import numpy as np
import pytest

from data.motion import motion_dataset_builder as motion
from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from tests import tfds_command
from tests.input_pipeline import videos

NAMES = (
  'left',
  'right',
  'up',
  'down',
  'clockwise',
  'counter_clockwise',
  'grow',
  'shrink',
)
OPPOSITE = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4, 6: 7, 7: 6}


def scenes(number: int) -> list[motion.Scene]:
  return [
    motion.draw_scene(np.random.default_rng((7, i))) for i in range(number)
  ]


@pytest.mark.parametrize('label', range(8), ids=NAMES)
def test_reversed_clip_is_a_clip_of_the_opposite_class(label):
  for scene in scenes(3):
    # The noise has to be reversed as well.
    backwards = dataclasses.replace(scene, noise=scene.noise[::-1])
    forwards = motion.film(scene, label)
    opposite = motion.film(backwards, OPPOSITE[label])
    np.testing.assert_array_equal(forwards[::-1], opposite)
    assert np.abs(forwards[0].astype(int) - forwards[-1]).max() > 50


def test_same_random_numbers_give_the_same_clip():
  clip = motion.film(motion.draw_scene(np.random.default_rng(5)), 4)
  assert clip.shape == (16, 32, 32, 3)
  assert clip.dtype == np.uint8
  again = motion.film(motion.draw_scene(np.random.default_rng(5)), 4)
  np.testing.assert_array_equal(clip, again)
  other = motion.film(motion.draw_scene(np.random.default_rng(6)), 4)
  assert (clip != other).mean() > 0.5


def test_encoding_is_the_same_in_every_thread():
  clips = [motion.film(scene, 6) for scene in scenes(20)]
  # At this size, x264's macroblock tree would give different bytes.
  clips = [np.repeat(np.repeat(clip, 3, 1), 2, 2) for clip in clips]
  encode = functools.partial(video_writer.encode_mp4, fps=16)
  with futures.ThreadPoolExecutor(4) as threads:
    first = list(threads.map(encode, clips))
    for _ in range(4):
      assert list(threads.map(encode, clips)) == first


def _single_frame_features(frames: np.ndarray) -> np.ndarray:
  """Coarse colors, position and area of the shape; linear and nonlinear."""
  rng = np.random.default_rng(0)
  colors = np.stack(
    [
      cv2.resize(frame, (8, 8), interpolation=cv2.INTER_AREA).ravel()
      for frame in frames
    ]
  )
  middle = np.median(frames, axis=(1, 2), keepdims=True)
  shape = np.abs(frames - middle).sum(axis=-1) > 100
  circle = np.exp(2j * np.pi * np.arange(32) / 32)
  places = [(shape.sum(axis=axis) * circle).sum(axis=-1) for axis in (1, 2)]
  found = np.stack(
    [shape.mean(axis=(1, 2))]
    + [part for p in places for part in (p.real, p.imag, np.angle(p))],
    axis=1,
  )
  features = [np.ones((len(frames), 1))]
  for values, scale in ((colors.astype(float), 0.05), (found, 0.5)):
    values = (values - values.mean(axis=0)) / values.std(axis=0)
    weights = scale * rng.normal(size=(values.shape[1], 150))
    features += [values, np.cos(values @ weights + rng.uniform(0, 6.28, 150))]
  return np.concatenate(features, axis=1)


def _accuracy_from_single_frames(
  frames: list[np.ndarray], labels: np.ndarray
) -> float:
  """Accuracy of a ridge regression, fitted on two thirds of the frames."""
  x, y = _single_frame_features(np.stack(frames)), np.eye(8)[labels]
  seen = len(x) * 2 // 3
  gram = x[:seen].T @ x[:seen] + 10 * np.eye(x.shape[1])
  weights = np.linalg.solve(gram, x[:seen].T @ y[:seen])
  return ((x[seen:] @ weights).argmax(axis=1) == labels[seen:]).mean()


@pytest.mark.slow
def test_single_frame_contains_no_information_about_the_class():
  labels = np.arange(2000) % 8
  drawn = scenes(len(labels))

  def accuracy(index: int, **fixed: Any) -> float:
    return _accuracy_from_single_frames(
      [
        motion.picture(dataclasses.replace(scene, **fixed), int(label), index)
        for scene, label in zip(drawn, labels, strict=True)
      ],
      labels,
    )

  # Guessing gives 0.125, with a standard deviation of 0.013.
  for index in (0, 8):
    assert accuracy(index) < 0.165
  # The same classifier finds the class if all shapes start at one position, or
  # with one size.
  assert accuracy(0, center=np.array([16.0, 16.0])) > 0.3
  assert accuracy(0, size=0.5) > 0.18


def _seen_motion(clip: np.ndarray) -> int:
  """The class by optical flow: the motion that best explains the change."""
  gray = clip @ np.array([0.299, 0.587, 0.114])
  padded = np.pad(gray, ((0, 0), (8, 8), (8, 8)), mode='wrap')
  frames = [cv2.GaussianBlur(f, (0, 0), 1.5)[8:-8, 8:-8] for f in padded]
  circle = np.exp(2j * np.pi * np.arange(32) / 32)
  votes = np.zeros(8)
  for before, after in zip(frames[:-1], frames[1:], strict=True):
    change, mean = after - before, (before + after) / 2
    slope_y, slope_x = (
      (np.roll(mean, -1, axis) - np.roll(mean, 1, axis)) / 2 for axis in (0, 1)
    )
    y, x = (
      (
        np.arange(32)
        - np.angle(((change**2).sum(axis=1 - axis) * circle).sum())
        * (16 / np.pi)
        + 16
      )
      % 32
      - 16
      for axis in (0, 1)
    )
    y, x = y[:, None], x[None]
    near = np.exp(-(x**2 + y**2) / 128)
    # d/dt = -(velocity . slope), with the velocity of each class.
    for label, (along_x, along_y) in enumerate(
      [(-1, 0), (1, 0), (0, -1), (0, 1), (-y, x), (y, -x), (x, y), (-x, -y)]
    ):
      expected = -(along_x * slope_x + along_y * slope_y)
      size = np.sqrt((near * expected**2).sum() * (near * change**2).sum())
      votes[label] += (near * expected * change).sum() / size
  return int(votes.argmax())


def test_optical_flow_finds_the_class():
  labels = np.arange(48) % 8
  seen = [
    _seen_motion(
      videos.decode_all(
        video_writer.encode_mp4(motion.film(scene, int(label)), fps=16)
      )
    )
    for scene, label in zip(scenes(len(labels)), labels, strict=True)
  ]
  assert (np.array(seen) == labels).mean() >= 0.97


@pytest.mark.parametrize('label', range(8), ids=NAMES)
def test_cover_is_where_the_shape_is(label):
  for scene in scenes(3):
    plain = dataclasses.replace(scene, noise=np.zeros_like(scene.noise))
    for index in (0, 7, 15):
      frame = motion.picture(plain, label, index)
      share = (frame - scene.background) / (scene.color - scene.background)
      # Where the colors are similar, rounding dominates the difference.
      contrast = np.abs(scene.color - scene.background)
      seen = np.average(share, axis=-1, weights=contrast)
      np.testing.assert_allclose(
        motion.cover(scene, label, index), seen, atol=0.05
      )


@pytest.mark.slow
def test_command_builds_videos_of_every_class(motion_dataset):
  names = set()
  contents = set()
  for split in ('train', 'validation'):
    dataset = PreparedDataset('motion', split, str(motion_dataset))
    assert dataset.class_names == NAMES
    assert len(dataset) == 48
    examples = [dataset[i] for i in range(48)]
    counts = np.bincount([example.label for example in examples])
    assert counts.tolist() == [6] * 8
    names |= {example.video_id for example in examples}
    contents |= {example.video for example in examples}
    for example in examples[:16]:
      scene, label = motion.scene_of(split, int(example.video_id.split('/')[1]))
      assert label == example.label
      film = motion.film(scene, label).astype(int)
      assert np.abs(videos.decode_all(example.video) - film).mean() < 10
      frames = videos.decode_all(example.video)
      assert frames.shape == (16, 32, 32, 3)
      assert _seen_motion(frames) == example.label
  # The splits have no video in common.
  assert len(names) == len(contents) == 96


def test_report_describes_the_dataset(motion_dataset):
  folder = motion_dataset / 'motion' / '1.0.0'
  report = json.loads((folder / 'report.json').read_text())
  lines = []
  for split in ('train', 'validation'):
    dataset = PreparedDataset('motion', split, str(motion_dataset))
    examples = [dataset[i] for i in range(len(dataset))]
    assert report['splits'][split] == {
      'videos': 48,
      'bytes': sum(len(example.video) for example in examples),
      'classes': dict.fromkeys(NAMES, 6),
    }
    lines += [
      [split, e.video_id, [e.label], hashlib.sha256(e.video).hexdigest()]
      for e in examples
    ]
  content = ''.join(json.dumps(line) + '\n' for line in sorted(lines))
  fingerprint = hashlib.sha256(content.encode()).hexdigest()
  assert report['fingerprint'] == fingerprint
  assert report['near_copies'] == []


@pytest.mark.slow
def test_command_in_another_folder_builds_the_same(motion_dataset, tmp_path):
  done = tfds_command.tfds_build(
    tfds_command.REPOSITORY / 'data' / 'motion',
    f'--data_dir={tmp_path}',
    '--max_examples_per_split=48',
    '--file_format=array_record',
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  name = pathlib.Path('motion', '1.0.0', 'report.json')
  assert (tmp_path / name).read_text() == (motion_dataset / name).read_text()
  dataset = PreparedDataset('motion', 'validation', str(tmp_path))
  other = PreparedDataset('motion', 'validation', str(motion_dataset))
  videos = {dataset[i].video_id: dataset[i].video for i in range(48)}
  assert videos == {other[i].video_id: other[i].video for i in range(48)}
