"""Scores do not depend on batches, and windows are those of their frames."""

from __future__ import annotations

import numpy as np
import pytest

import dualformer_jax
from dualformer_jax import errors, scoring, timeline
from dualformer_jax.input_pipeline import decoding
from dualformer_jax.recognizer import Recognizer
from tests import small_checkpoint

FPS = 10.0
SPAN = 16  # frames of a clip of small_checkpoint


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory):
  return tmp_path_factory.mktemp('scoring')


@pytest.fixture(scope='module', name='recognizer')
def _recognizer(folder) -> Recognizer:
  return dualformer_jax.load(small_checkpoint.save(folder / 'six views'))


@pytest.fixture(scope='module', name='one_view')
def _one_view(folder) -> Recognizer:
  """The same model, with one view of a video: a clip of its middle."""
  checkpoint = small_checkpoint.save(
    folder / 'one view', num_clips=1, num_crops=1
  )
  return dualformer_jax.load(checkpoint)


def noise(count: int, seed: int = 0) -> np.ndarray:
  """Frames whose brightness and colour change."""
  rng = np.random.default_rng(seed)
  colors = rng.integers(0, 256, (count, 1, 1, 3))
  frames = colors + rng.integers(0, 60, (count, 36, 48, 1))
  return (frames // 2 + 60).astype(np.uint8)


@pytest.fixture(scope='module', name='paths')
def _paths(folder) -> list[str]:
  paths = []
  for seed, count in enumerate([40, 5, 17, 30]):
    paths.append(str(folder / f'{seed}.mp4'))
    with open(paths[-1], 'wb') as file:
      decoding.write_mp4(file, noise(count, seed), fps=FPS)
  return paths


def assert_same(found, expected) -> None:
  """Compares two lists of predictions."""
  assert [name for name, _ in found] == [name for name, _ in expected]
  np.testing.assert_allclose(
    [value for _, value in found], [value for _, value in expected], atol=1e-5
  )


# --- Whole videos


@pytest.mark.parametrize('batch_size', [1, 4, 7])
def test_videos_score_as_each_alone_whatever_the_batch(
  recognizer, paths, batch_size
):
  names = [paths[0], 'none.mp4', *paths[1:], 'refused']
  videos = [(name, '') for name in names[:-1]] + [(names[-1], 'because')]
  results = list(
    scoring.score_videos(
      recognizer, videos, batch_size=batch_size, with_tokens=batch_size == 7
    )
  )
  assert [result.name for result in results] == names
  assert [result.error for result in results] == [
    '',
    'cannot be opened: No such file or directory',
    '',
    '',
    '',
    'because',
  ]
  for result in results:
    if result.error:
      assert result.probabilities == result.features == []
      continue
    views = recognizer.views(result.name)
    assert len(result.probabilities) == len(views) == 6
    clips = recognizer.normalize(views)
    logits = recognizer.logits(clips).astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.probabilities, softmax, atol=1e-5)
    features = recognizer.features(clips)
    np.testing.assert_allclose(result.features, features, atol=1e-5)
    found = recognizer.top(np.mean(result.probabilities, axis=0))
    assert_same(found, recognizer.predict(result.name))
    if result.tokens is not None:
      # The middle crop comes last, and has two clips.
      assert result.tokens.shape == (4, 8, 8, 16)
      mean = result.tokens.mean(axis=(0, 1, 2))
      np.testing.assert_allclose(mean, features[5], atol=1e-5)


def test_several_labels_have_probabilities_of_their_own(folder, paths):
  recognizer = dualformer_jax.load(
    small_checkpoint.save(folder / 'multi', multi_label=True)
  )
  (result,) = scoring.score_videos(recognizer, [(paths[0], '')], batch_size=4)
  clips = recognizer.normalize(recognizer.views(paths[0]))
  logits = recognizer.logits(clips).astype(np.float64)
  sigmoid = 1 / (1 + np.exp(-logits))
  np.testing.assert_allclose(result.probabilities, sigmoid, atol=1e-5)
  found = recognizer.top(np.mean(result.probabilities, axis=0))
  assert_same(found, recognizer.predict(paths[0]))


def test_few_videos_are_decoded_ahead(recognizer, monkeypatch):
  decoded = []
  views = recognizer.views(noise(16))

  def decode(name):
    decoded.append(name)
    return views

  monkeypatch.setattr(recognizer, 'views', decode)
  videos = [(str(i), '') for i in range(50)]
  results = scoring.score_videos(
    recognizer, videos, batch_size=6, num_threads=3
  )
  for count, _ in enumerate(results, 1):
    assert len(decoded) <= count + 3
  assert len(decoded) == 50


