"""Multi-Moments in Time: three seconds of anything, with all verbs that fit.

  tfds build data/multi_moments_in_time --manual_dir=VIDEOS --data_dir=OUT

A video has one label or several of 313, numbered as moments_categories.txt
says.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import tensorflow_datasets as tfds

import published

_FILES = {'train': 'trainingSet', 'validation': 'validationSet'}


class Builder(published.AnnotatedBuilder):
  """Stores the videos of Multi-Moments in Time, each with all its labels."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}
  MULTI_LABEL = True

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    path = published.find_one(folder, 'moments_categories.txt')
    with published.malformed(path):
      rows = published.read_csv(path)
      class_names = published.in_order({n: int(number) for n, number in rows})
    listed = []
    for split, file in _FILES.items():
      path = published.find_one(folder, f'{file}.csv', f'{file}.txt')
      with published.malformed(path):
        for video, first, *more in published.read_csv(path):
          name = published.without_extension(video)
          labels = tuple(
            published.numbered(number, class_names) for number in (first, *more)
          )
          listed.append(published.Listed(name, labels, split, in_folder=True))
    return class_names, listed
