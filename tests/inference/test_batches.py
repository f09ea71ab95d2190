"""Scores do not depend on batches; windows score as their frames do."""

from __future__ import annotations

import numpy as np
import pytest

import dualformer_jax
from dualformer_jax import errors
from dualformer_jax.inference import batches, timeline
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.inference.sources import Source
from dualformer_jax.input_pipeline import video_reader, video_writer
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
  """The same model with one view of a video: the clip in the middle."""
  checkpoint = small_checkpoint.save(
    folder / 'one view', num_clips=1, num_crops=1
  )
  return dualformer_jax.load(checkpoint)


def noise(count: int, seed: int = 0) -> np.ndarray:
  """Frames whose brightness and color change."""
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
      video_writer.write_mp4(file, noise(count, seed), fps=FPS)
  return paths


def assert_same(found, expected) -> None:
  """Compares two lists of predictions."""
  assert [name for name, _ in found] == [name for name, _ in expected]
  np.testing.assert_allclose(
    [value for _, value in found], [value for _, value in expected], atol=1e-5
  )


# --- Whole videos


@pytest.mark.parametrize('batch_size', [1, 4, 7])
def test_scores_do_not_depend_on_the_batch(recognizer, paths, batch_size):
  names = [paths[0], 'none.mp4', *paths[1:], 'refused']
  videos = [*map(Source, names[:-1]), Source(names[-1], 'because')]
  results = list(
    batches.score_videos(
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


def test_multi_label_probabilities_are_sigmoids(folder, paths):
  recognizer = dualformer_jax.load(
    small_checkpoint.save(folder / 'multi', multi_label=True)
  )
  (result,) = batches.score_videos(recognizer, [Source(paths[0])], batch_size=4)
  clips = recognizer.normalize(recognizer.views(paths[0]))
  logits = recognizer.logits(clips).astype(np.float64)
  sigmoid = 1 / (1 + np.exp(-logits))
  np.testing.assert_allclose(result.probabilities, sigmoid, atol=1e-5)
  found = recognizer.top(np.mean(result.probabilities, axis=0))
  assert_same(found, recognizer.predict(paths[0]))


def test_number_of_videos_decoded_ahead_is_limited(recognizer, monkeypatch):
  decoded = []
  views = recognizer.views(noise(16))

  def decode(name):
    decoded.append(name)
    return views

  monkeypatch.setattr(recognizer, 'views', decode)
  videos = [Source(str(i)) for i in range(50)]
  results = batches.score_videos(
    recognizer, videos, batch_size=6, num_threads=3
  )
  for count, _ in enumerate(results, 1):
    assert len(decoded) <= count + 3
  assert len(decoded) == 50


# --- Windows


def windows_of(recognizer, frames, **options) -> list[timeline.Window]:
  timed = ((index / FPS, frame) for index, frame in enumerate(frames))
  return list(batches.score_windows(recognizer, timed, FPS, **options))


@pytest.mark.parametrize('batch_size', [1, 4])
@pytest.mark.parametrize(
  ('count', 'stride', 'starts'),
  [
    (48, None, [0, 16, 32]),
    (54, None, [0, 16, 32, 38]),  # the last window ends with the video
    (50, 1.0, [0, 10, 20, 30, 34]),
    (46, 1.0, [0, 10, 20, 30]),
    (60, 3.0, [0, 30]),  # the rest is before the next window
    (61, 3.0, [0, 30, 45]),
    (16, None, [0]),
  ],
)
def test_windows_score_as_their_frames(
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


def test_frames_are_evenly_spaced_over_a_long_window(one_view):
  frames = noise(44)
  found = windows_of(one_view, frames, window=2.2, top_k=2)
  assert [window.start for window in found] == [0.0, 2.2]
  # 8 of 22 frames: every 2.75th.
  picked = [0, 2, 5, 8, 11, 13, 16, 19]
  for window, part in zip(found, (frames[:22], frames[22:]), strict=True):
    # A clip takes every second of these 16 frames.
    expected = one_view.predict(part[picked].repeat(2, axis=0), top_k=2)
    assert_same(window.predictions, expected)


def test_frames_of_a_short_window_are_repeated(one_view):
  frames = noise(4)
  (window,) = windows_of(one_view, frames, window=0.4)
  assert (window.start, window.end) == (0.0, 0.4)
  expected = one_view.predict(frames.repeat(4, axis=0))  # 16, every second
  assert_same(window.predictions, expected)


def test_video_shorter_than_a_window_is_one_window(one_view):
  frames = noise(5)
  (window,) = windows_of(one_view, frames)
  assert (window.start, window.end) == (0.0, 0.5)
  assert_same(window.predictions, one_view.predict(frames))


def test_windows_of_a_model_with_uniform_sampling(folder):
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
  to_rgb = video_reader.VideoReader._to_rgb

  def count(self, frame, size):
    converted.append(frame.pts)
    return to_rgb(self, frame, size)

  monkeypatch.setattr(video_reader.VideoReader, '_to_rgb', count)
  with video_reader.VideoReader(paths[0]) as reader:
    found = windows_of(one_view, reader, window=1.6, stride=0.2, batch_size=4)
  assert len(found) == 13
  assert len(converted) == len(set(converted)) == 40


@pytest.mark.parametrize('batch_size', [1, 4])
def test_windows_before_a_decoding_error_are_scored(one_view, batch_size):
  def frames():
    yield from noise(40)
    raise video_reader.VideoError('is cut short')

  found = []
  with pytest.raises(errors.UserError, match='is cut short'):
    for window in batches.score_windows(
      one_view, enumerate(frames()), 1.0, batch_size=batch_size
    ):
      found.append(window.start)
  assert found == [0.0, 16.0]


def test_window_that_takes_too_much_memory_raises(one_view):
  # 2 GiB are 699,050 frames of 32 x 32 pixels.
  with pytest.raises(errors.UserError, match='choose a shorter --window'):
    windows_of(one_view, noise(2), window=69_905.1)
  assert len(windows_of(one_view, noise(2), window=69_905.0)) == 1


def test_no_frames_give_no_windows(one_view):
  assert windows_of(one_view, iter([])) == []
