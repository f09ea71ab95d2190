"""From a folder of real videos to a model that classifies them."""

from __future__ import annotations

import json
import pathlib
import shutil

import av
import numpy as np
import pytest

import dualformer_jax
from dualformer_jax import errors
from dualformer_jax.inference import recognizer as recognizers
from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from tests import tfds_command, training_command

pytestmark = pytest.mark.slow

CLASSES = {
  'ApplyEyeMakeup': ('ucf101_ApplyEyeMakeup_test.avi',),
  'Archery': ('ucf101_Archery_example.avi',),
  'CricketShot': ('ucf101_v_CricketShot_g04_c01_rgb.gif',),
  'arm wrestling': ('k400_arm_wrestling_demo.mp4',),
  'cleaning pool': (
    'k400_cleaning_pool_test.mp4',
    'k400_cleaning_pool_part0_32f.mp4',
  ),
  'four frames': ('edge_unordered_4f.mov',),
  'hitting baseball': ('k400_hitting_baseball.mp4',),
  'making a cake': ('k400_making_a_cake_portrait.mp4',),
  'yoga': ('k400_yoga_Tw2yXa6CzWE.mp4', 'broken_corrupted.mp4'),
}
BROKEN = 'yoga/broken_corrupted.mp4'
# Small and from scratch, to take a minute rather than an hour.
FLAGS = (
  '--config.model.depths=(1, 2)',
  '--config.model.embed_dims=(24, 48)',
  '--config.model.num_heads=(1, 2)',
  '--config.model.num_frames=8',
  '--config.model.image_size=32',
  '--config.model.window=(4, 4, 4)',
  '--config.model.fine_sizes=((4, 4, 4), (4, 4, 4))',
  '--config.model.coarse_sizes=(None, (2, 2, 2))',
  '--config.model.drop_path_rate=0.0',
  '--config.model.head_dropout=0.0',
  '--config.model.dtype=float32',
  '--config.dataset.train_short_side=36',
  '--config.dataset.validation_split=train',
  '--config.dataset.test_split=train',
  '--config.dataset.num_threads=4',
  "--config.optimizer.multipliers=(('.*', 1.0, 1.0),)",
  '--config.optimizer.learning_rate=2e-3',
  '--config.num_epochs=120',
  '--config.validation.every_epochs=120',
)


@pytest.fixture(scope='module', name='videos')
def _videos(clips_dir, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('videos')
  for name, files in CLASSES.items():
    (folder / name).mkdir()
    for file in files:
      shutil.copy(clips_dir / file, folder / name)
  return folder


@pytest.fixture(scope='module', name='data_dir')
def _data_dir(videos, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('data')
  done = tfds_command.tfds_build(
    'data/video_folder', f'--manual_dir={videos}', f'--data_dir={folder}'
  )
  assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture(scope='module', name='workdir')
def _workdir(data_dir, tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp('trained')
  done = training_command.run_here(
    *FLAGS,
    f'--config.dataset.data_dir={data_dir}',
    config='video_folder',
    workdir=workdir,
  )
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture(scope='module', name='recognizer')
def _recognizer(workdir) -> recognizers.Recognizer:
  return dualformer_jax.load(workdir)


@pytest.fixture(scope='module', name='train_files')
def _train_files(data_dir) -> list[str]:
  dataset = PreparedDataset('video_folder', 'train', str(data_dir))
  return [dataset[i].video_id for i in range(len(dataset))]


def test_broken_video_is_reported_and_excluded(data_dir, train_files):
  (path,) = data_dir.rglob('report.json')
  report = json.loads(path.read_text())
  (broken,) = report['undecodable']
  assert broken['video_id'] == BROKEN
  assert broken['reason']
  assert BROKEN not in train_files
  # One of the two of `cleaning pool` is kept for validation.
  assert len(train_files) == 9


def test_training_overfits_its_videos(workdir, train_files):
  report = json.loads((workdir / 'report.json').read_text())
  assert report['num_videos'] == len(train_files)
  assert report['failed_videos'] == []
  assert report['top1'] == 1.0
  assert report['mean_class_accuracy'] == 1.0


def test_recognizer_classifies_each_file(recognizer, videos, train_files):
  assert recognizer.class_names == tuple(sorted(CLASSES))
  for name in train_files:
    (best, probability), *_ = recognizer.predict(videos / name)
    assert best == pathlib.Path(name).parent.name
    assert 0.0 < probability <= 1.0


def test_undecodable_video_raises_one_line(recognizer, videos):
  with pytest.raises(errors.UserError) as caught:
    recognizer.predict(videos / BROKEN)
  assert '\n' not in str(caught.value)
  assert 'broken_corrupted.mp4' in str(caught.value)


@pytest.mark.parametrize('num_frames', [1, 4])
def test_few_frames_are_looped(recognizer, tmp_path, num_frames):
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (num_frames, 48, 80, 3), np.uint8)
  path = tmp_path / 'short.mp4'
  path.write_bytes(video_writer.encode_mp4(frames, fps=25))
  for video in (path, frames):
    predicted = recognizer.predict(video, top_k=len(CLASSES))
    assert {name for name, _ in predicted} == set(CLASSES)
    assert sum(value for _, value in predicted) == pytest.approx(1, rel=1e-5)


def test_video_without_frames_raises_one_line(recognizer, tmp_path):
  path = tmp_path / 'empty.mp4'
  with av.open(str(path), 'w') as file:
    stream = file.add_stream('libx264', rate=25)
    stream.width = stream.height = 32
    file.start_encoding()
  assert path.stat().st_size > 0
  for video in (path, np.zeros((0, 32, 32, 3), np.uint8)):
    with pytest.raises(errors.UserError) as caught:
      recognizer.predict(video)
    assert '\n' not in str(caught.value)
