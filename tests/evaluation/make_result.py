"""Makes small test results and the reports of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dualformer_jax.evaluation import metrics, report
from dualformer_jax.evaluation.result import Result

NAMES = ('walk', 'run', 'jump')


def of(
  logits: Any,
  labels: Any,
  video_ids: list[str] | None = None,
  class_names: tuple[str, ...] = NAMES,
  num_clips: int = 1,
) -> Result:
  """Returns a result; logits are [videos, classes] or [videos, views, classes].

  Args:
    logits: class scores; without an axis of views, of one view.
    labels: class indices or multi-hot labels.
    video_ids: names of the videos; None for numbered names.
    class_names: names of the classes.
    num_clips: number of clips among the views.
  """
  logits = np.asarray(logits, np.float32)
  if logits.ndim == 2:
    logits = logits[:, None]
  video_ids = video_ids or [f'video {i}' for i in range(len(logits))]
  return Result(
    logits, np.asarray(labels), video_ids, class_names, num_clips, '/other'
  )


def report_of(result: Result, **more: Any) -> dict[str, Any]:
  """Returns the content of report.json, with names that contain HTML."""
  return {
    **metrics.summary(
      result.probabilities(), result.labels, result.multi_label
    ),
    'num_videos': len(result.labels),
    'failed_videos': [{'video': '<script>', 'reason': 'is <b>empty</b>'}],
    'views': {'num_clips': 1, 'num_crops': 1},
    **report.details(result, gflops=0.5),
    'checkpoint': '/run/<i>1</i>',
    'checkpoint_kind': 'latest',
    'dataset': {'folder': '/data/"x"', 'split': 'test'},
    'config': {'dataset': {'name': 'motion'}},
    'time': {'finished': '2026-11-28T12:00:00+00:00'},
    **more,
  }
