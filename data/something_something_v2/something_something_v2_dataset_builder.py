"""Something-Something V2: 174 actions with objects."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation


class Builder(annotation.AnnotatedBuilder):
  """Builds Something-Something V2."""

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with _open_file(folder, 'labels') as path:
      class_names = annotation.sort_classes(dict(annotation.read_json(path)))
    listing = annotation.Listing(class_names)
    for split in ('train', 'validation'):
      with _open_file(folder, split) as path:
        for video in annotation.read_json(path):
          # The class is the template without brackets around placeholders.
          label = video['template'].replace('[', '').replace(']', '')
          listing.add(str(video['id']), label, split)
    return listing


def _open_file(folder: pathlib.Path, word: str):
  names = (f'something-something-v2-{word}.json', f'{word}.json')
  return annotation.open_file(folder, *names)
