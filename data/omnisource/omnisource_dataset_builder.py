"""OmniSource: 200 classes of Kinetics, videos from three sources."""

from collections.abc import Iterator, Sequence
import pathlib

from dualformer_jax.input_pipeline.preparing import (
  annotation,
  builder,
  kinetics,
)

_RAW = 'slowonly_8x8_kinetics_raw_200'
_TRAIN = {
  'kinetics': ('k200_train.txt',),
  'kinetics_raw': (f'{_RAW}.json', f'{_RAW}.txt'),
  'insvideo': ('slowonly_8x8_insvideo_200_wodup.txt',),
}
_CLIP_SECONDS = 10.0  # Length of the numbered clips of a long video.


class Builder(annotation.AnnotatedBuilder):
  """Builds OmniSource; the validation videos are always those of Kinetics."""

  CONFIGS = builder.storage_configs(*_TRAIN)
  del CONFIGS['kinetics_raw_verbatim']  # Parts of a file must be re-encoded.

  def read_annotations(self, folder: pathlib.Path) -> annotation.Listing:
    """See the base class."""
    with annotation.open_file(folder, 'k200_actions.txt') as path:
      class_names = annotation.read_lines(path)
    # Long videos are published whole; many cut them into VIDEO/part_0.mp4, ...
    are_cut = any(folder.rglob('part_*.mp4'))
    listing = annotation.Listing(class_names)
    for split, names in {
      'train': _TRAIN[self.config.variant],
      'validation': ('k200_val.txt',),
    }.items():
      with annotation.open_file(folder, *names) as path:
        rows = list(_read_rows(path))
        by_youtube_id = {}
        if any(label is None for _, label, _ in rows):
          by_youtube_id = _read_kinetics(folder, class_names)
        for name, label, clips in rows:
          if label is None:
            label = by_youtube_id.get(name.split('/')[-1])
          if label is None:
            raise ValueError(f'{name} has no label here or in Kinetics-400')
          if clips is None:
            listing.add(name, label, split, in_folder=True)
          for clip in clips or ():
            part, fields = f'{name}/part_{clip}', {}
            if not are_cut:
              seconds = (clip * _CLIP_SECONDS, (clip + 1) * _CLIP_SECONDS)
              fields = {'seconds': seconds, 'video_id': part}
            file = part if are_cut else name
            listing.add(file, label, split, in_folder=True, **fields)
    return listing


def _read_rows(
  path: pathlib.Path,
) -> Iterator[tuple[str, int | None, list[int] | None]]:
  """Yields the name, the class number and the clips of each video.

  A line of text is `000/abseil/B00arxogubl.mp4 0` (a video and its class), or
  `pref_D/D32_1gwq35E 66 10 0 1 2` (of 10 clips, the first three), or in some
  copies only the name of a file.
  """
  if path.suffix == '.json':
    for video in annotation.read_json(path):
      clips = list(map(int, video['positive_clip_inds']))
      name = annotation.without_extension(video['video_dir'])
      yield name, int(video['label']), clips
    return
  for line in annotation.read_lines(path):
    file, *words = line.split()
    numbers = list(map(int, words))
    clips = numbers[2:] if len(numbers) > 1 else None
    name = annotation.without_extension(file)
    yield name, numbers[0] if numbers else None, clips


def _read_kinetics(
  folder: pathlib.Path, class_names: Sequence[str]
) -> dict[str, str]:
  """Returns the labels of Kinetics-400 videos by YouTube id."""
  path = pathlib.Path(__file__).parents[1] / 'kinetics400' / 'labels.txt'
  by_key = {kinetics.normalize_label(name): name for name in class_names}
  return {
    video.name.rsplit('_', 2)[0]: by_key[key]
    for video in kinetics.read_lists(folder, annotation.read_lines(path)).videos
    if (key := kinetics.normalize_label(video.labels[0])) in by_key
  }
