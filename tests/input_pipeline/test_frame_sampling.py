"""Frame indices agree with those of the published implementation."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from dualformer_jax.input_pipeline import frame_sampling

FIGURES = json.loads(
  (pathlib.Path(__file__).parents[1] / 'reference/sampling.json').read_text()
)


def _name(case: dict[str, int]) -> str:
  return '-'.join(str(v) for v in case.values() if isinstance(v, int))


@pytest.mark.parametrize('case', FIGURES['dense'], ids=_name)
def test_dense_eval_frames_match_the_reference(case):
  frames = frame_sampling.eval_frames(
    case['total_frames'],
    case['clip_len'],
    case['frame_interval'],
    case['num_clips'],
  )
  np.testing.assert_array_equal(frames, case['test_frames'])


@pytest.mark.parametrize(
  'case', [c for c in FIGURES['dense'] if c['num_clips'] == 1], ids=_name
)
def test_dense_train_offsets_cover_the_reference_range(case):
  rng = np.random.default_rng(0)
  total, interval = case['total_frames'], case['frame_interval']
  draws = np.stack(
    [
      frame_sampling.train_frames(total, case['clip_len'], interval, rng)
      for _ in range(3000)
    ]
  )
  offsets = draws[:, 0]
  assert offsets.min() == case['train_offset_min'][0]
  assert offsets.max() == case['train_offset_max'][0]
  assert len(np.unique(offsets)) == case['train_distinct'][0]
  steps = np.arange(case['clip_len']) * interval
  np.testing.assert_array_equal(draws, (offsets[:, None] + steps) % total)


@pytest.mark.parametrize('total', [13, 14, 8, 5])
def test_clips_start_at_multiples(total):
  rng = np.random.default_rng(0)
  clips = [frame_sampling.train_frames(total, 4, 2, rng, 2) for _ in range(300)]
  # 8 frames are needed; shorter videos are looped from their first frame.
  assert {clip[0] for clip in clips} == set(range(0, max(total - 7, 1), 2))
  for clip in clips:
    np.testing.assert_array_equal(clip, (clip[0] + np.arange(4) * 2) % total)


def test_offset_of_one_train_clip_is_uniform():
  rng = np.random.default_rng(0)
  draws = [frame_sampling.train_frames(13, 4, 2, rng)[0] for _ in range(3000)]
  counts = np.bincount(draws, minlength=6)
  # Six offsets; five standard deviations of a binomial count.
  np.testing.assert_allclose(counts, 500, atol=5 * np.sqrt(500 * 5 / 6))


@pytest.mark.parametrize('case', FIGURES['uniform'], ids=_name)
def test_uniform_eval_frames_match_the_reference(case):
  frames = frame_sampling.uniform_eval_frames(
    case['total_frames'], case['clip_len']
  )
  np.testing.assert_array_equal(frames, [case['test_frames']])


@pytest.mark.parametrize('total', [1, 2, 7, 30, 200])
def test_uniform_train_frames_rise_and_cover_their_segments(
  total,
):
  rng = np.random.default_rng(0)
  draws = np.stack(
    [frame_sampling.uniform_train_frames(total, 8, rng) for _ in range(2000)]
  )
  assert draws.shape == (2000, 8)
  assert (np.diff(draws, axis=1) >= 0).all()
  # Segment i is from round(i s) to round((i + 1) s), s = (total - 1) / 8.
  ends = [round(i * (total - 1) / 8) for i in range(9)]
  np.testing.assert_array_equal(draws.min(0), ends[:-1])
  np.testing.assert_array_equal(draws.max(0), ends[1:])


def test_video_of_one_frame_is_repeated():
  rng = np.random.default_rng(0)
  for frames in (
    frame_sampling.eval_frames(1, 16, 4, 4),
    frame_sampling.train_frames(1, 16, 4, rng),
    frame_sampling.uniform_eval_frames(1, 16),
    frame_sampling.uniform_train_frames(1, 16, rng),
  ):
    assert not frames.any()
