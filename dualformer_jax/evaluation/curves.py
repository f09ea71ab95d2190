"""The metrics that a training run keeps, and the curves of the report page."""

from __future__ import annotations

from collections.abc import Iterator
import json
import pathlib
from typing import Any

# In the workdir: a JSON object per line, with `step` and metrics by name.
METRICS_FILE = 'metrics.jsonl'
_MAX_POINTS = 400  # of a curve


def read_metrics(
  workdir: pathlib.Path,
) -> Iterator[tuple[int, dict[str, float]]]:
  """Yields the steps and the metrics of a run, in the order of writing."""
  path = workdir / METRICS_FILE
  if not path.is_file():
    return
  for line in path.read_text('utf-8').splitlines():
    try:
      metrics = json.loads(line)
      yield int(metrics.pop('step')), metrics
    except (ValueError, KeyError, AttributeError, TypeError):
      continue  # cut off when the process was killed


def training_curves(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the curves of the training loss and of the validation.

  Each has a name, and its steps and values; long ones are thinned out.
  """
  records = list(read_metrics(workdir))
  curves = []
  for name in ('train/loss', 'validation/top1', 'validation/mAP'):
    points = [(step, float(m[name])) for step, m in records if name in m]
    stride = -(-len(points) // _MAX_POINTS) or 1
    points = points[::-1][::stride][::-1]  # with the last one
    if len(points) > 1:
      curves.append({'name': name.replace('/', ' '), 'points': points})
  return curves
