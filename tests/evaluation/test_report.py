"""Figures, comparison and files of a report against hand-worked cases."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import metrics, report, result
from dualformer_jax.input_pipeline import dataset
from tests.evaluation import make_result
from tests.evaluation.make_result import NAMES


def test_most_confused_pairs_come_first():
  labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
  predictions = np.array([0, 1, 1, 1, 2, 0, 0, 0, 2])
  confusion = make_result.of(np.eye(3)[predictions], labels).confusion_matrix()
  assert confusion.tolist() == [[1, 2, 0], [0, 1, 1], [3, 0, 1]]
  expected = [('jump', 'walk', 3), ('walk', 'run', 2), ('run', 'jump', 1)]
  for limit in (2, 20):
    pairs = report.most_confused(confusion, NAMES, limit)
    assert [tuple(pair.values()) for pair in pairs] == expected[:limit]
    assert list(pairs[0]) == ['true', 'predicted', 'count']


def test_class_figures_count_videos_and_accuracy():
  logits = np.eye(4)[[0, 1, 1, 0, 2]]
  tested = make_result.of(logits, [0, 0, 1, 1, 1], class_names=(*NAMES, 'fall'))
  assert report.class_figures(tested) == [
    {'name': 'walk', 'count': 2, 'accuracy': 1 / 2},
    {'name': 'run', 'count': 3, 'accuracy': pytest.approx(1 / 3)},
    {'name': 'jump', 'count': 0, 'accuracy': None},
    {'name': 'fall', 'count': 0, 'accuracy': None},
  ]


@pytest.mark.parametrize(
  ('tested', 'smaller', 'expected'),
  [
    # Clips and crops; the views are those of the left, right and center crop.
    ((4, 1), (1, 1), [2]),
    ((4, 1), (2, 1), [1, 3]),
    ((4, 1), (4, 1), [0, 1, 2, 3]),
    ((4, 3), (1, 1), [10]),
    ((4, 3), (2, 1), [9, 11]),
    ((4, 3), (1, 3), [2, 6, 10]),
    ((4, 3), (4, 3), list(range(12))),
    ((10, 1), (4, 1), [1, 3, 6, 8]),
    ((1, 3), (1, 1), [2]),
  ],
)
def test_view_subset_is_spread_over_video(tested, smaller, expected):
  assert report.view_subset(*tested, *smaller) == expected


def test_view_budget_matches_smaller_tests():
  rng = np.random.default_rng(2)
  views = rng.normal(0, 2, (40, 3, 4, 5))  # videos, crops, clips, classes
  labels = rng.integers(0, 5, 40)
  views += np.eye(5)[labels][:, None, None]  # more views are better
  names = tuple('abcde')
  tested = make_result.of(
    views.reshape(40, 12, 5), labels, class_names=names, num_clips=4
  )
  exp = np.exp(views.astype(np.float32).astype(np.float64))
  softmax = exp / exp.sum(axis=-1, keepdims=True)
  chosen = {1: [2], 2: [1, 3], 4: [0, 1, 2, 3]}
  budget = report.view_budget(tested, gflops=2.5)
  expected = list(itertools.product((1, 3), (1, 2, 4)))
  assert [(r['num_crops'], r['num_clips']) for r in budget] == expected
  for row in budget:
    crops = softmax[:, 2:] if row['num_crops'] == 1 else softmax
    mean = crops[:, :, chosen[row['num_clips']]].mean(axis=(1, 2))
    correct = mean.argmax(axis=1) == labels
    assert row['accuracy'] == pytest.approx(correct.mean())
    interval = metrics.confidence_interval(int(correct.sum()), 40)
    assert row['interval'] == list(interval)
    assert row['gflops'] == 2.5 * row['num_clips'] * row['num_crops']
  assert len({row['accuracy'] for row in budget}) > 3


def test_view_budget_of_two_clips_has_two_rows():
  budget = report.view_budget(
    make_result.of(np.zeros((5, 2, 3)), [0] * 5, num_clips=2), gflops=1
  )
  views = [(row['num_clips'], row['num_crops']) for row in budget]
  assert views == [(1, 1), (2, 1)]


def test_multi_label_details_have_average_precision():
  logits = np.array([[3.0, 1, -1], [2, 2, -2], [1, 3, -3], [0, 0, -4]])
  labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
  details = report.details(make_result.of(logits, labels), gflops=1)
  assert list(details) == ['classes', 'view_budget']
  # The videos of 'walk' have ranks 1 and 3, those of 'run' ranks 1 and 2.
  walk = (1 + 2 / 3) / 2
  values = [row['average_precision'] for row in details['classes']]
  assert values == [walk, 1.0, None]
  (budget,) = details['view_budget']
  assert budget['mAP'] == pytest.approx((walk + 1) / 2)
  assert not {'accuracy', 'interval'} & set(budget)


def test_comparison_uses_common_videos():
  # Predictions for videos a to f, whose classes are 0, 0, 0, 1, 1, 1.
  labels = [0, 0, 0, 1, 1, 1]
  this = make_result.of(np.eye(3)[[0, 0, 1, 1, 2, 1]], labels, list('abcdef'))
  # In another order, without f but with z.
  other = make_result.of(
    np.eye(3)[[0, 0, 1, 1, 2, 2]], [1, 1, 0, 0, 0, 1], list('edcbaz')
  )
  comparison = report.compare(this, other)
  assert comparison['num_videos'] == 5
  assert comparison['videos_only_here'] == 1
  assert comparison['videos_only_there'] == 1
  # Only this test is correct on a, b and d. Both are wrong on c (same
  # prediction) and e (different predictions).
  assert comparison['only_this_right'] == 3
  assert comparison['only_other_right'] == 0
  assert comparison['p_value'] == pytest.approx(2 / 2**3)
  assert comparison['significant'] is False
  assert comparison['accuracy'] == pytest.approx(3 / 5)
  assert comparison['other_accuracy'] == 0
  assert comparison['differences'] == [
    {'video': v, 'true': t, 'predicted': p, 'other_predicted': o}
    for v, t, p, o in (
      ('a', 'walk', 'walk', 'jump'),
      ('b', 'walk', 'walk', 'run'),
      ('d', 'run', 'run', 'walk'),
      ('e', 'run', 'jump', 'walk'),
    )
  ]
  assert 'is not significant' in comparison['in_words']
  assert 'p = 0.25' in comparison['in_words']


@pytest.mark.parametrize(
  ('labels', 'video_ids', 'message'),
  [
    ([0, 1, 2], 'xyz', r"none of the 3 videos .*'a'.*'x'"),
    ([0, 2, 1], 'abc', r"another label for 2 of 3 .*'b'"),
  ],
)
def test_comparison_with_other_data_raises(labels, video_ids, message):
  this = make_result.of(np.eye(3), [0, 1, 2], list('abc'))
  with pytest.raises(UserError, match=message):
    report.compare(this, make_result.of(np.eye(3), labels, list(video_ids)))


class UnreadableVideos(dataset.PreparedDataset):
  """A dataset whose videos cannot be decoded."""

  def __init__(self):
    pass

  def __getitem__(self, index):
    return dataset.Example(b'not a video', 0, 'x')


def test_written_result_is_read_again(tmp_path):
  tested = make_result.of(np.eye(3), [0, 2, 2], ['a', '<b>', 'c'])
  content = make_result.report_of(tested, checkpoint='/bad \udcff name')
  report.write(tmp_path, content, tested, UnreadableVideos(), np.arange(3))
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'report.html',
    'report.json',
    'views.npz',
  ]
  assert json.loads((tmp_path / 'report.json').read_text()) == content
  again = result.read(f'{tmp_path}/report.json', NAMES)
  np.testing.assert_array_equal(again.logits, tested.logits)
  np.testing.assert_array_equal(again.labels, tested.labels)
  assert again.video_ids == tested.video_ids
  assert again.class_names == NAMES
  assert (again.num_clips, again.folder) == (1, str(tmp_path))


def test_failed_write_keeps_previous_report(tmp_path):
  tested = make_result.of(np.eye(3), [0, 1, 2])
  content = make_result.report_of(tested)
  report.write(tmp_path, content, tested, UnreadableVideos(), np.arange(3))
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}
  content['unserializable'] = object()
  other = make_result.of(np.eye(3), [0, 0, 0])
  with pytest.raises(TypeError):
    report.write(tmp_path, content, other, UnreadableVideos(), np.arange(3))
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unusable_earlier_test_raises(tmp_path):
  with pytest.raises(UserError, match='cannot read .*views.npz'):
    result.read(str(tmp_path / 'absent'), NAMES)
  (tmp_path / 'views.npz').write_bytes(b'{}')
  with pytest.raises(UserError, match='cannot read .*views.npz'):
    result.read(str(tmp_path), NAMES)
  with open(tmp_path / 'views.npz', 'wb') as file:
    make_result.of(np.eye(3), [0, 1, 2]).save(file)
  with pytest.raises(UserError, match="'walk' first, .* 'jump' first"):
    result.read(str(tmp_path), NAMES[::-1])
  with open(tmp_path / 'views.npz', 'wb') as file:
    make_result.of(np.eye(3), np.eye(3, dtype=int)).save(file)
  with pytest.raises(UserError, match='several labels'):
    result.read(str(tmp_path), NAMES)
