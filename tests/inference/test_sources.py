"""Arguments name files, folders, patterns, cameras and addresses."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading

import pytest

from dualformer_jax import errors
from dualformer_jax.inference import sources


@pytest.fixture(name='folder')
def _folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in (
    'a/2.mp4',
    'a/1.AVI',
    'a/._1.AVI',
    'a/notes.txt',
    'a/deeper/3.webm',
    'b/[4].mp4',
    'empty/notes.txt',
    '0',
    'http:/x.mp4',
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  return tmp_path


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['a'], ['a/1.AVI', 'a/2.mp4', 'a/deeper/3.webm']),
    (['a/2.mp4', 'a'], ['a/2.mp4', 'a/1.AVI', 'a/deeper/3.webm']),
    (['a/notes.txt'], ['a/notes.txt']),
    (['b/[4].mp4'], ['b/[4].mp4']),
    (['*/*.mp4'], ['a/2.mp4', 'b/[4].mp4', 'http:/x.mp4']),
    (['[ab]'], ['a/1.AVI', 'a/2.mp4', 'a/deeper/3.webm', 'b/[4].mp4']),
    (['**/*.webm'], ['a/deeper/3.webm']),
    (['./0'], ['./0']),
    (['http:/x.mp4'], ['http:/x.mp4']),
    (['0'], ['0']),
    (['rtsp://camera/1', 'HTTPS://host/x'], ['rtsp://camera/1', 'HTTPS://host/x']),
  ],
)  # fmt: skip
def test_find_videos(folder, arguments, expected):
  del folder
  assert sources.find_videos(arguments) == [(name, '') for name in expected]


def test_absolute_path_and_home_folder(folder, monkeypatch):
  monkeypatch.setenv('HOME', str(folder))
  expected = [(f'{folder}/a/2.mp4', '')]
  assert sources.find_videos([str(folder / 'a' / '2.mp4')]) == expected
  assert sources.find_videos(['~/a/2.mp4']) == expected


def test_linked_folders_are_followed_once(folder):
  (folder / 'b' / 'linked').symlink_to(folder / 'a')
  (folder / 'a' / 'deeper' / 'loop').symlink_to(folder)
  (folder / 'b' / 'loop').symlink_to('loop')  # leads nowhere
  # From b: a by the link, and from there the root, but neither b nor a again.
  linked = ['1.AVI', '2.mp4', 'deeper/3.webm', 'deeper/loop/http:/x.mp4']
  expected = ['b/[4].mp4', *(f'b/linked/{name}' for name in linked)]
  assert [name for name, _ in sources.find_videos(['b'])] == expected
  # In a pattern, ** follows no links.
  assert sources.find_videos(['**/*.mp4']) == [
    (name, '') for name in ('a/2.mp4', 'b/[4].mp4', 'http:/x.mp4')
  ]
  absolute = sources.find_videos([f'{folder}/b/**/*.mp4'])
  assert absolute == [(f'{folder}/b/[4].mp4', '')]


def test_patterns_may_name_hidden_folders_and_parents(folder, monkeypatch):
  hidden = folder / '.cache' / 'videos' / '.parts'
  hidden.mkdir(parents=True)
  for path in (hidden.parent / '5.mp4', hidden / '6.mp4'):
    path.touch()
  assert sources.find_videos(['.cache/**/*.mp4']) == [
    ('.cache/videos/5.mp4', '')
  ]
  monkeypatch.chdir(folder / 'empty')
  assert sources.find_videos(['../b/**/*.mp4']) == [('../b/[4].mp4', '')]


@pytest.mark.parametrize(
  ('argument', 'reason'),
  [
    ('none.mp4', 'no such file or folder'),
    ('empty', 'no videos in this folder'),
    ('*.mp4', 'no file matches this pattern'),
    ('file:a/2.mp4', 'no such file or folder'),
    ('concat:a/2.mp4|b/4.mp4', 'no such file or folder'),
    ('1234', 'no such file or folder'),
  ],
)
def test_argument_that_names_no_video_has_an_error(folder, argument, reason):
  del folder
  found, good = sources.find_videos([argument, 'a/2.mp4'])
  assert good == ('a/2.mp4', '')
  assert found[0] == argument
  assert reason in found[1]


def test_numbers_and_addresses_are_live():
  for name in (
    '0',
    '12',
    'rtsp://h/1',
    'rtmp://h',
    'http://h/x.ts',
    'HTTP://h',
  ):
    assert sources.is_live(name)
  for name in ('./0', '0.mp4', 'file://x', 'http:/x', 'pipe:0', '1234', ''):
    assert not sources.is_live(name)


@pytest.mark.parametrize(
  ('address', 'reason'),
  [
    ('http://127.0.0.1:1/x', 'Connection refused'),
    ('rtsp://127.0.0.1:1/x', 'Connection refused'),
    ('http://name.invalid/x', '.*(name|Name).*'),  # the resolver's words
    ('http://127.0.0.1:PORT/x', 'Server returned 404 Not Found'),
  ],
)
def test_address_that_cannot_be_opened_has_the_reason(address, reason):
  handler = http.server.SimpleHTTPRequestHandler
  with contextlib.ExitStack() as stack:
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    stack.enter_context(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    address = address.replace('PORT', str(server.server_port))
    with (
      pytest.raises(errors.UserError, match=f': {reason}$'),
      sources.open_stream(address),
    ):
      pass


def test_address_that_does_not_answer_is_left_after_some_time(monkeypatch):
  monkeypatch.setattr(sources, '_SECONDS_TO_OPEN', 0.5)
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'http://127.0.0.1:{server.getsockname()[1]}/x'
    assert sources._why_closed(address) == 'no answer within 0.5 seconds'
