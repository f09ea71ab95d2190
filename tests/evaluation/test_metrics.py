"""Metrics agree with the published implementation and hand-worked cases."""

import itertools
import math

import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.evaluation import metrics
from tests import reference_arrays


@pytest.fixture(scope='module', name='figures')
def _figures():
  with np.load(reference_arrays.DIRECTORY / 'metrics_seed1.npz') as file:
    return {name: file[name] for name in file}


def test_single_label_metrics_match_reference(figures):
  result = metrics.summary(figures['scores'], figures['labels'], False)
  assert result == pytest.approx(
    {
      'top1': figures['top1'].item(),
      'top5': figures['top5'].item(),
      'mean_class_accuracy': figures['mean_class'].item(),
    },
    abs=1e-6,
  )


def test_multi_label_metrics_match_reference(figures):
  result = metrics.summary(figures['scores'], figures['multihot'], True)
  assert result == pytest.approx(
    {
      'mAP': figures['mean_average_precision'].item(),
      'mmit_mAP': figures['mmit_map'].item(),
    },
    abs=1e-6,
  )


def test_multi_hot_labels_may_be_float(figures):
  labels = figures['multihot']
  assert metrics.summary(
    figures['scores'], labels.astype(np.float32), True
  ) == metrics.summary(figures['scores'], labels, True)


def test_top_k_matches_rank_of_label(figures):
  scores, labels = figures['scores'], figures['labels']
  better = [
    sum(score > row[label] for score in row)
    for row, label in zip(scores, labels, strict=True)
  ]
  for k in range(1, scores.shape[1] + 1):
    expected = sum(count < k for count in better) / len(labels)
    assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(expected)


def test_constant_scores_give_chance_accuracy():
  scores, labels = np.zeros((10, 5)), np.arange(10) % 5
  assert metrics.top_k_accuracy(scores, labels, 1) == pytest.approx(1 / 5)
  assert metrics.top_k_accuracy(scores, labels, 2) == pytest.approx(2 / 5)
  assert metrics.mean_class_accuracy(scores, labels) == pytest.approx(1 / 5)


def test_mean_class_accuracy_includes_classes_only_predicted():
  # Recall is 1/2 for class 0, 1 for class 1, and 0 for class 3, which is only
  # predicted. Class 2 does not occur.
  predicted, labels = [0, 3, 1], np.array([0, 0, 1])
  scores = np.eye(4)[predicted]
  assert metrics.mean_class_accuracy(scores, labels) == pytest.approx(1.5 / 3)


def test_average_precision_matches_hand_worked_case():
  scores = np.array([[0.9], [0.8], [0.7], [0.6]])
  labels = np.array([[1], [0], [1], [0]])
  expected = (1 / 1 + 2 / 3) / 2
  found = metrics.mean_average_precision(scores.T, labels.T)
  assert found == pytest.approx(expected)


def test_average_precision_with_ties_matches_definition():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 4, (30, 6)).astype(np.float32)
  labels = rng.integers(0, 2, (30, 6))

  def area(scores, labels):
    """Sums precision times gained recall over all thresholds."""
    total, recall_before = 0, 0
    for threshold in sorted(set(scores), reverse=True):
      named = labels[scores >= threshold]
      recall = sum(named) / sum(labels)
      total += sum(named) / len(named) * (recall - recall_before)
      recall_before = recall
    return total

  by_class = [area(scores[:, i], labels[:, i]) for i in range(6)]
  by_video = [area(scores[i], labels[i]) for i in range(30) if labels[i].any()]
  assert metrics.summary(scores, labels, True) == pytest.approx(
    {'mAP': np.mean(by_class), 'mmit_mAP': np.mean(by_video)}
  )


def test_map_excludes_classes_and_videos_without_labels():
  scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.8]])
  labels = np.array([[0, 1, 0], [0, 0, 0]])
  assert metrics.summary(scores, labels, True) == {'mAP': 1, 'mmit_mAP': 1}
  assert np.isnan(metrics.mean_average_precision(scores, labels * 0))


def test_top5_with_two_classes_is_one():
  scores = np.array([[0.1, 0.9], [0.9, 0.1]])
  assert metrics.summary(scores, np.array([0, 0]), False) == {
    'top1': 0.5,
    'top5': 1.0,
    'mean_class_accuracy': 0.25,
  }


