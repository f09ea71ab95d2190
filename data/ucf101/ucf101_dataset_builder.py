"""UCF101: 101 human actions, three splits.

  tfds build data/ucf101 --manual_dir=VIDEOS --data_dir=OUT --config=split1

Classes are numbered as classInd.txt says, from 0 instead of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib

import tensorflow_datasets as tfds

import preparation
import published


@dataclasses.dataclass(eq=False)
class SplitConfig(preparation.StorageConfig):
  """How the videos are stored, and which of the three splits it is."""

  split: int = 1


class Builder(published.AnnotatedBuilder):
  """Stores the videos of UCF101, split as one of the three lists says."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}
  CONFIGS = preparation.storage_configs(
    SplitConfig, split1={'split': 1}, split2={'split': 2}, split3={'split': 3}
  )
  BUILDER_CONFIGS = [CONFIGS['split1']]

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    config = self.builder_config
    assert isinstance(config, SplitConfig)
    path = published.find_one(folder, 'classInd.txt')
    with published.malformed(path):
      lines = [line.split() for line in published.read_lines(path)]
      numbers = {name: int(number) for number, name in lines}
      class_names = published.in_order(numbers, first=1)
    listed = []
    for split in ('train', 'test'):
      path = published.find_one(folder, f'{split}list{config.split:02d}.txt')
      with published.malformed(path):
        for line in published.read_lines(path):
          file, *_ = line.split()  # In the training lists a number follows.
          label = published.known(pathlib.PurePath(file).parent.name, numbers)
          name = published.without_extension(file)
          listed.append(published.Listed(name, label, split))
    return class_names, listed
