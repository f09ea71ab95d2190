"""Diving48: 48 kinds of dives, which differ only in motion."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation


class Builder(annotation.AnnotatedBuilder):
  """Builds Diving48 from version 2 of its annotations.

  A class is four words: takeoff, somersaults, twists, position.
  """

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with annotation.open_file(folder, 'Diving48_vocab.json') as path:
      class_names = ['+'.join(words) for words in annotation.read_json(path)]
    listing = annotation.Listing(class_names)
    for split in ('train', 'test'):
      with annotation.open_file(folder, f'Diving48_V2_{split}.json') as path:
        for video in annotation.read_json(path):
          listing.add(video['vid_name'], int(video['label']), split)
    return listing
