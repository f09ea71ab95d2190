"""The predict command: output, files, live sources and errors."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import csv
import fractions
import functools
import http.server
import io
import itertools
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

import av
import cv2
import numpy as np
import pytest

import dualformer_jax
from dualformer_jax import predict as predict_command
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline import video_writer
from tests import small_checkpoint, training_command
from tests.input_pipeline import videos

FPS = 10.0
LARGE = (100, 160)  # enough for labels of five lines
SPAN = 16  # frames of a clip of small_checkpoint
NAMES = set(small_checkpoint.CLASS_NAMES)
VARIABLE = training_command.REPOSITORY / 'tests' / 'cases' / 'vfr.mp4'
DOCUMENT = training_command.REPOSITORY / 'docs' / 'nearest_neighbors.md'


@pytest.fixture(scope='module', name='checkpoint')
def _checkpoint(tmp_path_factory) -> pathlib.Path:
  return small_checkpoint.save(tmp_path_factory.mktemp('predict') / 'model')


@pytest.fixture(scope='module', name='recognizer')
def _recognizer(checkpoint) -> Recognizer:
  return dualformer_jax.load(checkpoint)


@pytest.fixture(name='predict')
def _predict(checkpoint, run_command, tmp_path, monkeypatch):
  """Runs the command in tmp_path."""
  monkeypatch.chdir(tmp_path)
  return functools.partial(
    run_command, predict_command, f'--checkpoint={checkpoint}'
  )


def command(checkpoint: pathlib.Path, *arguments: object) -> list[str]:
  module = [sys.executable, '-m', 'dualformer_jax.predict']
  return [*module, f'--checkpoint={checkpoint}', *map(str, arguments)]


def noise(
  count: int, seed: int, size: tuple[int, int] = (36, 48)
) -> np.ndarray:
  """Frames whose brightness and color change every ten."""
  rng = np.random.default_rng(seed)
  colors = rng.integers(0, 256, (-(-count // 10), 1, 1, 3)).repeat(10, axis=0)
  frames = colors[:count] + rng.integers(0, 60, (count, *size, 1))
  return (frames // 2 + 60).astype(np.uint8)


def write(path: pathlib.Path, frames: np.ndarray) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(video_writer.encode_mp4(frames, fps=FPS, crf=30))
  return path


def write_sound(path: pathlib.Path) -> None:
  """An MP4 file with sound alone."""
  with av.open(str(path), 'w') as file:
    stream: Any = file.add_stream('aac', rate=16000)
    frame = av.AudioFrame.from_ndarray(
      np.zeros((1, 1024), np.float32), format='fltp', layout='mono'
    )
    frame.rate = 16000
    file.mux(stream.encode(frame))
    file.mux(stream.encode())


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
  return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(found: Any, expected: Any) -> None:
  """Compares two lists of predictions."""
  assert [name for name, _ in found] == [name for name, _ in expected]
  np.testing.assert_allclose(
    [value for _, value in found], [value for _, value in expected], atol=1e-5
  )


# --- Whole videos


@pytest.mark.slow
def test_folder_with_unreadable_videos(predict, recognizer, tmp_path):
  write(tmp_path / 'in' / 'a' / 'x.mp4', noise(40, 1, LARGE))
  write(tmp_path / 'in' / 'b' / 'x.mp4', noise(21, 2, LARGE))
  write(tmp_path / 'in' / 'b' / 'größe.mov', noise(6, 3, LARGE))
  (tmp_path / 'in' / 'b' / 'broken.mp4').write_bytes(b'not a video at all')
  write_sound(tmp_path / 'in' / 'sound.mp4')
  (tmp_path / 'in' / 'notes.txt').write_text('no video')
  good = ['in/a/x.mp4', 'in/b/größe.mov', 'in/b/x.mp4']
  done = [
    predict(
      *('--json', '--batch_size=5', '--features=out/f.npz'),
      *('--features_per_token', '--save=out/copies/', 'in', 'none*.mp4'),
    ),
    predict('--json', '--batch_size=1', '--top_k=2', 'in', 'none*.mp4'),
  ]
  for process in done:
    assert process.returncode == 1
    lines = {line['video']: line for line in lines_of(process)}
    assert list(lines) == [
      *('in/a/x.mp4', 'in/b/broken.mp4', 'in/b/größe.mov', 'in/b/x.mp4'),
      *('in/sound.mp4', 'none*.mp4'),
    ]
    errors = [line for line in process.stderr.splitlines() if 'error' in line]
    for name, reason in (
      ('in/b/broken.mp4', 'cannot be decoded: Invalid data'),
      ('in/sound.mp4', 'has no video stream'),
      ('none*.mp4', 'no file matches this pattern'),
    ):
      assert set(lines[name]) == {'video', 'error'}
      assert reason in lines[name]['error']
      assert f'error: {name}: {lines[name]["error"]}' == errors.pop(0)
    assert not errors
  for name in good:
    expected = recognizer.predict(name)
    for process, count in zip(done, (5, 2), strict=True):
      (line,) = (line for line in lines_of(process) if line['video'] == name)
      assert set(line) == {'video', 'predictions'}
      assert_same(line['predictions'], expected[:count])

  with np.load('out/f.npz') as file:
    assert set(file) == {'names', 'features', 'tokens'}
    assert file['names'].tolist() == good
    assert file['tokens'].shape == (3, 4, 8, 8, 16)
    for i, name in enumerate(good):
      clips = recognizer.normalize(recognizer.views(name))
      features = recognizer.features(clips)
      np.testing.assert_allclose(
        file['features'][i], features.mean(axis=0), atol=1e-5
      )
      # The second of the two clips of the last, the middle crop.
      tokens = recognizer.tokens(clips[5:])[0]
      np.testing.assert_allclose(file['tokens'][i], tokens, atol=1e-5)

  copies = [p for p in pathlib.Path('out/copies').rglob('*') if p.is_file()]
  names = {'a/x.mp4', 'b/größe.mov.mp4', 'b/x.mp4'}
  assert {str(p.relative_to('out/copies')) for p in copies} == names
  for name in good:
    original = videos.decode_all(name).astype(int)
    path = pathlib.Path(name).relative_to('in')
    suffix = '' if path.suffix == '.mp4' else '.mp4'
    copy = videos.decode_all(f'out/copies/{path}{suffix}').astype(int)
    assert copy.shape == original.shape
    difference = np.abs(copy - original)
    assert difference[:, 60:].mean() < 6  # below the label
    assert difference[:, :60, :40].mean() > 20


def test_table_is_plain_text(predict, recognizer, tmp_path):
  path = write(tmp_path / 'x\x1b[31m.mp4', noise(20, 4))
  expected = recognizer.predict(path, top_k=3)
  done = predict('--top_k=3', path.name)
  assert (done.returncode, done.stderr) == (0, '')
  title, *rows = done.stdout.splitlines()
  assert title == 'x?[31m.mp4'
  width = max(len(name) for name, _ in expected)
  assert rows == [f'  {p:.4f}  {name:{width}}'.rstrip() for name, p in expected]


@pytest.mark.slow
def test_table_in_a_terminal_has_colored_bars(
  checkpoint, recognizer, compilation_cache, tmp_path
):
  path = write(tmp_path / 'x.mp4', noise(20, 4))
  expected = recognizer.predict(path, top_k=3)
  width = max(len(name) for name, _ in expected)
  reader, writer = pty.openpty()
  subprocess.run(
    command(checkpoint, '--top_k=3', path),
    env={
      **training_command.environment(compilation_cache),
      'PYTHONIOENCODING': 'utf-8',
    },
    stdout=writer,
    timeout=300,
    check=True,
  )
  os.close(writer)
  with open(reader, 'rb') as terminal:
    shown = terminal.read1(10_000).decode()
  for (name, p), line in zip(expected, shown.splitlines()[1:], strict=True):
    bar = '\x1b[36m' + '█' * round(30 * p) + '\x1b[0m'
    assert line == f'  {p:.4f}  {name:{width}}  {bar}'


# --- Windows


@pytest.mark.slow
def test_timelines_and_copy_agree_with_windows(predict, checkpoint, tmp_path):
  frames = noise(70, 5, LARGE)
  path = write(tmp_path / 'long.mp4', frames)
  for name in ('o.json', 'copy.mp4'):
    (tmp_path / name).write_text('old')
  done = predict(
    *('--stride=1.2', '--json', '--batch_size=3', '--overwrite', path.name),
    *('--timeline=o.json,o/o.csv', '--timeline=o.png', '--save=copy.mp4'),
  )
  assert (done.returncode, done.stderr) == (0, '')
  files = {file.name for file in tmp_path.rglob('*') if file.is_file()}
  assert files == {'long.mp4', 'o.json', 'o.csv', 'o.png', 'copy.mp4'}
  windows = lines_of(done)
  assert all(window.pop('video') == 'long.mp4' for window in windows)
  # The same model, with one view of exactly the frames of a window.
  one_view = dualformer_jax.load(
    small_checkpoint.save(tmp_path / 'one', num_clips=1, num_crops=1)
  )
  decoded = videos.decode_all(path)
  starts = [0, 12, 24, 36, 48, 54]
  assert [window['start'] for window in windows] == [s / FPS for s in starts]
  for window, start in zip(windows, starts, strict=True):
    assert window['end'] == (start + SPAN) / FPS
    expected = one_view.predict(decoded[start : start + SPAN])
    assert_same(window['predictions'], expected)
  tops = [window['predictions'][0][0] for window in windows]
  assert len(set(tops)) > 1  # or the copy would show nothing

  content = json.loads(pathlib.Path('o.json').read_text())
  assert content == {'video': 'long.mp4', 'windows': windows}
  with open('o/o.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [float(row['end']) for row in rows] == [w['end'] for w in windows]
  assert [row['class_1'] for row in rows] == tops
  second = [float(row['probability_2']) for row in rows]
  assert second == [window['predictions'][1][1] for window in windows]
  picture = cv2.imread('o.png')
  assert picture is not None
  assert picture.shape[1] == 1280

  copy = videos.decode_all('copy.mp4').astype(int)
  assert copy.shape == decoded.shape
  assert videos.probe('copy.mp4').fps == FPS
  # Frames of one window have one label; its letters are white.
  letters = copy[:, :12, :80].min(axis=3) > 150
  middles = np.array(starts) + SPAN / 2
  places = np.abs(middles[:, None] - (np.arange(70) + 0.5)).argmin(axis=0)
  for i, j in itertools.combinations(range(0, 70, 5), 2):
    differ = (letters[i] != letters[j]).mean()
    if tops[places[i]] == tops[places[j]]:
      assert differ < 0.1
    else:
      assert differ > 0.05


def test_windows_are_printed_in_lines_up_to_a_time(predict, tmp_path):
  path = write(tmp_path / 'x.mp4', noise(50, 6))
  done = predict('--sliding', '--seconds=3.2', '--top_k=1', path, 'none')
  assert done.returncode == 1
  title, *lines = done.stdout.splitlines()
  assert title == str(path)
  times = [line.split('  ')[1] for line in lines]
  assert times == ['00:00.0 - 00:01.6', '00:01.6 - 00:03.2']
  for line in lines:
    name, probability = line.split('  ')[2].rsplit(' ', 1)
    assert name in NAMES
    assert 0.2 <= float(probability) <= 1.0


def test_windows_follow_the_times_of_frames(predict, tmp_path):
  """The video has 25 frames a second for 10 s, then 5 a second for 10 s."""
  with av.open(str(VARIABLE)) as file:
    times = [float(frame.time or 0) for frame in file.decode(video=0)]
  assert (times[80], times[128], times[240]) == (3.2, 5.12, 9.6)
  assert times[250:252] == [10.0, 10.2]
  done = predict('--sliding', '--json', '--save=copy.mp4', VARIABLE)
  starts = [window['start'] for window in lines_of(done)]
  # Windows of 16 frames, of which the last ends with the video.
  assert starts == [round(times[i], 3) for i in [*range(0, 288, 16), 284]]
  with av.open('copy.mp4') as file:
    copied = [float(frame.time or 0) for frame in file.decode(video=0)]
  assert copied == pytest.approx(times, abs=1e-4)

  flags = ('--window=2', '--stride=4', '--seconds=13', '--timeline=t.csv')
  windows = lines_of(predict('--json', *flags, VARIABLE))
  # The last window ends with the 13 s.
  assert [(w['start'], w['end']) for w in windows] == [
    (0.0, 2.0),
    (4.0, 6.0),
    (8.0, 10.0),
    (11.0, 13.0),
  ]
  rows = list(csv.DictReader(io.StringIO((tmp_path / 't.csv').read_text())))
  assert [float(row['start']) for row in rows] == [0.0, 4.0, 8.0, 11.0]


# The peak memory of a process is at least that of the process that starts it,
# which is large for the tests. This small process starts the command instead.
PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(
  checkpoint: pathlib.Path, cache: pathlib.Path, path: pathlib.Path
) -> int:
  """Returns the peak memory of the command in bytes."""
  predict = command(checkpoint, '--stride=40', f'--timeline={path}.json', path)
  done = subprocess.run(
    [sys.executable, '-c', PEAK_MEMORY, *predict],
    env=training_command.environment(cache),
    stdout=subprocess.PIPE,
    text=True,
    timeout=300,
    check=True,
  )
  return int(done.stdout) * (1 if sys.platform == 'darwin' else 1024)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(
  checkpoint, compilation_cache, tmp_path
):
  jpegs = [cv2.imencode('.jpg', frame)[1].tobytes() for frame in noise(100, 7)]
  peaks = []
  for count in (2_000, 20_000):
    path = tmp_path / f'{count}.mp4'
    repeated = jpegs * (count // len(jpegs))
    path.write_bytes(
      video_writer.mux_jpegs(repeated, fps=FPS, height=36, width=48)
    )
    peaks.append(peak_memory(checkpoint, compilation_cache, path))
  few, many = peaks
  # 18,000 more frames, at the model's size, take 55 MB.
  assert many - few < 10e6


# --- Live sources


def transport_stream(frames: np.ndarray) -> bytes:
  """Encodes H.264 in a format that can be read from the middle."""
  file = io.BytesIO()
  with av.open(file, 'w', format='mpegts') as container:
    stream = container.add_stream(
      'libx264', rate=fractions.Fraction(FPS), options={'g': '5', 'bf': '0'}
    )
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = 'yuv420p'
    for frame in frames:
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  return file.getvalue()


@contextlib.contextmanager
def served(content: bytes, stays_open: bool = False) -> Iterator[str]:
  """The address of a stream."""
  is_over = threading.Event()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_response(200)
      self.send_header('Content-Type', 'video/mp2t')
      self.end_headers()
      with contextlib.suppress(ConnectionError):
        self.wfile.write(content)
        self.wfile.flush()
        while stays_open and not is_over.wait(0.5):
          self.wfile.write(content)

    def log_message(self, format, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f'http://127.0.0.1:{server.server_port}/live.ts'
    finally:
      is_over.set()
      server.shutdown()
      thread.join()


def test_address_is_scored_by_windows_until_it_ends(
  predict, recognizer, tmp_path
):
  del recognizer
  content = transport_stream(noise(48, 8))
  (tmp_path / 'same.ts').write_bytes(content)
  with served(content) as address:
    done = predict('--json', '--timeline=t.json', address)
  assert (done.returncode, done.stderr) == (0, '')
  live = lines_of(done)
  from_file = lines_of(predict('--json', '--sliding', 'same.ts'))
  assert [(w['start'], w['end']) for w in live] == [
    (0.0, 1.6),
    (1.6, 3.2),
    (3.2, 4.8),
  ]
  for window, other in zip(live, from_file, strict=True):
    assert window['video'] == address
    assert window['end'] == other['end']
    # Colors of OpenCV and PyAV differ in the last digits.
    found, expected = dict(window['predictions']), dict(other['predictions'])
    for name in NAMES:
      assert found[name] == pytest.approx(expected[name], abs=0.02)
  content = json.loads((tmp_path / 't.json').read_text())
  assert [w['end'] for w in content['windows']] == [1.6, 3.2, 4.8]


@pytest.mark.slow
def test_interrupt_ends_a_live_source_and_writes_the_timeline(
  checkpoint, compilation_cache, tmp_path
):
  content = transport_stream(noise(100, 9))
  with served(content, stays_open=True) as address:
    process = subprocess.Popen(
      command(checkpoint, '--json', '--timeline=t.csv', address),
      env=training_command.environment(compilation_cache),
      cwd=tmp_path,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      bufsize=0,  # or communicate loses what is read beyond the first line
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
  assert process.returncode == 0
  assert errors.count(b'SIGINT: ') == 1  # beside lines of progress
  assert b'Traceback' not in errors
  assert json.loads(first)['start'] == 0.0
  rows = (tmp_path / 't.csv').read_text().splitlines()
  assert len(rows) == 1 + 1 + len(rest.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['windows', 'videos', 'nothing to write'])
def test_interrupt_ends_with_the_results_so_far(
  checkpoint, compilation_cache, tmp_path, mode
):
  count, length = (1, 600) if mode == 'windows' else (40, 40)
  videos = [
    write(tmp_path / f'{i}.mp4', noise(length, i)) for i in range(count)
  ]
  arguments = {
    'windows': ('--timeline=t.json', '--stride=0.2', videos[0]),
    'videos': ('--features=f.npz', *videos),
    'nothing to write': videos,
  }[mode]
  process = subprocess.Popen(
    command(checkpoint, '--json', *arguments),
    env=training_command.environment(compilation_cache),
    cwd=tmp_path,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    bufsize=0,
  )
  assert process.stdout is not None
  first = process.stdout.readline()
  process.send_signal(signal.SIGINT)
  rest, errors = process.communicate(timeout=60)
  assert process.returncode == 130
  assert errors.decode().splitlines()[-1] == 'stopped by SIGINT'
  assert b'Traceback' not in errors
  lines = [json.loads(line) for line in (first + rest).splitlines()]
  files = {path.name for path in tmp_path.iterdir()} - {v.name for v in videos}
  if mode == 'windows':
    assert files == {'t.json'}
    written = json.loads((tmp_path / 't.json').read_text())['windows']
    assert [w['start'] for w in written] == [line['start'] for line in lines]
    assert len(lines) < 290  # of 293
  elif mode == 'videos':
    assert files == {'f.npz'}
    with np.load(tmp_path / 'f.npz') as file:
      assert file['names'].tolist() == [line['video'] for line in lines]
    assert len(lines) < 40
  else:
    assert not files


# --- Errors


def test_truncated_video_fails_after_its_windows(predict, tmp_path):
  path = write(tmp_path / 'whole.mp4', noise(50, 10))
  with av.open(str(path)) as source, av.open('cut.mkv', 'w') as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    for packet in source.demux(video=0):
      if packet.size:
        packet.stream = stream
        target.mux(packet)
  cut = tmp_path / 'cut.mkv'
  cut.write_bytes(cut.read_bytes()[:-1500])
  done = predict('--sliding', '--json', '--timeline=t.json', 'cut.mkv')
  assert done.returncode == 2
  *windows, error = lines_of(done)
  assert [window['start'] for window in windows][:2] == [0.0, 1.6]
  assert 'is truncated' in error['error']
  assert done.stderr == f'error: cut.mkv: {error["error"]}\n'
  assert not (tmp_path / 't.json').exists()


@pytest.fixture(name='files')
def _files(tmp_path) -> pathlib.Path:
  write(tmp_path / 'a.mp4', noise(3, 0))
  write(tmp_path / 'b.mp4', noise(3, 0))
  write_sound(tmp_path / 'sound.mp4')
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'old.json').write_text('kept')
  (tmp_path / 'zero.mp4').touch()
  return tmp_path


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ('', 'VIDEO must be given'),
    ('none.mp4', 'none.mp4: no such file or folder'),
    (
      'http://127.0.0.1:1/x',
      'http://127.0.0.1:1/x: cannot be opened, or sends no video: Connection'
      ' refused',
    ),
    ('a.mp4 --checkpoint=empty', 'empty holds no checkpoint'),
    ('a.mp4 --top_k=0', '--top_k=0'),
    ('a.mp4 --stride=nan', '--stride=nan: expected more than 0'),
    ('a.mp4 --seconds=1', '--seconds has no effect without --sliding'),
    ('a.mp4 --timeline=t.txt', '.json or .csv or .png'),
    ('a.mp4 b.mp4 --timeline=t.csv', 'but there are 2'),
    ('a.mp4 --timeline=t.csv,old.json', 'old.json already exists'),
    ('a.mp4 --timeline=a.mp4/t.csv', 'a.mp4/t.csv cannot be written'),
    ('a.mp4 b.mp4 --save=x.mp4', 'there are 2'),
    ('a.mp4 b.mp4 --save=. --overwrite', 'is an input video'),
    ('a.mp4 --features=f.npy', 'expected a name that ends in .npz'),
    ('a.mp4 --features=f.npz --sliding', '--features is for whole videos'),
    ('a.mp4 --features_per_token', 'needs --features'),
    ('0 a.mp4', 'must be the only VIDEO'),
    ('0 --save=x.mp4', '--save needs a file'),
  ],
)
def test_invalid_arguments_fail_in_one_line_and_write_nothing(
  predict, files, arguments, expected
):
  before = {path: path.stat().st_mtime_ns for path in files.rglob('*')}
  done = predict(*arguments.split())
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert expected in line
  assert (done.returncode, done.stdout) == (2, '')
  after = {path: path.stat().st_mtime_ns for path in files.rglob('*')}
  assert after == before


def test_each_unreadable_video_has_an_error_line(predict, files):
  del files
  done = predict('none.mp4', 'sound.mp4', 'zero.mp4')
  lines = done.stderr.splitlines()
  assert [line.split(': ')[1] for line in lines] == [
    'none.mp4',
    'sound.mp4',
    'zero.mp4',
  ]
  assert (done.returncode, done.stdout) == (2, '')


# --- Documentation


def test_documented_search_finds_nearest_neighbors(
  predict, checkpoint, tmp_path
):
  folder = tmp_path / 'videos'
  for seed in range(4):
    write(folder / f'{seed}.mp4', noise(24, seed))
  (folder / 'copies').mkdir()
  shutil.copy(folder / '2.mp4', folder / 'copies' / 'again.mp4')
  text = DOCUMENT.read_text()
  (arguments,) = re.findall(
    r'python -m dualformer_jax.predict (.*)', text.replace('\\\n', ' ')
  )
  flags = [a for a in arguments.split() if not a.startswith('--checkpoint')]
  done = predict(*flags)
  assert done.returncode == 0, done.stderr
  code, other = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  variables: dict[str, Any] = {}
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(code.replace('videos/query.mp4', 'videos/2.mp4'), variables)
  rows = [line.split() for line in printed.getvalue().splitlines()]
  with np.load('features.npz') as file:
    names, features = file['names'].tolist(), file['features']
  query = names.index('videos/2.mp4')
  similarities = {
    name: float(
      features[query] @ row / np.linalg.norm(features[query])
      / np.linalg.norm(row)
    )
    for name, row in zip(names, features, strict=True)
    if name != 'videos/2.mp4'
  }  # fmt: skip
  expected = sorted(similarities, key=lambda name: -similarities[name])
  assert [name for _, name in rows] == expected
  assert rows[0] == ['1.000', 'videos/copies/again.mp4']
  assert [float(value) for value, _ in rows] == pytest.approx(
    [similarities[name] for name in expected], abs=6e-4
  )
  other = other.replace('checkpoints/tiny', str(checkpoint))
  exec(other.replace('other.mp4', 'videos/1.mp4'), variables)
  assert variables['similarity'].max() == pytest.approx(1, abs=1e-3)
  assert names[variables['nearest'][0]] == 'videos/1.mp4'
