r"""Serves a page to try a model: drop a video, see what the model says of it.

  python -m dualformer_jax.demo --checkpoint=DIR [--port=7860]

The page takes a video file, or records one with the camera, and shows its
classes, the classes over time, and a heat map of where the model looks. Only
this machine can open it, unless --host says otherwise. An upload is deleted as
soon as it has been looked at, and nothing is sent elsewhere. It needs the extra
`demo`: pip install 'dualformer_jax[demo]'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from absl import flags
import cv2
from jaxtyping import UInt8
import numpy as np

from dualformer_jax import command_line, heat_maps, scoring
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding
from dualformer_jax.input_pipeline.views import test_views

if TYPE_CHECKING:
  from dualformer_jax.recognizer import Recognizer

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'A checkpoint folder, or the workdir of a training run.',
  required=True,
)
_HOST = flags.DEFINE_string(
  'host',
  '127.0.0.1',
  'The address to serve at. With 0.0.0.0 everyone who reaches this machine can '
  'use the page; nobody is asked for a password.',
)
_PORT = flags.DEFINE_integer(
  'port', 7860, 'The port; 0 for any.', lower_bound=0, upper_bound=65535
)
_MAX_MEGABYTES = flags.DEFINE_integer(
  'max_megabytes', 200, 'How large an upload may be.', lower_bound=1
)

_TOP_K = 5
_MAX_WINDOWS = 60  # of a video; longer ones have gaps between them
_MIN_SIDE = 256  # pixels of the heat map's side
_HEIGHT = 380  # pixels of a video on the page
# Heat maps, and uploads that were never looked at, live as long.
_KEEP_SECONDS = 3600
_MOST_PROBABLE = 'the most probable class'
# What surrounds a file in the body of an upload is less than this.
_FORM_BYTES = 1 << 16
# Gradio's button to trim a video, for which it would fetch a program.
_CSS = 'button[aria-label="Trim video to selection"] {display: none}'
# Whatever the page asks for, the browser fetches from this server alone.
_POLICY = (
  "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
  "frame-ancestors 'self'; form-action 'self'"
)


@dataclasses.dataclass(frozen=True)
class _Clip:
  """The view of a video that a heat map is drawn over.

  Attributes:
    view: as the model sees it.
    pictures: the same, as sharp as it is shown.
    fps: at which it is as fast as the video.
    best: number of the video's most probable class.
  """

  view: UInt8[np.ndarray, 't h w 3']
  pictures: UInt8[np.ndarray, 't y x 3']
  fps: float
  best: int


# --- What is computed


def _look(recognizer: Recognizer, video: str) -> tuple[dict[str, float], _Clip]:
  """Returns the most probable classes of a video, and its middle view."""
  views = recognizer.views(video)
  probabilities = recognizer.probabilities(views)
  middle = len(views) // 2
  side = max(recognizer.model.image_size, _MIN_SIDE)
  sharp = dataclasses.replace(recognizer.preprocessing, image_size=side)
  clip = _Clip(
    view=views[middle],
    pictures=test_views(video, sharp)[middle],
    fps=heat_maps.clip_fps(video, recognizer.preprocessing),
    best=int(probabilities.argmax()),
  )
  return dict(recognizer.top(probabilities, _TOP_K)), clip


def _heat_map(
  recognizer: Recognizer, clip: _Clip, label: str, folder: pathlib.Path
) -> str:
  """Writes Grad-CAM of a class as MP4; returns its path, a new one."""
  depths = recognizer.model.depths
  layer = f'blocks.{len(depths) - 1}.{depths[-1] - 1}'
  number = clip.best
  if label != _MOST_PROBABLE:
    number = recognizer.class_number(label)
  view = recognizer.normalize(clip.view[None])
  heat = recognizer.gradcam(view, layer, number)[0]
  pictures = heat_maps.draw_heat(clip.pictures, heat)
  handle, path = tempfile.mkstemp('.mp4', 'heat_map_', folder)
  with open(handle, 'wb') as file:
    file.write(decoding.encode_mp4(pictures, fps=clip.fps))
  return path


def _timeline(
  recognizer: Recognizer, video: str, progress: Callable[[float], object]
) -> list[tuple[float, float, str]]:
  """Returns seconds, probabilities and classes: the corners of lines.

  Args:
    recognizer: the model.
    video: the file.
    progress: called with the share of the video that is done.
  """
  p = recognizer.preprocessing
  fps, seconds = decoding.frame_rate(video), decoding.duration(video) or 0.0
  windows = []
  for window in scoring.score_windows(
    recognizer,
    decoding.stream_frames(video),
    fps,
    stride=max(p.num_frames * p.frame_interval / fps, seconds / _MAX_WINDOWS),
    top_k=len(recognizer.class_names),
  ):
    windows.append(window)
    progress(min(1.0, window.end / max(seconds, window.end)))
  # Where windows overlap, each is shown until the next one starts.
  starts = [window.start for window in windows]
  ends = [
    min(window.end, after)
    for window, after in zip(windows, [*starts[1:], np.inf], strict=True)
  ]
  shares = [dict(window.predictions) for window in windows]
  total = {name: sum(s[name] for s in shares) for name in shares[0]}
  return [
    (second, share[name], name)
    for name in sorted(total, key=lambda name: -total[name])[:_TOP_K]
    for start, end, share in zip(starts, ends, shares, strict=True)
    for second in (start, end)
  ]


# --- The page


def _page(recognizer: Recognizer, folder: pathlib.Path) -> Any:
  """Returns the page, gradio.Blocks; files are written into the folder."""
  import gradio as gr
  import pandas as pd

  tracker = gr.Progress()  # what Gradio passes on as an argument

  def look(
    video: str | None,
    progress: gr.Progress = tracker,
  ) -> Iterator[Any]:
    if video is None:
      yield None, None, None, None, _MOST_PROBABLE
      return
    path = pathlib.Path(video)
    try:
      progress(0, 'Looking')
      classes, clip = _look(recognizer, video)
      heat_map = _heat_map(recognizer, clip, _MOST_PROBABLE, folder)
      yield classes, heat_map, None, clip, _MOST_PROBABLE
      corners = _timeline(
        recognizer, video, lambda share: progress(share, 'Windows over time')
      )
      frame = pd.DataFrame(corners, columns=['seconds', 'probability', 'class'])
      yield classes, heat_map, frame, clip, _MOST_PROBABLE
    except UserError as error:
      reason = getattr(error, 'reason', str(error))
      raise gr.Error(f'{path.name}: {reason}', print_exception=False) from None
    finally:
      # Gradio lets nothing through but what lies in its folder.
      if path.is_relative_to(folder):
        path.unlink(missing_ok=True)

  def heat_map_of(label: str, clip: _Clip | None) -> str | None:
    return _heat_map(recognizer, clip, label, folder) if clip else None

  with gr.Blocks(
    title='DualFormer', analytics_enabled=False, fill_width=True
  ) as page:
    gr.Markdown(
      f'# DualFormer\nDrop a video, or record one: what does it show? '
      f'The model knows {len(recognizer.class_names)} classes. '
      'Your video is deleted once it has been looked at.'
    )
    clip = gr.State(time_to_live=_KEEP_SECONDS)
    with gr.Row():
      with gr.Column(min_width=320):
        video = gr.Video(
          label='Video',
          sources=['upload', 'webcam'],
          # Without Gradio's own conversion, which needs the ffmpeg program.
          format=None,
          include_audio=True,
          webcam_options=gr.WebcamOptions(mirror=False),
          height=_HEIGHT,
        )
        classes = gr.Label(label='Classes', num_top_classes=_TOP_K)
      with gr.Column(min_width=320):
        heat_map = gr.Video(
          label='Where it looks',
          interactive=False,
          autoplay=True,
          loop=True,
          buttons=['download'],
          height=_HEIGHT,
        )
        label = gr.Dropdown(
          [_MOST_PROBABLE, *recognizer.class_names],
          label='Heat map of',
          info='Red is what speaks for this class (Grad-CAM).',
          value=_MOST_PROBABLE,
        )
    plot = gr.LinePlot(
      x='seconds',
      y='probability',
      color='class',
      y_lim=[0, 1],
      label='Classes over time',
    )
    gr.on(
      # A recording is no upload to Gradio, and neither is input.
      [video.upload, video.stop_recording, video.clear],
      look,
      video,
      [classes, heat_map, plot, clip, label],
      api_name='look',
    )
    label.input(heat_map_of, [label, clip], heat_map, api_visibility='private')
  return page.queue(max_size=32, default_concurrency_limit=1)


class _Guard:
  """Refuses requests that are too large, and adds the policy to answers."""

  def __init__(self, app: Any, max_bytes: int):
    self._app, self._max_bytes = app, max_bytes

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    headers = dict(scope['headers'])
    length = headers.get(b'content-length', b'0')
    # Only a body whose size is told beforehand can be refused beforehand.
    status = 411 if b'transfer-encoding' in headers else 0
    if not length.isdigit() or int(length) > self._max_bytes:
      status = 413
    if status:
      plain = (b'content-type', b'text/plain')
      start = {'type': 'http.response.start', 'status': status}
      await send({**start, 'headers': [plain]})
      await send({'type': 'http.response.body', 'body': b'The file is too big'})
      return

    async def send_with_policy(message: Any) -> None:
      if message['type'] == 'http.response.start':
        policy = (b'content-security-policy', _POLICY.encode())
        message = {**message, 'headers': [*message['headers'], policy]}
      await send(message)

    await self._app(scope, receive, send_with_policy)


def _delete_old(folder: pathlib.Path) -> None:
  """Deletes what is old, for ever: whoever has written it, and left it."""
  while True:
    time.sleep(5)
    for path in folder.rglob('*'):
      with contextlib.suppress(OSError):  # it may have gone by itself
        age = time.time() - path.stat().st_mtime
        if age > _KEEP_SECONDS and path.is_file():
          path.unlink()


# --- The command


def _listen(host: str, port: int) -> socket.socket:
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise UserError(
      f'--host={host} --port={port}: cannot be served at ({error.strerror}); '
      'choose another --port, or --port=0 for any'
    ) from error


def main() -> None:
  """Serves the page until it is interrupted."""
  # Such that the folder is deleted whatever ends the command.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  # Before Gradio is imported, which reads them then.
  os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
  os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'
  os.environ['HF_HUB_OFFLINE'] = '1'
  with tempfile.TemporaryDirectory(prefix='dualformer_demo_') as name:
    os.environ['GRADIO_TEMP_DIR'] = name
    tempfile.tempdir = name
    _serve(pathlib.Path(name).resolve())


def _serve(folder: pathlib.Path) -> None:
  """Serves the page, with a folder for all that is temporary."""
  # Mistakes are told before what takes seconds to import.
  for name in ('fastapi', 'gradio', 'uvicorn'):
    if importlib.util.find_spec(name) is None:
      raise UserError(
        f"{name} is not installed; pip install 'dualformer_jax[demo]'"
      )
  server = _listen(_HOST.value or '', _PORT.value or 0)

  import jax

  from dualformer_jax.recognizer import Recognizer

  # What was compiled once is not compiled again.
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.path.expanduser('~/.cache/dualformer_jax')
    jax.config.update('jax_compilation_cache_dir', cache)
  recognizer = Recognizer.load(_CHECKPOINT.value or '')
  cv2.setNumThreads(0)  # threads of its own would contend with JAX's

  import fastapi
  import gradio as gr
  from gradio.themes import Default
  import uvicorn

  max_bytes = (_MAX_MEGABYTES.value or 0) * 10**6
  app = fastapi.FastAPI(openapi_url=None)
  app.add_middleware(_Guard, max_bytes=max_bytes + _FORM_BYTES)
  system = ('ui-sans-serif', 'system-ui', 'sans-serif')
  gr.mount_gradio_app(
    app,
    _page(recognizer, folder),
    '/',
    max_file_size=max_bytes,
    show_error=True,
    footer_links=[],
    run_history=False,
    enable_monitoring=False,
    ssr_mode=False,
    mcp_server=False,
    pwa=False,
    css=_CSS,
    theme=Default(font=system, font_mono=('ui-monospace', 'monospace')),
  )
  threading.Thread(target=_delete_old, args=(folder,), daemon=True).start()
  host, port = server.getsockname()[:2]
  host = f'[{host}]' if ':' in host else host
  print(f'http://{host}:{port}/ is ready; Ctrl-C ends it', flush=True)
  config = uvicorn.Config(
    app, log_level='warning', access_log=False, timeout_graceful_shutdown=1
  )
  with contextlib.suppress(KeyboardInterrupt):
    uvicorn.Server(config).run(sockets=[server])


def cli() -> None:
  """Runs the command."""
  command_line.run(main)


if __name__ == '__main__':
  cli()
