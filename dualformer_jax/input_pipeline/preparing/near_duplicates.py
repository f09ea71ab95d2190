"""Finds videos that are re-encoded, resized or slightly cut copies of others.

The signature of a video is a difference hash of four of its frames: each frame
is reduced to 17x16 gray pixels, and each of 1024 bits states whether a pixel is
darker than its right neighbor. Copies differ in few bits, other videos in about
half of them.
"""

from collections.abc import Iterable, Iterator, Sequence

import cv2
from jaxtyping import Int64, UInt8, UInt64
import numpy as np

from dualformer_jax import progress
from dualformer_jax.input_pipeline import video_reader

_FRAMES = 4
_SIDE = 16
_BITS = _FRAMES * _SIDE * _SIDE
# Copies differ in at most this share of bits. Of real videos, re-encoded ones
# of half the size differ in 3 to 10%, other scenes in 38% or more.
_MAX_DIFFERENT = 0.15
# A reduced frame with a smaller range of gray levels is blank; its bits are
# noise.
_MIN_RANGE = 10
# Candidates are videos that agree in 20 random bits, in one of 32 draws. A copy
# that differs in 5% of its bits is missed once in a million times, one that
# differs in 10% once in 60.
_DRAWS = 32
_KEY_BITS = 20


class Signature:
  """Computes the signature of a video while its frames are being read."""

  def __init__(self):
    self._reduced: list[UInt8[np.ndarray, 'side side1']] = []

  def watch(
    self, frames: Iterable[video_reader.Frame]
  ) -> Iterator[video_reader.Frame]:
    """Yields the frames unchanged."""
    for frame in frames:
      gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
      size = (_SIDE + 1, _SIDE)
      self._reduced.append(cv2.resize(gray, size, interpolation=cv2.INTER_AREA))
      yield frame

  def text(self) -> str:
    """Returns the signature in hexadecimal; '' if most frames are blank."""
    if not self._reduced:
      return ''
    middles = (2 * np.arange(_FRAMES) + 1) * len(self._reduced) // (2 * _FRAMES)
    picked = [self._reduced[index] for index in middles]
    if sum(np.ptp(frame) < _MIN_RANGE for frame in picked) > _FRAMES // 2:
      return ''
    bits = [frame[:, 1:] > frame[:, :-1] for frame in picked]
    return np.packbits(bits).tobytes().hex()


def find(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
  """Returns pairs of indices of near-duplicates; each of `second` occurs once.

  A signature of '' matches nothing. The time grows linearly with the number of
  videos as long as few are alike: seconds for all of Kinetics-400.
  """
  first_indices = [i for i, text in enumerate(first) if text]
  second_indices = [i for i, text in enumerate(second) if text]
  if not first_indices or not second_indices:
    return []
  first_bits = _unpack([first[i] for i in first_indices])
  second_bits = _unpack([second[i] for i in second_indices])
  rng = np.random.default_rng(0)
  found: dict[int, int] = {}
  for _ in progress.track(range(_DRAWS), 'Comparing splits', _DRAWS, 'draws'):
    chosen = rng.choice(_BITS, _KEY_BITS, replace=False)
    first_keys = _keys(first_bits, chosen)
    second_keys = _keys(second_bits, chosen)
    order = np.argsort(first_keys, kind='stable')
    starts, ends = (
      np.searchsorted(first_keys, second_keys, side, sorter=order)
      for side in ('left', 'right')
    )
    for row in set(np.flatnonzero(starts < ends).tolist()).difference(found):
      candidates = order[starts[row] : ends[row]]
      difference = first_bits[candidates] ^ second_bits[row]
      different = np.bitwise_count(difference).sum(axis=1)
      best = int(different.argmin())
      if different[best] <= _MAX_DIFFERENT * _BITS:
        found[row] = int(candidates[best])
  return [(first_indices[found[i]], second_indices[i]) for i in sorted(found)]


def _unpack(signatures: list[str]) -> UInt64[np.ndarray, 'n words']:
  content = np.frombuffer(bytes.fromhex(''.join(signatures)), np.uint64)
  return content.reshape(len(signatures), -1)


def _keys(
  bits: UInt64[np.ndarray, 'n words'], chosen: Int64[np.ndarray, ' k']
) -> Int64[np.ndarray, ' n']:
  """Returns the chosen bits of each signature as one number."""
  words = bits[:, chosen // 64] >> (chosen % 64).astype(np.uint64)
  return (words & np.uint64(1)).astype(np.int64) @ (1 << np.arange(_KEY_BITS))
