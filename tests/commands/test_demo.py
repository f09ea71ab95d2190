"""The demo page, used by HTTP as a browser does."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from typing import Any
import urllib.error
import urllib.request
import wave

import cv2
import numpy as np
import pytest

import dualformer_jax
from dualformer_jax.input_pipeline import video_writer
from tests import small_checkpoint, training_command
from tests.input_pipeline import videos

MEGABYTE = 10**6
FPS = 10.0
# The server takes seconds to start.
pytestmark = pytest.mark.slow
COMMAND = (sys.executable, '-m', 'dualformer_jax.demo')


@pytest.fixture(scope='module', name='checkpoint')
def _checkpoint(tmp_path_factory) -> pathlib.Path:
  return small_checkpoint.save(tmp_path_factory.mktemp('demo') / 'model')


class Server:
  """The running command; its temporary files are in `folder`."""

  def __init__(self, process: subprocess.Popen[str], folder: pathlib.Path):
    self.process, self.folder = process, folder
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r'(http://127\.0\.0\.1:(\d+)/) is ready; .*\n', line)
    assert found, line
    self.url, self.port = found[1], int(found[2])

  def files(self) -> list[pathlib.Path]:
    return [path for path in self.folder.rglob('*') if path.is_file()]

  def request(
    self, path: str, body: bytes | None = None, **headers: str
  ) -> tuple[int, bytes]:
    names = {name.replace('_', '-'): value for name, value in headers.items()}
    request = urllib.request.Request(self.url + path, body, names)
    try:
      with urllib.request.urlopen(request, timeout=120) as response:
        return response.status, response.read()
    except urllib.error.HTTPError as error:
      with error:
        return error.code, error.read()

  def upload(self, name: str, *contents: bytes) -> tuple[int, bytes]:
    body = b''.join(
      b'--limit\r\nContent-Disposition: form-data; name="files"; filename="'
      + f'{name}"\r\n\r\n'.encode()
      + content
      + b'\r\n'
      for content in contents
    )
    return self.request(
      'gradio_api/upload',
      body + b'--limit--\r\n',
      Content_Type='multipart/form-data; boundary=limit',
    )

  def look(self, name: str, content: bytes) -> tuple[str, Any, pathlib.Path]:
    """Uploads and scores a video; returns event, data and the upload."""
    status, answer = self.upload(name, content)
    assert status == 200, answer
    [path] = json.loads(answer)
    assert pathlib.Path(path).read_bytes() == content
    file = {'path': path, 'meta': {'_type': 'gradio.FileData'}}
    event, data = self.call('look', file)
    return event, data, pathlib.Path(path)

  def call(self, name: str, *arguments: object) -> tuple[str, Any]:
    _, answer = self.request(
      f'gradio_api/call/{name}',
      json.dumps({'data': arguments}).encode(),
      Content_Type='application/json',
    )
    identifier = json.loads(answer)['event_id']
    _, answer = self.request(f'gradio_api/call/{name}/{identifier}')
    *_, event, data = answer.decode().strip().split('\n')
    return event.removeprefix('event: '), json.loads(data.removeprefix('data:'))


@pytest.fixture(scope='module', name='elsewhere')
def _elsewhere() -> Iterator[tuple[int, list[bytes]]]:
  """A proxy that records the requests it receives."""
  requests = []

  class Note(socketserver.StreamRequestHandler):
    def handle(self) -> None:
      requests.append(self.rfile.readline())

  with socketserver.TCPServer(('127.0.0.1', 0), Note) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], requests
    server.shutdown()


@pytest.fixture(scope='module', name='environment')
def _environment(compilation_cache, elsewhere, tmp_path_factory):
  proxy = f'http://127.0.0.1:{elsewhere[0]}'
  return {
    **training_command.environment(compilation_cache),
    'http_proxy': proxy,
    'https_proxy': proxy,
    'no_proxy': '127.0.0.1',
    'TMPDIR': str(tmp_path_factory.mktemp('temporary')),
  }


@pytest.fixture(scope='module', name='server')
def _server(checkpoint, environment) -> Iterator[Server]:
  process = subprocess.Popen(
    [*COMMAND, f'--checkpoint={checkpoint}', '--port=0', '--max_megabytes=1'],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    server = Server(process, pathlib.Path(environment['TMPDIR']))
    yield server
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
  finally:
    process.kill()
  # It ends at once and leaves no files. Warnings may come from libraries.
  assert process.returncode == 128 + signal.SIGTERM
  assert errors.endswith('stopped by SIGTERM\n')
  assert 'demo.py' not in errors
  assert not [*server.folder.iterdir()]


def test_video_is_scored_and_deleted(server, checkpoint, tmp_path):
  rng = np.random.default_rng(0)
  colors = rng.integers(0, 256, (5, 1, 1, 3)).repeat(10, axis=0)
  frames = np.clip(colors + rng.normal(0, 30, (50, 48, 64, 3)), 0, 255)
  path = tmp_path / 'colors.mp4'
  path.write_bytes(video_writer.encode_mp4(frames.astype(np.uint8), fps=FPS))
  event, data, upload = server.look('colors.mp4', path.read_bytes())
  assert event == 'complete'
  assert not upload.exists()
  classes, heat_map, timeline = data[:3]

  recognizer = dualformer_jax.load(checkpoint)
  expected = recognizer.predict(str(path))
  assert classes['label'] == expected[0][0]
  found = {c['label']: c['confidence'] for c in classes['confidences']}
  assert found == pytest.approx(dict(expected), abs=1e-5)

  # Windows of 1.6 s: three, and one that ends with the video.
  assert timeline['columns'] == ['seconds', 'probability', 'class']
  corners = [
    second for second, _, name in timeline['data'] if name == expected[0][0]
  ]
  assert corners == pytest.approx([0, 1.6, 1.6, 3.2, 3.2, 3.4, 3.4, 5])
  assert {name for *_, name in timeline['data']} == {*found}

  _, content = server.request(heat_map['url'].removeprefix(server.url))
  shown = videos.decode_all(content)
  assert shown.shape == (8, 256, 256, 3)
  middle = recognizer.views(str(path))[3]  # of six
  [heat] = recognizer.gradcam(
    recognizer.normalize(middle[None]), 'blocks.0.0', expected[0][0]
  )
  for picture, frame, warmth in zip(shown, middle, heat, strict=True):
    levels = (255 * warmth).astype(np.uint8)
    colors = cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)
    mixed = frame / 2 + colors[..., ::-1] / 2
    small = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    # The heat map is compressed, and has more pixels.
    assert np.corrcoef(small.ravel(), mixed.ravel())[0, 1] > 0.9


def test_unreadable_upload_fails_in_one_line_and_is_deleted(server, tmp_path):
  sound = tmp_path / 'sound.wav'
  with wave.open(str(sound), 'wb') as file:
    file.setparams((1, 2, 8000, 0, 'NONE', ''))
    file.writeframes(bytes(16000))
  before = server.files()
  for name, content in (
    ('notes.mp4', b'not a video'),
    ('empty.mp4', b''),
    ('sound.mp4', sound.read_bytes()),
  ):
    event, data, upload = server.look(name, content)
    assert event == 'error'
    assert data['error'].startswith(f'{name}: ')
    assert '\n' not in data['error']
    assert not upload.exists()
  assert server.files() == before


def test_file_that_was_not_uploaded_is_not_read(server, checkpoint):
  for path in ('/etc/hostname', str(checkpoint)):
    file = {'path': path, 'meta': {'_type': 'gradio.FileData'}}
    event, _ = server.call('look', file)
    assert event == 'error'
    assert pathlib.Path(path).exists()


def test_large_upload_is_refused_and_leaves_no_file(server):
  before = server.files()
  assert server.upload('large.mp4', bytes(MEGABYTE + 1))[0] == 413
  # Several files in one request, and a request without its size.
  for header, status in (
    (f'Content-Length: {2 * MEGABYTE}', b'413'),
    ('Transfer-Encoding: chunked', b'411'),
  ):
    with socket.create_connection(('127.0.0.1', server.port)) as connection:
      connection.sendall(
        b'POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\n'
        b'Content-Type: multipart/form-data; boundary=limit\r\n'
        + f'{header}\r\n\r\n'.encode()
      )
      assert connection.recv(100).startswith(b'HTTP/1.1 ' + status)
  assert server.files() == before


def test_old_uploads_are_deleted(server):
  before = server.files()
  status, answer = server.upload('forgotten.mp4', b'something')
  assert status == 200
  [path] = json.loads(answer)
  assert len(server.files()) == len(before) + 1
  long_ago = time.time() - 2 * 3600
  os.utime(path, (long_ago, long_ago))
  for _ in range(60):
    if not os.path.exists(path):
      break
    time.sleep(0.5)
  assert server.files() == before


def test_page_is_served_to_this_machine_alone(server):
  # A server for all addresses would answer at this one.
  with pytest.raises(OSError), socket.socket() as other:
    other.settimeout(5)
    other.connect(('127.0.0.2', server.port))


def test_page_loads_nothing_from_other_servers(server, elsewhere):
  with urllib.request.urlopen(server.url, timeout=60) as response:
    policy = response.headers['content-security-policy']
    page = response.read().decode()
  assert policy.startswith("default-src 'self' ")
  assert 'http' not in policy
  loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="([^"]+)', page)
  assert loaded
  assert not [address for address in loaded if '//' in address]
  assert elsewhere[1] == []


def test_page_leaves_room_for_the_buttons_below_a_video(server):
  with urllib.request.urlopen(server.url, timeout=60) as response:
    page = response.read().decode().replace('\\u003e', '>')
  # Gradio's own rule makes the drop zone cover them in wide windows.
  assert '.video-container > .wrap {flex: 1; min-height: 0' in page


def test_startup_errors_are_one_line(server, checkpoint, environment):
  for arguments, words in (
    ((f'--checkpoint={checkpoint}', f'--port={server.port}'), '--port=0'),
    ((f'--checkpoint={checkpoint.parent}', '--port=0'), 'holds no checkpoint'),
  ):
    done = subprocess.run(
      [*COMMAND, *arguments],
      env=environment,
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith('error: ')
    assert words in line
