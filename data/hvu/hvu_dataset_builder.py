"""HVU: videos from YouTube with 3,142 tags in six categories."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation, builder

_CATEGORIES = ('action', 'attribute', 'concept', 'event', 'object', 'scene')
_TAGS = ('HVU_Tags_Categories_V1.0.csv', 'hvu_categories.csv')
_FILES = {
  'train': ('HVU_Train_V1.0.csv', 'hvu_train.csv'),
  'validation': ('HVU_Val_V1.0.csv', 'hvu_val.csv'),
}
_COLUMNS = ('Tags', 'youtube_id', 'time_start', 'time_end')


class Builder(annotation.AnnotatedBuilder):
  """Builds HVU; videos without tags of the chosen category are dropped."""

  MULTI_LABEL = True
  CONFIGS = builder.storage_configs('all', *_CATEGORIES)

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with annotation.open_file(folder, *_TAGS) as path:
      categories = dict(annotation.read_table(path, 'Tag', 'Category'))
      variant = self.config.variant
      chosen = _CATEGORIES if variant == 'all' else (variant,)
      class_names = [
        tag
        for category in chosen
        for tag in sorted(t for t, c in categories.items() if c == category)
      ]
      if not class_names:
        raise ValueError(f'no tags of category {variant!r}')
    listing = annotation.Listing(class_names)
    for split, names in _FILES.items():
      with annotation.open_file(folder, *names) as path:
        for tags, youtube_id, *times in annotation.read_table(path, *_COLUMNS):
          tags = dict.fromkeys(tags.split('|'))
          labels = [tag for tag in tags if categories[tag] in chosen]
          # Truncated tenths of a second, as the publisher's downloader does.
          start, end = (int(float(time) * 10) for time in times)
          name = f'{youtube_id}_{start:06d}_{end:06d}'
          if labels:
            listing.add(name, labels, split)
    return listing
