"""Builds are resumable, reproducible and complete, or leave no dataset."""

import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from tensorflow_datasets.core import writer

from data.video_folder import video_folder_dataset_builder as video_folder
from dualformer_jax import errors
from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.preparing import builder, video_store
from tests import tfds_command
from tests.input_pipeline import videos as clips
from tests.input_pipeline.preparing import building
from tests.input_pipeline.preparing.building import build, in_process, write
from tests.input_pipeline.preparing.sample_videos import film

_ = in_process  # A fixture.


def make_videos(root: pathlib.Path, number: int) -> pathlib.Path:
  """Writes videos of two classes, the last of them damaged."""
  for index in range(number):
    frames = np.roll(film(index, 96, 128, frames=24), index, axis=2)
    content = video_writer.encode_mp4(frames, fps=25)
    write(root / f'class {index % 2}' / f'{index:03d}.mp4', content)
  write(root / 'class 0' / 'damaged.mp4', b'text')
  return root


def tree(folder: pathlib.Path) -> dict[str, bytes]:
  """The files of a dataset that do not depend on when and how it was built.

  dataset_info.json has the name of Python's module, an index file times.
  """
  assert list(folder.glob('*.index.npz'))
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
    and path.name != 'dataset_info.json'
    and path.suffix != '.npz'
  }


def test_configs_are_variants_times_forms():
  configs = builder.storage_configs('a', 'b')
  assert list(configs)[0] == 'a'
  assert {name: (c.variant, c.form) for name, c in configs.items()} == {
    'a': ('a', 'reencoded'),
    'b': ('b', 'reencoded'),
    'a_verbatim': ('a', 'verbatim'),
    'b_verbatim': ('b', 'verbatim'),
    'a_jpeg': ('a', 'jpeg'),
    'b_jpeg': ('b', 'jpeg'),
  }
  assert list(builder.storage_configs()) == ['reencoded', 'verbatim', 'jpeg']


def test_array_record_holds_the_same_as_tfrecord(in_process, tmp_path):
  videos = make_videos(tmp_path / 'videos', 4)
  datasets = [
    video_folder.Builder(data_dir=tmp_path / name, file_format=name)
    for name in ('tfrecord', 'array_record')
  ]
  first, second = (build(dataset, videos) for dataset in datasets)
  assert first == second
  for split in ('train', 'validation'):
    examples = [
      building.read_split(dataset.data_path, split) for dataset in datasets
    ]
    assert examples[0] == examples[1]


def test_failed_build_leaves_no_dataset_and_is_resumed(
  in_process, tmp_path, monkeypatch
):
  videos = make_videos(tmp_path / 'videos', 3)
  read = video_store.VideoStore.read
  calls = []

  def disk_full(store, video):
    calls.append(video)
    if len(calls) == 2:
      raise OSError(28, 'No space left on device')
    return read(store, video)

  folder = tmp_path / 'out' / 'video_folder' / 'reencoded'
  with monkeypatch.context() as patched:
    patched.setattr(video_store.VideoStore, 'read', disk_full)
    with pytest.raises(errors.UserError, match='No space left on device'):
      build(video_folder.Builder(data_dir=tmp_path / 'out'), videos)
  assert {path.name for path in folder.iterdir()} == {
    '.1.0.0-videos',
    '.1.0.0-videos.lock',
  }
  report = build(video_folder.Builder(data_dir=tmp_path / 'out'), videos)
  assert (report['found'], report['good']) == (4, 3)
  assert [path.name for path in folder.iterdir()] == ['1.0.0']


@pytest.mark.parametrize(
  'error',
  [
    OSError(30, 'Read-only file system', 'records'),
    RuntimeError('Failed to close: No space left on device; writing records'),
  ],
)
def test_errors_of_the_disk_are_user_errors(
  in_process, tmp_path, monkeypatch, error
):
  def fail(*_: object) -> None:
    raise error

  monkeypatch.setattr(writer.ExampleWriter, 'write', fail)
  dataset = video_folder.Builder(data_dir=tmp_path / 'out')
  with pytest.raises(errors.UserError) as caught:
    build(dataset, make_videos(tmp_path / 'videos', 2))
  message = str(caught.value)
  assert message.endswith('; run the command again to resume')
  assert str(error.args[1 if isinstance(error, OSError) else 0]) in message
  assert '\n' not in message


def test_full_disk_is_found_before_videos_are_read(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  monkeypatch.setattr(video_folder, 'find_videos', None)
  dataset = video_folder.Builder(data_dir=tmp_path / 'out')
  message = f'^{tmp_path}/out/video_folder.* cannot be written'
  with pytest.raises(errors.UserError, match=message):
    build(dataset, make_videos(tmp_path / 'videos', 1))


def start_build(
  videos: pathlib.Path, data_dir: pathlib.Path, store: pathlib.Path, count: int
) -> tuple[subprocess.Popen[str], tuple[str | os.PathLike[str], ...]]:
  """Starts `tfds build`, and waits until `count` videos are stored.

  Returns the process, which leads a session, and its arguments.
  """
  arguments = (
    tfds_command.REPOSITORY / 'data' / 'video_folder',
    f'--manual_dir={videos}',
    f'--data_dir={data_dir}',
  )
  process = subprocess.Popen(
    [*tfds_command.COMMAND, *arguments],
    env=tfds_command.ENVIRONMENT,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )
  deadline = time.monotonic() + 200
  while len(list(store.glob('*/*.json'))) < count:
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.02)
  return process, arguments