# --- Windows


def windows_of(recognizer, frames, **options) -> list[timeline.Window]:
  return list(scoring.score_windows(recognizer, frames, FPS, **options))


@pytest.mark.parametrize('batch_size', [1, 4])
@pytest.mark.parametrize(
  ('count', 'stride', 'starts'),
  [
    (48, None, [0, 16, 32]),
    (54, None, [0, 16, 32, 38]),  # the last one ends with the video
    (50, 1.0, [0, 10, 20, 30, 34]),
    (46, 1.0, [0, 10, 20, 30]),
    (60, 3.0, [0, 30]),  # what is left is between two windows
    (61, 3.0, [0, 30, 45]),
    (16, None, [0]),
  ],
)
def test_windows_score_as_their_frames_do(
  one_view, count, stride, starts, batch_size
):
  frames = noise(count)
  found = windows_of(
    one_view, iter(frames), stride=stride, batch_size=batch_size
  )
  assert [window.start for window in found] == [s / FPS for s in starts]
  assert [window.end for window in found] == [(s + SPAN) / FPS for s in starts]
  for window, start in zip(found, starts, strict=True):
    expected = one_view.predict(frames[start : start + SPAN])
    assert_same(window.predictions, expected)


def test_a_long_window_takes_its_frames_evenly(one_view):
  frames = noise(44)
  found = windows_of(one_view, frames, window=2.2, top_k=2)
  assert [window.start for window in found] == [0.0, 2.2]
  # Of 22 frames 8: every 2.75th.
  picked = [0, 2, 5, 8, 11, 13, 16, 19]
  for window, part in zip(found, (frames[:22], frames[22:]), strict=True):
    # Of exactly 16 frames, a clip takes every second.
    expected = one_view.predict(part[picked].repeat(2, axis=0), top_k=2)
    assert_same(window.predictions, expected)


def test_a_short_window_repeats_frames(one_view):
  frames = noise(4)
  (window,) = windows_of(one_view, frames, window=0.4)
  assert (window.start, window.end) == (0.0, 0.4)
  expected = one_view.predict(frames.repeat(4, axis=0))  # 16, every second
  assert_same(window.predictions, expected)


def test_a_video_shorter_than_a_window_is_scored_as_a_whole(one_view):
  frames = noise(5)
  (window,) = windows_of(one_view, frames)
  assert (window.start, window.end) == (0.0, 0.5)
  assert_same(window.predictions, one_view.predict(frames))


def test_evenly_sampling_models_take_their_frames_of_each_window(folder):
  checkpoint = small_checkpoint.save(
    folder / 'uniform', sampling='uniform', num_clips=1, num_crops=1
  )
  recognizer = dualformer_jax.load(checkpoint)
  frames = noise(60)
  found = windows_of(recognizer, frames, window=3.0)
  assert [window.start for window in found] == [0.0, 3.0]
  for window, part in zip(found, (frames[:30], frames[30:]), strict=True):
    assert_same(window.predictions, recognizer.predict(part))


def test_each_frame_is_decoded_once(one_view, paths, monkeypatch):
  converted = []
  rgb = decoding._Reader.rgb

  def count(self, frame):
    converted.append(frame.pts)
    return rgb(self, frame)

  monkeypatch.setattr(decoding._Reader, 'rgb', count)
  frames = decoding.stream_frames(paths[0])
  found = windows_of(one_view, frames, window=1.6, stride=0.2, batch_size=4)
  assert len(found) == 13
  assert len(converted) == len(set(converted)) == 40


@pytest.mark.parametrize('batch_size', [1, 4])
def test_windows_before_damage_are_scored(one_view, batch_size):
  def frames():
    yield from noise(40)
    raise decoding.VideoError('is cut short')

  found = []
  with pytest.raises(errors.UserError, match='is cut short'):
    for window in scoring.score_windows(
      one_view, frames(), FPS, batch_size=batch_size
    ):
      found.append(window.start)
  assert found == [0.0, 1.6]


def test_a_window_that_takes_too_much_memory_is_refused(one_view):
  # 2 GiB are 699,050 frames of 32 x 32 pixels.
  with pytest.raises(errors.UserError, match='choose a shorter --window'):
    windows_of(one_view, noise(2), window=69_905.1)
  assert len(windows_of(one_view, noise(2), window=69_905.0)) == 1


def test_no_frame_gives_no_window(one_view):
  assert windows_of(one_view, iter([])) == []
