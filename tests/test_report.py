"""Reports: figures against hand-worked ones, the page, the command itself."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

import dualformer_jax
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import records
from dualformer_jax.training import (
  metrics,
  report,
  report_page,
  report_pictures,
)
from tests import training_command

NAMES = ('walk', 'run', 'jump')
HOSTILE = '<script>alert("1")</script>&amp;'


def result_of(
  logits: Any,
  labels: Any,
  video_ids: list[str] | None = None,
  class_names: tuple[str, ...] = NAMES,
  num_clips: int = 1,
) -> report.Result:
  """Logits are [videos, classes] (one view) or [videos, views, classes]."""
  logits = np.asarray(logits, np.float32)
  if logits.ndim == 2:
    logits = logits[:, None]
  video_ids = video_ids or [f'video {i}' for i in range(len(logits))]
  return report.Result(
    logits, np.asarray(labels), video_ids, class_names, num_clips, '/there'
  )


# --- Figures


@pytest.mark.parametrize('multi_label', [False, True])
def test_probabilities_are_the_mean_over_views(multi_label):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 8, (5, 4, 3)).astype(np.float32)
  exp = np.exp(logits.astype(np.float64))
  if multi_label:
    expected = np.mean(exp / (1 + exp), axis=1)
  else:
    expected = np.mean(exp / exp.sum(axis=2, keepdims=True), axis=1)
  found = metrics.mean_probabilities(logits, multi_label)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  # Neither overflows, nor hides that a model has diverged.
  huge = metrics.mean_probabilities(logits * np.float32(1e30), multi_label)
  assert np.isfinite(huge).all()
  logits[0, 0, 0] = np.nan
  assert np.isnan(metrics.mean_probabilities(logits, multi_label)[0, 0])


def test_calibration_error_worked_out_by_hand():
  # Two of confidence 0.95, one of them right: 0.45 apart. One of 0.62, right:
  # 0.38. One of 0.59, wrong: 0.59. The last two are in different bins.
  probabilities = np.array(
    [[0.95, 0.05], [0.95, 0.05], [0.38, 0.62], [0.59, 0.41]]
  )
  labels = np.array([0, 1, 1, 1])
  expected = (2 * 0.45 + 0.38 + 0.59) / 4
  found = report.expected_calibration_error(probabilities, labels)
  assert found == pytest.approx(expected)


def test_calibration_error_equals_its_definition():
  rng = np.random.default_rng(1)
  probabilities = rng.dirichlet(np.ones(4) / 2, 200)
  probabilities[0] = [1, 0, 0, 0]  # the end of the last bin
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
  found = report.expected_calibration_error(probabilities, labels)
  assert found == pytest.approx(expected)


def test_wilson_interval_equals_published_figures():
  # Brown, Cai, DasGupta, Interval Estimation for a Binomial Proportion, 2001,
  # give the formula; 0 and 8 of 10 are worked out by it.
  assert report.wilson_interval(8, 10) == pytest.approx(
    (0.4902, 0.9433), abs=1e-4
  )
  assert report.wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
  assert report.wilson_interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


@pytest.mark.parametrize(('right', 'count'), [(3, 7), (150, 200), (1, 1000)])
def test_at_the_ends_of_wilson_interval_the_score_test_is_at_its_limit(
  right, count
):
  for end in report.wilson_interval(right, count):
    score = (right / count - end) / math.sqrt(end * (1 - end) / count)
    assert abs(score) == pytest.approx(1.959964, abs=1e-5)


def test_mcnemar_equals_counting_the_throws_of_coins():
  for count in range(1, 13):
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=count)]
    for one in range(count + 1):
      as_far = [abs(h - count / 2) >= abs(one - count / 2) for h in heads]
      found = report.mcnemar_p_value(one, count - one)
      assert found == pytest.approx(np.mean(as_far))
  assert report.mcnemar_p_value(0, 0) == 1
  assert report.mcnemar_p_value(0, 5000) < 1e-300
  # About normal: 1000 of 2100 are 2.18 standard deviations from 1050.
  assert report.mcnemar_p_value(1000, 1100) == pytest.approx(0.0308, abs=5e-4)


def test_the_most_confused_classes_come_first():
  labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
  predictions = np.array([0, 1, 1, 1, 2, 0, 0, 0, 2])
  confusion = report.confusion_matrix(labels, predictions, 3)
  assert confusion.tolist() == [[1, 2, 0], [0, 1, 1], [3, 0, 1]]
  expected = [('jump', 'walk', 3), ('walk', 'run', 2), ('run', 'jump', 1)]
  for limit in (2, 20):
    found = report.most_confused(confusion, NAMES, limit)
    assert [tuple(pair.values()) for pair in found] == expected[:limit]
    assert list(found[0]) == ['true', 'predicted', 'count']


def test_classes_are_counted():
  logits = np.eye(4)[[0, 1, 1, 0, 2]]
  result = result_of(logits, [0, 0, 1, 1, 1], class_names=(*NAMES, 'fall'))
  assert report.class_figures(result) == [
    {'name': 'walk', 'count': 2, 'accuracy': 1 / 2},
    {'name': 'run', 'count': 3, 'accuracy': pytest.approx(1 / 3)},
    {'name': 'jump', 'count': 0, 'accuracy': None},
    {'name': 'fall', 'count': 0, 'accuracy': None},
  ]


@pytest.mark.parametrize(
  ('had', 'wanted', 'expected'),
  [
    # Clips x crops; views are left, right, middle, each with its clips.
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
def test_few_views_are_spread_over_the_video(had, wanted, expected):
  assert report.view_subset(*had, *wanted) == expected


def test_a_smaller_budget_is_what_a_smaller_test_gives():
  rng = np.random.default_rng(2)
  views = rng.normal(0, 2, (40, 3, 4, 5))  # videos, crops, clips, classes
  labels = rng.integers(0, 5, 40)
  views += np.eye(5)[labels][:, None, None]  # The more, the better.
  result = result_of(
    views.reshape(40, 12, 5), labels, None, tuple('abcde'), num_clips=4
  )
  exp = np.exp(views.astype(np.float32).astype(np.float64))
  softmax = exp / exp.sum(axis=-1, keepdims=True)
  chosen = {1: [2], 2: [1, 3], 4: [0, 1, 2, 3]}
  budget = report.view_budget(result, gflops=2.5)
  expected = list(itertools.product((1, 3), (1, 2, 4)))
  assert [(r['num_crops'], r['num_clips']) for r in budget] == expected
  for row in budget:
    crops = softmax[:, 2:] if row['num_crops'] == 1 else softmax
    mean = crops[:, :, chosen[row['num_clips']]].mean(axis=(1, 2))
    right = mean.argmax(axis=1) == labels
    assert row['accuracy'] == pytest.approx(right.mean())
    assert row['interval'] == list(report.wilson_interval(int(right.sum()), 40))
    assert row['gflops'] == 2.5 * row['num_clips'] * row['num_crops']
  assert len({row['accuracy'] for row in budget}) > 3
  assert 'gflops' not in report.view_budget(result)[0]
  only_two = report.view_budget(
    result_of(views[:, 0, :2], labels, None, tuple('abcde'), num_clips=2)
  )
  assert [(r['num_crops'], r['num_clips']) for r in only_two] == [
    (1, 1),
    (1, 2),
  ]


def test_several_labels_a_video_have_average_precision_instead():
  logits = np.array([[3.0, 1, -1], [2, 2, -2], [1, 3, -3], [0, 0, -4]])
  hot = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
  details = report.details(result_of(logits, hot))
  assert list(details) == ['classes', 'view_budget']
  # walk: ranks 1 and 3; run: 3 (best) and 2 are its first two.
  expected = [(1 + 2 / 3) / 2, 1.0, None]
  found = [row['average_precision'] for row in details['classes']]
  assert found == [expected[0], expected[1], None]
  (budget,) = details['view_budget']
  assert budget['mAP'] == pytest.approx((expected[0] + 1) / 2)
  assert not {'accuracy', 'interval'} & set(budget)


# --- Comparison


def test_a_comparison_is_over_the_common_videos():
  # Classes predicted of videos a to f, whose class is 0, 0, 0, 1, 1, 1.
  labels = [0, 0, 0, 1, 1, 1]
  this = result_of(np.eye(3)[[0, 0, 1, 1, 2, 1]], labels, list('abcdef'))
  # In another order, without f, with another one.
  other = result_of(
    np.eye(3)[[0, 0, 1, 1, 2, 2]], [1, 1, 0, 0, 0, 1], list('edcbaz')
  )
  found = report.compare(this, other)
  assert found['num_videos'] == 5
  assert (found['videos_only_here'], found['videos_only_there']) == (1, 1)
  # a: this alone. b: this alone. c: both wrong alike. d: this alone.
  # e: both wrong, differently.
  assert (found['only_this_right'], found['only_other_right']) == (3, 0)
  assert found['p_value'] == 2 / 2**3
  assert found['significant'] is False
  assert found['accuracy'] == pytest.approx(3 / 5)
  assert found['other_accuracy'] == 0
  assert found['differences'] == [
    {'video': v, 'true': t, 'predicted': p, 'other_predicted': o}
    for v, t, p, o in (
      ('a', 'walk', 'walk', 'jump'),
      ('b', 'walk', 'walk', 'run'),
      ('d', 'run', 'run', 'walk'),
      ('e', 'run', 'jump', 'walk'),
    )
  ]
  assert 'is not significant' in found['in_words']
  assert 'p = 0.25' in found['in_words']


def test_runs_that_cannot_be_compared_are_told():
  this = result_of(np.eye(3), [0, 1, 2], list('abc'))
  with pytest.raises(UserError, match=r"none of the 3 videos .*'a'.*'x'"):
    report.compare(this, result_of(np.eye(3), [0, 1, 2], list('xyz')))
  with pytest.raises(UserError, match=r"another label for 2 of 3 .*'b'"):
    report.compare(this, result_of(np.eye(3), [0, 2, 1], list('abc')))


# --- The page


class Page(html.parser.HTMLParser):
  """Checks that tags are closed in order; keeps tags and text."""

  VOID = ('meta', 'img')

  def __init__(self, page: str):
    super().__init__()
    self.open: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.text: list[str] = []
    self.feed(page)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    assert len(dict(attrs)) == len(attrs)
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)

  def images(self) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in self.tags if tag == 'img']


def assert_stands_alone(page: str) -> Page:
  parsed = Page(page)
  loading = {'script', 'link', 'iframe', 'object', 'embed', 'form', 'base'}
  assert not loading & {tag for tag, _ in parsed.tags}
  for tag, attributes in parsed.tags:
    assert not {'href', 'srcset', 'onclick', 'onerror'} & set(attributes)
    if tag == 'img':
      assert (attributes['src'] or '').startswith('data:image/')
      assert attributes['alt']
  assert 'url(' not in page
  assert '@import' not in page
  return parsed


def full_report(result: report.Result, **more: Any) -> dict[str, Any]:
  return {
    **metrics.summary(
      result.probabilities(), result.labels, result.multi_label
    ),
    'num_videos': len(result.labels),
    'failed_videos': [{'video': HOSTILE, 'reason': 'is <b>empty</b>'}],
    'views': {'num_clips': 1, 'num_crops': 1},
    **report.details(result),
    'checkpoint': '/run/<i>1</i>',
    'dataset': {'folder': '/data/"x"', 'split': 'test'},
    'config': {'dataset': {'name': 'motion'}},
    'time': {'finished': 'today'},
    **more,
  }


def test_names_from_files_are_text_in_the_page():
  names = (HOSTILE, 'run', 'jump')
  videos = ['"><img src=x onerror=y>', 'b', 'c']
  result = result_of(np.eye(3), [1, 0, 2], videos, names)
  other = result_of(np.eye(3)[[1, 0, 0]], [1, 0, 2], videos, names)
  mistake = report_page.Mistake(
    videos[0], names[0], 0.2, names[1], 0.6, np.zeros((9, 30, 3), np.uint8)
  )
  unreadable = report_page.Mistake('gone', 'run', 0.1, 'jump', 0.4, None)
  page = report_page.page(
    full_report(result, comparison=report.compare(result, other)),
    [mistake, unreadable],
    report_pictures.draw_confusion(np.eye(3, dtype=int), names),
    report_pictures.draw_reliability(
      *report.reliability(result.probabilities(), result.labels)
    ),
  )
  parsed = assert_stands_alone(page)
  assert len(parsed.images()) == 3
  assert parsed.images()[-1]['alt'] == f'Three frames of {videos[0]}'
  # Mistakes, confused pairs, classes, comparison; and failed videos.
  assert sum(HOSTILE in text for text in parsed.text) >= 5
  for text in (videos[0], 'is <b>empty</b>', '/run/<i>1</i>'):
    assert text in parsed.text
  headings = [tag for tag, _ in parsed.tags if tag in ('h1', 'h2')]
  assert headings == ['h1'] + ['h2'] * 7


def test_the_page_of_several_labels_has_what_makes_sense():
  hot = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
  page = report_page.page(full_report(result_of(np.eye(3), hot)))
  parsed = assert_stands_alone(page)
  text = ' '.join(parsed.text)
  assert 'mAP' in text
  assert 'average precision' in text
  assert 'top-1' not in text
  assert parsed.images() == []


@pytest.mark.parametrize(('k', 'cell'), [(2, 44), (8, 44), (60, 13), (400, 2)])
def test_a_confusion_matrix_is_readable(k, cell):
  rng = np.random.default_rng(0)
  confusion = np.diag(rng.integers(5, 9, k))
  confusion[0, k - 1] = 4
  picture = report_pictures.draw_confusion(confusion, ['name'] * k)
  assert max(picture.shape) < 1000
  first = len(picture) - 12 - k * cell  # where the matrix begins
  corner = cell // 4  # beside the counts
  places = first + np.arange(k) * cell + max(corner, 1)
  colors = picture[np.ix_(places, places)].astype(int)
  red, blue = colors[..., 0], colors[..., 2]
  right, wrong, none = blue > red + 50, red > blue + 50, red == 255
  np.testing.assert_array_equal(right, np.eye(k))
  assert np.argwhere(wrong).tolist() == [[0, k - 1]]
  np.testing.assert_array_equal(none, confusion == 0)
  # Names or numbers stand above and beside it.
  assert (picture[:first] < 128).any()
  assert (picture[first:, :first] < 128).any()


class Broken(records.PreparedDataset):
  """A dataset whose videos are none."""

  def __init__(self):
    pass

  def __getitem__(self, index):
    return records.Example(b'no video', 0, 'x')


def test_a_video_that_fails_now_has_no_picture():
  assert report.thumbnail(Broken(), 3) is None


# --- The command


@pytest.fixture(scope='module', name='trained')
def _trained(motion_dataset, compilation_cache, tmp_path_factory):
  """The workdir of a short training, tested with 2 clips."""
  workdir = tmp_path_factory.mktemp('report') / 'workdir'
  done = training_command.run(
    *training_command.TINY,
    '--config.num_epochs=1',
    '--config.test.num_clips=2',
    f'--config.dataset.data_dir={motion_dataset}',
    workdir=workdir,
    cache=compilation_cache,
  )
  assert done.returncode == 0, done.stderr
  return workdir


def read(workdir: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The report and its views."""
  with np.load(workdir / 'views.npz', allow_pickle=False) as file:
    arrays = {name: file[name] for name in file}
  return json.loads((workdir / 'report.json').read_text()), arrays