@pytest.mark.parametrize(
  ('scores', 'labels', 'multi_label', 'message'),
  [
    (np.zeros((0, 3)), np.zeros(0, int), False, 'no videos'),
    (np.array([[0.5, np.nan]]), np.array([0]), False, 'not finite.*diverged'),
    (np.zeros((2, 3)), np.zeros((2, 3)), True, 'no video .* has a label'),
  ],
)
def test_unmeasurable_scores_raise(scores, labels, multi_label, message):
  with pytest.raises(errors.UserError, match=message):
    metrics.summary(scores, labels, multi_label)


@pytest.mark.parametrize('multi_label', [False, True])
def test_probabilities_are_averaged_over_views(multi_label):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 8, (5, 4, 3)).astype(np.float32)
  exp = np.exp(logits.astype(np.float64))
  if multi_label:
    expected = np.mean(exp / (1 + exp), axis=1)
  else:
    expected = np.mean(exp / exp.sum(axis=2, keepdims=True), axis=1)
  probabilities = metrics.mean_probabilities(logits, multi_label)
  np.testing.assert_allclose(probabilities, expected, atol=1e-12)


@pytest.mark.parametrize('multi_label', [False, True])
def test_probabilities_do_not_overflow_or_hide_nan(multi_label):
  logits = np.array([[[1e30, -2e30, 3.0]]], np.float32)
  assert np.isfinite(metrics.mean_probabilities(logits, multi_label)).all()
  logits[0, 0, 0] = np.nan
  assert np.isnan(metrics.mean_probabilities(logits, multi_label)[0, 0])


def test_calibration_error_matches_hand_worked_case():
  # Two videos have confidence 0.95 and accuracy 1/2: a gap of 0.45. One has
  # confidence 0.62 and is correct: 0.38. One has 0.59 and is wrong: 0.59. The
  # last two are in different bins.
  probabilities = np.array(
    [[0.95, 0.05], [0.95, 0.05], [0.38, 0.62], [0.59, 0.41]]
  )
  labels = np.array([0, 1, 1, 1])
  expected = (2 * 0.45 + 0.38 + 0.59) / 4
  value = metrics.expected_calibration_error(probabilities, labels)
  assert value == pytest.approx(expected)


def test_calibration_error_matches_definition():
  rng = np.random.default_rng(1)
  probabilities = rng.dirichlet(np.ones(4) / 2, 200)
  probabilities[0] = [1, 0, 0, 0]  # upper edge of the last bin
  labels = rng.integers(0, 4, 200)
  expected = 0.0
  for number in range(15):
    inside = [
      (row.max(), row.argmax() == label)
      for row, label in zip(probabilities, labels, strict=True)
      if number / 15 < row.max() <= (number + 1) / 15
    ]
    if inside:
      confidence, right = np.mean(inside, axis=0)
      expected += len(inside) / 200 * abs(confidence - right)
  value = metrics.expected_calibration_error(probabilities, labels)
  assert value == pytest.approx(expected)


def test_confidence_interval_matches_published_formula():
  # Wilson's formula as in Brown, Cai and DasGupta, Interval Estimation for a
  # Binomial Proportion, 2001.
  assert metrics.confidence_interval(8, 10) == pytest.approx(
    (0.4902, 0.9433), abs=1e-4
  )
  assert metrics.confidence_interval(0, 10) == pytest.approx(
    (0, 0.2775), abs=1e-4
  )
  assert metrics.confidence_interval(10, 10) == pytest.approx(
    (0.7225, 1), abs=1e-4
  )


@pytest.mark.parametrize(('correct', 'count'), [(3, 7), (150, 200), (1, 1000)])
def test_confidence_interval_inverts_score_test(correct, count):
  for end in metrics.confidence_interval(correct, count):
    score = (correct / count - end) / math.sqrt(end * (1 - end) / count)
    assert abs(score) == pytest.approx(1.959964, abs=1e-5)


def test_mcnemar_matches_enumeration_of_coin_tosses():
  for count in range(1, 13):
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=count)]
    for one in range(count + 1):
      as_extreme = [abs(h - count / 2) >= abs(one - count / 2) for h in heads]
      value = metrics.mcnemar_p_value(one, count - one)
      assert value == pytest.approx(np.mean(as_extreme))
  assert metrics.mcnemar_p_value(0, 0) == 1
  assert metrics.mcnemar_p_value(0, 5000) < 1e-300
  # 1000 of 2100 are 2.18 standard deviations from 1050: 0.03 by the normal
  # approximation.
  assert metrics.mcnemar_p_value(1000, 1100) == pytest.approx(0.0308, abs=5e-4)