def test_mirrored_videos_give_another_fingerprint(in_process, tmp_path):
  found = []
  for name in ('base', 'zero', 'hflip'):
    content = (clips.CASES / f'{name}.mp4').read_bytes()
    write(tmp_path / name / 'class' / 'video.mp4', content)
    dataset = video_folder.Builder(data_dir=tmp_path / f'out {name}')
    report = build(dataset, tmp_path / name)
    [example] = building.read_split(dataset.data_path, 'train').values()
    found.append((report['fingerprint'], clips.decode_all(example.video)))
  base, zero, mirrored = found
  assert zero[0] == base[0] != mirrored[0]
  np.testing.assert_array_equal(zero[1], base[1])
  difference = mirrored[1] - base[1][:, :, ::-1].astype(int)
  assert np.abs(difference).mean() < 8


# TFDS reads a deprecated field of protobuf when it finds a dataset.
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_finished_dataset_is_not_rebuilt(in_process, tmp_path):
  videos = make_videos(tmp_path / 'videos', 2)
  dataset = video_folder.Builder(data_dir=tmp_path / 'out')
  build(dataset, videos)
  paths = pathlib.Path(dataset.data_path).iterdir()
  before = {path: path.stat().st_mtime_ns for path in paths}
  make_videos(videos, 3)
  build(video_folder.Builder(data_dir=tmp_path / 'out'), videos)
  assert {path: path.stat().st_mtime_ns for path in before} == before


def test_second_process_is_refused(tmp_path):
  dataset = video_folder.Builder(data_dir=tmp_path / 'out')
  folder = tmp_path / 'out' / 'video_folder' / 'reencoded'
  folder.mkdir(parents=True)
  with open(folder / '.1.0.0-videos.lock', 'wb') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(errors.UserError, match='another process'):
      build(dataset, make_videos(tmp_path / 'videos', 1))


def test_invalid_options_raise(in_process, tmp_path):
  videos = make_videos(tmp_path / 'videos', 1)
  for config, message in (
    (video_folder.VideoFolderConfig(name='a', crf=60), 'crf'),
    (video_folder.VideoFolderConfig(name='b', variant='split4'), 'variant'),
  ):
    dataset = video_folder.Builder(data_dir=tmp_path / 'out', config=config)
    with pytest.raises(errors.UserError, match=message):
      build(dataset, videos)
  dataset = video_folder.Builder(data_dir=tmp_path / 'out')
  with pytest.raises(errors.UserError, match='--manual_dir'):
    build(dataset, tmp_path / 'absent')


@pytest.mark.slow
def test_command_prints_a_user_error_in_one_line(tmp_path):
  write(tmp_path / 'videos' / 'yoga' / 'notes.txt', b'no video')
  done = tfds_command.tfds_build(
    'data/video_folder',
    f'--manual_dir={tmp_path / "videos"}',
    f'--data_dir={tmp_path / "out"}',
  )
  assert done.returncode == 2
  assert 'Traceback' not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith(f'error: {tmp_path / "videos"}: no videos found')
  assert not list((tmp_path / 'out').rglob('1.0.0'))


@pytest.fixture(scope='module')
def many_videos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return make_videos(tmp_path_factory.mktemp('videos'), 80)


@pytest.fixture(scope='module')
def undisturbed(many_videos, tmp_path_factory) -> pathlib.Path:
  """A dataset built in processes, without interruption."""
  dataset = video_folder.Builder(data_dir=tmp_path_factory.mktemp('out'))
  build(dataset, many_videos)
  return pathlib.Path(dataset.data_path)


@pytest.mark.slow
def test_interrupted_and_killed_build_is_resumed_with_the_same_bytes(
  many_videos, undisturbed, tmp_path
):
  store = tmp_path / 'video_folder' / 'reencoded' / '.1.0.0-videos'
  process, arguments = start_build(many_videos, tmp_path, store, 10)
  os.killpg(process.pid, signal.SIGINT)  # As a terminal does.
  output, _ = process.communicate(timeout=10)
  assert process.returncode == 130
  assert 'Traceback' not in output
  last = output.strip().splitlines()[-1]
  assert last == 'stopped by SIGINT; run the command again to resume'

  stored = len(list(store.glob('*/*.json')))
  process, arguments = start_build(many_videos, tmp_path, store, stored + 10)
  os.kill(process.pid, signal.SIGKILL)  # The workers must end by themselves.
  process.communicate(timeout=100)  # They hold its output open until then.
  while True:
    before = {path: path.stat().st_mtime_ns for path in store.glob('*/*.json')}
    time.sleep(0.5)
    if len(list(store.glob('*/*.json'))) == len(before):
      break
  assert len(before) < 80

  started = time.time_ns()
  done = tfds_command.tfds_build(*arguments)
  assert done.returncode == 0, done.stderr
  assert all(when < started for when in before.values())
  folder = tmp_path / 'video_folder' / 'reencoded'
  assert tree(folder / '1.0.0') == tree(undisturbed)
  assert [path.name for path in folder.iterdir()] == ['1.0.0']


@pytest.mark.slow
def test_beam_workers_give_the_same_dataset(in_process, tmp_path):
  videos = make_videos(tmp_path / 'videos', 4)
  dataset = video_folder.Builder(data_dir=tmp_path / 'alone')
  report = build(dataset, videos)
  done = tfds_command.tfds_build(
    tfds_command.REPOSITORY / 'data' / 'video_folder',
    f'--manual_dir={videos}',
    f'--data_dir={tmp_path / "beam"}',
    '--beam_pipeline_options=runner=DirectRunner,direct_num_workers=2,'
    'direct_running_mode=multi_processing',
  )
  assert done.returncode == 0, done.stderr
  assert 'on Beam' in done.stdout + done.stderr
  folder = tmp_path / 'beam' / 'video_folder' / 'reencoded' / '1.0.0'
  assert building.read_report(folder) == report
  for split in ('train', 'validation'):
    expected = building.read_split(dataset.data_path, split)
    assert building.read_split(folder, split) == expected
