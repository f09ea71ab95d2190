"""Metrics: the reference's figures, and cases worked out by hand."""

import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.training import metrics
from tests import reference_arrays


@pytest.fixture(scope='module', name='figures')
def _figures():
  with np.load(reference_arrays.DIRECTORY / 'metrics_seed1.npz') as file:
    return {name: file[name] for name in file}


def test_single_label_metrics_equal_the_reference(figures):
  result = metrics.summary(figures['scores'], figures['labels'], False)
  assert result == pytest.approx(
    {
      'top1': figures['top1'].item(),
      'top5': figures['top5'].item(),
      'mean_class_accuracy': figures['mean_class'].item(),
    },
    abs=1e-6,
  )


def test_multi_label_metrics_equal_the_reference(figures):
  result = metrics.summary(figures['scores'], figures['multihot'], True)
  assert result == pytest.approx(
    {
      'mAP': figures['mean_average_precision'].item(),
      'mmit_mAP': figures['mmit_map'].item(),
    },
    abs=1e-6,
  )


def test_multi_hot_floats_count_like_integers(figures):
  labels = figures['multihot']
  assert metrics.summary(
    figures['scores'], labels.astype(np.float32), True
  ) == metrics.summary(figures['scores'], labels, True)


def test_every_k_of_top_k_equals_counting_the_better_classes(figures):
  scores, labels = figures['scores'], figures['labels']
  better = [
    sum(score > row[label] for score in row)
    for row, label in zip(scores, labels, strict=True)
  ]
  for k in range(1, scores.shape[1] + 1):
    expected = sum(count < k for count in better) / len(labels)
    assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(expected)


def test_equal_scores_earn_no_more_than_chance():
  scores, labels = np.zeros((10, 5)), np.arange(10) % 5
  assert metrics.top_k_accuracy(scores, labels, 1) == pytest.approx(1 / 5)
  assert metrics.top_k_accuracy(scores, labels, 2) == pytest.approx(2 / 5)
  assert metrics.mean_class_accuracy(scores, labels) == pytest.approx(1 / 5)


def test_mean_class_accuracy_counts_classes_that_are_only_predicted():
  # Recalls: class 0 half, class 1 all, class 3 none (predicted, never right);
  # class 2 occurs nowhere.
  predicted, labels = [0, 3, 1], np.array([0, 0, 1])
  scores = np.eye(4)[predicted]
  assert metrics.mean_class_accuracy(scores, labels) == pytest.approx(1.5 / 3)


def test_average_precision_worked_out_by_hand():
  scores = np.array([[0.9], [0.8], [0.7], [0.6]])
  labels = np.array([[1], [0], [1], [0]])
  expected = (1 / 1 + 2 / 3) / 2
  assert metrics.mean_average_precision(scores, labels) == pytest.approx(
    expected
  )
  assert metrics.mmit_mean_average_precision(
    scores.T, labels.T
  ) == pytest.approx(expected)


def test_average_precision_with_many_ties_equals_its_definition():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 4, (30, 6)).astype(np.float32)
  labels = rng.integers(0, 2, (30, 6))

  def area(scores, labels):
    """Adds up precision x gain of recall, threshold by threshold."""
    total, recall_before = 0, 0
    for threshold in sorted(set(scores), reverse=True):
      named = labels[scores >= threshold]
      recall = sum(named) / sum(labels)
      total += sum(named) / len(named) * (recall - recall_before)
      recall_before = recall
    return total

  by_class = [area(scores[:, i], labels[:, i]) for i in range(6)]
  assert metrics.mean_average_precision(scores, labels) == pytest.approx(
    np.mean(by_class)
  )
  by_video = [area(scores[i], labels[i]) for i in range(30) if labels[i].any()]
  assert metrics.mmit_mean_average_precision(scores, labels) == pytest.approx(
    np.mean(by_video)
  )


def test_classes_and_videos_without_labels_are_left_out():
  scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.8]])
  labels = np.array([[0, 1, 0], [0, 0, 0]])
  assert metrics.mean_average_precision(scores, labels) == 1
  assert metrics.mmit_mean_average_precision(scores, labels) == 1
  assert np.isnan(metrics.mean_average_precision(scores, labels * 0))
  assert np.isnan(metrics.mmit_mean_average_precision(scores, labels * 0))


def test_top5_of_fewer_classes_takes_all_of_them():
  scores = np.array([[0.1, 0.9], [0.9, 0.1]])
  assert metrics.summary(scores, np.array([0, 0]), False) == {
    'top1': 0.5,
    'top5': 1.0,
    'mean_class_accuracy': 0.25,
  }


def test_summary_refuses_what_cannot_be_measured():
  labels = np.array([0, 1])
  with pytest.raises(errors.UserError, match='no video to evaluate'):
    metrics.summary(np.zeros((0, 3)), labels[:0], False)
  scores = np.array([[0.5, np.nan], [0.5, 0.5]])
  with pytest.raises(errors.UserError, match='not finite.*diverged'):
    metrics.summary(scores, labels, False)
  with pytest.raises(errors.UserError, match='no video has a label'):
    metrics.summary(np.zeros((2, 3)), np.zeros((2, 3)), True)
