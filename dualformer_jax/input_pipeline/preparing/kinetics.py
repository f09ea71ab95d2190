"""The annotation files of Kinetics-400, 600 and 700."""

from collections.abc import Sequence
import pathlib

from dualformer_jax.input_pipeline.preparing import annotation

# Names of the files of each split, at the publisher and its mirrors.
_SPLITS = {
  'train': ('train',),
  'validation': ('val', 'validate'),
  'test': ('test',),
}
_COLUMNS = ('label', 'youtube_id', 'time_start', 'time_end')


class KineticsBuilder(annotation.AnnotatedBuilder, skip_registration=True):
  """Reads labels.txt next to the builder's source file, and video lists."""

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    return read_lists(folder, self.read_labels())


def read_lists(
  folder: pathlib.Path, class_names: Sequence[str]
) -> annotation.Listing:
  """Reads train.csv, val.csv and, if it has labels, test.csv."""
  by_key = {normalize_label(name): name for name in class_names}
  listing = annotation.Listing(class_names)
  for split, words in _SPLITS.items():
    names = [
      f'{prefix}{word}{extension}'
      for extension in ('.csv', '.txt')
      for prefix in ('', 'kinetics_', f'kinetics-{len(class_names)}_')
      for word in words
    ]
    if split == 'test' and annotation.find_file(folder, *names) is None:
      continue
    with annotation.open_file(folder, *names) as path:
      header = annotation.read_lines(path)[:1]
      if split == 'test' and 'label' not in ''.join(header):
        continue
      for label, youtube_id, *times in annotation.read_table(path, *_COLUMNS):
        start, end = (int(float(time)) for time in times)
        name = f'{youtube_id}_{start:06d}_{end:06d}'
        listing.add(name, by_key.get(normalize_label(label), label), split)
  return listing


def normalize_label(label: str) -> str:
  """Drops underscores, quotes and capitals, in which copies of files differ."""
  return label.replace('_', ' ').replace('"', '').strip().lower()