def test_views_are_what_the_model_says_of_each_video(trained, motion_dataset):
  figures, arrays = read(trained)
  assert arrays['logits'].shape == (48, 2, 8)
  assert arrays['logits'].dtype == np.float32
  dataset = records.PreparedDataset('motion', 'validation', str(motion_dataset))
  recognizer = dualformer_jax.load(trained)
  exp = np.exp(arrays['logits'].astype(np.float64))
  probabilities = np.mean(exp / exp.sum(axis=2, keepdims=True), axis=1)
  for index in (0, 31, 47):
    example = dataset[index]
    assert arrays['video_ids'][index] == example.video_id
    assert arrays['labels'][index] == example.label
    path = trained.parent / 'video.mp4'
    path.write_bytes(example.video)
    np.testing.assert_allclose(
      recognizer.probabilities(recognizer.views(path)),
      probabilities[index],
      atol=1e-6,
    )
  predictions = probabilities.argmax(axis=1)
  right = predictions == arrays['labels']
  assert figures['top1'] == right.mean()
  assert figures['view_budget'][-1]['accuracy'] == right.mean()
  (first, second) = figures['view_budget']
  assert second['gflops'] == pytest.approx(2 * first['gflops'])
  # The two MLPs have 8 x 8 x 8 tokens, 16 channels and 64 hidden ones:
  # less than all, but not by much.
  mlps = 2 * 2 * 8**3 * 16 * 64 / 1e9
  assert mlps < first['gflops'] < 5 * mlps
  counts = [
    (row['num_clips'], row['num_crops']) for row in figures['view_budget']
  ]
  assert counts == [(1, 1), (2, 1)]
  for number, row in enumerate(figures['classes']):
    assert row['name'] == dataset.class_names[number]
    assert row['accuracy'] == pytest.approx(
      right[arrays['labels'] == number].mean()
    )
  wrong = sum(pair['count'] for pair in figures['most_confused'])
  assert 0 < wrong <= np.sum(~right)
  gaps = np.abs(probabilities.max(axis=1).mean() - right.mean())
  assert gaps - 1e-9 <= figures['expected_calibration_error'] <= 1


