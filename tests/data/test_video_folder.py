"""Any folder of videos becomes a dataset, whatever else it contains."""

import os
import pathlib
from typing import Any

import cv2
import numpy as np
import pytest

from data.video_folder import video_folder_dataset_builder as video_folder
from dualformer_jax import errors
from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.dataset import (
  PreparedDataset,
  near_duplicates,
)
from dualformer_jax.input_pipeline.preparing import transcoding, video_store
from tests.input_pipeline import videos
from tests.input_pipeline.preparing import building
from tests.input_pipeline.preparing.building import in_process, write

pytestmark = pytest.mark.usefixtures('in_process')
_ = in_process  # A fixture.


def clip(
  number: int, frames: int = 20, height: int = 48, width: int = 64
) -> np.ndarray:
  """Smooth frames that differ between numbers and over time."""
  y, x = np.mgrid[:height, :width] / max(height, width)
  time = np.arange(frames)[:, None, None, None] / frames
  phase = number + np.arange(3) * 2.0 + 3.0 * time
  waves = np.sin(4 * x[None, ..., None] + phase) + np.cos(
    3 * y[None, ..., None] * (1 + number % 3) + phase
  )
  return (127.5 + 60 * waves).clip(0, 255).astype(np.uint8)


def mp4(number: int, **size: int) -> bytes:
  return video_writer.encode_mp4(clip(number, **size), fps=12)


def build(
  manual: pathlib.Path, out: pathlib.Path, **arguments: Any
) -> tuple[dict[str, Any], pathlib.Path]:
  """Returns the report and the folder of the dataset."""
  builder = video_folder.Builder(data_dir=out, **arguments)
  report = building.build(builder, manual)
  return report, pathlib.Path(builder.data_path)


GOOD = {
  'Kätzchen 猫/0.mp4': 20,
  'Kätzchen 猫/1.mp4': 20,
  'Kätzchen 猫/2.mp4': 20,
  'Kätzchen 猫/3.mp4': 20,
  'Kätzchen 猫/4.mp4': 20,
  'alone/only one.mp4': 20,
  'sizes/four.MP4': 4,
  'sizes/large.mp4': 5,
  'sizes/more/and more/small.mp4': 5,
}
BAD = {
  'bad/empty.mp4',
  'bad/folder.mp4',
  'bad/gone.mp4',
  'bad/loop.mp4',
  'bad/pipe.mp4',
  'bad/text.mp4',
}
CLASSES = ('Kätzchen 猫', 'alone', 'bad', 'sizes')


@pytest.fixture
def messy_folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """Good and bad videos among other files, links and folders."""
  root = tmp_path / 'messy videos'
  for number in range(5):
    write(root / 'Kätzchen 猫' / f'{number}.mp4', mp4(number))
  write(root / 'alone' / 'only one.mp4', mp4(16))
  write(root / 'sizes' / 'four.MP4', mp4(11, frames=4))
  write(root / 'sizes' / 'large.mp4', mp4(12, frames=5, height=300, width=401))
  small = mp4(13, frames=5, height=50, width=36)
  write(root / 'sizes' / 'more' / 'and more' / 'small.mp4', small)

  write(root / 'bad' / 'empty.mp4', b'')
  write(root / 'bad' / 'text.mp4', b'This is not a video.\n' * 50)
  (root / 'bad' / 'folder.mp4').mkdir()
  (root / 'bad' / 'gone.mp4').symlink_to('nowhere.mp4')
  (root / 'bad' / 'loop.mp4').symlink_to('loop.mp4')
  os.mkfifo(root / 'bad' / 'pipe.mp4')  # Opening it would block for ever.

  (root / 'sizes' / 'cycle').symlink_to(root)
  write(root / 'sizes' / '._one.mp4', b'written by macOS')
  write(root / '.git' / 'x.mp4', mp4(30))
  write(root / 'sizes' / 'notes.txt', b'notes')
  write(root / 'README', b'read me')
  write(root / 'stray.mp4', mp4(31))
  (root / 'nothing').mkdir()
  return root


