"""The annotation files of Something-Something V1 and Jester: alike."""

from __future__ import annotations

import pathlib

import published

FRAME_RATE = 12.0  # Both are published as folders of frames.


def read(
  folder: pathlib.Path, prefix: str
) -> tuple[list[str], list[published.Listed]]:
  """The classes of PREFIX-labels.csv and the videos of the other two files.

  Raises:
    UserError: a file is missing or malformed.
  """
  class_names = published.read_lines(
    published.find_one(folder, f'{prefix}-labels.csv')
  )
  classes = set(class_names)
  listed = []
  for split in ('train', 'validation'):
    path = published.find_one(folder, f'{prefix}-{split}.csv')
    with published.malformed(path):
      for line in published.read_lines(path):
        # Not a CSV reader: quotes in a label are part of it.
        name, _, label = line.partition(';')
        label = published.known(label.strip(), classes)
        listed.append(published.Listed(name, label, split))
  return class_names, listed