def test_the_page_shows_the_worst_mistakes(trained):
  figures, _ = read(trained)
  page = (trained / 'report.html').read_text('utf-8')
  parsed = assert_stands_alone(page)
  wrong = round(48 * (1 - figures['top1']))
  assert len(parsed.images()) == 2 + min(24, wrong)
  assert f'{100 * figures["top1"]:.1f} %' in parsed.text
  assert all(
    (image['src'] or '').startswith('data:image/jpeg')
    for image in parsed.images()[2:]
  )


def test_two_runs_are_compared(
  trained, motion_dataset, compilation_cache, tmp_path
):
  _, arrays = read(trained)
  labels = arrays['labels']
  # Another run on half of the videos, which gets all but the first two right.
  other = tmp_path / 'other'
  other.mkdir()
  half = np.arange(48) % 2 == 0
  logits = np.eye(8, dtype=np.float32)[labels] * 9
  logits[:4] = np.roll(logits[:4], 1, axis=1)
  np.savez(
    other / 'views.npz',
    **{
      **arrays,
      'logits': logits[half][:, None],
      'labels': labels[half],
      'video_ids': arrays['video_ids'][half],
    },
    allow_pickle=False,
  )
  workdir = tmp_path / 'workdir'
  done = training_command.run(
    '--mode=test',
    f'--compare={other}/report.json',
    f'--config.init_from={trained}',
    f'--config.dataset.data_dir={motion_dataset}',
    '--config.batch_size=8',
    '--config.test.num_clips=2',
    workdir=workdir,
    cache=compilation_cache,
  )
  assert done.returncode == 0, done.stderr
  figures, again = read(workdir)
  np.testing.assert_allclose(again['logits'], arrays['logits'], atol=1e-5)
  exp = np.exp(arrays['logits'].astype(np.float64))
  right = (exp / exp.sum(axis=2, keepdims=True)).mean(axis=1).argmax(
    axis=1
  ) == labels
  there = np.arange(48) >= 4
  one = int(np.sum(right & ~there & half))
  two = int(np.sum(~right & there & half))
  p_value = 2 * sum(math.comb(one + two, i) for i in range(min(one, two) + 1))
  found = figures['comparison']
  assert (found['only_this_right'], found['only_other_right']) == (one, two)
  assert found['p_value'] == pytest.approx(min(1, p_value / 2 ** (one + two)))
  assert found['significant'] is (found['p_value'] < 0.05)
  assert found['num_videos'] == 24
  named = [row['video'] for row in found['differences']]
  assert {
    v
    for v, r in zip(arrays['video_ids'][4::2], right[4::2], strict=True)
    if not r
  } <= {*named}
  assert len(named) >= one + two
  assert found['in_words'] in done.stderr
  page = assert_stands_alone((workdir / 'report.html').read_text('utf-8'))
  assert found['in_words'] in page.text