def test_messy_folder_becomes_a_dataset(messy_folder, tmp_path):
  report, folder = build(messy_folder, tmp_path / 'out')
  assert report['found'] == len(GOOD) + len(BAD)
  assert report['good'] == len(GOOD)
  reasons = {b['video_id']: b['reason'] for b in report['undecodable']}
  assert reasons.keys() == BAD
  assert all(reason and '\n' not in reason for reason in reasons.values())
  assert report['ignored'] == {
    '.txt': 1,
    'hidden': 2,
    'no extension': 1,
    'not in the folder of a class': 1,
  }
  notes = '\n'.join(report['notes'])
  for note in (
    "link 'sizes/cycle'",
    "'nothing' contains no videos",
    "'bad' has no good video for train, validation",
    "'alone' has no good video for validation",
  ):
    assert note in notes
  assert len(report['notes']) == 4

  names = (folder / 'label.labels.txt').read_text('utf-8')
  assert names == '\n'.join(CLASSES) + '\n'
  train = building.read_split(folder, 'train')
  validation = building.read_split(folder, 'validation')
  assert not train.keys() & validation.keys()
  examples = train | validation
  assert examples.keys() == GOOD.keys()
  for video_id, example in examples.items():
    assert isinstance(example.label, int)
    assert CLASSES[example.label] == video_id.split('/')[0]
    assert videos.probe(example.video).num_frames == GOOD[video_id]
  for split, counts in ((train, [4, 1, 0, 2]), (validation, [1, 0, 0, 1])):
    labels = [example.label for example in split.values()]
    assert np.bincount(labels, minlength=4).tolist() == counts

  sizes = {name: (videos.probe(examples[name].video)) for name in examples}
  large = sizes['sizes/large.mp4']
  assert (large.height, large.width, large.fps) == (256, 342, 12)
  small = sizes['sizes/more/and more/small.mp4']
  assert (small.height, small.width) == (50, 36)
  frames = videos.decode_all(examples['Kätzchen 猫/1.mp4'].video)
  assert np.abs(frames.astype(int) - clip(1)).mean() < 4
  assert np.abs(frames.astype(int) - clip(1)[::-1]).mean() > 20


def test_verbatim_keeps_bytes_and_splits(messy_folder, tmp_path):
  reencoded, other = build(messy_folder, tmp_path / 'out')
  report, folder = build(messy_folder, tmp_path / 'out', config='verbatim')
  for split in ('train', 'validation'):
    examples = building.read_split(folder, split)
    assert examples.keys() == building.read_split(other, split).keys()
    for video_id, example in examples.items():
      assert example.video == (messy_folder / video_id).read_bytes()
  names = [v['video_id'] for v in report['undecodable']]
  assert names == [v['video_id'] for v in reencoded['undecodable']]
  assert report['fingerprint'] != reencoded['fingerprint']


def test_folders_of_splits_are_used(tmp_path):
  videos = tmp_path / 'videos'
  same = mp4(0)
  write(videos / 'train' / 'b' / '0.mp4', same)
  write(videos / 'train' / 'b' / '1.mp4', mp4(1))
  write(videos / 'train' / 'b' / 'sub' / '2.mp4', b'damaged')
  write(videos / 'val' / 'b' / '0.mp4', same)
  smaller = [cv2.resize(frame, (48, 36)) for frame in clip(1)]
  again = video_writer.encode_mp4(smaller[1:], fps=12, crf=30)
  write(videos / 'val' / 'b' / 'again.mp4', again)
  write(videos / 'val' / 'a' / '3.mp4', mp4(3))
  write(videos / 'test' / 'a' / '4.mp4', b'damaged')
  write(videos / 'train' / 'stray.mp4', mp4(5))
  report, folder = build(videos, tmp_path / 'out')
  assert {name: s['classes'] for name, s in report['splits'].items()} == {
    'train': {'a': 0, 'b': 2},
    'validation': {'a': 1, 'b': 2},
  }
  pairs = [
    ('train/b/0.mp4', 'val/b/0.mp4'),
    ('train/b/1.mp4', 'val/b/again.mp4'),
  ]
  assert report['near_copies'] == [
    {'splits': ['train', 'validation'], 'videos': [list(p) for p in pairs]}
  ]
  train, validation = (
    PreparedDataset(os.fspath(folder), split, '')
    for split in ('train', 'validation')
  )
  assert near_duplicates(train, validation) == pairs
  assert near_duplicates(validation, train) == [(b, a) for a, b in pairs]
  assert near_duplicates(train, train) == []
  assert report['ignored'] == {'not in the folder of a class': 1}
  assert report['notes'] == [
    "class 'a' has no good video for train, test",
    "class 'b' has no good video for test",
  ]


def test_classes_can_be_named_like_splits(tmp_path):
  for name in ('train', 'test'):
    for number in range(2):
      write(tmp_path / name / f'{number}.mp4', b'')
  found = video_folder.find_videos(tmp_path)
  assert not found.has_splits
  assert found.class_names == ['test', 'train']


def test_ambiguous_folders_raise(tmp_path):
  write(tmp_path / 'a' / 'train' / 'x' / '0.mp4', b'')
  write(tmp_path / 'a' / 'val' / 'x' / '0.mp4', b'')
  write(tmp_path / 'a' / 'extra' / '0.mp4', b'')
  with pytest.raises(errors.UserError, match="'extra'.*splits or classes"):
    video_folder.find_videos(tmp_path / 'a')
  write(tmp_path / 'b' / 'high jump' / '0.mp4', b'')
  write(tmp_path / 'b' / 'high  jump ' / '0.mp4', b'')
  with pytest.raises(errors.UserError, match="both class 'high jump'"):
    video_folder.find_videos(tmp_path / 'b')
  # The same letters, composed and decomposed.
  write(tmp_path / 'c' / 'caf\u00e9' / '0.mp4', b'')
  write(tmp_path / 'c' / 'cafe\u0301' / '0.mp4', b'')
  with pytest.raises(errors.UserError, match='both'):
    video_folder.find_videos(tmp_path / 'c')


