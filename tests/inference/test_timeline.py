"""Windows are written as JSON, CSV and a chart, and drawn on frames."""

from __future__ import annotations

import csv
import io
import json

import cv2
import numpy as np
import pytest

from dualformer_jax.inference import drawing, timeline
from dualformer_jax.inference.timeline import Window

# Ten seconds of `walk`, ten of `run`.
WINDOWS = [
  Window(0.0, 10.0, [('walk', 0.75), ('run', 0.25)]),
  Window(10.0, 20.0, [('run', 0.875), ('walk', 0.125)]),
]


def test_json_and_csv_hold_the_windows():
  content = json.loads(timeline.encode('.json', 'ä.mp4', WINDOWS))
  assert content['video'] == 'ä.mp4'
  assert content['windows'] == [
    {'start': 0, 'end': 10, 'predictions': [['walk', 0.75], ['run', 0.25]]},
    {'start': 10, 'end': 20, 'predictions': [['run', 0.875], ['walk', 0.125]]},
  ]
  windows = [Window(1 / 3, 2 / 3, [('a, "b"', 0.5)])]
  text = timeline.encode('.csv', 'ä.mp4', windows).decode()
  assert list(csv.reader(io.StringIO(text))) == [
    ['start', 'end', 'class_1', 'probability_1'],
    ['0.333', '0.667', 'a, "b"', '0.5'],
  ]


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0.0, '00:00.0'),
    (9.96, '00:10.0'),
    (59.94, '00:59.9'),
    (59.96, '01:00.0'),
    (3725.5, '1:02:05.5'),
  ],
)
def test_format_time(seconds, text):
  assert timeline.format_time(seconds) == text


def chart_rows(picture: np.ndarray) -> list[tuple[int, int]]:
  """Returns the first line and the end of each row of the chart."""
  # Just inside the right border, after the labels.
  column = picture[:, -40].astype(int)
  is_row = (column != 255).any(axis=1)
  edges = np.flatnonzero(np.diff(is_row.astype(int)))
  rows = [(edges[i] + 1, edges[i + 1] + 1) for i in range(0, len(edges), 2)]
  return [(a, b) for a, b in rows if b - a > 20]  # not the times below


def heights(
  picture: np.ndarray, row: tuple[int, int]
) -> tuple[np.ndarray, set[tuple[int, ...]]]:
  """Returns how far each column of a row is filled, and the colors."""
  part = picture[slice(*row)]
  is_filled = np.ptp(part.astype(int), axis=2) > 0
  colors = {tuple(map(int, color)) for color in part[is_filled]}
  return is_filled.mean(axis=0), colors


def test_chart_shows_probabilities_over_time():
  content = timeline.encode('.png', 'name', WINDOWS)
  bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
  assert bgr is not None
  picture = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
  np.testing.assert_array_equal(picture, timeline.draw_chart('name', WINDOWS))
  top, run, walk = chart_rows(picture)[:3]  # run is more probable on average
  filled, colors = heights(picture, run)
  columns = np.flatnonzero(filled)
  middle = (columns[0] + columns[-1] + 1) // 2
  first, second = columns[0] + 5, middle + 5
  assert columns[-1] - columns[0] > 900
  assert filled[first] == filled[middle - 5] == pytest.approx(0.25, abs=0.02)
  assert filled[second] == filled[columns[-1]] == pytest.approx(0.88, abs=0.02)
  (run_color,) = colors
  filled, colors = heights(picture, walk)
  assert filled[first] == pytest.approx(0.75, abs=0.02)
  assert filled[second] == pytest.approx(0.125, abs=0.02)
  (walk_color,) = colors
  assert run_color != walk_color
  assert tuple(picture[top[0] + 3, first]) == walk_color
  assert tuple(picture[top[0] + 3, second]) == run_color
  # Each row has its own label on the left.
  labels = [picture[slice(*row), : columns[0]] for row in (top, run, walk)]
  for label in labels:
    assert (label.min(axis=2) < 100).any(axis=0).sum() > 15
  assert not np.array_equal(labels[1], labels[2])


