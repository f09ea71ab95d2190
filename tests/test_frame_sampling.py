"""Frame sampling: the published implementation's indices and ranges."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from dualformer_jax.input_pipeline import frame_sampling

FIGURES = json.loads(
  (pathlib.Path(__file__).parent / 'reference/sampling.json').read_text()
)


def _name(case: dict[str, int]) -> str:
  return '-'.join(str(v) for v in case.values() if isinstance(v, int))


@pytest.mark.parametrize('case', FIGURES['dense'], ids=_name)
def test_dense_test_frames_are_those_of_the_reference(case):
  frames = frame_sampling.test_frames(
    case['total_frames'],
    case['clip_len'],
    case['frame_interval'],
    case['num_clips'],
  )
  np.testing.assert_array_equal(frames, case['test_frames'])


@pytest.mark.parametrize('case', FIGURES['dense'], ids=_name)
def test_dense_train_offsets_cover_the_range_of_the_reference(case):
  rng = np.random.default_rng(0)
  total, interval = case['total_frames'], case['frame_interval']
  draws = np.stack(
    [
      frame_sampling.train_frames(
        total, case['clip_len'], interval, case['num_clips'], rng
      )
      for _ in range(3000)
    ]
  )
  offsets = draws[:, :, 0]
  np.testing.assert_array_equal(offsets.min(0), case['train_offset_min'])
  np.testing.assert_array_equal(offsets.max(0), case['train_offset_max'])
  distinct = [len(np.unique(column)) for column in offsets.T]
  assert distinct == case['train_distinct']
  steps = np.arange(case['clip_len']) * interval
  np.testing.assert_array_equal(draws, (offsets[..., None] + steps) % total)


def test_clips_of_a_video_hardly_longer_than_one_are_in_order():
  rng = np.random.default_rng(0)
  draws = [frame_sampling.train_frames(66, 32, 2, 4, rng) for _ in range(200)]
  offsets = np.stack(draws)[:, :, 0]
  assert (np.diff(offsets, axis=1) >= 0).all()


def test_one_train_clip_is_uniform_over_all_offsets():
  rng = np.random.default_rng(0)
  draws = [
    frame_sampling.train_frames(13, 4, 2, 1, rng)[0, 0] for _ in range(3000)
  ]
  counts = np.bincount(draws, minlength=6)
  # Six places; five standard deviations of a binomial count.
  np.testing.assert_allclose(counts, 500, atol=5 * np.sqrt(500 * 5 / 6))


@pytest.mark.parametrize('case', FIGURES['uniform'], ids=_name)
def test_uniform_test_frames_are_those_of_the_reference(case):
  frames = frame_sampling.uniform_test_frames(
    case['total_frames'], case['clip_len']
  )
  np.testing.assert_array_equal(frames, [case['test_frames']])


@pytest.mark.parametrize('total', [1, 2, 7, 30, 200])
def test_uniform_train_frames_rise_and_reach_all_frames_of_their_segments(
  total,
):
  rng = np.random.default_rng(0)
  draws = np.concatenate(
    [frame_sampling.uniform_train_frames(total, 8, rng) for _ in range(2000)]
  )
  assert draws.shape == (2000, 8)
  assert (np.diff(draws, axis=1) >= 0).all()
  # Segment i is from round(i s) to round((i + 1) s), s = (total - 1) / 8.
  ends = [round(i * (total - 1) / 8) for i in range(9)]
  np.testing.assert_array_equal(draws.min(0), ends[:-1])
  np.testing.assert_array_equal(draws.max(0), ends[1:])


def test_a_video_of_one_frame_is_repeated():
  rng = np.random.default_rng(0)
  for frames in (
    frame_sampling.test_frames(1, 16, 4, 4),
    frame_sampling.train_frames(1, 16, 4, 1, rng),
    frame_sampling.uniform_test_frames(1, 16),
    frame_sampling.uniform_train_frames(1, 16, rng),
  ):
    assert not frames.any()


def test_a_video_without_frames_is_refused():
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match='1 or more'):
    frame_sampling.test_frames(0, 16, 4, 1)
  with pytest.raises(ValueError, match='1 or more'):
    frame_sampling.train_frames(0, 16, 4, 1, rng)
  with pytest.raises(ValueError, match='1 or more'):
    frame_sampling.uniform_test_frames(0, 16)
