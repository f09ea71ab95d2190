"""Any folder of videos, a folder a class, becomes a dataset.

  tfds build data/video_folder --manual_dir=VIDEOS --data_dir=OUT

VIDEOS/CLASS/video.mp4 is split into train and validation;
VIDEOS/{train,validation,test}/CLASS/video.mp4 is taken as it is. Files that
cannot be decoded are listed in the report and left out.
"""

from __future__ import annotations

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
from dualformer_jax.input_pipeline import storing
import preparation

# What a folder of a split may be called.
_SPLITS = {
  'train': 'train',
  'validation': 'validation',
  'val': 'validation',
  'test': 'test',
}


@dataclasses.dataclass(eq=False)
class VideoFolderConfig(preparation.StorageConfig):
  """How the videos are stored and split.

  Attributes:
    validation_share: of the videos of a class, where the folder does not say.
  """

  validation_share: float = 0.2


class Builder(preparation.ReportingBuilder):
  """Stores the videos of a folder."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Videos as MANUAL_DIR/CLASS/video.mp4, or, split by yourself, as'
    ' MANUAL_DIR/train/CLASS/video.mp4 and'
    ' MANUAL_DIR/validation/CLASS/video.mp4.'
  )
  CONFIGS = preparation.storage_configs(VideoFolderConfig)
  BUILDER_CONFIGS = [CONFIGS['reencoded']]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(features=preparation.features())

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    folder = preparation.manual_folder(dl_manager, self.name)
    config = self.builder_config
    assert isinstance(config, VideoFolderConfig)
    found = find_videos(folder)
    stored = self.store(found.videos, config.storage)
    if not stored:
      raise errors.UserError(
        f'{_text(folder)}: none of its {len(found.videos)} videos can be'
        ' decoded; the lines above say why'
      )
    if not found.has_splits:
      stored = choose_splits(stored, config.validation_share)
    splits = {
      split: [item for item in stored if item[0].split == split]
      for split in dict.fromkeys(_SPLITS.values())
    }
    splits = {split: videos for split, videos in splits.items() if videos}

    notes = [*found.notes, *_missing(found, stored)]
    for note in notes:
      logging.warning('%s', note)
    self.findings.update(ignored=found.ignored, notes=notes)
    self.label.names = found.class_names
    return {
      split: self.examples(split, videos, config.storage)
      for split, videos in splits.items()
    }

  def _generate_examples(self, *args: Any) -> Any:
    raise NotImplementedError  # TFDS wants it; _split_generators does it all.


# Videos, each with what was stored of it.
Stored = Sequence[tuple[preparation.Video, storing.Stored]]


@dataclasses.dataclass(frozen=True)
class Found:
  """What a folder holds.

  Attributes:
    videos: files with a video's extension, good or not, sorted.
    has_splits: whether the folder says which are for training.
    ignored: how many other files there are, by kind.
    notes: what its owner may want to know, a line each.
  """

  videos: list[preparation.Video]
  has_splits: bool
  ignored: dict[str, int]
  notes: list[str]

  @property
  def class_names(self) -> list[str]:
    """Sorted; a folder of videos is a class even if none of them is good."""
    return sorted({video.labels[0] for video in self.videos})


def find_videos(root: pathlib.Path) -> Found:
  """Looks through ROOT/CLASS or ROOT/SPLIT/CLASS, subfolders and links too.

  Raises:
    UserError: there is no video, or it cannot be told which class it is of.
  """
  # All paths here are relative to the root: so are those in the report.
  ignored: collections.Counter[str] = collections.Counter()
  notes: list[str] = []
  files: list[pathlib.Path] = []
  folders: list[pathlib.Path] = []

  def walk(folder: pathlib.Path, above: Sequence[os.stat_result]) -> None:
    try:
      here = [*above, (root / folder).stat()]
      names = sorted(os.listdir(root / folder))
    except OSError as error:
      notes.append(f'folder {_text(folder)!r} cannot be read: {error.strerror}')
      return
    suffixes = {pathlib.PurePath(name).suffix.lower() for name in names}
    if (
      len(folder.parts) > 1
      and suffixes & preparation.FRAME_FILES
      and not suffixes & preparation.VIDEO_FILES
    ):
      files.append(folder)  # A video as a folder of frames.
      return
    for path in (folder / name for name in names):
      full = root / path
      if path.name.startswith('.'):
        ignored['hidden'] += 1
      elif full.is_dir():
        if any(os.path.samestat(full.stat(), stat) for stat in here):
          notes.append(f'link {_text(path)!r} leads back to a folder above it')
          continue
        folders.append(path)
        walk(path, here)
        # It cannot be a video, and must not be passed over without a word.
        if path.suffix.lower() in preparation.VIDEO_FILES:
          files.append(path)
      elif path.suffix.lower() in preparation.VIDEO_FILES:
        files.append(path)
      else:
        ignored[_text(path.suffix.lower()) or 'no extension'] += 1

  walk(pathlib.Path(), [])
  has_splits = _has_splits(root, files)
  depth = 2 if has_splits else 1  # How deep the folder of a class lies.
  videos = []
  owners: dict[tuple[str, str], pathlib.Path] = {}
  for path in files:
    if len(path.parts) <= depth:
      ignored['not in the folder of a class'] += 1
      continue
    folder = pathlib.Path(*path.parts[:depth])
    split = _SPLITS[path.parts[0]] if has_splits else ''
    label = _class_name(folder.name)
    owner = owners.setdefault((split, label), folder)
    if not label or owner != folder:
      raise errors.UserError(
        f'{_text(root)}: as names of classes, those of the folders'
        f' {_text(owner)!r} and {_text(folder)!r} are both {label!r};'
        ' they must differ, in more than blanks'
      )
    videos.append(preparation.Video(_text(path), root / path, label, split))
  if not videos:
    raise errors.UserError(
      f'{_text(root)}: no videos found; they should lie there as'
      ' CLASS/video.mp4, or as train/CLASS/video.mp4 and'
      ' validation/CLASS/video.mp4'
    )
  owned = set(owners.values())
  notes += [
    f'folder {_text(folder)!r} holds no video: not a class'
    for folder in folders
    if len(folder.parts) == depth and folder not in owned
  ]
  return Found(videos, has_splits, dict(sorted(ignored.items())), notes)


def _has_splits(root: pathlib.Path, paths: Sequence[pathlib.Path]) -> bool:
  """Whether the folders below the root are splits, rather than classes."""
  tops = {path.parts[0] for path in paths if len(path.parts) > 1}
  splits = {
    path.parts[0]
    for path in paths
    if len(path.parts) > 2 and path.parts[0] in _SPLITS
  }
  if len(splits) > 1 and not tops <= _SPLITS.keys():
    raise errors.UserError(
      f'{_text(root)}: the folders of splits {sorted(splits)} and other'
      f' folders {sorted(map(_text, tops - _SPLITS.keys()))} lie side by side;'
      ' give either splits, or classes'
    )
  return bool(splits) and tops <= _SPLITS.keys()


def choose_splits(stored: Stored, share: float) -> Stored:
  """Chooses the videos for validation, a share of each class.

  At least one of a class, and never all. Which ones depends on nothing but
  their names.
  """
  classes = collections.defaultdict(list)
  for video, _ in stored:
    classes[video.labels[0]].append(video.video_id)
  held_out = set()
  for names in classes.values():
    number = max(1, round(share * len(names))) if share else 0
    number = min(number, len(names) - 1)
    held_out.update(sorted(names, key=_hash)[:number])
  return [
    (
      dataclasses.replace(
        video,
        split='validation' if video.video_id in held_out else 'train',
      ),
      kept,
    )
    for video, kept in stored
  ]


def _missing(found: Found, stored: Stored) -> list[str]:
  """A line for each class that a split has no video of."""
  there = {(video.split, video.labels[0]) for video, _ in stored}
  splits = {video.split for video in found.videos} - {''}
  notes = []
  for name in found.class_names:
    lacking = [
      split
      for split in dict.fromkeys(_SPLITS.values())
      if split in (splits or {'train', 'validation'})
      and (split, name) not in there
    ]
    if lacking:
      notes.append(f'class {name!r} has no good video for {", ".join(lacking)}')
  return notes


def _hash(name: str) -> bytes:
  # Some file systems store letters and their accents apart.
  return hashlib.sha256(unicodedata.normalize('NFC', name).encode()).digest()


def _text(path: pathlib.Path | str) -> str:
  """A path as text that can be written: a name need not be valid UTF-8."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def _class_name(folder: str) -> str:
  """On one line, without blanks at its ends, as TFDS stores names."""
  return unicodedata.normalize('NFC', ' '.join(_text(folder).split()))
