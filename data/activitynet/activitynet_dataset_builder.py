"""ActivityNet 1.3: 200 activities in untrimmed videos of YouTube.

  tfds build data/activitynet --manual_dir=VIDEOS --data_dir=OUT

Whole videos with the label of the first annotation or, with --config=segments,
every annotated segment as a video of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib

import tensorflow_datasets as tfds

import preparation
import published

_SPLITS = {'training': 'train', 'validation': 'validation'}


@dataclasses.dataclass(eq=False)
class SegmentsConfig(preparation.StorageConfig):
  """How the videos are stored, and whether they are cut into segments."""

  segments: bool = False


def _configs() -> dict[str, preparation.StorageConfig]:
  configs = preparation.storage_configs(
    SegmentsConfig, videos={'segments': False}, segments={'segments': True}
  )
  del configs['segments_verbatim']  # A part of a file is no file.
  return configs


class Builder(published.AnnotatedBuilder):
  """Stores the videos of ActivityNet 1.3."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}
  CONFIGS = _configs()
  BUILDER_CONFIGS = [CONFIGS['videos']]

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[published.Listed]]:
    """See the base class."""
    config = self.builder_config
    assert isinstance(config, SegmentsConfig)
    path = published.find_one(folder, 'activity_net.v1-3.min.json')
    classes = set()
    listed = []
    with published.malformed(path):
      for youtube_id, video in published.read_json(path)['database'].items():
        name = f'v_{youtube_id}'
        found = video['annotations']  # None for testing.
        classes.update(annotation['label'] for annotation in found)
        if video['subset'] not in _SPLITS or not found:
          continue
        split = _SPLITS[video['subset']]
        for number, annotation in enumerate(found):
          start, end = map(float, annotation['segment'])
          whole = published.Listed(
            name, annotation['label'], split, other_name=youtube_id
          )
          if not config.segments:
            listed.append(whole)
            break
          listed.append(
            dataclasses.replace(
              whole, seconds=(start, end), video_id=f'{name}/{number}'
            )
          )
    return sorted(classes), listed
