"""The report as one HTML page, which contains its pictures and loads nothing.

The template is report.html.j2; Jinja escapes whatever is inserted there.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import io
import logging
from typing import Any

from jaxtyping import Int, UInt8
import jinja2
import numpy as np
from PIL import Image

from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import metrics
from dualformer_jax.evaluation.result import Result
from dualformer_jax.input_pipeline import dataset, video_reader

_MAX_MISTAKES = 24
_THUMBNAIL_HEIGHT = 90  # pixels
_LOG = logging.getLogger(__name__)


def render(
  report: dict[str, Any],
  mistakes: Sequence[Mapping[str, Any]] = (),
  charts: Mapping[str, Any] | None = None,
  curves: Sequence[Mapping[str, Any]] = (),
) -> str:
  """Returns the page as HTML, with the content of report.json.

  `curves` are those of curves.training_curves.
  """
  classes = report['classes']
  quality = 'accuracy' if 'accuracy' in classes[0] else 'average_precision'
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('dualformer_jax.evaluation', '.'),
    autoescape=True,
    lstrip_blocks=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters['percent'] = lambda share: f'{100 * share:.1f}%'
  environment.filters['jpeg_url'] = _jpeg_url
  return environment.get_template('report.html.j2').render(
    report={'comparison': None, 'probes': [], 'most_confused': [], **report},
    charts=charts,
    curves=curves,
    mistakes=mistakes,
    quality=quality,
    classes=sorted(
      enumerate(classes),
      key=lambda item: (item[1][quality] is None, item[1][quality]),
    ),
  )


def chart_data(result: Result) -> dict[str, Any] | None:
  """Returns the figures of the charts; None for multi-label data.

  `confusion` has true class, predicted class, number of videos and its share of
  the true class; `bins` is as metrics.reliability returns it, bin by bin.
  """
  if result.multi_label:
    return None
  counts = result.confusion_matrix()
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  rows, columns = np.nonzero(counts)
  cells = (rows, columns, counts[rows, columns], shares[rows, columns])
  bins = metrics.reliability(result.probabilities(), result.labels)
  return {
    'confusion': list(zip(*(x.tolist() for x in cells), strict=True)),
    'bins': list(zip(*(x.tolist() for x in bins), strict=True)),
  }


def find_mistakes(
  result: Result,
  data: dataset.PreparedDataset,
  indices: Int[np.ndarray, ' v'],
  limit: int = _MAX_MISTAKES,
) -> list[dict[str, Any]]:
  """Returns wrong predictions, the most confident first; see report.write."""
  if result.multi_label:
    return []
  probabilities, predictions = result.probabilities(), result.predictions
  wrong = np.flatnonzero(predictions != result.labels)
  confidence = probabilities[wrong, predictions[wrong]]
  worst = wrong[np.argsort(-confidence, kind='stable')[:limit]]
  return [
    {
      'video': result.video_ids[i],
      'true': result.class_names[result.labels[i]],
      'true_probability': float(probabilities[i, result.labels[i]]),
      'predicted': result.class_names[predictions[i]],
      'predicted_probability': float(probabilities[i, predictions[i]]),
      'picture': _thumbnail(data, int(indices[i])),  # None if unreadable
    }
    for i in worst
  ]


def _jpeg_url(pixels: UInt8[np.ndarray, 'h w 3']) -> str:
  """Returns an RGB picture as a `data:` URL."""
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, 'jpeg')
  data = base64.b64encode(content.getvalue()).decode()
  return f'data:image/jpeg;base64,{data}'


def _thumbnail(
  data: dataset.PreparedDataset, index: int
) -> UInt8[np.ndarray, 'h w 3'] | None:
  """Returns three frames of a video side by side, or None if unreadable."""

  def shrink(frame: UInt8[np.ndarray, 'h w 3']) -> UInt8[np.ndarray, 'h2 w2 3']:
    height, width = frame.shape[:2]
    width = round(width * _THUMBNAIL_HEIGHT / height)
    width = min(max(width, 1), 2 * _THUMBNAIL_HEIGHT)
    return np.asarray(Image.fromarray(frame).resize((width, _THUMBNAIL_HEIGHT)))

  try:
    with video_reader.VideoReader(data[index].video) as reader:
      indices = [(2 * i + 1) * len(reader) // 6 for i in range(3)]
      frames = reader.get_frames(indices, shrink)
  except UserError as error:
    _LOG.warning('the page shows no picture of video %d: %s', index, error)
    return None
  return np.concatenate(list(frames), axis=1)
