"""What a test found out: figures in depth, and the files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import logging
import math
import os
import pathlib
import statistics
from typing import Any
import zipfile

import cv2
from jaxtyping import Float, Int, Num, UInt8
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding, records
from dualformer_jax.training import metrics, report_page, report_pictures

REPORT, PAGE, VIEWS = 'report.json', 'report.html', 'views.npz'
NUM_BINS = 15
NUM_CONFUSED = 20
NUM_MISTAKES = 24
# p-values below it count as significant.
SIGNIFICANCE = 0.05
_THUMBNAIL_HEIGHT = 90
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
  """What a model says of each view of the videos of a split.

  Attributes:
    logits: class scores of each view, crop by crop, and in each crop clip by
      clip in the order of time.
    labels: class, or 0s and 1s, of each video.
    video_ids: the name of each video.
    class_names: in the order of the labels.
    num_clips: clips in each crop.
    folder: where it is kept.
  """

  logits: Float[np.ndarray, 'v n k']
  labels: Num[np.ndarray, ' v'] | Num[np.ndarray, 'v k']
  video_ids: list[str]
  class_names: tuple[str, ...]
  num_clips: int
  folder: str

  @property
  def multi_label(self) -> bool:
    """Whether a video may have several labels."""
    return self.labels.ndim == 2

  @property
  def num_crops(self) -> int:
    """Crops of each clip."""
    return self.logits.shape[1] // self.num_clips

  def probabilities(
    self, views: Sequence[int] | None = None
  ) -> Float[np.ndarray, 'v k']:
    """Returns the class probabilities of each video, averaged over views.

    Args:
      views: the numbers of those that count; None for all.
    """
    logits = self.logits if views is None else self.logits[:, list(views)]
    return metrics.mean_probabilities(logits, self.multi_label)


def read(path: str, class_names: tuple[str, ...]) -> Result:
  """Reads what an earlier test has written.

  Args:
    path: its workdir, or a file in it such as report.json.
    class_names: that it must have.

  Raises:
    UserError: it is not there, is damaged, or is of other data.
  """
  folder = pathlib.Path(path).expanduser().absolute()
  if folder.name in (REPORT, PAGE, VIEWS):
    folder = folder.parent
  file = folder / VIEWS
  try:
    with open(file, 'rb') as opened, np.load(opened) as content:
      result = Result(
        content['logits'],
        content['labels'],
        content['video_ids'].tolist(),
        tuple(content['class_names'].tolist()),
        int(content['num_clips']),
        str(folder),
      )
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError(
      f'--compare={path}: there is no {file}; test that run again with '
      '--mode=test, which writes it'
    ) from error
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(
      f'--compare={path}: {file} is damaged ({type(error).__name__}: {error}); '
      'test that run again with --mode=test'
    ) from error
  if result.class_names != class_names:
    raise UserError(
      f'--compare={path}: {file} is of {len(result.class_names)} classes, '
      f'{result.class_names[0]!r} first, but the dataset has '
      f'{len(class_names)}, {class_names[0]!r} first; compare with a test on '
      'the same classes in the same order'
    )
  if result.multi_label:
    raise UserError(
      f'--compare={path}: its videos have several labels each; runs can be '
      'compared where videos have one'
    )
  return result


# -------------------------------------------------------------------- figures


def details(result: Result, gflops: float | None = None) -> dict[str, Any]:
  """Returns what a report says beside its main metrics, of JSON's types.

  Args:
    result: of the test.
    gflops: billions of multiply-adds that one view takes.
  """
  found = {
    'classes': class_figures(result),
    'view_budget': view_budget(result, gflops),
  }
  if result.multi_label:
    return found
  probabilities = result.probabilities()
  confusion = confusion_matrix(
    result.labels, probabilities.argmax(axis=1), len(result.class_names)
  )
  return {
    'expected_calibration_error': expected_calibration_error(
      probabilities, result.labels
    ),
    'most_confused': most_confused(confusion, result.class_names),
    **found,
  }


def class_figures(result: Result) -> list[dict[str, Any]]:
  """Returns name, number of videos and accuracy of each class.

  With several labels a video it is the average precision. Classes that no
  video has have None.
  """
  probabilities = result.probabilities()
  predictions = probabilities.argmax(axis=1)
  figures = []
  for number, name in enumerate(result.class_names):
    value = None
    if result.multi_label:
      quality = 'average_precision'
      labels = result.labels[:, number, None]
      count = np.count_nonzero(labels)
      if count:
        value = metrics.mean_average_precision(
          probabilities[:, number, None], labels
        )
    else:
      quality = 'accuracy'
      of_class = result.labels == number
      count = np.count_nonzero(of_class)
      if count:
        value = float(np.mean(predictions[of_class] == number))
    figures.append({'name': name, 'count': int(count), quality: value})
  return figures


def confusion_matrix(
  labels: Int[np.ndarray, ' v'], predictions: Int[np.ndarray, ' v'], k: int
) -> Int[np.ndarray, 'k k']:
  """Returns how many videos of each class (row) were taken for which."""
  pairs = labels.astype(np.int64) * k + predictions
  return np.bincount(pairs, minlength=k * k).reshape(k, k)


def most_confused(
  confusion: Int[np.ndarray, 'k k'],
  class_names: Sequence[str],
  limit: int = NUM_CONFUSED,
) -> list[dict[str, Any]]:
  """Returns the classes that were most often taken for another, as pairs.

  Args:
    confusion: of confusion_matrix.
    class_names: of each row.
    limit: how many pairs, at most.
  """
  mistakes = confusion - np.diag(np.diag(confusion))
  order = np.argsort(-mistakes, axis=None, kind='stable')[:limit]
  return [
    {
      'true': class_names[row],
      'predicted': class_names[column],
      'count': int(mistakes[row, column]),
    }
    for row, column in zip(
      *np.unravel_index(order, mistakes.shape), strict=True
    )
    if mistakes[row, column]
  ]


def reliability(
  probabilities: Float[np.ndarray, 'v k'],
  labels: Int[np.ndarray, ' v'],
  num_bins: int = NUM_BINS,
) -> tuple[
  Int[np.ndarray, ' bins'],
  Float[np.ndarray, ' bins'],
  Float[np.ndarray, ' bins'],
]:
  """Returns number, mean confidence and accuracy of videos by confidence.

  The confidence is the probability of the predicted class. Bins are equally
  wide and hold their upper end; of an empty one the figures are 0.
  """
  confidence = probabilities.max(axis=1)
  right = probabilities.argmax(axis=1) == labels
  edges = np.linspace(0, 1, num_bins + 1)[1:-1]
  bins = np.digitize(confidence, edges, right=True)
  counts = np.bincount(bins, minlength=num_bins)
  divisor = np.maximum(counts, 1)
  return (
    counts,
    np.bincount(bins, confidence, num_bins) / divisor,
    np.bincount(bins, right, num_bins) / divisor,
  )


def expected_calibration_error(
  probabilities: Float[np.ndarray, 'v k'],
  labels: Int[np.ndarray, ' v'],
  num_bins: int = NUM_BINS,
) -> float:
  """Returns how far confidence is from accuracy, in 0..1.

  The mean over bins of confidence, weighted by their videos (Guo et al., arXiv
  1706.04599).
  """
  counts, confidence, accuracy = reliability(probabilities, labels, num_bins)
  return float(np.sum(counts * np.abs(accuracy - confidence)) / len(labels))


def wilson_interval(right: int, count: int) -> tuple[float, float]:
  """Returns the 95 % interval of a share, by Wilson's score."""
  z = statistics.NormalDist().inv_cdf(0.975)
  share = right / count
  middle = share + z * z / (2 * count)
  half = z * math.sqrt(
    share * (1 - share) / count + z * z / (4 * count * count)
  )
  scale = 1 + z * z / count
  return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def view_subset(
  num_clips: int, num_crops: int, clips: int, crops: int
) -> list[int]:
  """Returns the numbers of the views that stand for a smaller test.

  Of the clips it takes those at the middle, or just after it, of equal parts
  of the video: the third of 4, the second and fourth of 4. Of three crops the
  middle one comes last.

  Args:
    num_clips: clips of the test.
    num_crops: its crops, 1 or 3.
    clips: how many clips to take.
    crops: how many crops to take.
  """
  chosen_clips = [(2 * i + 1) * num_clips // (2 * clips) for i in range(clips)]
  chosen_crops = range(num_crops) if crops == num_crops else [num_crops - 1]
  return [
    crop * num_clips + clip for crop in chosen_crops for clip in chosen_clips
  ]


def view_budget(
  result: Result, gflops: float | None = None
) -> list[dict[str, Any]]:
  """Returns how good the test would have been with fewer views, and as it was.

  Args:
    result: of the test.
    gflops: billions of multiply-adds that one view takes.
  """
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
        right = int(np.sum(probabilities.argmax(axis=1) == result.labels))
        count = len(result.labels)
        row['accuracy'] = right / count
        row['interval'] = list(wilson_interval(right, count))
      if gflops is not None:
        row['gflops'] = gflops * len(views)
      rows.append(row)
  return rows


def mcnemar_p_value(only_one: int, only_other: int) -> float:
  """Returns how probable it is that two equal models differ at least as much.

  McNemar's test, exact and two-sided: each of the videos that only one of them
  got right is a fair coin.

  Args:
    only_one: videos that the one got right, and the other did not.
    only_other: the other way around.
  """
  count = only_one + only_other
  term = total = 1
  for i in range(1, min(only_one, only_other) + 1):
    term = term * (count - i + 1) // i
    total += term
  return min(1.0, 2 * total / 2**count)


def compare(result: Result, other: Result) -> dict[str, Any]:
  """Returns where and how far two tests differ, of JSON's types.

  Raises:
    UserError: they have no video in common, or disagree on the labels.
  """
  places = {name: i for i, name in enumerate(other.video_ids)}
  pairs = [
    (i, places[name])
    for i, name in enumerate(result.video_ids)
    if name in places
  ]
  if not pairs:
    raise UserError(
      f'--compare: {other.folder} has none of the {len(result.video_ids)} '
      f'videos of this test ({result.video_ids[0]!r} for one, there '
      f'{other.video_ids[0]!r}); compare with a test on the same split'
    )
  here, there = np.array(pairs).T
  labels = result.labels[here]
  differing = np.flatnonzero(labels != other.labels[there])
  if len(differing):
    raise UserError(
      f'--compare: {other.folder} has another label for {len(differing)} of '
      f'{len(pairs)} videos, {result.video_ids[here[differing[0]]]!r} for one; '
      'compare with a test on the same dataset'
    )
  ours = result.probabilities()[here].argmax(axis=1)
  theirs = other.probabilities()[there].argmax(axis=1)
  only_this = int(np.sum((ours == labels) & (theirs != labels)))
  only_other = int(np.sum((ours != labels) & (theirs == labels)))
  p_value = mcnemar_p_value(only_this, only_other)
  names = result.class_names
  found = {
    'other': other.folder,
    'num_videos': len(pairs),
    'videos_only_here': len(result.video_ids) - len(pairs),
    'videos_only_there': len(other.video_ids) - len(pairs),
    'accuracy': float(np.mean(ours == labels)),
    'other_accuracy': float(np.mean(theirs == labels)),
    'only_this_right': only_this,
    'only_other_right': only_other,
    'p_value': p_value,
    'significant': p_value < SIGNIFICANCE,
    'differences': [
      {
        'video': result.video_ids[here[i]],
        'true': names[labels[i]],
        'predicted': names[ours[i]],
        'other_predicted': names[theirs[i]],
      }
      for i in np.flatnonzero(ours != theirs)
    ],
  }
  return {'in_words': _in_words(found), **found}


def _in_words(comparison: dict[str, Any]) -> str:
  is_it = 'is' if comparison['significant'] else 'is not'
  return (
    f'On {comparison["num_videos"]:,} videos that both runs have, top-1 is '
    f'{comparison["accuracy"]:.1%} here and {comparison["other_accuracy"]:.1%} '
    f'in the other. Only this run is right on '
    f'{comparison["only_this_right"]:,} of them, only the other on '
    f'{comparison["only_other_right"]:,}: the '
    f'difference {is_it} significant (McNemar, exact, two-sided: p = '
    f'{comparison["p_value"]:.3g}).'
  )


# ---------------------------------------------------------------------- files


def write(
  folder: pathlib.Path,
  report: dict[str, Any],
  result: Result,
  data: records.PreparedDataset,
  places: Int[np.ndarray, ' v'],
) -> None:
  """Writes views.npz, report.html and report.json, in this order.

  Args:
    folder: where they go; made if it is not there.
    report: what report.json will hold.
    result: of the test.
    data: its videos.
    places: where in `data` each video of `result` is.
  """
  folder.mkdir(parents=True, exist_ok=True)
  page = report_page.page(
    report, mistakes(result, data, places), **_pictures(result)
  )
  with open(folder / f'{VIEWS}.incomplete', 'wb') as file:
    np.savez(
      file,
      logits=result.logits,
      labels=result.labels,
      video_ids=np.array(result.video_ids, np.str_),
      class_names=np.array(result.class_names, np.str_),
      num_clips=np.array(result.num_clips),
    )
  text = json.dumps(report, indent=2) + '\n'
  for name, content in ((PAGE, page), (REPORT, text)):
    # Paths may hold what is no text.
    (folder / f'{name}.incomplete').write_text(content, 'utf-8', 'replace')
  for name in (VIEWS, PAGE, REPORT):
    os.replace(folder / f'{name}.incomplete', folder / name)


def mistakes(
  result: Result,
  data: records.PreparedDataset,
  places: Int[np.ndarray, ' v'],
  limit: int = NUM_MISTAKES,
) -> list[report_page.Mistake]:
  """Returns the videos whose class was wrong, the most confident ones first.

  None where videos have several labels.
  """
  if result.multi_label:
    return []
  probabilities = result.probabilities()
  predictions = probabilities.argmax(axis=1)
  wrong = np.flatnonzero(predictions != result.labels)
  confidence = probabilities[wrong, predictions[wrong]]
  worst = wrong[np.argsort(-confidence, kind='stable')[:limit]]
  return [
    report_page.Mistake(
      video=result.video_ids[i],
      true=result.class_names[result.labels[i]],
      true_probability=float(probabilities[i, result.labels[i]]),
      predicted=result.class_names[predictions[i]],
      predicted_probability=float(probabilities[i, predictions[i]]),
      picture=thumbnail(data, int(places[i])),
    )
    for i in worst
  ]


def thumbnail(
  data: records.PreparedDataset, place: int
) -> UInt8[np.ndarray, 'h w 3'] | None:
  """Returns three frames of a video side by side, RGB; None if unreadable."""

  def small(frame: decoding.Frame) -> decoding.Frame:
    height, width = frame.shape[:2]
    width = round(width * _THUMBNAIL_HEIGHT / height)
    width = min(max(width, 1), 2 * _THUMBNAIL_HEIGHT)
    return cv2.resize(
      frame, (width, _THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA
    ).astype(np.uint8)

  try:
    frames = decoding.decode_frames(
      data[place].video,
      lambda total: [(2 * i + 1) * total // 6 for i in range(3)],
      small,
    )
  except UserError as error:
    _LOG.warning('no picture of video %d: %s', place, error)
    return None
  return np.concatenate(list(frames), axis=1)


def _pictures(result: Result) -> dict[str, Any]:
  """Returns the pictures of a page; none for data with several labels."""
  if result.multi_label:
    return {}
  probabilities = result.probabilities()
  confusion = confusion_matrix(
    result.labels, probabilities.argmax(axis=1), len(result.class_names)
  )
  return {
    'confusion': report_pictures.draw_confusion(confusion, result.class_names),
    'reliability': report_pictures.draw_reliability(
      *reliability(probabilities, result.labels)
    ),
  }
