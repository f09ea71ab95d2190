"""Writes small datasets with TFDS: `python -m tests.levels_datasets FOLDER`.

Each frame of the videos of `levels` is of one brightness, which identifies the
video and the frame: see `brightness`. There is also a small `motion`.
"""

from __future__ import annotations

from collections.abc import Iterator
import sys
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data.motion import motion_dataset_builder
from dualformer_jax.input_pipeline import video_writer

CLASSES = ('first', 'second', 'third class')
NUM_VIDEOS = {'train': 11, 'validation': 5}
FRAMES = 12
SIZE = (36, 48)
# Of the dataset `flawed`.
BROKEN = {'train': (3, 4, 8), 'validation': (0, 2)}


def brightness(index: int, frame: int) -> int:
  """What is in a frame of video number `index`."""
  return 20 + 17 * index + frame


def label(index: int) -> int:
  return index % len(CLASSES)


def labels(index: int) -> list[int]:
  """Of the dataset with several labels, or none."""
  return list(range(index % (len(CLASSES) + 1)))


def video(index: int) -> bytes:
  levels = [brightness(index, frame) for frame in range(FRAMES)]
  frames = np.array(levels, np.uint8)[:, None, None, None]
  frames = np.broadcast_to(frames, (FRAMES, *SIZE, 3))
  return video_writer.encode_mp4(frames, fps=25, crf=1)


class Levels(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'video': tfds.features.Tensor(shape=(), dtype=np.object_),
          'label': self._label(),
          'video_id': tfds.features.Text(),
        }
      ),
    )

  def _label(self) -> Any:
    return tfds.features.ClassLabel(names=list(CLASSES))

  def _split_generators(
    self, dl_manager: Any
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    del dl_manager
    return {split: self._generate_examples(split) for split in NUM_VIDEOS}

  def _generate_examples(
    self, split: str
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for index in range(NUM_VIDEOS[split]):
      name = f'{split}/{index}'
      yield name, self._example(split, index) | {'video_id': name}

  def _example(self, split: str, index: int) -> dict[str, Any]:
    del split
    return {'video': video(index), 'label': label(index)}


class LevelsMulti(Levels):
  def _label(self) -> Any:
    return tfds.features.Sequence(super()._label())

  def _example(self, split: str, index: int) -> dict[str, Any]:
    return {'video': video(index), 'label': labels(index)}


class Flawed(Levels):
  def _example(self, split: str, index: int) -> dict[str, Any]:
    example = super()._example(split, index)
    if index in BROKEN[split]:
      example['video'] = example['video'][:500]
    return example


def main() -> None:
  for file_format in ('tfrecord', 'array_record'):
    for builder in (Levels, LevelsMulti, Flawed):
      builder(
        data_dir=f'{sys.argv[1]}/{file_format}', file_format=file_format
      ).download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3)
      )
  motion_dataset_builder.Builder(
    data_dir=f'{sys.argv[1]}/motion'
  ).download_and_prepare(
    download_config=tfds.download.DownloadConfig(max_examples_per_split=48)
  )


if __name__ == '__main__':
  main()
