"""HMDB51: 51 human actions, three splits.

  tfds build data/hmdb51 --manual_dir=VIDEOS --data_dir=OUT --config=split1

A class has a file for each split; classes are numbered by their sorted names.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib

import tensorflow_datasets as tfds

import preparation
import published

_SPLITS = {'1': 'train', '2': 'test'}  # Videos with a 0 are in neither.


@dataclasses.dataclass(eq=False)
class SplitConfig(preparation.StorageConfig):
  """How the videos are stored, and which of the three splits it is."""

  split: int = 1


class Builder(published.AnnotatedBuilder):
  """Stores the videos of HMDB51, split as one of the three sets says."""

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
    class_names = published.read_labels(__file__)
    listed = []
    for label in class_names:
      path = published.find_one(folder, f'{label}_test_split{config.split}.txt')
      with published.malformed(path):
        for line in published.read_lines(path):
          file, number = line.rsplit(maxsplit=1)
          if number != '0':
            name = f'{label}/{published.without_extension(file)}'
            listed.append(published.Listed(name, label, _SPLITS[number]))
    return class_names, listed
