"""Kinetics-700: ten seconds of YouTube videos, 700 human actions.

  tfds build data/kinetics700 --manual_dir=VIDEOS --data_dir=OUT

A class is numbered by its place in labels.txt, a file named by the video on
YouTube and the seconds taken of it.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import tensorflow_datasets as tfds

import kinetics
import published


class Builder(published.AnnotatedBuilder):
  """Stores the videos of Kinetics-700."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    class_names = published.read_labels(__file__)
    return class_names, kinetics.read(folder, class_names)
