"""Something-Something V2: 174 things done with objects.

  tfds build data/something_something_v2 --manual_dir=VIDEOS --data_dir=OUT

The class of a video is its template, without the brackets around what was
filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import tensorflow_datasets as tfds

import published

_NAMES = ('something-something-v2-{}.json', '{}.json')


class Builder(published.AnnotatedBuilder):
  """Stores the videos of Something-Something V2."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    path = _find(folder, 'labels')
    with published.malformed(path):
      labels = published.read_json(path)
      class_names = published.in_order(
        {name: int(number) for name, number in labels.items()}
      )
    listed = []
    for split in ('train', 'validation'):
      path = _find(folder, split)
      with published.malformed(path):
        for video in published.read_json(path):
          label = video['template'].replace('[', '').replace(']', '')
          label = published.known(label, labels)
          listed.append(published.Listed(str(video['id']), label, split))
    return class_names, listed


def _find(folder: pathlib.Path, what: str) -> pathlib.Path:
  return published.find_one(folder, *(name.format(what) for name in _NAMES))
