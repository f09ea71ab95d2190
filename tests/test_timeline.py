"""Windows become files that say the same, and pictures that show it."""

from __future__ import annotations

import csv
import io
import json

import cv2
import numpy as np
import pytest

from dualformer_jax import timeline
from dualformer_jax.timeline import Window

# Ten seconds of `walk`, ten of `run`.
WINDOWS = [
  Window(0.0, 10.0, [('walk', 0.75), ('run', 0.25)]),
  Window(10.0, 20.0, [('run', 0.875), ('walk', 0.125)]),
]


def test_json_and_csv_say_what_the_windows_do():
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
  ('seconds', 'digits', 'text'),
  [
    (0.0, 1, '00:00.0'),
    (9.96, 1, '00:10.0'),
    (59.94, 1, '00:59.9'),
    (59.96, 1, '01:00.0'),
    (3725.5, 1, '1:02:05.5'),
    (90.0, 0, '01:30'),
    (86400.0, 0, '24:00:00'),
  ],
)
def test_times_are_told_as_on_a_clock(seconds, digits, text):
  assert timeline.clock(seconds, digits) == text


def coloured_rows(picture: np.ndarray) -> list[tuple[int, int]]:
  """First and last line of each row of the picture that is grey or coloured."""
  # Just inside the right border, after the labels.
  column = picture[:, -40].astype(int)
  is_row = (column != 255).any(axis=1)
  edges = np.flatnonzero(np.diff(is_row.astype(int)))
  rows = [(edges[i] + 1, edges[i + 1] + 1) for i in range(0, len(edges), 2)]
  return [(a, b) for a, b in rows if b - a > 20]  # not the times below


def heights(
  picture: np.ndarray, row: tuple[int, int]
) -> tuple[np.ndarray, set[tuple[int, ...]]]:
  """How far each column of a row is filled, and the colours that fill it."""
  part = picture[slice(*row)]
  is_filled = np.ptp(part.astype(int), axis=2) > 0
  colors = {tuple(map(int, color)) for color in part[is_filled]}
  return is_filled.mean(axis=0), colors


def test_the_picture_shows_each_class_when_it_is_probable():
  content = timeline.encode('.png', 'name', WINDOWS)
  bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
  assert bgr is not None
  picture = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
  np.testing.assert_array_equal(picture, timeline.picture('name', WINDOWS))
  top, run, walk = coloured_rows(picture)[:3]  # run is more probable on average
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
  # Each row has a label in front of it, and each label is another.
  labels = [picture[slice(*row), : columns[0]] for row in (top, run, walk)]
  for label in labels:
    assert (label.min(axis=2) < 100).any(axis=0).sum() > 15
  assert not np.array_equal(labels[1], labels[2])


def test_windows_that_overlap_are_shown_until_the_next_one_starts():
  windows = [
    Window(float(i), i + 4.0, [('walk', 1.0 if i < 10 else 0.25)])
    for i in range(20)
  ]
  picture = timeline.picture('name', windows)
  filled, _ = heights(picture, coloured_rows(picture)[1])
  columns = np.flatnonzero(filled)
  scale = len(columns) / 23
  assert np.mean(filled == 1.0) * picture.shape[1] == pytest.approx(
    10 * scale, abs=2
  )


def test_a_picture_has_place_for_very_many_windows_and_classes():
  windows = [
    Window(i * 2.0, i * 2.0 + 2, [(f'{"long " * 20}{i % 30}', 0.9)])
    for i in range(5000)
  ]
  picture = timeline.picture('name', windows)
  assert picture.shape[1] == 1280
  assert len(coloured_rows(picture)) == 1 + 10


def test_what_the_font_lacks_is_replaced():
  def named(name):
    return timeline.picture('', [Window(0.0, 1.0, [(name, 1.0)])])

  np.testing.assert_array_equal(named('größer'), named('gro?er'))
  np.testing.assert_array_equal(named('跳\n'), named('??'))


def lit(frame: np.ndarray, original: np.ndarray) -> tuple[int, int]:
  """Height and width of the corner of a frame in which something is drawn."""
  rows, columns = np.nonzero((frame != original).any(axis=2))
  return int(rows.max()) + 1, int(columns.max()) + 1


def test_each_frame_has_the_label_of_its_window():
  frame = np.full((240, 320, 3), 200, np.uint8)
  windows = [
    Window(0.0, 2.0, [('walk', 1.0)]),
    Window(1.0, 3.0, [('run', 1.0)]),
    Window(6.0, 8.0, [('jump', 1.0)]),
  ]
  frames = list(timeline.labelled([frame] * 80, 10.0, windows))
  assert len(frames) == 80
  assert (frame == 200).all()  # what is given is not drawn on
  # The middles are at 1, 2 and 7 seconds.
  expected = [0] * 15 + [1] * 30 + [2] * 35
  labels = [timeline.label(frame, window.predictions) for window in windows]
  for found, place in zip(frames, expected, strict=True):
    np.testing.assert_array_equal(found, labels[place])


def test_a_label_has_a_line_for_each_class_with_a_bar():
  frame = np.full((240, 320, 3), 200, np.uint8)
  one = timeline.label(frame, [('walk', 1.0)])
  two = timeline.label(frame, [('walk', 1.0), ('run', 0.0)])
  height, width = lit(one, frame)
  assert lit(two, frame) == (2 * height, width)
  np.testing.assert_array_equal(one[:height], two[:height])
  # White letters, on a bar that the second line has not.
  assert one[:height].min(axis=2).max() > 200
  blue = one[2, :width].astype(int)
  assert (blue[:, 2] > blue[:, 0] + 40).all()
  assert np.ptp(two[height + 2, :width].astype(int), axis=1).max() == 0


@pytest.mark.parametrize('size', [(1, 1), (20, 20), (32, 500), (2160, 3840)])
def test_a_label_fits_into_any_frame(size):
  frame = np.full((*size, 3), 200, np.uint8)
  predictions = [(f'{"long name " * 10}{i}', 0.2) for i in range(5)]
  labelled = timeline.label(frame, predictions)
  assert labelled.shape == frame.shape
  lines = min(5, size[0] // 12) if size[0] < 240 else 5
  if lines:
    height, _ = lit(labelled, frame)
    assert height <= size[0]
  else:
    np.testing.assert_array_equal(labelled, frame)
