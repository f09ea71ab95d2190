"""Any folder of videos becomes a dataset, whatever lies in it."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any
import wave

import av
import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dualformer_jax import errors
from dualformer_jax.input_pipeline import decoding, records, storing
import preparation
from tests import tfds_command
from video_folder import video_folder_dataset_builder as video_folder


def clip(
  number: int, frames: int = 20, height: int = 48, width: int = 64
) -> np.ndarray:
  """Smooth frames, different for every number; they change over time."""
  y, x = np.mgrid[:height, :width] / max(height, width)
  time = np.arange(frames)[:, None, None, None] / frames
  phase = number + np.arange(3) * 2.0 + 3.0 * time
  waves = np.sin(4 * x[None, ..., None] + phase) + np.cos(
    3 * y[None, ..., None] * (1 + number % 3) + phase
  )
  return (127.5 + 60 * waves).clip(0, 255).astype(np.uint8)


def mp4(number: int, **size: int) -> bytes:
  return decoding.encode_mp4(clip(number, **size), fps=12)


def write(path: pathlib.Path, content: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def write_with(path: pathlib.Path, codec: str, frames: np.ndarray) -> None:
  """A video of another kind, as its extension says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), 'w') as container:
    stream: Any = container.add_stream(codec, rate=12)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = 'yuv420p'
    for frame in frames:
      container.mux(
        stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24'))
      )
    container.mux(stream.encode())


def build(
  manual: pathlib.Path, out: pathlib.Path, **arguments: Any
) -> tuple[dict[str, Any], video_folder.Builder]:
  """The same as the command, without waiting for a process."""
  builder = video_folder.Builder(data_dir=out, **arguments)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=manual, try_download_gcs=False
    )
  )
  report = builder.data_path / 'report.json'
  return json.loads(report.read_text(encoding='utf-8')), builder


def stored(
  folder: str | os.PathLike[str], split: str
) -> dict[str, records.Example]:
  dataset = records.PreparedDataset(os.fspath(folder), split, '')
  examples = [dataset[i] for i in range(len(dataset))]
  return {example.video_id: example for example in examples}


