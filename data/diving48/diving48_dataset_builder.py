"""Diving48: 48 kinds of dives, which differ in the course of motion alone.

  tfds build data/diving48 --manual_dir=VIDEOS --data_dir=OUT

A class is four words of the vocabulary: takeoff, somersaults, twists, position.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import tensorflow_datasets as tfds

import published


class Builder(published.AnnotatedBuilder):
  """Stores the videos of Diving48, as of version 2 of its annotations."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    path = published.find_one(folder, 'Diving48_vocab.json')
    with published.malformed(path):
      class_names = ['+'.join(words) for words in published.read_json(path)]
    listed = []
    for split in ('train', 'test'):
      path = published.find_one(folder, f'Diving48_V2_{split}.json')
      with published.malformed(path):
        for video in published.read_json(path):
          label = published.numbered(video['label'], class_names)
          listed.append(published.Listed(video['vid_name'], label, split))
    return class_names, listed
