"""What the annotation files of Kinetics-400, 600 and 700 say."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

from dualformer_jax import errors
import published

# What the publisher and its mirrors call the files of a split.
_SPLITS = {
  'train': ('train',),
  'validation': ('val', 'validate'),
  'test': ('test',),
}


def read(
  folder: pathlib.Path, class_names: Sequence[str]
) -> list[published.Listed]:
  """The videos that train.csv, val.csv and, if it has labels, test.csv list.

  Args:
    folder: where they are, or below.
    class_names: all there are.

  Raises:
    UserError: a file is missing or malformed.
  """
  by_key = {key(name): name for name in class_names}
  listed = []
  for split, words in _SPLITS.items():
    names = [
      f'{prefix}{word}{extension}'
      for extension in ('.csv', '.txt')
      for prefix in ('', 'kinetics_', f'kinetics-{len(class_names)}_')
      for word in words
    ]
    try:
      path = published.find_one(folder, *names)
    except errors.UserError:
      if split == 'test':
        continue
      raise
    if split == 'test' and 'label' not in ''.join(
      published.read_lines(path)[:1]
    ):
      continue
    rows = published.read_table(
      path, 'label', 'youtube_id', 'time_start', 'time_end'
    )
    with published.malformed(path):
      for label, youtube_id, start, end in rows:
        name = f'{youtube_id}_{int(float(start)):06d}_{int(float(end)):06d}'
        label = by_key[published.known(key(label), by_key)]
        listed.append(published.Listed(name, label, split))
  return listed


def key(label: str) -> str:
  """What a label has in common wherever it is written.

  Copies of the files differ in blanks, which may be underscores, in quotes and
  in capitals.
  """
  return label.replace('_', ' ').replace('"', '').strip().lower()
