"""Which videos are others again: encoded anew, of another size, a little cut.

A video's signature is what four of its frames look like when they are small: in
each, which of 16x16 places is darker than the one to its right (the difference
hash, on a few frames). Copies differ in few of these 1024 bits, other videos in
about half of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import cv2
from jaxtyping import Int64, UInt8, UInt64
import numpy as np
from tqdm import auto as tqdm

from dualformer_jax.input_pipeline import decoding

_FRAMES = 4
_SIDE = 16
_BITS = _FRAMES * _SIDE * _SIDE
# Videos are taken for copies up to this share of different bits. Of real ones,
# re-encoded ones of half the size differ in 3 to 10%, other scenes in 38% and
# more.
_MAX_DIFFERENT = 0.15
# Small frames that span fewer grey levels show nothing: their bits are noise.
_MIN_SPAN = 10
# Copies are looked for among videos that agree in some bits chosen at random,
# again and again: one that differs in 5% is missed once in a million times, in
# 10% once in 60.
_KEYS = 32
_KEY_BITS = 20


class Signature:
  """Takes the signature of a video whose frames pass through."""

  def __init__(self):
    self._small: list[UInt8[np.ndarray, 'side side1']] = []

  def watch(self, frames: Iterable[decoding.Frame]) -> Iterator[decoding.Frame]:
    """The same frames."""
    for frame in frames:
      grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
      size = (_SIDE + 1, _SIDE)
      self._small.append(cv2.resize(grey, size, interpolation=cv2.INTER_AREA))
      yield frame

  def text(self) -> str:
    """In hexadecimal; '' where the frames show next to nothing."""
    total = len(self._small)
    if not total:
      return ''
    picked = [
      self._small[(2 * part + 1) * total // (2 * _FRAMES)]
      for part in range(_FRAMES)
    ]
    if sum(np.ptp(small) < _MIN_SPAN for small in picked) > _FRAMES // 2:
      return ''
    bits = [small[:, 1:] > small[:, :-1] for small in picked]
    return np.packbits(bits).tobytes().hex()


def find(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
  """Those of the second videos that one of the first is a near copy of.

  Takes time in proportion to the number of videos, as long as few look alike:
  seconds for all of Kinetics-400.

  Args:
    first: signatures; '' is like no other.
    second: the same.

  Returns:
    The place in the first and that in the second, by the latter; each of the
    second at most once.
  """
  places = [i for i, text in enumerate(first) if text]
  wanted = [i for i, text in enumerate(second) if text]
  if not places or not wanted:
    return []
  ours = _bits([first[i] for i in places])
  theirs = _bits([second[i] for i in wanted])
  rng = np.random.default_rng(0)
  found: dict[int, int] = {}
  for _ in tqdm.trange(_KEYS, desc='Comparing splits', unit=' keys', delay=3):
    chosen = rng.choice(_BITS, _KEY_BITS, replace=False)
    keys = _keys(ours, chosen)
    order = np.argsort(keys, kind='stable')
    asked = _keys(theirs, chosen)
    starts, ends = (
      np.searchsorted(keys, asked, side, sorter=order)
      for side in ('left', 'right')
    )
    for row in np.flatnonzero(starts < ends).tolist():
      if row in found:
        continue
      alike = order[starts[row] : ends[row]]
      different = np.bitwise_count(ours[alike] ^ theirs[row]).sum(axis=1)
      best = int(different.argmin())
      if different[best] <= _MAX_DIFFERENT * _BITS:
        found[row] = int(alike[best])
  return [(places[found[row]], wanted[row]) for row in sorted(found)]


def _bits(signatures: list[str]) -> UInt64[np.ndarray, 'n words']:
  content = np.frombuffer(bytes.fromhex(''.join(signatures)), np.uint64)
  return content.reshape(len(signatures), -1)


def _keys(
  bits: UInt64[np.ndarray, 'n words'], chosen: Int64[np.ndarray, ' k']
) -> Int64[np.ndarray, ' n']:
  """The chosen bits of each signature, as one number."""
  keys = np.zeros(len(bits), np.int64)
  for number, place in enumerate(chosen.tolist()):
    word, shift = divmod(place, 64)
    bit = bits[:, word] >> np.uint64(shift) & np.uint64(1)
    keys |= bit.astype(np.int64) << number
  return keys
