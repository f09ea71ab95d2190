"""Motion: eight classes of small rendered videos that only motion tells apart.

  tfds build data/motion --data_dir=~/tensorflow_datasets

The scene of a clip is drawn from the same distribution whatever its class: a
shape at any place of a torus (it leaves on one side and comes back on the
other), at any angle, of any size. The class only says in which direction the
scene changes. No single frame tells anything of it, and a clip played backwards
is a clip of the opposite class.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import cv2
from jaxtyping import Float, UInt8
import numpy as np
import tensorflow_datasets as tfds

from dualformer_jax.input_pipeline import decoding
import preparation

# Each class stands beside its opposite.
CLASSES = (
  'left',
  'right',
  'up',
  'down',
  'clockwise',
  'counter_clockwise',
  'grow',
  'shrink',
)
NUM_FRAMES = 16
SIZE = 32  # Pixels, both sides.
FPS = 16.0
CRF = 18
NUM_CLIPS = {'train': 4096, 'validation': 512}
SEED = 0

_NOISE = 4.0  # Standard deviation of the noise of each pixel and frame.
_RADIUS = (5.5, 12.5)  # Pixels, the smallest and the largest.
# How much changes from one frame to the next.
_SHIFT = (1.5, 2.5)  # Pixels.
_TURN = (10.0, 18.0)  # Degrees.
_GROWTH = (0.06, 0.10)  # Share of the way from the smallest to the largest.
# Bright shapes of any colour on dark backgrounds of any colour, 0 to 255.
_BRIGHT = (140.0, 245.0)
_DARK = (10.0, 80.0)
_FINE = 4  # Shapes are drawn this much larger, then averaged.

# Outlines, turned by hand so that none looks the same after a turn that a clip
# makes from one frame to the next: even the cross needs 90 degrees for that.
_OUTLINES = {
    'triangle': ((-0.8, -0.6), (0.8, -0.6), (0.0, 1.0)),
    'square': ((-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)),
    'bar': ((-1.0, -0.35), (1.0, -0.35), (1.0, 0.35), (-1.0, 0.35)),
    'cross': (
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ),
    'corner': (
        (-0.8, -0.8), (0.8, -0.8), (0.8, -0.15), (-0.15, -0.15), (-0.15, 0.8),
        (-0.8, 0.8),
    ),
    'arrow': (
        (-1, -0.3), (0.0, -0.3), (0.0, -0.85), (1, 0), (0.0, 0.85), (0.0, 0.3),
        (-1, 0.3),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scene:
  """All of a clip but its class: the same distribution for every class.

  Attributes:
    outline: corners of the shape around its middle, the farthest at 1.
    centre: place of the shape halfway through the clip, (x, y) in pixels.
    angle: of the shape halfway through the clip, in radians.
    size: halfway through the clip, 0 (smallest) to 1 (largest).
    shift: pixels, `turn`: radians, `growth`: share of the way from the smallest
      to the largest: what changes from frame to frame, where the class says so.
    colour: of the shape, RGB.
    background: RGB.
    noise: added to the frames.
  """

  outline: Float[np.ndarray, 'n 2']
  centre: Float[np.ndarray, ' xy']
  angle: float
  size: float
  shift: float
  turn: float
  growth: float
  colour: Float[np.ndarray, ' rgb']
  background: Float[np.ndarray, 'h w 3']
  noise: Float[np.ndarray, 't h w 3']


def draw_scene(rng: np.random.Generator) -> Scene:
  """A scene at random."""
  outline = np.array(list(_OUTLINES.values())[rng.integers(len(_OUTLINES))])
  outline -= outline.mean(axis=0)
  outline /= np.linalg.norm(outline, axis=1).max()
  colour = rng.uniform(*_BRIGHT, size=3)
  behind = rng.uniform(*_DARK, size=3)
  clouds = rng.normal(0.0, 8.0, size=(4, 4, 3))
  return Scene(
    outline=outline,
    centre=rng.uniform(0.0, SIZE, size=2),
    angle=rng.uniform(0.0, 2.0 * np.pi),
    size=rng.uniform(),
    shift=rng.uniform(*_SHIFT),
    turn=np.deg2rad(rng.uniform(*_TURN)),
    growth=rng.uniform(*_GROWTH),
    colour=colour,
    background=behind
    + cv2.resize(clouds, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC),
    noise=np.float32(_NOISE)
    * rng.standard_normal((NUM_FRAMES, SIZE, SIZE, 3), np.float32),
  )


def film(scene: Scene, label: int) -> UInt8[np.ndarray, '16 32 32 3']:
  """The scene, changing as the class says.

  Halfway through, the scene is as described, so that the clips of two opposite
  classes are each other played backwards (but for the noise).
  """
  return np.stack([picture(scene, label, i) for i in range(NUM_FRAMES)])


def picture(
  scene: Scene, label: int, index: int
) -> UInt8[np.ndarray, '32 32 3']:
  """One frame of the film."""
  shape = cover(scene, label, index)[..., None] * (
    scene.colour - scene.background
  )
  frame = np.rint(scene.background + shape + scene.noise[index])
  return frame.clip(0, 255).astype(np.uint8)


def cover(scene: Scene, label: int, index: int) -> Float[np.ndarray, '32 32']:
  """How much of each pixel of a frame the shape covers, 0 to 1."""
  time = index - (NUM_FRAMES - 1) / 2
  (x, y), angle, size = scene.centre, scene.angle, scene.size
  match CLASSES[label]:
    case 'left':
      x -= scene.shift * time
    case 'right':
      x += scene.shift * time
    case 'up':
      y -= scene.shift * time
    case 'down':
      y += scene.shift * time
    case 'clockwise':  # Seen on a screen, where y points down.
      angle += scene.turn * time
    case 'counter_clockwise':
      angle -= scene.turn * time
    case 'grow':
      size += scene.growth * time
    case 'shrink':
      size -= scene.growth * time
  smallest, largest = _RADIUS
  # Grown to the largest it starts again as the smallest, as a shape that leaves
  # comes back on the other side: else large shapes would be those that grew.
  radius = smallest * (largest / smallest) ** (size % 1.0)
  return _cover(scene.outline, (x, y), angle, radius)


def _cover(
  outline: Float[np.ndarray, 'n 2'],
  centre: tuple[float, float],
  angle: float,
  radius: float,
) -> Float[np.ndarray, 'h w']:
  """How much of each pixel the shape covers, 0 to 1."""
  cos, sin = np.cos(angle), np.sin(angle)
  turned = radius * outline @ np.array([[cos, sin], [-sin, cos]])
  # The place and those beside it: what leaves on one side comes back on the
  # other. No shape is so large that two of them would meet.
  around = SIZE * np.array([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
  corners = turned + np.mod(centre, SIZE) + around[:, None]
  bits = 8
  fine = np.zeros((SIZE * _FINE, SIZE * _FINE), np.uint8)
  places = np.rint(corners * (_FINE * 2**bits)).astype(np.int32)
  cv2.fillPoly(fine, list(places), 255, shift=bits)
  cover = cv2.resize(fine, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
  return cover / np.float32(255)


def render(
  label: int, rng: np.random.Generator
) -> UInt8[np.ndarray, '16 32 32 3']:
  """A clip of a class, RGB: the same random numbers, the same scene."""
  return film(draw_scene(rng), label)


class Builder(preparation.ReportingBuilder):
  """Renders the videos and stores them as MP4."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Eight classes, 16 frames of 32x32 pixels.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=preparation.features(CLASSES)
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    del dl_manager  # Nothing to download.
    return {
      split: self.reported(split, self._generate_examples(split))
      for split in NUM_CLIPS
    }

  def _generate_examples(
    self, split: str
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the clips of a split, each with random numbers of its own."""
    make = functools.partial(_example, split)
    for example in preparation.in_threads(make, range(NUM_CLIPS[split])):
      yield example['video_id'], example


def scene_of(split: str, index: int) -> tuple[Scene, int]:
  """Returns the scene of a clip of a split, and the clip's class."""
  rng = np.random.default_rng((SEED, list(NUM_CLIPS).index(split), index))
  return draw_scene(rng), index % len(CLASSES)


def _example(split: str, index: int) -> dict[str, Any]:
  scene, label = scene_of(split, index)
  video = decoding.encode_mp4(film(scene, label), fps=FPS, crf=CRF)
  return {
    'video': video,
    'label': label,
    'video_id': f'{split}/{index:05d}',
  }
