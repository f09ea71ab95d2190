"""A folder of videos with one subfolder per class."""

import collections
from collections.abc import Sequence
import dataclasses
import hashlib
import os
import pathlib
from typing import Any
import unicodedata

from absl import logging
import tensorflow_datasets as tfds

from dualformer_jax import errors
from dualformer_jax.input_pipeline import video_container
from dualformer_jax.input_pipeline.preparing import (
  builder,
  frame_folders,
  transcoding,
)

# Splits by name of their folder.
_SPLIT_NAMES = ('train', 'validation', 'test')
_SPLITS = {name: name for name in _SPLIT_NAMES} | {'val': 'validation'}


@dataclasses.dataclass(eq=False)
class VideoFolderConfig(builder.StorageConfig):
  """A configuration with a rule for splitting."""

  # Of the videos of each class, if there are no folders of splits.
  validation_share: float = 0.2


class Builder(builder.VideoDatasetBuilder):
  """Builds a dataset from CLASS/video.mp4 or SPLIT/CLASS/video.mp4."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Videos as MANUAL_DIR/CLASS/video.mp4, or with your own splits as'
    ' MANUAL_DIR/train/CLASS/video.mp4 and'
    ' MANUAL_DIR/validation/CLASS/video.mp4.'
  )
  CONFIGS = builder.storage_configs(config_class=VideoFolderConfig)

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    folder = self.manual_folder(dl_manager)
    config = self.config
    assert isinstance(config, VideoFolderConfig)
    found = find_videos(folder)
    stored = self.store(found.videos, folder)
    if not found.has_splits:
      stored = choose_splits(stored, config.validation_share)
    notes = [*found.notes, *_find_empty_classes(found, stored)]
    for note in notes:
      logging.warning('%s', note)
    self.findings.update(ignored=found.ignored, notes=notes)
    self.class_label.names = found.class_names
    return self.examples(stored, _SPLIT_NAMES)


@dataclasses.dataclass(frozen=True)
class VideoFolder:
  """The videos of a folder, sorted by path, whether they can be decoded or not.

  `ignored` counts other files by kind; `notes` are for the user.
  """

  videos: list[transcoding.Video]
  has_splits: bool
  ignored: dict[str, int]
  notes: list[str]

  @property
  def class_names(self) -> list[str]:
    """Sorted; a folder of videos is a class even if none can be decoded."""
    return sorted({video.labels[0] for video in self.videos})


def find_videos(root: pathlib.Path) -> VideoFolder:
  """Finds ROOT/CLASS/video.mp4 or ROOT/SPLIT/CLASS/video.mp4; follows links.

  Raises UserError if there are no videos, or their classes are ambiguous.
  """
  ignored: collections.Counter[str] = collections.Counter()
  notes: list[str] = []
  paths, folders = _walk(root, ignored, notes)
  has_splits = _has_splits(root, paths)
  depth = 2 if has_splits else 1  # Of the folder of a class.
  videos = []
  owners: dict[tuple[str, str], pathlib.Path] = {}
  for path in paths:
    if len(path.parts) <= depth:
      ignored['not in the folder of a class'] += 1
      continue
    folder = pathlib.Path(*path.parts[:depth])
    split = _SPLITS[path.parts[0]] if has_splits else ''
    label = _class_name(folder.name)
    owner = owners.setdefault((split, label), folder)
    if not label or owner != folder:
      raise errors.UserError(
        f'{_text(root)}: folders {_text(owner)!r} and {_text(folder)!r} are'
        f' both class {label!r}; class names must differ in more than spaces'
      )
    videos.append(transcoding.Video(_text(path), root / path, (label,), split))
  if not videos:
    raise errors.UserError(
      f'{_text(root)}: no videos found; expected CLASS/video.mp4, or'
      ' train/CLASS/video.mp4 and validation/CLASS/video.mp4'
    )
  notes += [
    f'folder {_text(folder)!r} contains no videos and is not a class'
    for folder in folders
    if len(folder.parts) == depth and folder not in owners.values()
  ]
  counts = dict(sorted((+ignored).items()))  # Of what was ignored.
  return VideoFolder(videos, has_splits, counts, notes)


def _walk(
  root: pathlib.Path, ignored: collections.Counter[str], notes: list[str]
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """Returns the videos and the folders below a folder, relative to it."""
  videos, folders = [], []

  def note_error(error: OSError) -> None:
    folder = _text(os.path.relpath(error.filename, root))
    notes.append(f'folder {folder!r} cannot be read: {error.strerror}')

  for top, names, files in os.walk(root, onerror=note_error, followlinks=True):
    folder = pathlib.Path(top).relative_to(root)
    visible = [folder / n for n in names + files if not n.startswith('.')]
    suffixes = {pathlib.PurePath(name).suffix.lower() for name in names + files}
    has_images = bool(suffixes & frame_folders.SUFFIXES)
    has_videos = bool(suffixes & video_container.SUFFIXES)
    if len(folder.parts) > 1 and has_images and not has_videos:
      videos.append(folder)  # A video stored as a folder of frames.
      names.clear()
      continue
    ignored['hidden'] += len(names + files) - len(visible)
    below = []
    for path in visible:
      suffix = path.suffix.lower()
      if path.name in names:
        if any(os.path.samefile(root / path, root / p) for p in path.parents):
          notes.append(f'link {_text(path)!r} leads to a folder above it')
          continue
        below.append(path)
      # A folder named like a video is reported as undecodable.
      if suffix in video_container.SUFFIXES:
        videos.append(path)
      elif path.name not in names:
        ignored[_text(suffix) or 'no extension'] += 1
    folders += below
    names[:] = [path.name for path in below]
  return sorted(videos), sorted(folders)


def _has_splits(root: pathlib.Path, paths: Sequence[pathlib.Path]) -> bool:
  """Returns whether the folders below the root are splits, not classes."""
  tops = {path.parts[0] for path in paths if len(path.parts) > 1}
  splits = {p.parts[0] for p in paths if len(p.parts) > 2} & _SPLITS.keys()
  if len(splits) > 1 and not tops <= _SPLITS.keys():
    raise errors.UserError(
      f'{_text(root)}: contains folders of splits {sorted(splits)} and other'
      f' folders {sorted(map(_text, tops - _SPLITS.keys()))}; use either splits'
      ' or classes'
    )
  return bool(splits) and tops <= _SPLITS.keys()


def choose_splits(
  stored: builder.StoredVideos, share: float
) -> builder.StoredVideos:
  """Assigns a share of each class to validation: at least one video, not all.

  The choice depends only on the names of the videos.
  """
  classes = collections.defaultdict(list)
  for video, _ in stored:
    classes[video.labels[0]].append(video.video_id)
  validation = set()
  for names in classes.values():
    number = max(1, round(share * len(names))) if share else 0
    number = min(number, len(names) - 1)
    validation.update(sorted(names, key=_hash)[:number])

  def split(video: transcoding.Video) -> str:
    return 'validation' if video.video_id in validation else 'train'

  return [
    (dataclasses.replace(video, split=split(video)), result)
    for video, result in stored
  ]


def _find_empty_classes(
  found: VideoFolder, stored: builder.StoredVideos
) -> list[str]:
  """Returns a note for each class without videos in a split."""
  present = {(video.split, video.labels[0]) for video, _ in stored}
  used = {video.split for video in found.videos} - {''}
  splits = [s for s in _SPLIT_NAMES if s in (used or {'train', 'validation'})]
  notes = []
  for name in found.class_names:
    if empty := [split for split in splits if (split, name) not in present]:
      notes.append(f'class {name!r} has no good video for {", ".join(empty)}')
  return notes


def _hash(name: str) -> bytes:
  # Normalized, as some file systems store letters and accents separately.
  return hashlib.sha256(unicodedata.normalize('NFC', name).encode()).digest()


def _text(path: pathlib.Path | str) -> str:
  """Returns a path as valid text, with escapes for bytes that are not."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def _class_name(folder: str) -> str:
  """Returns a name on one line without outer spaces, as TFDS stores it."""
  return unicodedata.normalize('NFC', ' '.join(_text(folder).split()))
