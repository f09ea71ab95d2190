"""Near-duplicates are found; other videos are not."""

from collections.abc import Callable
import itertools

import cv2
import numpy as np
import pytest

from dualformer_jax.input_pipeline import video_reader, video_writer
from dualformer_jax.input_pipeline.preparing import near_duplicates
from tests.input_pipeline import videos


def scene(number: int, frames: int = 8) -> np.ndarray:
  """Moving blurred shapes, large and small, as in real images."""
  rng = np.random.default_rng(number)
  image = np.zeros((96, 144, 3), np.float32)
  for size, strength in ((4, 60), (12, 40), (40, 20)):
    coarse = rng.normal(0, strength, (size, size * 3 // 2, 3))
    image += cv2.resize(coarse.astype(np.float32), (144, 96))
  shift = rng.integers(1, 3)
  moved = [np.roll(image, index * shift, axis=1) for index in range(frames)]
  return (128 + np.stack(moved)).clip(0, 255).astype(np.uint8)


def signature(video: np.ndarray | bytes) -> str:
  seen = near_duplicates.Signature()
  if isinstance(video, bytes):
    video = videos.decode_all(video)
  np.testing.assert_array_equal(list(seen.watch(video)), video)
  return seen.text()


def encode(frames: np.ndarray, crf: int) -> bytes:
  return video_writer.encode_mp4(frames, fps=25, crf=crf)


def smaller(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  return np.stack([cv2.resize(frame, size) for frame in frames])


COPIES: dict[str, Callable[[np.ndarray], np.ndarray | bytes]] = {
  're-encoded': lambda f: encode(f, crf=33),
  'smaller': lambda f: encode(smaller(f, (80, 54)), crf=26),
  'darker': lambda f: (f * 0.7 + 10).astype(np.uint8),
  'half the frames': lambda f: encode(f[::2], crf=23),
}


@pytest.fixture(scope='module')
def originals() -> list[str]:
  return [signature(scene(number)) for number in range(20)]


@pytest.mark.parametrize('copy', COPIES.values(), ids=COPIES)
def test_copy_is_found(copy, originals):
  others = [signature(scene(number)) for number in range(100, 105)]
  copies = [signature(copy(scene(number))) for number in (12, 3)]
  found = near_duplicates.find(originals, ['', copies[0], *others, copies[1]])
  assert found == [(12, 1), (3, 7)]
  assert near_duplicates.find(originals, others) == []


def test_all_pairs_with_few_different_bits_are_found():
  rng = np.random.default_rng(0)
  first = rng.integers(0, 2, (500, 1024), np.uint8)
  source = rng.choice(500, 100, replace=False)
  # At most a tenth of the bits differ; beyond that some pairs may be missed.
  noise = rng.random((100, 1024)) < rng.uniform(0, 0.08, (100, 1))
  second = np.concatenate(
    [first[source] ^ noise, rng.integers(0, 2, (100, 1024), np.uint8)]
  )

  def texts(bits: np.ndarray) -> list[str]:
    return [np.packbits(row).tobytes().hex() for row in bits]

  different = np.array([(first != row).sum(axis=1) for row in second]).T
  expected = np.argwhere(different <= 0.15 * 1024)
  found = near_duplicates.find(texts(first), texts(second))
  assert sorted(found) == sorted(map(tuple, expected.tolist()))
  assert len(found) == 100


def test_blank_videos_match_nothing():
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 6, (20, 64, 96, 3), np.uint8)
  assert signature(noise) == ''
  assert near_duplicates.Signature().text() == ''
  fade_in = scene(0)
  fade_in[:2] = 0
  assert signature(fade_in)
  assert near_duplicates.find(['', ''], ['', '']) == []
  assert near_duplicates.find([signature(fade_in)], ['']) == []


@pytest.mark.slow
def test_copies_of_real_clips_are_found(clips_dir):
  clips = {}
  for path in sorted(clips_dir.glob('[ku][4c]*')):
    with video_reader.VideoReader(path) as reader:
      clips[path.stem] = np.stack(list(itertools.islice(reader, 80)))
  originals = {name: signature(frames) for name, frames in clips.items()}
  for a, b in itertools.combinations(originals.values(), 2):
    assert len(a) == len(b) == 256
    assert (int(a, 16) ^ int(b, 16)).bit_count() / 1024 > 0.3
  names = list(originals)
  for name, frames in clips.items():
    height, width = frames.shape[1:3]
    small = smaller(frames, (round(0.6 * width), round(0.6 * height)))
    copy = signature(encode(small, crf=26))
    found = near_duplicates.find(list(originals.values()), [copy])
    assert [names[index] for index, _ in found] == [name]
