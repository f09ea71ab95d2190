"""Predicts the classes of videos or of their windows, and writes files."""

from collections.abc import Callable, Iterator, Sequence
import pathlib
import tempfile
from typing import Any

import numpy as np

from dualformer_jax.errors import UserError, error_reason
from dualformer_jax.files import output_file
from dualformer_jax.inference import batches, timeline
from dualformer_jax.inference.output_files import OutputFiles
from dualformer_jax.inference.printer import Prediction
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.inference.sources import Source, open_stream
from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.progress import counting, track


def predict_videos(
  recognizer: Recognizer,
  videos: Sequence[Source],
  files: OutputFiles,
  *,
  batch_size: int,
  num_threads: int,
  top_k: int,
  is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Prediction]:
  """Yields a prediction for each video as a whole, and writes files.

  Once `is_stopped`, the file of features has the videos so far.

  Raises:
    UserError: the file of features cannot be written. Where a video cannot be
      read or its copy cannot be written, its prediction has an error.
  """
  p = recognizer.preprocessing
  num_views = p.num_clips * p.num_crops * sum(not v.error for v in videos)
  scored = batches.score_videos(
    recognizer,
    videos,
    batch_size=min(batch_size, num_views),
    num_threads=num_threads,
    with_tokens=files.with_tokens,
  )
  names, features, shape = [], [], ()
  # Features of the tokens of many videos do not fit into memory.
  with tempfile.TemporaryFile() as tokens:
    for video in track(scored, 'Scoring', len(videos), 'videos'):
      if is_stopped():
        break
      try:
        if video.error:
          raise UserError(video.error)
        probabilities = np.mean(video.probabilities, axis=0)
        predictions = recognizer.top(probabilities, top_k)
        if video.name in files.copies:
          window = timeline.Window(0.0, 0.0, predictions)
          _write_copy(files.copies[video.name], video.name, [window])
      except UserError as error:
        yield Prediction(video.name, error=error_reason(error))
        continue
      names.append(video.name)
      if files.features:
        features.append(np.mean(video.features, axis=0))
      if video.tokens is not None:
        tokens.write(video.tokens.tobytes())
        shape = video.tokens.shape
      yield Prediction(video.name, predictions)
    arrays: dict[str, Any] = {
      'names': np.array(names),
      'features': np.array(features),
    }
    if shape:
      tokens.flush()
      shape = (len(names), *shape)
      arrays['tokens'] = np.memmap(tokens, np.float32, 'r', shape=shape)
    if files.features and names:
      with output_file(files.features) as file:
        np.savez(file, **arrays)


def predict_windows(
  recognizer: Recognizer,
  videos: Sequence[Source],
  files: OutputFiles,
  *,
  seconds: float | None = None,
  is_stopped: Callable[[], bool] = lambda: False,
  **options: Any,
) -> Iterator[Prediction]:
  """Yields predictions for the windows of one video after the other.

  Files are written when a video has ended. Where a video cannot be read to its
  end or a file cannot be written, a prediction with an error follows. Once
  `is_stopped`, timelines have the windows so far, and there is no copy.
  `options` are those of batches.score_windows; see open_stream for `seconds`.
  """
  for video in videos:
    windows: list[timeline.Window] = []
    end = 0.0
    try:
      if video.error:
        raise UserError(video.error)
      with (
        open_stream(video.name, seconds, is_stopped) as stream,
        counting('Scoring', stream.duration, 's of video') as add,
      ):
        for window in batches.score_windows(
          recognizer, stream.frames, stream.fps, **options
        ):
          yield Prediction(video.name, window.predictions, window)
          add(window.end - end)
          end = window.end
          if files.timelines or files.copies:
            windows.append(window)
      if is_stopped() and not end:
        return
      if not end:
        raise UserError('sends no frames')
      for path in files.timelines:
        with output_file(path) as file:
          file.write(timeline.encode(path.suffix.lower(), video.name, windows))
      if is_stopped():
        return
      if video.name in files.copies:
        _write_copy(files.copies[video.name], video.name, windows, seconds)
    except UserError as error:
      yield Prediction(video.name, error=error_reason(error))


def _write_copy(
  path: pathlib.Path,
  video: str,
  windows: Sequence[timeline.Window],
  seconds: float | None = None,
) -> None:
  """Writes a copy of a video with the predictions of windows on its frames."""
  with open_stream(video, seconds) as stream, output_file(path) as file:
    labeled = timeline.label_frames(stream.frames, windows)
    video_writer.write_mp4(file, labeled, fps=stream.fps)
