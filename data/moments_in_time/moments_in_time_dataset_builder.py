"""Moments in Time: three seconds of anything that happens, 339 verbs.

  tfds build data/moments_in_time --manual_dir=VIDEOS --data_dir=OUT

Classes are numbered as moments_categories.txt says.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import tensorflow_datasets as tfds

import published

_FILES = {'train': 'trainingSet.csv', 'validation': 'validationSet.csv'}


class Builder(published.AnnotatedBuilder):
  """Stores the videos of Moments in Time."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    path = published.find_one(folder, 'moments_categories.txt')
    with published.malformed(path):
      rows = published.read_csv(path)
      numbers = {name: int(number) for name, number in rows}
      class_names = published.in_order(numbers)
    listed = []
    for split, file in _FILES.items():
      path = published.find_one(folder, file)
      with published.malformed(path):
        for video, label, *_ in published.read_csv(path):
          name = published.without_extension(video)
          label = published.known(label, numbers)
          listed.append(published.Listed(name, label, split, in_folder=True))
    return class_names, listed
