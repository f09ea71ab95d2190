"""Windows of videos whose frame rate varies, by the times of their frames."""

from __future__ import annotations

import numpy as np
import pytest

from dualformer_jax.errors import UserError
from dualformer_jax.inference import windows
from dualformer_jax.input_pipeline.transforms import Preprocessing

DENSE = Preprocessing(4, 2, 2)
UNIFORM = Preprocessing(4, 1, 2, sampling='uniform')
# 10 frames a second for 2 s, then 2 a second for 4 s: 28 frames in 6 s.
TIMES = [*(i / 10 for i in range(20)), *(2 + i / 2 for i in range(8))]
FPS = 28 / 6


def cut(
  times: list[float],
  preprocessing: Preprocessing = DENSE,
  fps: float = FPS,
  **options: float,
) -> list[tuple[float, float, list[float]]]:
  """Returns start, end and the times of the frames of each window."""
  frames = [np.full((2, 2, 3), i, np.uint8) for i in range(len(times))]
  timed = zip(times, frames, strict=True)
  found = windows.window_clips(timed, preprocessing, fps, **options)
  return [
    (start, end, [times[frame] for frame in clip[:, 0, 0, 0]])
    for start, end, clip in found
  ]


def test_windows_of_a_clip_have_its_frames_and_their_times():
  # 8 frames: 0 to 7, 8 to 15, 16 to 23, and the last 8.
  found = cut(TIMES)
  assert [window[:2] for window in found] == [
    (0.0, 0.8),
    (0.8, 1.6),
    (1.6, 4.0),
    (2.0, 6.0),
  ]
  assert [window[2] for window in found] == [
    [0.0, 0.2, 0.4, 0.6],
    [0.8, 1.0, 1.2, 1.4],
    [1.6, 1.8, 2.0, 3.0],
    [2.0, 3.0, 4.0, 5.0],
  ]


def test_windows_of_seconds_start_and_end_at_these_times():
  found = cut(TIMES, window=1.0)
  assert [window[:2] for window in found] == [(i, i + 1) for i in range(6)]
  # The frames that are shown at four moments of a second.
  for start, _, clip in found:
    moments = [start + i / 4 for i in range(4)]
    assert clip == [max(t for t in TIMES if t <= m) for m in moments]


def test_uniform_sampling_is_even_in_time():
  found = cut(TIMES, UNIFORM, window=3.0)
  assert [window[:2] for window in found] == [(0.0, 3.0), (3.0, 6.0)]
  # A copy of 14 frames at the average rate has segments 0, 3, 6, 10, 13 (the
  # multiples of 13 / 4, rounded), with middles 1, 4, 8 and 11.
  for start, _, clip in found:
    moments = [start + i / FPS for i in (1, 4, 8, 11)]
    assert clip == [max(t for t in TIMES if t <= m) for m in moments]


def test_strides_are_in_seconds():
  found = cut(TIMES, stride=1.5)
  # 8 frames each; the last window ends with the video.
  assert [window[:2] for window in found] == [
    (0.0, 0.8),
    (1.5, 3.5),
    (2.0, 6.0),
  ]
  found = cut(TIMES, window=1.0, stride=0.5)
  starts = [window[0] for window in found]
  assert starts == [i / 2 for i in range(11)]
  assert all(end - start == pytest.approx(1) for start, end, _ in found)


def test_window_in_which_no_frame_starts_is_left_out():
  times = [0.0, 0.1, 0.2, 3.0, 3.1, 3.2]
  first, second = cut(times, window=0.5)
  assert (first[0], second[0]) == (0.0, 3.0)
  assert {*first[2]} <= {*times[:3]}
  assert {*second[2]} <= {*times[3:]}


def test_rounded_times_do_not_shift_windows():
  times = [round(i / 30, 3) for i in range(90)]  # as in WebM
  assert times[1] == 0.033
  found = cut(times, window=0.1)
  assert len(found) == 30
  for i, (start, end, _) in enumerate(found):
    assert (start, end) == pytest.approx((i / 10, (i + 1) / 10), abs=2e-3)


def test_video_shorter_than_a_window_is_repeated():
  [(start, end, clip)] = cut([0.0, 0.5], fps=2.0, window=5.0)
  assert (start, end) == (0.0, 1.0)
  # Of a second that is repeated: 0, 1.25, 2.5 and 3.75 s.
  assert clip == [0.0, 0.0, 0.5, 0.5]


def test_long_window_raises_before_a_frame_is_read():
  with pytest.raises(UserError, match='choose a shorter --window'):
    next(windows.window_clips(iter([]), DENSE, FPS, window=1e8))