def test_invalid_utf8_names_are_escaped(tmp_path):
  folder = tmp_path / 'videos' / 'a'
  folder.mkdir(parents=True)
  (folder / os.fsdecode(b'\xff.mp4')).write_bytes(mp4(0))
  report, folder = build(tmp_path / 'videos', tmp_path / 'out')
  assert list(building.read_split(folder, 'train')) == ['a/\\xff.mp4']
  assert report['good'] == 1


def test_folders_of_frames_are_videos(tmp_path):
  for number in range(3):
    for index, frame in enumerate(clip(number, frames=4)):
      path = tmp_path / 'videos' / 'waving' / f'{number}' / f'img_{index}.jpg'
      write(path, cv2.imencode('.jpg', frame)[1].tobytes())
  _, folder = build(tmp_path / 'videos', tmp_path / 'out')
  examples = building.read_split(folder, 'train')
  assert len(examples) == 2
  for name, example in examples.items():
    assert name in {f'waving/{number}' for number in range(3)}
    assert videos.probe(example.video).num_frames == 4


def test_only_damaged_videos_raise(tmp_path):
  write(tmp_path / 'videos' / 'a' / '0.mp4', b'damaged')
  with pytest.raises(errors.UserError, match='none of 1 videos'):
    build(tmp_path / 'videos', tmp_path / 'out')
  assert not list((tmp_path / 'out').rglob('1.0.0'))


def test_split_depends_only_on_names():
  nothing = video_store.StoredVideo('')
  videos = [
    (transcoding.Video(f'{name}/{i}', pathlib.Path(), (name,)), nothing)
    for name, number in (('a', 100), ('b', 7), ('c', 2), ('d', 1))
    for i in range(number)
  ]

  def validation(given):
    chosen = video_folder.choose_splits(given, 0.2)
    return {v.video_id for v, _ in chosen if v.split == 'validation'}

  names = validation(videos)
  counts = {k: sum(n.startswith(k) for n in names) for k in 'abcd'}
  assert counts == {'a': 20, 'b': 1, 'c': 1, 'd': 0}
  assert validation(videos[::-1]) == names
  assert validation([v for v in videos if v[0].labels != ('a',)]) == {
    name for name in names if not name.startswith('a')
  }
  # One more video moves at most one other.
  assert len(names - validation(videos[1:])) <= 2


def test_validation_share_is_configurable(tmp_path):
  for number in range(4):
    write(tmp_path / 'videos' / 'a' / f'{number}.mp4', mp4(number, frames=2))
  config = video_folder.VideoFolderConfig(name='half', validation_share=0.5)
  report, _ = build(tmp_path / 'videos', tmp_path / 'out', config=config)
  assert {n: s['videos'] for n, s in report['splits'].items()} == {
    'train': 2,
    'validation': 2,
  }


@pytest.mark.slow
def test_real_clips_are_stored_completely(clips_dir, tmp_path):
  source = tmp_path / 'videos'
  frames = {
    'cleaning pool/k400_cleaning_pool_part0_32f.mp4': 32,
    'making a cake/k400_making_a_cake_portrait.mp4': 300,
    'making a cake/broken_corrupted.mp4': None,
    'Archery/ucf101_Archery_example.avi': 131,
    'CricketShot/ucf101_v_CricketShot_g04_c01_rgb.gif': 79,
    'unordered/edge_unordered_4f.mov': 4,
  }
  for name in frames:
    path = source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(clips_dir / path.name)
  report, folder = build(source, tmp_path / 'out')
  assert [b['video_id'] for b in report['undecodable']] == [
    'making a cake/broken_corrupted.mp4'
  ]
  good = {name: count for name, count in frames.items() if count}
  examples = building.read_split(folder, 'train')
  assert examples.keys() == good.keys()
  for name, count in good.items():
    original = videos.decode_all(clips_dir / name.split('/')[1])
    stored = videos.decode_all(examples[name].video)
    assert len(original) == len(stored) == count
    if min(original.shape[1:3]) <= 256:
      height, width = stored.shape[1:3]
      original = original[:, :height, :width].astype(int)
      for index in range(0, count, 16):
        assert np.abs(stored[index] - original[index]).mean() < 6
  portrait = examples['making a cake/k400_making_a_cake_portrait.mp4'].video
  info = videos.probe(portrait)
  assert (info.height, info.width) == (340, 256)