def test_overlapping_windows_end_where_the_next_one_starts():
  windows = [
    Window(float(i), i + 4.0, [('walk', 1.0 if i < 10 else 0.25)])
    for i in range(20)
  ]
  picture = timeline.draw_chart('name', windows)
  filled, _ = heights(picture, chart_rows(picture)[1])
  columns = np.flatnonzero(filled)
  scale = len(columns) / 23
  assert np.mean(filled == 1.0) * picture.shape[1] == pytest.approx(
    10 * scale, abs=2
  )


def test_chart_of_many_windows_and_long_names():
  windows = [
    Window(i * 2.0, i * 2.0 + 2, [(f'{"long " * 20}{i % 30}', 0.9)])
    for i in range(5000)
  ]
  picture = timeline.draw_chart('name', windows)
  assert picture.shape[1] == 1280
  assert len(chart_rows(picture)) == 1 + 10


def test_characters_that_the_font_of_opencv_4_lacks_are_replaced(monkeypatch):
  monkeypatch.setattr('cv2.__version__', '4.10.0')

  def named(name):
    return timeline.draw_chart('', [Window(0.0, 1.0, [(name, 1.0)])])

  np.testing.assert_array_equal(named('größer'), named('gro?er'))
  np.testing.assert_array_equal(named('跳\n'), named('??'))


def lit(frame: np.ndarray, original: np.ndarray) -> tuple[int, int]:
  """Returns height and width of the corner that was drawn on."""
  rows, columns = np.nonzero((frame != original).any(axis=2))
  return int(rows.max()) + 1, int(columns.max()) + 1


def test_each_frame_is_labeled_with_the_nearest_window():
  frame = np.full((240, 320, 3), 200, np.uint8)
  windows = [
    Window(0.0, 2.0, [('walk', 1.0)]),
    Window(1.0, 3.0, [('run', 1.0)]),
    Window(6.0, 8.0, [('jump', 1.0)]),
  ]
  times = [index / 10 for index in range(80)]
  labeled = timeline.label_frames(((t, frame) for t in times), windows)
  found_times, frames = zip(*labeled, strict=True)
  assert list(found_times) == times
  assert (frame == 200).all()  # the input is unchanged
  # The middles are at 1, 2 and 7 seconds.
  expected = [0] * 15 + [1] * 30 + [2] * 35
  labels = [
    drawing.draw_predictions(frame, window.predictions) for window in windows
  ]
  for found, index in zip(frames, expected, strict=True):
    np.testing.assert_array_equal(found, labels[index])


def test_label_has_a_line_and_a_bar_for_each_class():
  frame = np.full((240, 320, 3), 200, np.uint8)
  one = drawing.draw_predictions(frame, [('walk', 1.0)])
  two = drawing.draw_predictions(frame, [('walk', 1.0), ('run', 0.0)])
  height, width = lit(one, frame)
  assert lit(two, frame) == (2 * height, width)
  np.testing.assert_array_equal(one[:height], two[:height])
  # White letters; the bar of the second line has length 0.
  assert one[:height].min(axis=2).max() > 200
  blue = one[2, :width].astype(int)
  assert (blue[:, 2] > blue[:, 0] + 40).all()
  assert np.ptp(two[height + 2, :width].astype(int), axis=1).max() == 0


@pytest.mark.parametrize('size', [(1, 1), (20, 20), (32, 500), (2160, 3840)])
def test_label_fits_into_frames_of_any_size(size):
  frame = np.full((*size, 3), 200, np.uint8)
  predictions = [(f'{"long name " * 10}{i}', 0.2) for i in range(5)]
  labeled = drawing.draw_predictions(frame, predictions)
  assert labeled.shape == frame.shape
  lines = min(5, size[0] // 12) if size[0] < 240 else 5
  if lines:
    height, _ = lit(labeled, frame)
    assert height <= size[0]
  else:
    np.testing.assert_array_equal(labeled, frame)
