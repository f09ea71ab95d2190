"""Each video is transcoded once; results survive an interruption."""

from collections.abc import Iterator
import dataclasses
import hashlib
import os
import pathlib
import pickle
import tempfile

import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.preparing import transcoding, video_store
from tests.input_pipeline import videos
from tests.input_pipeline.preparing.sample_videos import film


def write_video(path: pathlib.Path, number: int = 0) -> transcoding.Video:
  path.write_bytes(video_writer.encode_mp4(film(number), fps=25))
  return transcoding.Video(path.name, path, ('x',))


@pytest.fixture
def store(tmp_path) -> video_store.VideoStore:
  return video_store.VideoStore(tmp_path / 'store', transcoding.Storage())


def test_video_is_transcoded_once(store, tmp_path):
  video = write_video(tmp_path / 'a.mp4')
  first = store.add(video)
  times = {p: p.stat().st_mtime_ns for p in store.folder.rglob('*.*')}
  assert len(times) == 2
  assert pickle.loads(pickle.dumps(store)).add(video) == first
  assert {p: p.stat().st_mtime_ns for p in store.folder.rglob('*.*')} == times
  content = store.read(video)
  assert len(content) == first.num_bytes
  assert videos.probe(content).num_frames == len(film(0))


def test_changed_file_or_storage_is_transcoded_again(store, tmp_path):
  video = write_video(tmp_path / 'a.mp4')
  first = store.add(video)
  other = dataclasses.replace(store, storage=transcoding.Storage(crf=40))
  assert other.add(video).sha256 != first.sha256
  write_video(tmp_path / 'a.mp4', 1)
  assert store.add(video).sha256 != first.sha256


def test_key_of_a_result_is_stable(store, tmp_path):
  """It changes on purpose alone: results of earlier versions are not used."""
  path = tmp_path / 'a.mp4'
  path.write_bytes(b'')
  os.utime(path, ns=(10**9, 10**9))
  key = store._base_path(transcoding.Video('a', path, ('x',)))
  text = (
    f'[5, "a", "{path}", 0, 1000000000, null, 25.0, ["reencoded", 23, 90, 256]]'
  )
  digest = hashlib.sha256(text.encode()).hexdigest()
  assert key == store.folder / digest[:2] / digest[2:34]


def test_verbatim_video_is_not_copied(store, tmp_path):
  store = dataclasses.replace(store, storage=transcoding.Storage('verbatim'))
  video = write_video(tmp_path / 'a.mp4')
  store.add(video)
  assert [p.suffix for p in store.folder.rglob('*.*')] == ['.json']
  assert store.read(video) == video.path.read_bytes()


def test_damaged_store_raises(store, tmp_path):
  video = write_video(tmp_path / 'a.mp4')
  store.add(video)
  (path,) = store.folder.rglob('*.video')
  path.write_bytes(b'other')
  with pytest.raises(errors.UserError, match='changed'):
    store.read(video)
  video.path.unlink()
  with pytest.raises(errors.UserError, match='a.mp4'):
    store.read(video)


def test_bad_videos_are_results_with_a_reason(store, tmp_path):
  (tmp_path / 'gone.mp4').symlink_to('nowhere.mp4')
  (tmp_path / 'loop.mp4').symlink_to('loop.mp4')
  (tmp_path / 'text.mp4').write_bytes(b'text')
  for name, reason in (('gone', 'link'), ('loop', 'link'), ('text', '')):
    path = tmp_path / f'{name}.mp4'
    stored = store.add(transcoding.Video(name, path, ('x',)))
    assert stored.reason
    assert reason in stored.reason
    assert '\n' not in stored.reason
    assert not stored.sha256


@pytest.fixture
def unprivileged_folder() -> Iterator[pathlib.Path]:
  """A folder of a user other than root, who cannot read protected files."""
  # Not tmp_path, as its parents are closed to other users.
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o777)
    is_root = not os.geteuid()
    if is_root:
      os.seteuid(65534)
    try:
      yield pathlib.Path(folder)
    finally:
      if is_root:
        os.seteuid(0)


def test_unreadable_files_are_results_with_a_reason(unprivileged_folder):
  closed = unprivileged_folder / 'closed'
  closed.mkdir()
  videos = [
    write_video(unprivileged_folder / 'locked.mp4'),
    write_video(closed / 'inside.mp4'),
  ]
  videos[0].path.chmod(0)
  closed.chmod(0)
  store = video_store.VideoStore(
    unprivileged_folder / 'store', transcoding.Storage()
  )
  try:
    for video in videos:
      assert 'Permission denied' in store.add(video).reason
  finally:
    closed.chmod(0o700)