@pytest.fixture(scope='module')
def strange(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Videos good, broken and odd, among all that else lies in folders."""
  root = tmp_path_factory.mktemp('strange videos')
  for number in range(5):
    write(root / 'Kätzchen 猫' / f'{number}.mp4', mp4(number))
  write(root / 'frames' / 'one.mp4', mp4(10, frames=1))
  write(root / 'frames' / 'four.MP4', mp4(11, frames=4))
  write(root / 'sizes' / 'large.mp4', mp4(12, frames=5, height=300, width=401))
  write(root / 'sizes' / 'small.mp4', mp4(13, frames=5, height=50, width=36))
  write_with(root / 'kinds' / 'a.avi', 'mpeg4', clip(14))
  write_with(
    root / 'kinds' / 'deeper' / 'and deeper' / 'b.mkv', 'h264', clip(15)
  )
  write(root / 'alone' / 'only one.mp4', mp4(16))

  whole = mp4(20)
  write(root / 'bad' / 'cut.mp4', whole[: len(whole) // 2])
  write(root / 'bad' / 'empty.mp4', b'')
  write(root / 'bad' / 'text.mp4', b'This is not a video.\n' * 50)
  write(root / 'bad' / 'playlist.mp4', b'#EXTM3U\n#EXTINF:1,\n../alone/x.mp4\n')
  with wave.open(str(root / 'bad' / 'sound.mp4'), 'wb') as sound:
    sound.setparams((1, 2, 8000, 0, 'NONE', ''))
    sound.writeframes(bytes(8000))
  with av.open(str(root / 'bad' / 'no frames.mp4'), 'w') as container:
    stream: Any = container.add_stream('libx264', rate=12)
    stream.height = stream.width = 32
    stream.pix_fmt = 'yuv420p'
    container.start_encoding()
  (root / 'bad' / 'gone.mp4').symlink_to('nowhere.mp4')
  os.mkfifo(root / 'bad' / 'pipe.mp4')  # Whoever opens it waits for ever.

  (root / 'kinds' / 'round').symlink_to(root)
  (root / 'kinds' / 'itself.mp4').symlink_to('itself.mp4')
  write(root / 'frames' / '._one.mp4', b'what macOS leaves')
  write(root / '.git' / 'x.mp4', mp4(30))
  write(root / 'frames' / 'notes.txt', b'notes')
  write(root / 'README', b'read me')
  write(root / 'stray.mp4', mp4(31))
  (root / 'nothing').mkdir()
  return root


BAD = {
  'bad/cut.mp4',
  'bad/empty.mp4',
  'bad/gone.mp4',
  'bad/no frames.mp4',
  'bad/pipe.mp4',
  'bad/playlist.mp4',
  'bad/sound.mp4',
  'bad/text.mp4',
  'kinds/itself.mp4',
}
GOOD = {
  'Kätzchen 猫/0.mp4': 20,
  'Kätzchen 猫/1.mp4': 20,
  'Kätzchen 猫/2.mp4': 20,
  'Kätzchen 猫/3.mp4': 20,
  'Kätzchen 猫/4.mp4': 20,
  'alone/only one.mp4': 20,
  'frames/four.MP4': 4,
  'frames/one.mp4': 1,
  'kinds/a.avi': 20,
  'kinds/deeper/and deeper/b.mkv': 20,
  'sizes/large.mp4': 5,
  'sizes/small.mp4': 5,
}
NAMES = ('Kätzchen 猫', 'alone', 'bad', 'frames', 'kinds', 'sizes')


@pytest.fixture(scope='module')
def built(
  strange: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The dataset of them, by the command, given in another folder."""
  out = tmp_path_factory.mktemp('out')
  done = tfds_command.tfds_build(
    tfds_command.REPOSITORY / 'data' / 'video_folder',
    f'--manual_dir={strange}',
    f'--data_dir={out}',
    cwd=out,
  )
  assert done.returncode == 0, done.stderr
  for video_id in BAD:  # A line for each.
    assert any(
      line.startswith('WARNING') and f'{video_id}: ' in line
      for line in (done.stdout + done.stderr).splitlines()
    )
  return out / 'video_folder' / 'reencoded' / '1.0.0'


def test_no_file_is_lost_without_a_word(built):
  report = json.loads((built / 'report.json').read_text(encoding='utf-8'))
  assert report['found'] == len(GOOD) + len(BAD)
  assert report['good'] == len(GOOD)
  reasons = {b['video_id']: b['reason'] for b in report['undecodable']}
  assert reasons.keys() == BAD
  assert all(reason and '\n' not in reason for reason in reasons.values())
  assert 'empty' in reasons['bad/empty.mp4']
  assert 'link' in reasons['bad/gone.mp4']
  assert report['ignored'] == {
    '.txt': 1,
    'hidden': 2,
    'no extension': 1,
    'not in the folder of a class': 1,
  }
  notes = '\n'.join(report['notes'])
  assert "'kinds/round'" in notes
  assert "'nothing' holds no video" in notes
  assert "'bad' has no good video for train, validation" in notes
  assert "'alone' has no good video for validation" in notes
  assert len(report['notes']) == 4


def test_every_good_video_is_stored_under_its_class(built):
  assert (built / 'label.labels.txt').read_text(encoding='utf-8') == (
    '\n'.join(NAMES) + '\n'
  )
  splits = {split: stored(built, split) for split in ('train', 'validation')}
  assert not splits['train'].keys() & splits['validation'].keys()
  examples = splits['train'] | splits['validation']
  assert examples.keys() == GOOD.keys()
  for video_id, example in examples.items():
    assert isinstance(example.label, int)
    assert NAMES[example.label] == video_id.split('/')[0]
    assert decoding.count_frames(example.video) == GOOD[video_id]
  counts = {
    split: np.bincount([e.label for e in examples.values()], minlength=6)
    for split, examples in splits.items()
  }
  assert counts['validation'].tolist() == [1, 0, 0, 1, 1, 1]
  assert counts['train'].tolist() == [4, 1, 0, 1, 1, 1]


def test_stored_videos_are_small_and_cheap_to_seek_in(built):
  examples = stored(built, 'train') | stored(built, 'validation')
  sizes = {}
  for video_id in ('sizes/large.mp4', 'sizes/small.mp4', 'kinds/a.avi'):
    info = decoding.probe(examples[video_id].video)
    sizes[video_id] = (info.height, info.width)
    assert info.fps == 12
  assert sizes == {
    'sizes/large.mp4': (256, 342),
    'sizes/small.mp4': (50, 36),
    'kinds/a.avi': (48, 64),
  }
  frames = decoding.decode_all(examples['kinds/deeper/and deeper/b.mkv'].video)
  difference = np.abs(frames.astype(int) - clip(15))
  assert difference.mean() < 4
  assert np.abs(frames.astype(int) - clip(15)[::-1]).mean() > 20


def test_verbatim_keeps_the_bytes_and_splits_alike(built, strange, tmp_path):
  build(strange, tmp_path, config='verbatim', file_format='array_record')
  folder = tmp_path / 'video_folder' / 'verbatim' / '1.0.0'
  assert list(folder.glob('*.array_record-*'))
  for split in ('train', 'validation'):
    examples = stored(folder, split)
    assert examples.keys() == stored(built, split).keys()
    for video_id, example in examples.items():
      assert example.video == (strange / video_id).read_bytes()
  reports = [
    json.loads((f / 'report.json').read_text(encoding='utf-8'))
    for f in (folder, built)
  ]
  assert reports[0]['undecodable'] == reports[1]['undecodable']
  assert reports[0]['fingerprint'] != reports[1]['fingerprint']


def test_no_video_at_all_is_one_line(tmp_path):
  write(tmp_path / 'videos' / 'yoga' / 'notes.txt', b'no video')
  done = tfds_command.tfds_build(
    'data/video_folder',
    f'--manual_dir={tmp_path / "videos"}',
    f'--data_dir={tmp_path / "out"}',
  )
  assert done.returncode != 0
  assert 'Traceback' not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith(f'error: {tmp_path / "videos"}: no videos found')
  assert not list((tmp_path / 'out').rglob('1.0.0'))


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
  videos = tmp_path / 'videos'
  same = mp4(0)
  write(videos / 'train' / 'b' / '0.mp4', same)
  write(videos / 'train' / 'b' / '1.mp4', mp4(1))
  write(videos / 'train' / 'b' / 'sub' / '2.mp4', b'broken')
  write(videos / 'val' / 'b' / '0.mp4', same)
  smaller = [cv2.resize(f, (48, 36)) for f in clip(1)]
  again = decoding.encode_mp4(smaller[1:], fps=12, crf=30)
  write(videos / 'val' / 'b' / 'again.mp4', again)
  write(videos / 'val' / 'a' / '3.mp4', mp4(3))
  write(videos / 'test' / 'a' / '4.mp4', b'broken')
  write(videos / 'train' / 'stray.mp4', mp4(5))
  report, builder = build(videos, tmp_path / 'out')
  assert builder.label.names == ['a', 'b']
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
  summary = (builder.data_path / 'summary.txt').read_text()
  assert '2 videos of validation are in train as well' in summary
  assert '  val/b/again.mp4 is like train/b/1.mp4' in summary
  train, validation = (
    records.PreparedDataset(os.fspath(builder.data_path), split, '')
    for split in ('train', 'validation')
  )
  assert records.near_copies(train, validation) == pairs
  assert records.near_copies(validation, train) == [(b, a) for a, b in pairs]
  assert records.near_copies(train, train) == []
  assert report['ignored'] == {'not in the folder of a class': 1}
  assert report['notes'] == [
    "class 'a' has no good video for train, test",
    "class 'b' has no good video for test",
  ]


def test_classes_may_be_called_like_splits(tmp_path):
  for name in ('train', 'test'):
    for number in range(2):
      write(tmp_path / name / f'{number}.mp4', b'')
  found = video_folder.find_videos(tmp_path)
  assert not found.has_splits
  assert found.class_names == ['test', 'train']


def test_what_cannot_be_told_apart_is_an_error(tmp_path):
  write(tmp_path / 'a' / 'train' / 'x' / '0.mp4', b'')
  write(tmp_path / 'a' / 'val' / 'x' / '0.mp4', b'')
  write(tmp_path / 'a' / 'extra' / '0.mp4', b'')
  with pytest.raises(errors.UserError, match="'extra'.*side by side"):
    video_folder.find_videos(tmp_path / 'a')
  write(tmp_path / 'b' / 'high jump' / '0.mp4', b'')
  write(tmp_path / 'b' / 'high  jump ' / '0.mp4', b'')
  with pytest.raises(errors.UserError, match="both 'high jump'"):
    video_folder.find_videos(tmp_path / 'b')
  # The same letters, the accent apart or not.
  write(tmp_path / 'c' / 'caf\u00e9' / '0.mp4', b'')
  write(tmp_path / 'c' / 'cafe\u0301' / '0.mp4', b'')
  with pytest.raises(errors.UserError, match='both'):
    video_folder.find_videos(tmp_path / 'c')


def test_names_that_are_not_text_are_written_as_such(tmp_path):
  folder = tmp_path / 'videos' / 'a'
  folder.mkdir(parents=True)
  (folder / os.fsdecode(b'\xff.mp4')).write_bytes(mp4(0))
  report, builder = build(tmp_path / 'videos', tmp_path / 'out')
  assert list(stored(builder.data_path, 'train')) == ['a/\\xff.mp4']
  assert report['good'] == 1


def test_a_folder_of_frames_is_a_video(tmp_path):
  for number in range(3):
    folder = tmp_path / 'videos' / 'waving' / f'{number}'
    folder.mkdir(parents=True)
    for index, frame in enumerate(clip(number, frames=4)):
      cv2.imwrite(os.fspath(folder / f'img_{index + 1:05d}.jpg'), frame)
  (tmp_path / 'videos' / 'waving' / 'not one.mp4').mkdir()
  report, builder = build(tmp_path / 'videos', tmp_path / 'out')
  examples = stored(builder.data_path, 'train')
  assert len(examples) == 2
  for name, example in examples.items():
    assert name in {f'waving/{number}' for number in range(3)}
    assert decoding.probe(example.video).num_frames == 4
  (bad,) = report['undecodable']
  assert bad['video_id'] == 'waving/not one.mp4'


def test_nothing_decodable_is_an_error_that_leaves_nothing(tmp_path):
  write(tmp_path / 'videos' / 'a' / '0.mp4', b'broken')
  with pytest.raises(errors.UserError, match='none of its 1 videos'):
    build(tmp_path / 'videos', tmp_path / 'out')
  with pytest.raises(errors.UserError, match='--manual_dir'):
    build(tmp_path / 'absent', tmp_path / 'out')
  folder = tmp_path / 'out' / 'video_folder' / 'reencoded'
  assert {path.name for path in folder.iterdir()} <= {
    '.1.0.0-videos',  # What is known of the videos.
    '.1.0.0-videos.lock',
  }


def test_an_aborted_build_leaves_nothing_that_looks_whole(
  tmp_path, monkeypatch
):
  for number in range(3):
    write(tmp_path / 'videos' / 'a' / f'{number}.mp4', mp4(number))
  taken = []

  def full(*video):
    taken.append(video)
    if len(taken) == 2:
      raise OSError('No space left on device')
    return example(*video)

  example = storing.example
  with monkeypatch.context() as patched:
    patched.setattr(storing, 'example', full)
    with pytest.raises(OSError, match='No space'):
      build(tmp_path / 'videos', tmp_path / 'out')
  folder = tmp_path / 'out' / 'video_folder' / 'reencoded'
  assert len(taken) == 2
  # What was decoded is kept for the next attempt.
  assert {path.name for path in folder.iterdir()} <= {
    '.1.0.0-videos',
    '.1.0.0-videos.lock',
  }
  report, _ = build(tmp_path / 'videos', tmp_path / 'out')
  assert report['good'] == 3
  assert [path.name for path in folder.iterdir()] == ['1.0.0']


def test_the_split_depends_on_nothing_but_names():
  nothing = storing.Stored('')
  videos = [
    (preparation.Video(f'{name}/{i}.mp4', pathlib.Path(), name), nothing)
    for name, number in (('a', 100), ('b', 7), ('c', 2), ('d', 1))
    for i in range(number)
  ]

  def held_out(given):
    chosen = video_folder.choose_splits(given, 0.2)
    return {v.video_id for v, _ in chosen if v.split == 'validation'}

  names = held_out(videos)
  counts = {k: sum(n.startswith(k) for n in names) for k in 'abcd'}
  assert counts == {'a': 20, 'b': 1, 'c': 1, 'd': 0}
  assert held_out(videos[::-1]) == names
  assert held_out([v for v in videos if v[0].label != 'a']) == {
    name for name in names if not name.startswith('a')
  }
  # One more video moves one other at most.
  assert len(names - held_out(videos[1:])) <= 2


def test_a_share_can_be_given(tmp_path):
  for number in range(4):
    write(tmp_path / 'videos' / 'a' / f'{number}.mp4', mp4(number, frames=2))
  report, _ = build(
    tmp_path / 'videos',
    tmp_path / 'out',
    config=video_folder.VideoFolderConfig(name='half', validation_share=0.5),
  )
  assert {n: s['videos'] for n, s in report['splits'].items()} == {
    'train': 2,
    'validation': 2,
  }


def test_videos_too_large_for_a_record_are_left_out(tmp_path, monkeypatch):
  write(tmp_path / 'videos' / 'a' / '0.mp4', mp4(0, frames=2))
  large = mp4(1, frames=20)
  write(tmp_path / 'videos' / 'a' / '1.mp4', large)
  monkeypatch.setattr(storing, 'MAX_BYTES', len(large) - 1)
  video = storing.Video('a', tmp_path / 'videos' / 'a' / '1.mp4', 'a')
  kept = storing.store(video, storing.Storage('verbatim'), tmp_path / 'kept')
  assert str(len(large)) in kept.reason


def test_real_clips(clips_dir, tmp_path):
  videos = tmp_path / 'videos'
  frames = {
    'cleaning pool/k400_cleaning_pool_test.mp4': 300,
    'cleaning pool/k400_cleaning_pool_part0_32f.mp4': 32,
    'making a cake/k400_making_a_cake_portrait.mp4': 300,
    'making a cake/broken_corrupted.mp4': None,
    'Archery/ucf101_Archery_example.avi': 131,
    'Archery/ucf101_ApplyEyeMakeup_test.avi': 164,
    'CricketShot/ucf101_v_CricketShot_g04_c01_rgb.gif': 79,
    'unordered/edge_unordered_4f.mov': 4,
  }
  for name in frames:
    path = videos / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(clips_dir / path.name)
  report, builder = build(videos, tmp_path / 'out')
  assert [b['video_id'] for b in report['undecodable']] == [
    'making a cake/broken_corrupted.mp4'
  ]
  examples = stored(builder.data_path, 'train')
  examples |= stored(builder.data_path, 'validation')
  good = {name: count for name, count in frames.items() if count}
  assert examples.keys() == good.keys()
  for name, count in good.items():
    original = decoding.decode_all(clips_dir / name.split('/')[1])
    kept = decoding.decode_all(examples[name].video)
    assert len(original) == len(kept) == count
    if min(original.shape[1:3]) <= 256:
      # Each frame is nearest to the one it comes from, or to one like it.
      height, width = kept.shape[1:3]
      original = original[:, :height, :width].astype(int)
      for index in range(0, count, 16):
        assert np.abs(kept[index] - original[index]).mean() < 6
  portrait = examples['making a cake/k400_making_a_cake_portrait.mp4'].video
  info = decoding.probe(portrait)
  assert (info.height, info.width) == (340, 256)
