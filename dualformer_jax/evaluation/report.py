"""The report of a test: report.json, report.html and views.npz."""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from jaxtyping import Int
import numpy as np

from dualformer_jax import files
from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import curves, metrics, report_page
from dualformer_jax.evaluation.result import VIEWS_FILE, Result
from dualformer_jax.input_pipeline import dataset

JSON_FILE, PAGE_FILE = 'report.json', 'report.html'
_SIGNIFICANCE = 0.05  # differences with a lower p-value are significant
_MAX_CONFUSED_PAIRS = 20


def details(result: Result, gflops: float) -> dict[str, Any]:
  """Returns the numbers of report.json that depend on classes and views.

  `gflops` is billions of multiply-adds of one view, as papers count FLOPs.
  """
  figures = {
    'classes': class_figures(result),
    'view_budget': view_budget(result, gflops),
  }
  if result.multi_label:
    return figures
  return {
    'expected_calibration_error': metrics.expected_calibration_error(
      result.probabilities(), result.labels
    ),
    'most_confused': most_confused(
      result.confusion_matrix(), result.class_names
    ),
    **figures,
  }


def class_figures(result: Result) -> list[dict[str, Any]]:
  """Returns the name, number of videos and quality of each class.

  The quality is the accuracy or, for multi-label data, the average precision.
  It is None for a class without videos.
  """
  if result.multi_label:
    quality, counts = 'average_precision', np.sum(result.labels > 0, axis=0)
    values = [
      metrics.mean_average_precision(scores[None], labels[None])
      for scores, labels in zip(
        result.probabilities().T, result.labels.T, strict=True
      )
    ]
  else:
    confusion = result.confusion_matrix()
    quality, counts = 'accuracy', confusion.sum(axis=1)
    values = np.diag(confusion) / np.maximum(counts, 1)
  rows = zip(result.class_names, counts.tolist(), values, strict=True)
  return [
    {'name': name, 'count': count, quality: float(value) if count else None}
    for name, count, value in rows
  ]


def most_confused(
  confusion: Int[np.ndarray, 'k k'],
  class_names: Sequence[str],
  limit: int = _MAX_CONFUSED_PAIRS,
) -> list[dict[str, Any]]:
  """Returns the most frequent pairs of a true and a wrongly predicted class."""
  errors = confusion - np.diag(np.diag(confusion))
  order = np.argsort(-errors, axis=None, kind='stable')[:limit]
  rows, columns = np.unravel_index(order, errors.shape)
  return [
    {
      'true': class_names[row],
      'predicted': class_names[column],
      'count': int(errors[row, column]),
    }
    for row, column in zip(rows, columns, strict=True)
    if errors[row, column]
  ]


def view_budget(result: Result, gflops: float) -> list[dict[str, Any]]:
  """Returns the quality with fewer views per video, and with all of them."""
  numbers_of_clips = {1, 2, 4, result.num_clips}
  rows = []
  for crops in sorted({1, result.num_crops}):
    for clips in sorted(n for n in numbers_of_clips if n <= result.num_clips):
      views = view_subset(result.num_clips, result.num_crops, clips, crops)
      row: dict[str, Any] = {'num_clips': clips, 'num_crops': crops}
      probabilities = result.probabilities(views)
      if result.multi_label:
        row |= metrics.summary(probabilities, result.labels, True)
      else:
        correct = int(np.sum(probabilities.argmax(axis=1) == result.labels))
        count = len(result.labels)
        row['accuracy'] = correct / count
        row['interval'] = list(metrics.confidence_interval(correct, count))
      rows.append({**row, 'gflops': gflops * len(views)})
  return rows


