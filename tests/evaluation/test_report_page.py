"""The report page is self-contained, escapes names and has readable charts."""

import numpy as np
import pytest

from dualformer_jax.evaluation import report, report_page
from dualformer_jax.input_pipeline import dataset
from tests.evaluation import html_page, make_result

HOSTILE = '<script>alert("1")</script>&amp;'


def _mistake(video, true, predicted, picture):
  return {
    'video': video,
    'true': true,
    'true_probability': 0.2,
    'predicted': predicted,
    'predicted_probability': 0.6,
    'picture': picture,
  }


def test_page_escapes_names():
  names = (HOSTILE, 'run', 'jump')
  videos = ['"><img src=x onerror=y>', 'b', 'c']
  tested = make_result.of(np.eye(3), [1, 0, 2], videos, names)
  other = make_result.of(np.eye(3)[[1, 0, 0]], [1, 0, 2], videos, names)
  thumbnail = np.zeros((9, 30, 3), np.uint8)
  page = html_page.Page(
    report_page.render(
      make_result.report_of(
        tested,
        comparison=report.compare(tested, other),
        failed_videos=[{'video': HOSTILE, 'reason': 'is <b>empty</b>'}],
      ),
      [
        _mistake(videos[0], names[0], names[1], thumbnail),
        _mistake('unreadable', 'run', 'jump', None),
      ],
      report_page.chart_data(tested),
    )
  )
  assert len(page.fits) > 5
  assert all(page.fits)
  assert len(page.images()) == 1
  image = page.images()[-1]
  assert image['alt'] == f'Three frames of {videos[0]}'
  assert (image['width'], image['height']) == ('30', '9')
  # In the comparison, confused pairs, mistakes, classes and failed videos.
  assert sum(HOSTILE in text for text in page.text) >= 5
  checkpoint = 'the latest one, /run/<i>1</i>'
  for text in (videos[0], 'is <b>empty</b>', checkpoint):
    assert text in page.text
  headings = [tag for tag, _ in page.tags if tag in ('h1', 'h2')]
  assert headings == ['h1'] + ['h2'] * 7


def test_page_shows_comparison_without_differences():
  tested = make_result.of(np.eye(3), [1, 0, 2])
  page = html_page.Page(
    report_page.render(
      make_result.report_of(tested, comparison=report.compare(tested, tested))
    )
  )
  assert 'Both predict the same class for every video.' in page.text


def test_multi_label_page_shows_average_precision():
  labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
  tested = make_result.of(np.eye(3), labels)
  assert report_page.chart_data(tested) is None
  page = html_page.Page(report_page.render(make_result.report_of(tested)))
  text = ' '.join(page.text)
  assert 'mAP' in text
  assert 'average precision' in text
  assert 'top-1' not in text
  assert page.images() == []


class Videos(dataset.PreparedDataset):
  """A dataset in which video 0 can be decoded and the others cannot."""

  def __init__(self, video: bytes):
    self.video = video

  def __getitem__(self, index):
    video = b'not a video' if index else self.video
    return dataset.Example(video, 0, 'x')


def test_most_confident_mistakes_come_first(motion_dataset):
  motion = dataset.PreparedDataset('motion', 'validation', str(motion_dataset))
  logits = [[2, 0, 0], [3, 0, 0], [0, 9, 0], [4, 0, 0]]
  tested = make_result.of(logits, [1, 2, 1, 1], list('abcd'))
  mistakes = report_page.find_mistakes(
    tested, Videos(motion[0].video), np.array([5, 0, 7, 9]), limit=2
  )
  assert [mistake['video'] for mistake in mistakes] == ['d', 'b']
  assert [mistake['true'] for mistake in mistakes] == ['run', 'jump']
  assert [mistake['predicted'] for mistake in mistakes] == ['walk', 'walk']
  unreadable, readable = (mistake['picture'] for mistake in mistakes)
  assert unreadable is None
  assert readable is not None
  assert readable.shape == (90, 270, 3)


@pytest.mark.parametrize(('k', 'cell'), [(2, 44), (8, 44), (60, 13), (400, 2)])
def test_confusion_matrix_colors_cells(k, cell):
  # Two videos of each class are correct, two more of class 0 are not.
  labels = np.concatenate([np.arange(k), np.arange(k), [0, 0]])
  predicted = np.concatenate([np.arange(k), np.arange(k), [k - 1, k - 1]])
  names = tuple(f'class {i}' for i in range(k))
  tested = make_result.of(np.eye(k)[predicted], labels, class_names=names)
  page = html_page.Page(
    report_page.render(
      make_result.report_of(tested), charts=report_page.chart_data(tested)
    )
  )
  cells = {
    (int(a['y'] or 0) // cell, int(a['x'] or 0) // cell): a
    for tag, a in page.tags
    if tag == 'rect' and a.get('width') == str(cell)
  }
  assert cells.keys() == {(i, i) for i in range(k)} | {(0, k - 1)}
  for (row, column), cell_ in cells.items():
    assert cell_['class'] == ('right' if row == column else 'wrong')
  # The square root of a half.
  assert float(cells[0, k - 1]['fill-opacity'] or 0) == 0.71
  assert float(cells[1, 1]['fill-opacity'] or 0) == 1
  assert f'class 0, predicted class {k - 1}: 2' in page.text
  # Above and beside the matrix: every name, or numbers of some classes.
  assert page.text.count('class 1' if k <= 60 else '20') >= 2


def test_reliability_diagram_has_a_bar_per_bin():
  # Confidence 0.9 (bin 14 of 15), once right and once wrong.
  logits = np.log([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05]])
  tested = make_result.of(logits, [0, 1])
  page = html_page.Page(
    report_page.render(
      make_result.report_of(tested), charts=report_page.chart_data(tested)
    )
  )
  accuracy, confidence, count = [
    attributes
    for tag, attributes in page.tags
    if tag == 'rect' and attributes.get('x') == f'{13 / 15:.4f}'
  ]
  assert (accuracy['class'], accuracy['height']) == ('right', '0.5')
  assert confidence['y'] == '0.897'
  assert count['height'] == '1.0'
