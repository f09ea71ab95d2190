"""Multi-Moments in Time: clips of three seconds, each with several verbs."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation

_FILES = {'train': 'trainingSet', 'validation': 'validationSet'}


class Builder(annotation.AnnotatedBuilder):
  """Builds Multi-Moments in Time; lists contain the numbers of classes."""

  MULTI_LABEL = True

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with annotation.open_file(folder, 'moments_categories.txt') as path:
      class_names = annotation.sort_classes(dict(annotation.read_csv(path)))
    listing = annotation.Listing(class_names)
    for split, file in _FILES.items():
      names = (f'{file}.csv', f'{file}.txt')
      with annotation.open_file(folder, *names) as path:
        for video, first, *more in annotation.read_csv(path):
          name = annotation.without_extension(video)
          labels = [int(number) for number in (first, *more)]
          listing.add(name, labels, split, in_folder=True)
    return listing