def test_a_run_on_other_videos_is_told_after_the_report(
  trained, motion_dataset, compilation_cache, tmp_path
):
  _, arrays = read(trained)
  arrays['video_ids'] = np.char.add(arrays['video_ids'], ' of another split')
  other = tmp_path / 'other'
  other.mkdir()
  np.savez(other / 'views.npz', **arrays, allow_pickle=False)
  workdir = tmp_path / 'workdir'
  done = training_command.run(
    '--mode=test',
    f'--compare={other}',
    f'--config.init_from={trained}',
    f'--config.dataset.data_dir={motion_dataset}',
    '--config.batch_size=8',
    '--config.test.num_clips=2',
    workdir=workdir,
    cache=compilation_cache,
  )
  assert done.returncode == 2
  line = done.stderr.splitlines()[-1]
  assert line.startswith(f'error: --compare: {other} has none of the 48 videos')
  figures, _ = read(workdir)
  assert figures['num_videos'] == 48
  assert 'comparison' not in figures


def test_what_cannot_be_compared_with_is_told(
  trained, motion_dataset, compilation_cache, tmp_path
):
  _, arrays = read(trained)
  arrays['class_names'] = arrays['class_names'][::-1]
  np.savez(tmp_path / 'views.npz', **arrays, allow_pickle=False)
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}
  done = training_command.run(
    '--mode=test',
    f'--compare={tmp_path}',
    f'--config.init_from={trained}',
    f'--config.dataset.data_dir={motion_dataset}',
    workdir=tmp_path,
    cache=compilation_cache,
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith(f'error: --compare={tmp_path}: ')
  assert "'shrink' first" in line
  assert "'left' first" in line
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
  names = tuple(map(str, arrays['class_names']))
  with pytest.raises(UserError, match='there is no .*views.npz'):
    report.read(str(tmp_path / 'absent'), names)
  shutil.copy(trained / 'report.json', tmp_path / 'views.npz')
  with pytest.raises(UserError, match='views.npz is damaged'):
    report.read(str(tmp_path), names)
