"""Near copies are found, whatever was done to them; other videos are not."""

from __future__ import annotations

from collections.abc import Callable
import itertools

import cv2
import numpy as np
import pytest

from dualformer_jax.input_pipeline import decoding, near_copies


def scene(number: int, frames: int = 24) -> np.ndarray:
  """Blurred shapes that move: large ones and small ones, as in pictures."""
  rng = np.random.default_rng(number)
  picture = np.zeros((128, 192, 3), np.float32)
  for size, strength in ((4, 60), (12, 40), (40, 20)):
    coarse = rng.normal(0, strength, (size, size * 3 // 2, 3))
    picture += cv2.resize(coarse.astype(np.float32), (192, 128))
  shift = rng.integers(1, 3)
  moved = [np.roll(picture, index * shift, axis=1) for index in range(frames)]
  return (128 + np.stack(moved)).clip(0, 255).astype(np.uint8)


def signature(video: np.ndarray | bytes) -> str:
  seen = near_copies.Signature()
  frames = (
    video if isinstance(video, np.ndarray) else decoding.decode_all(video)
  )
  for frame, passed in zip(frames, seen.watch(frames), strict=True):
    assert passed is frame or np.array_equal(passed, frame)
  return seen.text()


def share_different(a: str, b: str) -> float:
  assert len(a) == len(b) == 256  # 1024 bits
  return (int(a, 16) ^ int(b, 16)).bit_count() / 1024


def smaller(frames: np.ndarray) -> np.ndarray:
  return np.stack([cv2.resize(frame, (80, 54)) for frame in frames])


COPIES: dict[str, Callable[[np.ndarray], np.ndarray | bytes]] = {
  'encoded anew': lambda f: decoding.encode_mp4(f, fps=25, crf=33),
  'smaller': lambda f: decoding.encode_mp4(smaller(f), fps=25, crf=26),
  'darker': lambda f: (f * 0.7 + 10).astype(np.uint8),
  'half the frames': lambda f: decoding.encode_mp4(f[::2], fps=12, crf=23),
  'without the first frame': lambda f: f[1:],
}


@pytest.mark.parametrize('copy', COPIES.values(), ids=COPIES)
def test_a_copy_is_found_among_others(copy):
  originals = [signature(scene(number)) for number in range(30)]
  others = [signature(scene(number)) for number in range(100, 120)]
  copies = [signature(copy(scene(number))) for number in (20, 3)]
  found = near_copies.find(originals, ['', copies[0], *others, copies[1]])
  assert found == [(20, 1), (3, 22)]
  assert near_copies.find(originals, others) == []


def test_what_is_found_is_what_differs_in_few_bits():
  """Random bits, of which copies have some others: all pairs compared."""
  rng = np.random.default_rng(0)
  first = rng.integers(0, 2, (3000, 1024), np.uint8)
  source = rng.choice(3000, 200, replace=False)
  # At most a tenth: of those that differ more, some may be missed.
  noise = rng.random((200, 1024)) < rng.uniform(0, 0.08, (200, 1))
  second = np.concatenate(
    [first[source] ^ noise, rng.integers(0, 2, (300, 1024), np.uint8)]
  )

  def texts(bits: np.ndarray) -> list[str]:
    return [np.packbits(row).tobytes().hex() for row in bits]

  different = (first[:, None, :64] != second[:, :64]).sum(-1)
  for part in range(64, 1024, 64):
    part = slice(part, part + 64)
    different += (first[:, None, part] != second[:, part]).sum(-1)
  expected = np.argwhere(different <= 0.15 * 1024)
  found = near_copies.find(texts(first), texts(second))
  assert sorted(found) == sorted(map(tuple, expected.tolist()))
  assert len(found) == 200


def test_videos_that_show_nothing_are_like_no_other():
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 6, (20, 64, 96, 3), np.uint8)
  assert signature(noise) == ''
  assert near_copies.Signature().text() == ''
  # A quarter is black: the rest tells.
  faded = scene(0)
  faded[:6] = 0
  assert signature(faded)
  assert near_copies.find(['', ''], ['', '']) == []
  assert near_copies.find([signature(faded)], ['']) == []


def test_copies_of_real_clips_are_found_and_nothing_else(clips_dir):
  clips = {}
  for path in sorted(clips_dir.glob('[ku][4c]*')):
    frames = decoding.stream_frames(path)
    clips[path.stem] = np.stack(list(itertools.islice(frames, 80)))
  originals = {name: signature(frames) for name, frames in clips.items()}
  for a, b in itertools.combinations(originals.values(), 2):
    assert share_different(a, b) > 0.3
  names = list(originals)
  for name, frames in clips.items():
    small = [cv2.resize(f, None, fx=0.6, fy=0.6) for f in frames]
    copy = signature(decoding.encode_mp4(small, fps=30, crf=26))
    found = near_copies.find(list(originals.values()), [copy])
    assert [names[place] for place, _ in found] == [name]
