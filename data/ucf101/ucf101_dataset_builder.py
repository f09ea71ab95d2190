"""UCF101: 101 human actions, three splits."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation, builder


class Builder(annotation.AnnotatedBuilder):
  """Builds UCF101; classInd.txt numbers the classes, from 1."""

  CONFIGS = builder.storage_configs('split1', 'split2', 'split3')

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with annotation.open_file(folder, 'classInd.txt') as path:
      lines = (line.split() for line in annotation.read_lines(path))
      numbers = {name: number for number, name in lines}
      class_names = annotation.sort_classes(numbers, first=1)
    listing = annotation.Listing(class_names)
    for split in ('train', 'test'):
      name = f'{split}list0{self.config.variant[-1]}.txt'
      with annotation.open_file(folder, name) as path:
        for line in annotation.read_lines(path):
          file, *_ = line.split()  # The training lists add a class number.
          label = pathlib.PurePath(file).parent.name
          listing.add(annotation.without_extension(file), label, split)
    return listing
