"""The page of `python -m dualformer_jax.demo`, made with Gradio."""

from collections.abc import Callable, Iterator
import pathlib
from typing import Any
import uuid

import gradio as gr
import pandas as pd

from dualformer_jax.errors import UserError, error_reason
from dualformer_jax.files import output_file
from dualformer_jax.inference import (
  batches,
  explain,
  sources,
  timeline,
  visualize,
)
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline import video_writer

# Heat maps and uploads that were never scored are deleted after this time.
KEEP_SECONDS = 3600
# Hides Gradio's button to trim a video, which needs the ffmpeg program; and
# leaves room below a video for the buttons that choose its source.
CSS = """
button[aria-label="Trim video to selection"] {display: none}
.video-container > .wrap {flex: 1; min-height: 0; height: auto}
"""

_TOP_K = 5
_MAX_WINDOWS = 60  # in the plot; in longer videos there are gaps between them
_MIN_SIZE = 256  # pixels, of the heat map
_HEIGHT = 380  # pixels, of a video on the page
_MOST_PROBABLE = 'the most probable class'


def make_page(recognizer: Recognizer, folder: pathlib.Path) -> gr.Blocks:
  """Returns the page; heat maps and uploads are in `folder`."""
  tracker = gr.Progress()  # Gradio replaces this default of an argument

  def predict(
    video: str | None, progress: gr.Progress = tracker
  ) -> Iterator[Any]:
    if video is None:
      yield None, None, None, None, _MOST_PROBABLE
      return
    path = pathlib.Path(video)
    try:
      progress(0, 'Views')
      views = recognizer.views(video)
      probabilities = recognizer.probabilities(views)
      classes = recognizer.top(probabilities, _TOP_K)
      size = max(recognizer.model.image_size, _MIN_SIZE)
      clip = visualize.load_clip(recognizer, video, views, size=size)
      state = (clip, classes[0][0])
      heat_map = redraw(_MOST_PROBABLE, state)
      yield dict(classes), heat_map, None, state, _MOST_PROBABLE
      table = _plot_table(
        recognizer, video, lambda share: progress(share, 'Windows over time')
      )
      yield dict(classes), heat_map, table, state, _MOST_PROBABLE
    except UserError as error:
      reason = error_reason(error)
      raise gr.Error(f'{path.name}: {reason}', print_exception=False) from None
    finally:
      # Gradio only passes on files in its own folder.
      if path.is_relative_to(folder):
        path.unlink(missing_ok=True)

  def redraw(
    label: str, state: tuple[visualize.Clip, str] | None
  ) -> str | None:
    if state is None:
      return None
    clip, best = state
    layer = explain.last_layer(recognizer.model)
    label = best if label == _MOST_PROBABLE else label
    picture = visualize.draw_gradcam(recognizer, clip, layer, label)
    path = folder / f'heat_map_{uuid.uuid4().hex}.mp4'
    with output_file(path) as file:
      video_writer.write_mp4(file, picture.frames, fps=clip.fps)
    return str(path)

  with gr.Blocks(
    title='DualFormer', analytics_enabled=False, fill_width=True
  ) as page:
    gr.Markdown(
      '# DualFormer\nDrop a video, or record one, to see its classes. The '
      f'model knows {len(recognizer.class_names)} classes. Your video is '
      'deleted once it has been scored.'
    )
    state = gr.State(time_to_live=KEEP_SECONDS)
    with gr.Row():
      with gr.Column(min_width=320):
        video = gr.Video(
          label='Video',
          sources=['upload', 'webcam'],
          # None disables Gradio's conversion, which needs the ffmpeg program.
          format=None,
          include_audio=True,
          webcam_options=gr.WebcamOptions(mirror=False),
          height=_HEIGHT,
        )
        classes = gr.Label(label='Classes', num_top_classes=_TOP_K)
      with gr.Column(min_width=320):
        heat_map = gr.Video(
          label='Where the model looks',
          interactive=False,
          autoplay=True,
          loop=True,
          buttons=['download'],
          height=_HEIGHT,
        )
        label = gr.Dropdown(
          [_MOST_PROBABLE, *recognizer.class_names],
          label='Heat map of',
          info='Red is evidence of this class (Grad-CAM).',
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
      # In Gradio, a recording does not count as an upload.
      [video.upload, video.stop_recording, video.clear],
      predict,
      video,
      [classes, heat_map, plot, state, label],
      api_name='look',
    )
    label.input(redraw, [label, state], heat_map, api_visibility='private')
  return page.queue(max_size=32, default_concurrency_limit=1)


def _plot_table(
  recognizer: Recognizer, video: str, progress: Callable[[float], object]
) -> pd.DataFrame:
  """Returns points of a line for each of the most probable classes.

  `progress` is called with the share of the video that is done, from 0 to 1.
  """
  p = recognizer.preprocessing
  windows = []
  with sources.open_stream(video) as stream:
    seconds = stream.duration or 0.0
    span = p.num_frames * p.frame_interval / stream.fps
    for window in batches.score_windows(
      recognizer,
      stream.frames,
      stream.fps,
      stride=max(span, seconds / _MAX_WINDOWS),
      top_k=len(recognizer.class_names),
    ):
      windows.append(window)
      progress(min(1.0, window.end / max(seconds, window.end)))
  rows = pd.DataFrame([dict(window.predictions) for window in windows])
  spans = timeline.display_spans(windows)
  points = [
    (second, probability, name)
    for name in rows.sum().nlargest(_TOP_K).index
    for span, probability in zip(spans, rows[name], strict=True)
    for second in span
  ]
  return pd.DataFrame(points, columns=['seconds', 'probability', 'class'])