def view_subset(
  num_clips: int, num_crops: int, clips: int, crops: int
) -> list[int]:
  """Returns the indices of the views that a smaller test would have used.

  A smaller test has clips at the centers of equal parts of the video: of clips
  0 to 3, a test with one clip uses clip 2, a test with two uses clips 1 and 3.
  A single crop is the center crop, which is the last of three.
  """
  chosen_clips = [(2 * i + 1) * num_clips // (2 * clips) for i in range(clips)]
  chosen_crops = range(num_crops) if crops == num_crops else [num_crops - 1]
  return [
    crop * num_clips + clip for crop in chosen_crops for clip in chosen_clips
  ]


def compare(result: Result, other: Result) -> dict[str, Any]:
  """Compares two tests on the videos that both have, for JSON.

  Raises UserError if they have no video in common, or labels differ.
  """
  _, here, there = np.intersect1d(
    result.video_ids, other.video_ids, return_indices=True
  )
  order = np.argsort(here)
  here, there = here[order], there[order]
  if not len(here):
    raise UserError(
      f'--compare: {other.folder} has none of the {len(result.video_ids)} '
      f'videos of this test (the first is {result.video_ids[0]!r} here, '
      f'{other.video_ids[0]!r} there); compare with a test on the same split'
    )
  labels = result.labels[here]
  differing = here[labels != other.labels[there]]
  if len(differing):
    raise UserError(
      f'--compare: {other.folder} has another label for {len(differing)} of '
      f'{len(here)} videos, such as {result.video_ids[differing[0]]!r}; '
      'compare with a test on the same dataset'
    )
  predicted = result.predictions[here]
  other_predicted = other.predictions[there]
  correct, other_correct = predicted == labels, other_predicted == labels
  only_this = int(np.sum(correct & ~other_correct))
  only_other = int(np.sum(~correct & other_correct))
  p_value = metrics.mcnemar_p_value(only_this, only_other)
  significant = p_value < _SIGNIFICANCE
  names = result.class_names
  return {
    'in_words': (
      f'On the {len(here):,} videos of both tests, top-1 is '
      f'{correct.mean():.1%} for this run and {other_correct.mean():.1%} for '
      f'the other. {only_this:,} videos are correct only in this run, '
      f'{only_other:,} only in the other: the difference '
      f'{"is" if significant else "is not"} significant (exact two-sided '
      f'McNemar test, p = {p_value:.3g}).'
    ),
    'other': other.folder,
    'num_videos': len(here),
    'videos_only_here': len(result.video_ids) - len(here),
    'videos_only_there': len(other.video_ids) - len(here),
    'accuracy': float(correct.mean()),
    'other_accuracy': float(other_correct.mean()),
    'only_this_right': only_this,
    'only_other_right': only_other,
    'p_value': p_value,
    'significant': significant,
    'differences': [
      {
        'video': result.video_ids[here[i]],
        'true': names[labels[i]],
        'predicted': names[predicted[i]],
        'other_predicted': names[other_predicted[i]],
      }
      for i in np.flatnonzero(predicted != other_predicted)
    ],
  }


def write(
  folder: pathlib.Path,
  report: dict[str, Any],
  result: Result,
  data: dataset.PreparedDataset,
  indices: Int[np.ndarray, ' v'],
) -> list[dict[str, Any]]:
  """Writes views.npz, report.html and report.json; returns the worst mistakes.

  The page shows frames of `data`, the tested split. `indices` are those of the
  videos of `result` in it.
  """
  mistakes = report_page.find_mistakes(result, data, indices)
  page = report_page.render(
    report,
    mistakes,
    report_page.chart_data(result),
    curves.training_curves(folder),
  )
  # Closed in reverse order: report.json appears last, when the other files are
  # complete.
  with (
    files.output_file(folder / JSON_FILE) as report_file,
    files.output_file(folder / PAGE_FILE) as page_file,
    files.output_file(folder / VIEWS_FILE) as views_file,
  ):
    result.save(views_file)
    # File names may contain bytes that are not valid UTF-8.
    page_file.write(page.encode('utf-8', 'replace'))
    report_file.write(f'{json.dumps(report, indent=2)}\n'.encode())
  return mistakes
