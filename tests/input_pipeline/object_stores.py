"""Local servers with the protocols of object stores, slow and failing."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import pathlib
import random
import threading
import time
from typing import Any
import urllib.parse

from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

# Otherwise gcsfs asks Google's servers for the type of a bucket.
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'


@dataclasses.dataclass
class Faults:
  """What a proxy does to requests.

  Attributes:
    latency: seconds before each answer.
    share: of requests that fail: half with 503, half with a connection that is
      dropped within the answer.
    failed: number of requests that failed.
    requests: number of all requests.
  """

  latency: float = 0.0
  share: float = 0.0
  failed: int = 0
  requests: int = 0


class SilentHandler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, format: str, *args: Any) -> None:
    pass


@contextlib.contextmanager
def serve(handler: type[SilentHandler]) -> Iterator[str]:
  """Serves in threads; yields the URL."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  server.daemon_threads = True
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.contextmanager
def proxy(upstream: str, faults: Faults) -> Iterator[str]:
  """A server that forwards requests to another; yields its URL."""
  parts = urllib.parse.urlsplit(upstream)
  assert parts.hostname is not None
  host, port = parts.hostname, parts.port
  rng, lock = random.Random(0), threading.Lock()

  class Handler(SilentHandler):
    def forward(self) -> None:
      time.sleep(faults.latency)
      with lock:
        faults.requests += 1
        fails = rng.random() < faults.share
        faults.failed += fails
        drops = fails and rng.random() < 0.5
      length = int(self.headers.get('Content-Length') or 0)
      body = self.rfile.read(length)
      if fails and not drops:
        self.send_response(503)
        self.send_header('Content-Length', '0')
        self.end_headers()
        return
      connection = http.client.HTTPConnection(host, port, timeout=30)
      connection.request(self.command, self.path, body, dict(self.headers))
      answer = connection.getresponse()
      content = answer.read()
      connection.close()
      self.send_response(answer.status)
      dropped = {'transfer-encoding', 'connection', 'date', 'server'}
      if self.command != 'HEAD':
        dropped.add('content-length')
      for name, value in answer.getheaders():
        if name.lower() not in dropped:
          self.send_header(name, value)
      if self.command != 'HEAD':
        self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      if self.command == 'HEAD':
        return
      if drops:
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.connection.close()
        self.close_connection = True
        return
      self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = forward  # noqa: N815

  with serve(Handler) as url:
    yield url


@contextlib.contextmanager
def s3() -> Iterator[str]:
  """An S3 server; yields its URL."""
  server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  try:
    yield f'http://{host}:{port}'
  finally:
    server.stop()


@contextlib.contextmanager
def gcs() -> Iterator[str]:
  """A Google Cloud Storage server; yields its URL."""
  server = create_server('127.0.0.1', 0, in_memory=True)
  server.start()
  try:
    http_server: Any = server._api._httpd
    _, port = http_server.socket.getsockname()
    yield f'http://127.0.0.1:{port}'
  finally:
    server.stop()


@contextlib.contextmanager
def hub(repository: str, folder: pathlib.Path) -> Iterator[str]:
  """A server of the Hugging Face Hub with one dataset; yields its URL.

  It has what reading needs: the repository, its tree, and files by range.
  """
  revision = '0123456789abcdef0123456789abcdef01234567'

  def entry(path: pathlib.Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
      return {'type': 'directory', 'path': name, 'oid': '0' * 40, 'size': 0}
    size = path.stat().st_size
    return {'type': 'file', 'path': name, 'oid': '0' * 40, 'size': size}

  class Handler(SilentHandler):
    def answer(self, status: int, content: bytes, **headers: str) -> None:
      self.send_response(status)
      self.send_header('Content-Length', str(len(content)))
      for name, value in headers.items():
        self.send_header(name.replace('_', '-'), value)
      self.end_headers()
      if self.command != 'HEAD':
        self.wfile.write(content)

    def answer_json(self, value: Any) -> None:
      content = json.dumps(value).encode()
      self.answer(200, content, Content_Type='application/json')

    def do_GET(self) -> None:
      url = urllib.parse.urlsplit(self.path)
      path = urllib.parse.unquote(url.path)
      api = f'/api/datasets/{repository}'
      if path in (api, f'{api}/revision/main'):
        self.answer_json({'id': repository, 'sha': revision, 'siblings': []})
      elif path.startswith(f'{api}/tree/main'):
        top = folder / path.removeprefix(f'{api}/tree/main').strip('/')
        query = urllib.parse.parse_qs(url.query)
        is_recursive = query.get('recursive', ['False'])[0].lower() == 'true'
        paths = sorted(top.rglob('*') if is_recursive else top.glob('*'))
        if not top.is_dir():
          self.answer(404, b'', X_Error_Code='EntryNotFound')
        else:
          self.answer_json([entry(p) for p in paths])
      elif path.startswith(f'/datasets/{repository}/resolve/main/'):
        name = path.removeprefix(f'/datasets/{repository}/resolve/main/')
        content = (folder / name).read_bytes()
        headers = {'ETag': '"0"', 'X_Repo_Commit': revision}
        if found := self.headers.get('Range'):
          first, last = map(int, found.removeprefix('bytes=').split('-'))
          part = content[first : last + 1]
          total = f'bytes {first}-{first + len(part) - 1}/{len(content)}'
          self.answer(206, part, Content_Range=total, **headers)
        else:
          self.answer(200, content, **headers)
      else:
        self.answer(404, b'', X_Error_Code='RepoNotFound')

    def do_POST(self) -> None:
      length = int(self.headers.get('Content-Length') or 0)
      body = urllib.parse.parse_qs(self.rfile.read(length).decode())
      names = [folder / name for name in body.get('paths', [])]
      self.answer_json([entry(p) for p in names if p.exists()])

    do_HEAD = do_GET  # noqa: N815

  with serve(Handler) as url:
    yield url
