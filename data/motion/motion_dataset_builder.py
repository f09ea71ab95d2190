"""Motion: small rendered videos of eight classes that differ only in motion.

A clip shows a shape on a torus. The distribution of the scene (shape, position,
angle, size) is the same for every class, so a single frame contains no
information about it. A clip played backwards is of the opposite class.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
import dataclasses
from typing import Any

import cv2
from jaxtyping import Float, UInt8
import numpy as np
import tensorflow_datasets as tfds

from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.preparing import builder

# Each class next to its opposite.
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

_NOISE = 4.0  # Standard deviation, per pixel and frame.
_RADIUS = (5.5, 12.5)  # Pixels, the smallest and the largest.
# Ranges of the change per frame.
_SHIFT = (1.5, 2.5)  # Pixels.
_TURN = (10.0, 18.0)  # Degrees.
_GROWTH = (0.06, 0.10)  # Share of the range from the smallest to the largest.
# Bright shapes on dark backgrounds, both of any color, 0 to 255.
_BRIGHT = (140.0, 245.0)
_DARK = (10.0, 80.0)
_SUPERSAMPLING = 4  # Shapes are drawn this much larger, then averaged.

# Outlines that do not look the same after the rotation of one frame: even the
# cross needs 90 degrees.
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
  """All of a clip except its class, in pixels and radians.

  Center, angle and size (0 to 1) are those halfway through the clip; shift,
  turn and growth are their changes per frame.
  """

  outline: Float[np.ndarray, 'n 2']
  center: Float[np.ndarray, ' xy']
  angle: float
  size: float
  shift: float
  turn: float
  growth: float
  color: Float[np.ndarray, ' rgb']
  background: Float[np.ndarray, 'h w 3']
  noise: Float[np.ndarray, 't h w 3']


def draw_scene(rng: np.random.Generator) -> Scene:
  """Returns a random scene."""
  outline = np.array(list(_OUTLINES.values())[rng.integers(len(_OUTLINES))])
  outline -= outline.mean(axis=0)
  outline /= np.linalg.norm(outline, axis=1).max()
  color = rng.uniform(*_BRIGHT, size=3)
  behind = rng.uniform(*_DARK, size=3)
  clouds = rng.normal(0.0, 8.0, size=(4, 4, 3))
  return Scene(
    outline=outline,
    center=rng.uniform(0.0, SIZE, size=2),
    angle=rng.uniform(0.0, 2.0 * np.pi),
    size=rng.uniform(),
    shift=rng.uniform(*_SHIFT),
    turn=np.deg2rad(rng.uniform(*_TURN)),
    growth=rng.uniform(*_GROWTH),
    color=color,
    background=behind
    + cv2.resize(clouds, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC),
    noise=np.float32(_NOISE)
    * rng.standard_normal((NUM_FRAMES, SIZE, SIZE, 3), np.float32),
  )


def film(scene: Scene, label: int) -> UInt8[np.ndarray, '16 32 32 3']:
  """Renders a clip of a class, RGB; reversed, it is of the opposite class."""
  return np.stack([picture(scene, label, i) for i in range(NUM_FRAMES)])


def picture(
  scene: Scene, label: int, index: int
) -> UInt8[np.ndarray, '32 32 3']:
  """Renders one frame of a clip, RGB."""
  shape = cover(scene, label, index)[..., None] * (
    scene.color - scene.background
  )
  frame = np.rint(scene.background + shape + scene.noise[index])
  return frame.clip(0, 255).astype(np.uint8)


def cover(scene: Scene, label: int, index: int) -> Float[np.ndarray, '32 32']:
  """Returns the share of each pixel of a frame that the shape covers."""
  time = index - (NUM_FRAMES - 1) / 2
  (x, y), angle, size = scene.center, scene.angle, scene.size
  match CLASSES[label]:
    case 'left':
      x -= scene.shift * time
    case 'right':
      x += scene.shift * time
    case 'up':
      y -= scene.shift * time
    case 'down':
      y += scene.shift * time
    case 'clockwise':  # On a screen, where y points down.
      angle += scene.turn * time
    case 'counter_clockwise':
      angle -= scene.turn * time
    case 'grow':
      size += scene.growth * time
    case 'shrink':
      size -= scene.growth * time
  smallest, largest = _RADIUS
  # After the largest size comes the smallest; otherwise large shapes would be
  # those that grew.
  radius = smallest * (largest / smallest) ** (size % 1.0)
  cos, sin = np.cos(angle), np.sin(angle)
  turned = radius * scene.outline @ np.array([[cos, sin], [-sin, cos]])
  # Nine copies, so that a shape that leaves on one side returns on the other.
  # No shape is large enough to overlap with its copies.
  around = SIZE * np.array([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
  corners = turned + np.mod((x, y), SIZE) + around[:, None]
  bits = 8  # Of the fraction of fillPoly's coordinates.
  fine = np.zeros((SIZE * _SUPERSAMPLING, SIZE * _SUPERSAMPLING), np.uint8)
  points = np.rint(corners * (_SUPERSAMPLING * 2**bits)).astype(np.int32)
  cv2.fillPoly(fine, list(points), 255, shift=bits)
  cover = cv2.resize(fine, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
  return cover / np.float32(255)


class Builder(builder.VideoDatasetBuilder):
  """Renders the videos and stores them as MP4."""

  CLASS_NAMES = CLASSES

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    del dl_manager  # Nothing to download.
    splits = {split: _render_split(split) for split in NUM_CLIPS}
    return {s: self.report_examples(s, clips) for s, clips in splits.items()}


def scene_of(split: str, index: int) -> tuple[Scene, int]:
  """Returns the scene and the class of a clip."""
  rng = np.random.default_rng((SEED, list(NUM_CLIPS).index(split), index))
  return draw_scene(rng), index % len(CLASSES)


def _render_split(split: str) -> Iterator[dict[str, Any]]:
  def render(index: int) -> dict[str, Any]:
    scene, label = scene_of(split, index)
    video = video_writer.encode_mp4(film(scene, label), fps=FPS, crf=CRF)
    return {
      'video': video,
      'label': label,
      'video_id': f'{split}/{index:05d}',
    }

  with futures.ThreadPoolExecutor() as threads:
    yield from threads.map(render, range(NUM_CLIPS[split]))
