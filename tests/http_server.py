"""HTTP servers of tests, in threads of this process."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import http.server
import threading
from typing import Any


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
