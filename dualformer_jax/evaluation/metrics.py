"""Metrics of a test: accuracy, average precision, calibration, intervals.

Scores are finite, one row per video; their order alone determines accuracy and
average precision. The definitions follow the published implementation
(MMAction2's evaluation), also for classes and videos without labels.
"""

from jaxtyping import Bool, Float, Int, Num
import numpy as np
from scipy import special

from dualformer_jax.errors import UserError

_NUM_BINS = 15  # of confidence


def summary(
  scores: Float[np.ndarray, 'v k'],
  labels: Int[np.ndarray, 'v'] | Num[np.ndarray, 'v k'],
  multi_label: bool,
) -> dict[str, float]:
  """Returns the headline metrics of a test, each in 0..1, by name.

  Raises:
    UserError: there are no videos or no labels, or a score is not finite.
  """
  if not len(scores):
    raise UserError(
      'the test has no videos: none could be read; the log lists the reasons'
    )
  if not np.all(np.isfinite(scores)):
    raise UserError(
      'the scores of the model are not finite: training diverged (try a lower '
      'optimizer.learning_rate) or the weights are damaged'
    )
  if not multi_label:
    return {
      'top1': top_k_accuracy(scores, labels, 1),
      'top5': top_k_accuracy(scores, labels, 5),
      'mean_class_accuracy': mean_class_accuracy(scores, labels),
    }
  if not np.any(labels):
    raise UserError('no video of the test has a label; test on another split')
  return {
    'mAP': mean_average_precision(scores.T, labels.T),
    'mmit_mAP': mean_average_precision(scores, labels),
  }


def top_k_accuracy(
  scores: Float[np.ndarray, 'v k'], labels: Int[np.ndarray, 'v'], k: int = 1
) -> float:
  """Returns the fraction of videos whose label is among the k best classes.

  Ties are broken in favor of the lower class index.
  """
  best = np.argsort(-scores, axis=1, kind='stable')[:, :k]
  return float(np.mean(np.any(best == labels[:, None], axis=1)))


def mean_class_accuracy(
  scores: Float[np.ndarray, 'v k'], labels: Int[np.ndarray, 'v']
) -> float:
  """Returns the mean recall over classes, in 0..1.

  The recall of a class that is predicted but has no videos is 0; classes
  neither predicted nor present are excluded.
  """
  predictions = np.argmax(scores, axis=1)
  recalls = [
    np.sum((labels == label) & (predictions == label))
    / max(np.sum(labels == label), 1)
    for label in np.union1d(labels, predictions)
  ]
  return float(np.mean(recalls))


def mean_average_precision(
  scores: Float[np.ndarray, 'r n'], labels: Num[np.ndarray, 'r n']
) -> float:
  """Returns the mean average precision of the rows that have a label, or nan.

  With classes as rows it is mAP, which ranks the videos by the scores of each
  class. With videos as rows it ranks the classes of each video, as in the
  evaluation of Multi-Moments in Time.
  """
  values = [
    _average_precision(row, positive)
    for row, positive in zip(scores, labels > 0, strict=True)
    if np.any(positive)
  ]
  return float(np.mean(values)) if values else float('nan')


def mean_probabilities(
  logits: Float[np.ndarray, 'v n k'], multi_label: bool
) -> Float[np.ndarray, 'v k']:
  """Returns the class probabilities of videos, averaged over n views.

  Classes are independent (sigmoid) if `multi_label`, or exclusive (softmax).
  """
  activation = special.expit if multi_label else special.softmax
  axis = {} if multi_label else {'axis': 1}
  total = np.zeros((logits.shape[0], logits.shape[2]))
  # View by view: float64 copies of all logits would need much memory.
  for view in np.moveaxis(logits, 1, 0):
    with np.errstate(invalid='ignore'):  # `summary` reports nan
      total += activation(view.astype(np.float64), **axis)
  return total / logits.shape[1]


def cross_entropy(
  probabilities: Float[np.ndarray, 'v k'],
  labels: Int[np.ndarray, 'v'] | Num[np.ndarray, 'v k'],
) -> float:
  """Returns the mean cross-entropy of videos, in nats.

  With multi-hot labels it is the binary cross-entropy, averaged over classes.
  """
  p = np.clip(probabilities, 1e-12, 1)
  if labels.ndim == 1:
    return float(-np.mean(np.log(p[np.arange(len(p)), labels])))
  others = np.clip(1 - probabilities, 1e-12, 1)
  return float(-np.mean(np.where(labels > 0, np.log(p), np.log(others))))


def reliability(
  probabilities: Float[np.ndarray, 'v k'], labels: Int[np.ndarray, ' v']
) -> tuple[
  Int[np.ndarray, 'b'], Float[np.ndarray, 'b'], Float[np.ndarray, 'b']
]:
  """Returns the size, mean confidence and accuracy of bins of confidence.

  Confidence is the probability of the predicted class. Bins are equally wide
  and include their upper edges; of an empty bin all are 0.
  """
  confidence = probabilities.max(axis=1)
  correct = probabilities.argmax(axis=1) == labels
  edges = np.linspace(0, 1, _NUM_BINS + 1)[1:-1]
  bins = np.digitize(confidence, edges, right=True)
  counts = np.bincount(bins, minlength=_NUM_BINS)
  divisor = np.maximum(counts, 1)
  return (
    counts,
    np.bincount(bins, confidence, _NUM_BINS) / divisor,
    np.bincount(bins, correct, _NUM_BINS) / divisor,
  )


def expected_calibration_error(
  probabilities: Float[np.ndarray, 'v k'], labels: Int[np.ndarray, ' v']
) -> float:
  """Returns the mean gap between confidence and accuracy, in 0..1.

  The mean is over the bins of `reliability`, weighted by their number of videos
  (Guo et al., arXiv 1706.04599).
  """
  counts, confidence, accuracy = reliability(probabilities, labels)
  return float(np.sum(counts * np.abs(accuracy - confidence)) / len(labels))


def confidence_interval(num_correct: int, count: int) -> tuple[float, float]:
  """Returns the 95% confidence interval of an accuracy (Wilson score)."""
  from scipy import stats  # takes 55 MB and a second, and training needs none

  interval = stats.binomtest(num_correct, count).proportion_ci(method='wilson')
  return float(interval.low), float(interval.high)


def mcnemar_p_value(only_first: int, only_second: int) -> float:
  """Returns the p-value of McNemar's test, exact and two-sided.

  The arguments are the numbers of videos that only one model gets right.
  """
  from scipy import stats

  count = only_first + only_second
  return float(stats.binomtest(only_first, count).pvalue) if count else 1.0


def _average_precision(
  scores: Float[np.ndarray, 'n'], positive: Bool[np.ndarray, 'n']
) -> float:
  """Returns the sum over thresholds of precision times gained recall.

  Equal scores share one threshold, so their order does not matter.
  """
  order = np.argsort(-scores, kind='stable')
  ranked = scores[order]
  hits = np.cumsum(positive[order])
  ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
  precision = hits[ends] / (ends + 1)
  recall = hits[ends] / hits[-1]
  return float(np.sum(np.diff(recall, prepend=0) * precision))
