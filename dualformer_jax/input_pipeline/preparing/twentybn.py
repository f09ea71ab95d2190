"""The annotation files of Something-Something V1 and Jester, by TwentyBN."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation


class TwentyBnBuilder(annotation.AnnotatedBuilder, skip_registration=True):
  """Reads PREFIX-labels.csv, PREFIX-train.csv and PREFIX-validation.csv."""

  FRAME_RATE = 12.0
  PREFIX = ''

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with annotation.open_file(folder, f'{self.PREFIX}-labels.csv') as path:
      listing = annotation.Listing(annotation.read_lines(path))
    for split in ('train', 'validation'):
      with annotation.open_file(folder, f'{self.PREFIX}-{split}.csv') as path:
        for line in annotation.read_lines(path):
          # Not csv.reader: quotes are part of a label.
          name, _, label = line.partition(';')
          listing.add(name, label.strip(), split)
    return listing
