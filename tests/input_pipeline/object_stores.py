"""Local servers with the protocols of object stores, slow and failing."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import http.client
import os
import pathlib
import random
import threading
import time
from typing import Any
import urllib.parse

from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

from tests import hub_server
from tests.http_server import SilentHandler, serve

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
  """A server of the Hugging Face Hub with one dataset; yields its URL."""
  files = {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }
  with hub_server.start() as server:
    server.add(repository, files, 'dataset')
    yield server.url
