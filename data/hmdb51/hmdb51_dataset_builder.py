"""HMDB51: 51 human actions, three splits."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation, builder

_SPLITS = {'1': 'train', '2': 'test'}  # Videos marked 0 are unused.


class Builder(annotation.AnnotatedBuilder):
  """Builds HMDB51; each class has an annotation file per split."""

  CONFIGS = builder.storage_configs('split1', 'split2', 'split3')

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    listing = annotation.Listing(self.read_labels())
    for label in listing.class_names:
      name = f'{label}_test_{self.config.variant}.txt'
      with annotation.open_file(folder, name) as path:
        for line in annotation.read_lines(path):
          file, number = line.rsplit(maxsplit=1)
          if number == '0':
            continue
          name = f'{label}/{annotation.without_extension(file)}'
          listing.add(name, label, _SPLITS[number])
    return listing
