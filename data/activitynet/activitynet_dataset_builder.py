"""ActivityNet 1.3: 200 activities in untrimmed videos from YouTube."""

import pathlib

from dualformer_jax.input_pipeline.preparing import annotation, builder

_SPLITS = {'training': 'train', 'validation': 'validation'}


class Builder(annotation.AnnotatedBuilder):
  """Builds ActivityNet 1.3; a video gets the label of its first annotation.

  With --config=segments each annotated segment is a video.
  """

  CONFIGS = builder.storage_configs('videos', 'segments')
  del CONFIGS['segments_verbatim']  # Parts of a file must be re-encoded.

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with annotation.open_file(folder, 'activity_net.v1-3.min.json') as path:
      database = annotation.read_json(path)['database']
      segments = [s for v in database.values() for s in v['annotations']]
      class_names = sorted({segment['label'] for segment in segments})
      listing = annotation.Listing(class_names)
      for youtube_id, video in database.items():
        split = _SPLITS.get(video['subset'])
        if split is None:
          continue
        name, fields = f'v_{youtube_id}', {'other_name': youtube_id}
        for number, segment in enumerate(video['annotations']):
          if self.config.variant == 'segments':
            start, end = map(float, segment['segment'])
            fields.update(seconds=(start, end), video_id=f'{name}/{number}')
          listing.add(name, segment['label'], split, **fields)
          if self.config.variant == 'videos':
            break
    return listing
