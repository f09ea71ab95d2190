r"""Serves a web page to try a model on videos.

  python -m dualformer_jax.demo --checkpoint=DIR [--port=7860]

The page takes a video file or records one with the camera. It shows the
classes, the classes over time, and a heat map of where the model looks. Only
this machine can open the page, unless --host is given. An upload is deleted
once it has been scored, and nothing is sent to other servers. The command needs
the extra `demo`: pip install -e '.[demo]'.
"""

import contextlib
import functools
import os
import pathlib
import socket
import tempfile
import threading
import time
from typing import Any

from absl import flags

from dualformer_jax import command_line
from dualformer_jax.command_line import CHECKPOINT_HELP
from dualformer_jax.errors import UserError, require
from dualformer_jax.files import unfinished

FLAGS = flags.FLAGS

# The size of an upload's request beyond that of the file is below this.
_FORM_BYTES = 1 << 16
# A browser loads nothing for the page from other servers.
_POLICY = (
  "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
  "frame-ancestors 'self'; form-action 'self'"
)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('checkpoint', None, CHECKPOINT_HELP, required=True)
  flags.DEFINE_string(
    'host',
    '127.0.0.1',
    'The address to serve at. With 0.0.0.0 everyone who reaches this machine '
    'can use the page; there is no password.',
  )
  flags.DEFINE_integer('port', 7860, 'The port; 0 for any.', 0, 65535)
  flags.DEFINE_integer('max_megabytes', 200, 'Largest size of an upload.', 1)


def main() -> None:
  """Serves the page until the command is interrupted."""
  try:
    tempfile.gettempdir()
  except FileNotFoundError as error:
    raise UserError(f'{error.strerror}; set TMPDIR to a folder') from error
  with (
    tempfile.TemporaryDirectory(prefix='dualformer_demo_') as folder,
    unfinished(pathlib.Path(folder)),
  ):
    tempfile.tempdir = folder
    # Gradio reads these when it is imported.
    os.environ.update(
      GRADIO_TEMP_DIR=folder,
      GRADIO_ANALYTICS_ENABLED='False',
      HF_HUB_DISABLE_TELEMETRY='1',
      HF_HUB_OFFLINE='1',
    )
    _serve(pathlib.Path(folder).resolve())


def _serve(folder: pathlib.Path) -> None:
  """Serves the page, with a folder for all temporary files."""
  require('the demo', 'demo', 'fastapi', 'gradio', 'uvicorn')
  server = _listen(FLAGS.host, FLAGS.port)

  # Imported late, so that --help and errors do not wait for them.
  import cv2

  from dualformer_jax.inference.recognizer import Recognizer

  command_line.enable_compilation_cache()
  recognizer = Recognizer.load(FLAGS.checkpoint)
  cv2.setNumThreads(0)  # its threads would compete with those of JAX

  import fastapi
  from fastapi import responses
  import gradio as gr
  from gradio.themes import Default
  import uvicorn

  from dualformer_jax.inference import demo_page

  max_bytes = FLAGS.max_megabytes * 10**6
  app = fastapi.FastAPI(openapi_url=None)

  @app.middleware('http')
  async def guard(request: Any, call_next: Any) -> Any:
    """Refuses large requests and adds the policy to responses."""
    length = request.headers.get('content-length', '0')
    if 'transfer-encoding' in request.headers:
      # A request must state its size, to be refused before its body is read.
      return responses.PlainTextResponse('The size is missing', 411)
    if not length.isdigit() or int(length) > max_bytes + _FORM_BYTES:
      return responses.PlainTextResponse('The file is too big', 413)
    response = await call_next(request)
    response.headers['content-security-policy'] = _POLICY
    return response

  fonts = ('ui-sans-serif', 'system-ui', 'sans-serif')
  gr.mount_gradio_app(
    app,
    demo_page.make_page(recognizer, folder),
    '/',
    max_file_size=max_bytes,
    show_error=True,
    footer_links=[],
    run_history=False,
    enable_monitoring=False,
    ssr_mode=False,
    mcp_server=False,
    pwa=False,
    css=demo_page.CSS,
    theme=Default(font=fonts, font_mono=('ui-monospace', 'monospace')),
  )
  keep = (folder, demo_page.KEEP_SECONDS)
  threading.Thread(target=_delete_old_files, args=keep, daemon=True).start()
  host, port = server.getsockname()[:2]
  host = f'[{host}]' if ':' in host else host
  print(f'http://{host}:{port}/ is ready; press Ctrl-C to stop', flush=True)
  config = uvicorn.Config(
    app,
    loop='asyncio',  # uvloop would take the signals
    log_level='warning',
    access_log=False,
  )
  web: Any = uvicorn.Server(config)
  web.capture_signals = contextlib.nullcontext
  web.run(sockets=[server])


def _listen(host: str, port: int) -> socket.socket:
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise UserError(
      f'--host={host} --port={port} is not available ({error.strerror}); '
      'choose another --port, or --port=0 for any'
    ) from error


def _delete_old_files(folder: pathlib.Path, max_seconds: float) -> None:
  """Deletes old files in a folder, forever."""
  while True:
    time.sleep(5)
    for path in folder.rglob('*'):
      with contextlib.suppress(OSError):  # the file may have been deleted
        age = time.time() - path.stat().st_mtime
        if age > max_seconds and path.is_file():
          path.unlink()


cli = functools.partial(command_line.run, main, define_flags)

if __name__ == '__main__':
  cli()
