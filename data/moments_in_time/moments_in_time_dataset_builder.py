"""Moments in Time: three seconds of anything that happens, 339 verbs.

  tfds build data/moments_in_time --manual_dir=VIDEOS --data_dir=OUT

Classes are numbered as moments_categories.txt says.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import tensorflow_datasets as tfds

import preparation

_FILES = {'train': 'trainingSet.csv', 'validation': 'validationSet.csv'}


class Builder(preparation.AnnotatedBuilder):
  """Stores the videos of Moments in Time."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[preparation.Listed]]:
    """See the base class."""
    path = preparation.find_one(folder, 'moments_categories.txt')
    with preparation.malformed(path):
      rows = preparation.read_csv(path)
      numbers = {name: int(number) for name, number in rows}
      class_names = preparation.in_order(numbers)
    listed = []
    for split, file in _FILES.items():
      path = preparation.find_one(folder, file)
      with preparation.malformed(path):
        for video, label, *_ in preparation.read_csv(path):
          name = preparation.without_extension(video)
          label = preparation.known(label, numbers)
          listed.append(preparation.Listed(name, label, split, in_folder=True))
    return class_names, listed
