"""How good the scores of a set of videos are; NumPy only.

Scores are finite, one row a video. Whether they are logits or probabilities
does not matter: only their order does. The definitions, and what happens to
classes and videos without labels, are those of the published implementation,
which takes them from MMAction2's evaluation.
"""

from collections.abc import Iterable

from jaxtyping import Bool, Float, Int, Num
import numpy as np

from dualformer_jax import errors


def top_k_accuracy(
  scores: Float[np.ndarray, 'v k'], labels: Int[np.ndarray, 'v'], k: int = 1
) -> float:
  """Returns the share, in 0..1, of videos whose label is among the k best.

  Of classes with equal scores the one with the lowest number counts as best,
  so that a model which gives every class the same score gains nothing.

  Args:
    scores: a score for every class of every video.
    labels: the class of each video.
    k: how many classes may be named.
  """
  best = np.argsort(-scores, axis=1, kind='stable')[:, :k]
  return float(np.mean(np.any(best == labels[:, None], axis=1)))


def mean_class_accuracy(
  scores: Float[np.ndarray, 'v k'], labels: Int[np.ndarray, 'v']
) -> float:
  """Returns the mean of the recalls, in 0..1, of single classes.

  A class that is predicted without occurring among the labels has recall 0;
  one that occurs in neither is left out.

  Args:
    scores: a score for every class of every video.
    labels: the class of each video.
  """
  predictions = np.argmax(scores, axis=1)
  recalls = [
    np.sum((labels == label) & (predictions == label))
    / max(np.sum(labels == label), 1)
    for label in np.union1d(labels, predictions)
  ]
  return float(np.mean(recalls))


def mean_average_precision(
  scores: Float[np.ndarray, 'v k'], labels: Num[np.ndarray, 'v k']
) -> float:
  """Returns the mean over classes of the average precision (mAP), in 0..1.

  For each class the videos are ranked by its score. Classes that no video has
  are left out; nan when that leaves none.

  Args:
    scores: a score for every class of every video.
    labels: multi-hot, 1 for every class of a video and 0 for the others.
  """
  return _mean(
    _average_precision(*column)
    for column in zip(scores.T, labels.T > 0, strict=True)
    if np.any(column[1])
  )


def mmit_mean_average_precision(
  scores: Float[np.ndarray, 'v k'], labels: Num[np.ndarray, 'v k']
) -> float:
  """Returns the mean over videos of the average precision, in 0..1.

  For each video the classes are ranked by their scores, as in the evaluation
  of Multi-Moments in Time. Videos without a label are left out; nan when that
  leaves none.

  Args:
    scores: a score for every class of every video.
    labels: multi-hot, 1 for every class of a video and 0 for the others.
  """
  return _mean(
    _average_precision(*row)
    for row in zip(scores, labels > 0, strict=True)
    if np.any(row[1])
  )


def summary(
  scores: Float[np.ndarray, 'v k'],
  labels: Int[np.ndarray, 'v'] | Num[np.ndarray, 'v k'],
  multi_label: bool,
) -> dict[str, float]:
  """Returns the metrics of a report, in 0..1, by name.

  These are 'top1', 'top5' (of fewer than five classes, all) and
  'mean_class_accuracy', or, for data with several labels a video, 'mAP' and
  'mmit_mAP'.

  Args:
    scores: a score for every class of every video.
    labels: class numbers, or multi-hot labels when multi_label.
    multi_label: whether a video may have several labels.

  Raises:
    errors.UserError: there is nothing to measure, or a score is not finite.
  """
  if not len(scores):
    raise errors.UserError('there is no video to evaluate: none could be read')
  if not np.all(np.isfinite(scores)):
    raise errors.UserError(
      'the model gives scores that are not finite: its training has diverged '
      '(a lower optimizer.learning_rate helps), or its weights are damaged'
    )
  if not multi_label:
    return {
      'top1': top_k_accuracy(scores, labels, 1),
      'top5': top_k_accuracy(scores, labels, min(5, scores.shape[1])),
      'mean_class_accuracy': mean_class_accuracy(scores, labels),
    }
  if not np.any(labels):
    raise errors.UserError('no video has a label: there is nothing to evaluate')
  return {
    'mAP': mean_average_precision(scores, labels),
    'mmit_mAP': mmit_mean_average_precision(scores, labels),
  }


def mean_probabilities(
  logits: Float[np.ndarray, 'v n k'], multi_label: bool
) -> Float[np.ndarray, 'v k']:
  """Returns the class probabilities of videos, averaged over n views.

  Args:
    logits: the class scores of each view of each video.
    multi_label: whether each class has a probability of its own (sigmoid)
      rather than its share of one (softmax).
  """
  total = np.zeros((logits.shape[0], logits.shape[2]))
  for view in np.moveaxis(logits, 1, 0):
    view = view.astype(np.float64)
    with np.errstate(invalid='ignore'):  # summary tells what is not finite
      if multi_label:
        total += 0.5 + 0.5 * np.tanh(view / 2)
      else:
        exp = np.exp(view - view.max(axis=1, keepdims=True))
        total += exp / exp.sum(axis=1, keepdims=True)
  return total / logits.shape[1]


def _average_precision(
  scores: Float[np.ndarray, 'n'], positive: Bool[np.ndarray, 'n']
) -> float:
  """Returns the precision at each recall gained, weighted by the gain.

  Equal scores are one step of the curve: their order cannot matter.
  """
  order = np.argsort(-scores, kind='stable')
  ranked = scores[order]
  hits = np.cumsum(positive[order])
  ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
  precision = hits[ends] / (ends + 1)
  recall = hits[ends] / hits[-1]
  return float(np.sum(np.diff(recall, prepend=0) * precision))


def _mean(values: Iterable[float]) -> float:
  values = list(values)
  return float(np.mean(values)) if values else float('nan')
