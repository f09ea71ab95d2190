"""Jester: 27 gestures in front of a webcam.

  tfds build data/jester --manual_dir=VIDEOS --data_dir=OUT

Published as folders of frames, 12 a second.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import tensorflow_datasets as tfds

import published
import twentybn


class Builder(published.AnnotatedBuilder):
  """Stores the videos of Jester."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}
  FRAME_RATE = twentybn.FRAME_RATE

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    return twentybn.read(folder, 'jester-v1')
