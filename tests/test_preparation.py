"""Preparing many videos, some of them damaged, interrupted and on Beam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import fractions
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import av
import cv2
import numpy as np
import pytest

from dualformer_jax.input_pipeline import decoding, records, storing
from tests import tfds_command

HEIGHT, WIDTH, FRAMES = 32, 48, 8
NUMBER = 500
CLASSES = ('jumping', 'running')


def level(number: int, index: int) -> int:
  """How bright a frame of a video is; no two in a row are alike."""
  return 40 + (number % 3) * 8 + index * 9


def film(
  number: int, height: int = HEIGHT, width: int = WIDTH, frames: int = FRAMES
) -> np.ndarray:
  """Even frames, but for a bright upper left quarter."""
  clip = np.empty((frames, height, width, 3), np.uint8)
  clip[:] = np.array([level(number, i) for i in range(frames)])[
    :, None, None, None
  ]
  clip[:, : height // 2, : width // 2] = 230
  return clip


def encode(
  frames: Iterable[np.ndarray],
  container: str,
  codec: str = 'libx264',
  pix_fmt: str = 'yuv420p',
  times: Iterable[int] | None = None,
  rotation: int = 0,
  **options: str,
) -> bytes:
  frames = list(frames)
  file = io.BytesIO()
  with av.open(file, 'w', format=container) as output:
    stream: Any = output.add_stream(codec, rate=25, options=options)
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt = pix_fmt
    stream.codec_context.time_base = fractions.Fraction(1, 25)
    if rotation:
      stream.set_display_rotation(rotation)
    times = range(len(frames)) if times is None else times
    for time_, frame in zip(times, frames, strict=True):
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      picture.pts = time_
      output.mux(stream.encode(picture))
    output.mux(stream.encode())
  return file.getvalue()


def sound() -> bytes:
  """An MP4 file without pictures."""
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as output:
    stream = output.add_stream('aac', rate=8000)
    silence = np.zeros((1, 8000), np.float32)
    frame = av.AudioFrame.from_ndarray(silence, format='fltp', layout='mono')
    frame.sample_rate = 8000
    output.mux([*stream.encode(frame), *stream.encode()])
  return file.getvalue()


def sizes_change(number: int) -> bytes:
  small = film(number, HEIGHT // 2, WIDTH // 2)
  return encode(film(number)[:4], 'h264') + encode(small[4:], 'h264')


def turned(number: int) -> bytes:
  """Stored lying on its side, to be shown upright."""
  return encode(np.rot90(film(number), 1, (1, 2)), 'mp4', rotation=-90)


# How odd videos are made, and how many frames they have to be stored with.
ODD: dict[str, tuple[str, Callable[[int], bytes], int]] = {
  'wrong extension': (
    '.mp4',
    lambda n: encode(film(n), 'avi', 'mpeg4', b='8M'),
    8,
  ),
  'one frame': ('.mp4', lambda n: encode(film(n)[:1], 'mp4'), 1),
  'sizes change': ('.h264', sizes_change, 8),
  'variable rate': (
    '.mp4',
    lambda n: encode(film(n), 'mp4', times=(0, 1, 5, 6, 20, 21, 22, 60)),
    8,
  ),
  'out of order': (
    '.avi',
    lambda n: encode(film(n), 'avi', 'mpeg4', bf='2', b='8M'),
    8,
  ),
  'no frame count': (
    '.mkv',
    lambda n: encode(film(n), 'matroska', live='1'),
    8,
  ),
  'odd sizes': (
    '.mp4',
    lambda n: encode(film(n, 31, 47), 'mp4', pix_fmt='yuv444p'),
    8,
  ),
  'rotation': ('.mov', turned, 8),
  '4:4:4': ('.mp4', lambda n: encode(film(n), 'mp4', pix_fmt='yuv444p'), 8),
  '10 bits': (
    '.mp4',
    lambda n: encode(film(n), 'mp4', pix_fmt='yuv420p10le'),
    8,
  ),
}


def half(content: bytes) -> bytes:
  return content[: len(content) // 2]


# How damaged files are made, and what the report says of them.
BAD: dict[str, tuple[str, Callable[[int], bytes], str]] = {
  'truncated': ('.mp4', lambda n: half(encode(film(n), 'mp4')), 'decoded|cut'),
  'truncated avi': (
    '.avi',
    lambda n: half(encode(film(n), 'avi', 'mpeg4')),
    'cut short|decoded',
  ),
  'truncated webm': (
    '.webm',
    lambda n: half(encode(film(n), 'webm', 'libvpx')),
    'cut short|decoded',
  ),
  'empty': ('.mp4', lambda n: b'', 'is empty'),
  'sound': ('.mp4', lambda n: sound(), 'holds no video stream'),
  'text': ('.mp4', lambda n: b'not a video\n' * 20, 'cannot be decoded'),
}


@pytest.fixture(scope='module')
def videos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Five hundred files: 25 of them bad, 40 odd."""
  root = tmp_path_factory.mktemp('videos')
  for name in CLASSES:
    (root / name).mkdir()
  odd, bad = list(ODD), list(BAD)
  for number in range(NUMBER):
    folder = root / CLASSES[number % 2]
    kind, extension, make = 'plain', '.mp4', None
    if number % 25 == 3:  # 20 of them
      kind = bad[number // 25 % len(bad)]
      extension, make, _ = BAD[kind]
    elif number % 25 in (11, 18):  # 40 of them
      kind = odd[(2 * (number // 25) + (number % 25 == 18)) % len(odd)]
      extension, make, _ = ODD[kind]
    if make is not None:
      content = make(number)
    else:
      content = decoding.encode_mp4(film(number), fps=25)
    (folder / f'{number:03d} {kind}{extension}').write_bytes(content)
  (root / CLASSES[0] / 'folder.mp4').mkdir()
  (root / CLASSES[0] / 'gone.mp4').symlink_to('nowhere.mp4')
  os.mkfifo(root / CLASSES[0] / 'pipe.mp4')
  locked = root / CLASSES[1] / 'locked.mp4'
  locked.write_bytes(decoding.encode_mp4(film(1), fps=25))
  locked.chmod(0)
  (root / CLASSES[1] / 'loop.mp4').symlink_to('loop.mp4')
  return root


def command(videos: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
  return [
    os.fspath(pathlib.Path(sys.executable).with_name('tfds')),
    'build',
    os.fspath(tfds_command.REPOSITORY / 'data' / 'video_folder'),
    f'--manual_dir={videos}',
    f'--data_dir={out}',
    *more,
  ]


@pytest.fixture(scope='module')
def built(
  videos: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  out = tmp_path_factory.mktemp('undisturbed')
  done = tfds_command.tfds_build(*command(videos, out)[2:])
  assert done.returncode == 0, done.stderr
  assert 'videos/s' in done.stderr  # How fast, and how long it takes.
  return out / 'video_folder' / 'reencoded' / '1.0.0'


def all_examples(folder: pathlib.Path) -> dict[str, records.Example]:
  examples = {}
  for split in ('train', 'validation'):
    dataset = records.PreparedDataset(os.fspath(folder), split, '')
    for index in range(len(dataset)):
      examples[dataset[index].video_id] = dataset[index]
  return examples


def test_every_good_video_is_there_with_its_frames_the_right_way_up(built):
  examples = all_examples(built)
  names = {name for name in examples if 'locked' not in name}
  assert len(names) == NUMBER - 20
  for name in names:
    number, kind = pathlib.Path(name).stem.split(' ', 1)
    count = 8 if kind == 'plain' else ODD[kind][2]
    frames = decoding.decode_all(examples[name].video)
    assert examples[name].label == int(number) % 2
    assert len(frames) == count, name
    height, width = frames.shape[1:3]
    assert (height, width) == ((30, 46) if kind == 'odd sizes' else (32, 48))
    for index, frame in enumerate(frames):
      upper_left = frame[: height // 2 - 1, : width // 2 - 1].mean()
      lower = frame[height // 2 + 1 :].mean()
      right = frame[:, width // 2 + 1 :].mean()
      assert abs(upper_left - 230) < 8, (name, index)
      assert abs(lower - level(int(number), index)) < 4, (name, index)
      assert abs(right - level(int(number), index)) < 4, (name, index)


def test_every_bad_file_is_in_the_report_with_its_reason(built):
  report = json.loads((built / 'report.json').read_text())
  reasons = {b['video_id']: b['reason'] for b in report['undecodable']}
  for name in reasons:
    _, _, kind = pathlib.Path(name).stem.partition(' ')
    if not kind:
      continue
    assert any(part in reasons[name] for part in BAD[kind][2].split('|')), name
  special = {
    'jumping/folder.mp4',
    'jumping/gone.mp4',
    'jumping/pipe.mp4',
    'running/loop.mp4',
  }
  if os.geteuid():  # Root may read everything.
    special |= {'running/locked.mp4'}
    assert 'Permission' in reasons['running/locked.mp4']
  assert special <= reasons.keys()
  assert len(reasons) == 20 + len(special)
  assert report['found'] == report['good'] + len(reasons)
  summary = (built / 'summary.txt').read_text()
  assert f'{len(reasons)} of {report["found"]} videos' in summary
  assert report['fingerprint'] in summary


def tree(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    # Reading leaves an index beside the records.
    if path.is_file() and path.suffix != '.npz'
  }


def test_killed_and_started_again_it_gives_the_same_bytes(
  videos, built, tmp_path
):
  kept = tmp_path / 'video_folder' / 'reencoded' / '.1.0.0-videos'
  process = subprocess.Popen(
    command(videos, tmp_path),
    env=os.environ | {'PYTHONPATH': str(tfds_command.REPOSITORY)},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  deadline = time.monotonic() + 200
  while len(list(kept.glob('*/*.json'))) < 100:
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)  # The workers have to end by themselves.
  process.wait()
  while True:
    before = len(list(kept.glob('*/*.json')))
    time.sleep(0.5)
    if len(list(kept.glob('*/*.json'))) == before:
      break
  assert before < NUMBER
  old = {path: path.stat().st_mtime_ns for path in kept.glob('*/*.json')}

  started = time.time_ns()
  done = tfds_command.tfds_build(*command(videos, tmp_path)[2:])
  assert done.returncode == 0, done.stderr
  assert all(when < started for when in old.values())
  folder = tmp_path / 'video_folder' / 'reencoded'
  assert tree(folder / '1.0.0') == tree(built)
  assert [path.name for path in folder.iterdir()] == ['1.0.0']


def test_nothing_is_done_twice(tmp_path):
  path = tmp_path / 'a.mp4'
  path.write_bytes(decoding.encode_mp4(film(0), fps=25))
  video = storing.Video('a', path, 'x')
  first = storing.store(video, storing.Storage(), tmp_path / 'kept')
  files = {p: p.stat().st_mtime_ns for p in (tmp_path / 'kept').rglob('*.*')}
  assert storing.store(video, storing.Storage(), tmp_path / 'kept') == first
  assert {p: p.stat().st_mtime_ns for p in files} == files
  # Another file of the same name is another video.
  path.write_bytes(decoding.encode_mp4(film(1), fps=25))
  again = storing.store(video, storing.Storage(), tmp_path / 'kept')
  assert again.sha256 != first.sha256


@pytest.fixture
def nobodys_folder() -> Iterator[pathlib.Path]:
  """A folder of a user who may not read what is closed, as root may."""
  # Not tmp_path: the folders above that are closed to others.
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


def test_what_may_not_be_read_is_told(nobodys_folder):
  closed = nobodys_folder / 'closed'
  closed.mkdir()
  paths = (nobodys_folder / 'locked.mp4', closed / 'inside.mp4')
  for path in paths:
    path.write_bytes(decoding.encode_mp4(film(0), fps=25))
  paths[0].chmod(0)
  closed.chmod(0)
  kept = nobodys_folder / 'kept'
  try:
    for path in paths:
      for form in storing.FORMS:
        video = storing.Video(path.name, path, 'x')
        stored = storing.store(video, storing.Storage(form), kept)
        assert 'Permission denied' in stored.reason
  finally:
    closed.chmod(0o700)


def test_a_file_that_kills_the_decoder_is_left_out(tmp_path, monkeypatch):
  """A process that dies takes no other video with it."""
  paths = []
  for number in range(6):
    paths.append(tmp_path / f'{number}.mp4')
    paths[-1].write_bytes(decoding.encode_mp4(film(number), fps=25))
  # Workers find this instead of the real decoder.
  (tmp_path / 'sitecustomize.py').write_text(
    'import os, sys\n'
    'from dualformer_jax.input_pipeline import decoding\n'
    'real = decoding.frame_rate\n'
    'def frame_rate(path):\n'
    "  if str(path).endswith('3.mp4'):\n"
    '    os.abort()\n'
    '  return real(path)\n'
    'decoding.frame_rate = frame_rate\n'
  )
  monkeypatch.setenv(
    'PYTHONPATH', f'{tmp_path}{os.pathsep}{tfds_command.REPOSITORY}'
  )
  videos = [storing.Video(path.name, path, 'x') for path in paths]
  results = list(
    storing.store_all(videos, storing.Storage(), tmp_path / 'kept', 2)
  )
  assert [bool(result.reason) for result in results] == [
    number == 3 for number in range(6)
  ]
  assert 'crash' in results[3].reason


@pytest.mark.parametrize('form', storing.FORMS)
def test_a_folder_of_frames_is_a_video(tmp_path, form):
  folder = tmp_path / 'frames'
  folder.mkdir()
  clip = film(2)
  for index, frame in enumerate(clip):
    # Written out of order, and beside optical flow.
    name = f'img_{index + 1:05d}.jpg'
    cv2.imwrite(os.fspath(folder / name), frame[..., ::-1])
    cv2.imwrite(os.fspath(folder / f'flow_x_{index:05d}.jpg'), frame)
  video = storing.Video('v', folder, 'x', fps=12.0)
  storage = storing.Storage(form)
  assert not storing.store(video, storage, tmp_path / 'kept').reason
  content = storing.read(video, storage, tmp_path / 'kept')
  assert decoding.probe(content).num_frames == len(clip)
  assert decoding.frame_rate(content) == 12.0
  picked = decoding.decode_frames(content, [6, 1, 1])
  for frame, index in zip(picked, [6, 1, 1], strict=True):
    original = cv2.imread(os.fspath(folder / f'img_{index + 1:05d}.jpg'))
    assert original is not None
    difference = np.abs(frame.astype(int) - original[..., ::-1]).max()
    # As they are, or encoded anew.
    assert difference == 0 if form != 'reencoded' else difference < 30


def test_frames_that_are_damaged_are_told(tmp_path):
  folder = tmp_path / 'frames'
  folder.mkdir()
  for index, frame in enumerate(film(2)):
    cv2.imwrite(os.fspath(folder / f'{index:05d}.jpg'), frame)
  video = storing.Video('v', folder, 'x')
  path = folder / '00004.jpg'
  whole = path.read_bytes()
  for content in (half(whole), b''):
    path.write_bytes(content)
    for form in storing.FORMS:
      stored = storing.store(video, storing.Storage(form), tmp_path / 'kept')
      assert '00004.jpg' in stored.reason
  (tmp_path / 'nothing').mkdir()
  empty = storing.Video('e', tmp_path / 'nothing', 'x')
  stored = storing.store(empty, storing.Storage(), tmp_path / 'kept')
  assert 'without frames' in stored.reason


def test_the_options_of_clusters_are_those_of_beam():
  readme = tfds_command.REPOSITORY / 'data' / 'README.md'
  rows = re.findall(r'`(runner=[^`]+)`', readme.read_text('utf-8'))
  assert len(rows) == 4
  program = """
import sys
from apache_beam.options import pipeline_options
for row in sys.argv[1:]:
  options = dict(option.split('=', 1) for option in row.split(','))
  # What Beam does not know is left out; numbers are numbers.
  known = pipeline_options.PipelineOptions(
    [f'--{name}={value}' for name, value in options.items()]
  ).get_all_options(drop_default=True)
  assert {name: str(value) for name, value in known.items()} == options, row
"""
  done = subprocess.run(
    [sys.executable, '-c', program, *rows],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def test_beam_workers_give_the_same_dataset(videos, tmp_path):
  few = tmp_path / 'few'
  for name in CLASSES:
    (few / name).mkdir(parents=True)
    for path in sorted((videos / name).glob('0*'))[:12]:
      (few / name / path.name).symlink_to(path)
  reports, examples = [], []
  for more in (
    [],
    [
      '--beam_pipeline_options=runner=DirectRunner,direct_num_workers=2,'
      'direct_running_mode=multi_processing'
    ],
  ):
    out = tmp_path / f'out{len(reports)}'
    done = tfds_command.tfds_build(*command(few, out, *more)[2:])
    assert done.returncode == 0, done.stderr
    assert ('on Beam' in done.stdout + done.stderr) == bool(more)
    folder = out / 'video_folder' / 'reencoded' / '1.0.0'
    reports.append((folder / 'report.json').read_text())
    examples.append(all_examples(folder))
  assert reports[0] == reports[1]
  assert examples[0] == examples[1]
  assert len(examples[0]) == 23
