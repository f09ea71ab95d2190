"""Moments in Time: clips of three seconds, 339 verbs."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation

_FILES = {'train': 'trainingSet.csv', 'validation': 'validationSet.csv'}


class Builder(annotation.AnnotatedBuilder):
  """Builds Moments in Time."""

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with annotation.open_file(folder, 'moments_categories.txt') as path:
      class_names = annotation.sort_classes(dict(annotation.read_csv(path)))
    listing = annotation.Listing(class_names)
    for split, file in _FILES.items():
      with annotation.open_file(folder, file) as path:
        for video, label, *_ in annotation.read_csv(path):
          name = annotation.without_extension(video)
          listing.add(name, label, split, in_folder=True)
    return listing
