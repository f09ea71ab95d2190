"""OmniSource: 200 classes of Kinetics, with videos of three sources.

  tfds build data/omnisource --manual_dir=VIDEOS --data_dir=OUT

For training, the clips of Kinetics or, with --config=kinetics_raw or
--config=insvideo, the positive clips of its long videos, or videos of
Instagram. For validation always the clips of Kinetics.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import tensorflow_datasets as tfds

import kinetics
import preparation
import published

_RAW = 'slowonly_8x8_kinetics_raw_200'
_TRAIN = {
  'kinetics': ('k200_train.txt',),
  'kinetics_raw': (f'{_RAW}.json', f'{_RAW}.txt'),
  'insvideo': ('slowonly_8x8_insvideo_200_wodup.txt',),
}
_CLIP_SECONDS = 10.0  # What the clips of a long video are counted in.


@dataclasses.dataclass(eq=False)
class SourceConfig(preparation.StorageConfig):
  """How the videos are stored, and where those for training come from."""

  source: str = 'kinetics'


def _configs() -> dict[str, preparation.StorageConfig]:
  configs = preparation.storage_configs(
    SourceConfig, **{source: {'source': source} for source in _TRAIN}
  )
  del configs['kinetics_raw_verbatim']  # A part of a file is no file.
  return configs


class Builder(published.AnnotatedBuilder):
  """Stores the videos of a source for training, of Kinetics for validation."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}
  CONFIGS = _configs()
  BUILDER_CONFIGS = [CONFIGS['kinetics']]

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    config = self.builder_config
    assert isinstance(config, SourceConfig)
    class_names = published.read_lines(
      published.find_one(folder, 'k200_actions.txt')
    )
    listed = []
    for split, names in {
      'train': _TRAIN[config.source],
      'validation': ('k200_val.txt',),
    }.items():
      path = published.find_one(folder, *names)
      with published.malformed(path):
        listed += _read_list(path, folder, class_names, split)
    return class_names, listed


def _read_list(
  path: pathlib.Path,
  folder: pathlib.Path,
  class_names: Sequence[str],
  split: str,
) -> list[published.Listed]:
  """The videos of a list, and the positive clips of the long ones."""
  # Long videos are published whole; many cut them as VIDEO/part_0.mp4, ...
  are_cut = any(folder.rglob('part_*.mp4'))
  of_kinetics: dict[str, str] | None = None
  listed = []
  for file, number, clips in _read_rows(path):
    name = published.without_extension(file)
    if number is None:
      of_kinetics = of_kinetics or _labels_of_kinetics(folder, class_names)
      label = of_kinetics[published.known(name.split('/')[-1], of_kinetics)]
    else:
      label = published.numbered(number, class_names)
    if clips is None:
      listed.append(published.Listed(name, label, split, in_folder=True))
    for clip in map(int, clips or ()):
      part = f'{name}/part_{clip}'
      times = (clip * _CLIP_SECONDS, (clip + 1) * _CLIP_SECONDS)
      listed.append(
        published.Listed(part, label, split, in_folder=True)
        if are_cut
        else published.Listed(name, label, split, times, part, in_folder=True)
      )
  return listed


def _read_rows(path: pathlib.Path) -> list[tuple[str, Any, Any]]:
  """A file or folder, the number of its class and those of its clips.

  In text, `000/abseil/B00arxogubl.mp4 0` is a video and
  `pref_D/D32_1gwq35E 66 10 0 1 2` one with clips: of 10, the first three. There
  are copies that name files and no more.
  """
  if path.suffix == '.json':
    return [
      (video['video_dir'], video['label'], video['positive_clip_inds'])
      for video in published.read_json(path)
    ]
  rows = []
  for line in published.read_lines(path):
    file, *numbers = line.split()
    clips = numbers[2:] if len(numbers) > 1 else None
    rows.append((file, numbers[0] if numbers else None, clips))
  return rows


def _labels_of_kinetics(
  folder: pathlib.Path, class_names: Sequence[str]
) -> dict[str, str]:
  """The class of each video of Kinetics-400 that is one of these classes."""
  labels = pathlib.Path(__file__).parents[1] / 'kinetics400' / 'labels.txt'
  by_key = {kinetics.key(name): name for name in class_names}
  return {
    video.name.rsplit('_', 2)[0]: by_key[key]
    for video in kinetics.read(folder, published.read_lines(labels))
    if (key := kinetics.key(video.labels[0])) in by_key
  }
