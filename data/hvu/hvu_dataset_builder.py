"""HVU: videos of YouTube with tags of all that is to be seen in them.

  tfds build data/hvu --manual_dir=VIDEOS --data_dir=OUT

3,142 tags in six categories. With --config=action and its like a video has the
tags of one category, and those without any are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib

import tensorflow_datasets as tfds

import preparation
import published

_CATEGORIES = ('action', 'attribute', 'concept', 'event', 'object', 'scene')
_TAGS = ('HVU_Tags_Categories_V1.0.csv', 'hvu_categories.csv')
_FILES = {
  'train': ('HVU_Train_V1.0.csv', 'hvu_train.csv'),
  'validation': ('HVU_Val_V1.0.csv', 'hvu_val.csv'),
}


@dataclasses.dataclass(eq=False)
class HvuConfig(preparation.StorageConfig):
  """How the videos are stored, and which tags they have.

  Attributes:
    category: of the tags; '' for all.
  """

  category: str = ''


class Builder(published.AnnotatedBuilder):
  """Stores the videos of HVU, each with all its tags."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}
  MULTI_LABEL = True
  CONFIGS = preparation.storage_configs(
    HvuConfig,
    all={'category': ''},
    **{name: {'category': name} for name in _CATEGORIES},
  )
  BUILDER_CONFIGS = [CONFIGS['all']]

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    config = self.builder_config
    assert isinstance(config, HvuConfig)
    path = published.find_one(folder, *_TAGS)
    categories = dict(published.read_table(path, 'Tag', 'Category'))
    with published.malformed(path):
      chosen = (config.category,) if config.category else _CATEGORIES
      class_names = [
        tag
        for category in chosen
        for tag in sorted(t for t, c in categories.items() if c == category)
      ]
      if not class_names:
        raise ValueError(f'has no tags of the category {config.category!r}')
    wanted = set(class_names)
    listed = []
    for split, names in _FILES.items():
      path = published.find_one(folder, *names)
      rows = published.read_table(
        path, 'Tags', 'youtube_id', 'time_start', 'time_end'
      )
      with published.malformed(path):
        for tags, youtube_id, start, end in rows:
          labels = tuple(
            tag
            for tag in dict.fromkeys(tags.split('|'))
            if published.known(tag, categories) in wanted
          )
          # Tenths of a second, cut off as the publisher's downloader does.
          times = (int(float(seconds) * 10) for seconds in (start, end))
          name = '_'.join([youtube_id, *(f'{time:06d}' for time in times)])
          if labels:
            listed.append(published.Listed(name, labels, split))
    return class_names, listed
