"""What annotation files name: read, found among the files, and prepared.

A definition of a published dataset says where its annotations are, how a line
reads and what the classes are; the rest is here.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import json
import os
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from dualformer_jax import errors
import preparation


@dataclasses.dataclass(frozen=True)
class Listed:
  """A video that an annotation file names.

  Attributes:
    name: of its file, without the extension; perhaps after folders. A folder of
      frames of that name does as well.
    label: the name of its class, or the names of all of them.
    split: the name of its split.
    seconds: from when on and until when it is wanted; None for all of it.
    video_id: if the name does not tell it from others.
    in_folder: whether its folder must be the one in the name, as files of other
      folders have the same name.
    other_name: what the file may be called instead.
  """

  name: str
  label: str | tuple[str, ...]
  split: str
  seconds: tuple[float, float] | None = None
  video_id: str = ''
  in_folder: bool = False
  other_name: str = ''

  @property
  def labels(self) -> tuple[str, ...]:
    """The names of its classes, one or several."""
    return (self.label,) if isinstance(self.label, str) else self.label


class AnnotatedBuilder(preparation.ReportingBuilder, skip_registration=True):
  """Stores the videos that annotation files name, those of them that are there.

  A definition says what the files say (`read_annotations`), and no more.

  Attributes:
    MULTI_LABEL: whether a video may have several labels.
    FRAME_RATE: of videos that are published as folders of frames.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'The videos and the annotation files as they are published; the README.md'
    ' beside the definition says how they must lie.'
  )
  CONFIGS = preparation.storage_configs()
  BUILDER_CONFIGS = [CONFIGS['reencoded']]
  MULTI_LABEL = False
  FRAME_RATE = 25.0

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=preparation.features(multi_label=self.MULTI_LABEL)
    )

  def read_annotations(
    self, folder: pathlib.Path
  ) -> tuple[Sequence[str], Sequence[Listed]]:
    """What the annotation files below `folder` say.

    Returns:
      The names of the classes, by label, and the videos.

    Raises:
      UserError: a file is missing or malformed.
    """
    raise NotImplementedError

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    folder = preparation.manual_folder(dl_manager, self.name)
    config = self.builder_config
    assert isinstance(config, preparation.StorageConfig)
    class_names, listed = self.read_annotations(folder)
    listed, twice = _once(listed)
    self.label.names = list(class_names)
    known = set(class_names)
    for video in listed:
      for label in video.labels:
        if label not in known:
          raise errors.UserError(
            f'{folder}: {video.name} is of the class {label!r}, which is not'
            f' one of the {len(known)} of {self.name}'
          )
    paths = find_files(folder)
    found, missing = [], []
    for video in listed:
      path = _match(video, paths)
      if path is None:
        missing.append(video)
        continue
      found.append(
        preparation.Video(
          video.video_id or video.name,
          path,
          video.label,
          video.split,
          video.seconds,
          self.FRAME_RATE,
        )
      )
    if not found:
      raise errors.UserError(
        f'{folder}: none of the {len(listed)} videos that the annotations name'
        f' lies there, {listed[0].name if listed else ""}.mp4 for one; see'
        f' data/{self.name}/README.md'
      )
    stored = self.store(found, config.storage)
    if not stored:
      raise errors.UserError(
        f'{folder}: none of its {len(found)} videos can be decoded; the lines'
        ' above say why'
      )
    self.findings.update(
      listed=preparation.count(video.split for video in listed),
      missing={
        split: preparation.count(
          label
          for video in missing
          if video.split == split
          for label in video.labels
        )
        for split in dict.fromkeys(video.split for video in missing)
      },
      missing_videos=preparation.count(video.split for video in missing),
      notes=[f'{name} is listed more than once' for name in twice],
    )
    preparation.write_text(
      pathlib.Path(self.data_path) / preparation.MISSING,
      ''.join(f'{video.split} {video.name}\n' for video in missing),
    )
    splits = dict.fromkeys(video.split for video in listed)
    generators = {}
    for split in splits:
      videos = [item for item in stored if item[0].split == split]
      if videos:
        generators[split] = self.examples(split, videos, config.storage)
    return generators

  def _generate_examples(self, *args: Any) -> Any:
    raise NotImplementedError  # TFDS wants it; _split_generators does it all.


def find_one(folder: pathlib.Path, *names: str) -> pathlib.Path:
  """The annotation file of one of these names, in `folder` or below it.

  At most two folders deep; the names may be patterns.

  Raises:
    UserError: there is none.
  """
  for below in ('', '*/', '*/*/'):
    for name in names:
      for path in sorted(folder.glob(below + name)):
        if path.is_file():
          return path
  raise errors.UserError(
    f'{folder}: the annotation file {" or ".join(names)} is not there'
  )


def read_lines(path: pathlib.Path) -> list[str]:
  """The lines of a text file that are not blank, without blanks at the ends.

  Raises:
    UserError: the file cannot be read, or is not UTF-8.
  """
  with malformed(path):
    lines = path.read_text('utf-8-sig').splitlines()
  return [line.strip() for line in lines if line.strip()]


def read_csv(path: pathlib.Path, **options: Any) -> list[list[str]]:
  """The rows of a CSV file that are not empty.

  Raises:
    UserError: the file cannot be read, or is malformed.
  """
  with malformed(path):
    text = path.read_text('utf-8-sig')
    return [row for row in csv.reader(text.splitlines(), **options) if row]


def read_table(path: pathlib.Path, *columns: str) -> list[list[str]]:
  """The named columns of a CSV file that begins with their names.

  Raises:
    UserError: the file cannot be read, or is malformed.
  """
  header, *rows = read_csv(path) or [[]]
  with malformed(path):
    names = [name.strip() for name in header]
    if missing := [column for column in columns if column not in names]:
      raise ValueError(f'has no column {missing[0]!r}, only {names}')
    places = [names.index(column) for column in columns]
    for row in rows:
      if len(row) <= max(places):
        raise ValueError(f'the line {",".join(row)!r} has too few columns')
    return [[row[place].strip() for place in places] for row in rows]


def read_json(path: pathlib.Path) -> Any:
  """The content of a JSON file.

  Raises:
    UserError: the file cannot be read, or is malformed.
  """
  with malformed(path):
    return json.loads(path.read_text('utf-8-sig'))


def read_labels(beside: str) -> list[str]:
  """The class names in labels.txt beside a definition, by label.

  Args:
    beside: the definition's `__file__`.
  """
  return read_lines(pathlib.Path(beside).with_name('labels.txt'))


def in_order(numbers: Mapping[str, int], first: int = 0) -> list[str]:
  """Class names by their numbers, which count from `first` on.

  Raises:
    ValueError: a number is missing.
  """
  names = sorted(numbers, key=numbers.__getitem__)
  expected = list(range(first, first + len(names)))
  if [numbers[name] for name in names] != expected:
    raise ValueError(f'the classes are not numbered {first}, {first + 1}, ...')
  return names


def known(label: str, classes: Collection[str]) -> str:
  """The label, if there is such a class.

  Raises:
    ValueError: there is not.
  """
  if label not in classes:
    raise ValueError(f'{label!r} is not one of the {len(classes)} classes')
  return label


def numbered(number: int | str, class_names: Sequence[str]) -> str:
  """The name of the class of this number, from 0 on.

  Raises:
    ValueError: there is none.
  """
  if not 0 <= int(number) < len(class_names):
    raise ValueError(
      f'{number!r} is not the number of a class: 0 to {len(class_names) - 1}'
    )
  return class_names[int(number)]


@contextlib.contextmanager
def malformed(path: pathlib.Path) -> Iterator[None]:
  """Turns what an annotation file that is wrong leads to into a UserError."""
  try:
    yield
  except errors.UserError:  # Says it already.
    raise
  except (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    csv.Error,
  ) as error:
    raise errors.UserError(
      f'{path}: cannot be read as the annotation file that its publisher ships'
      f' ({type(error).__name__}: {error})'
    ) from error


def without_extension(name: str) -> str:
  """The name of a video without its extension, if it is that of a video."""
  stem, extension = os.path.splitext(name)
  return stem if extension.lower() in preparation.VIDEO_FILES else name


def find_files(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """All videos below a folder by their name, without extension.

  And by FOLDER/NAME, too. A folder that holds pictures but no videos is a
  video: of frames.
  """
  found: dict[str, list[pathlib.Path]] = collections.defaultdict(list)

  def add(name: str, path: pathlib.Path) -> None:
    found[name].append(path)
    found[f'{path.parent.name}/{name}'].append(path)

  seen = set()
  for top, folders, files in os.walk(folder, followlinks=True):
    status = os.stat(top)
    if (status.st_dev, status.st_ino) in seen:  # A link led here again.
      folders.clear()
      continue
    seen.add((status.st_dev, status.st_ino))
    folders.sort()
    videos = [
      f
      for f in files
      if os.path.splitext(f)[1].lower() in preparation.VIDEO_FILES
    ]
    for name in sorted(videos):
      add(without_extension(name), pathlib.Path(top, name))
    # A folder with a video's name is broken, and must not be lost sight of.
    for name in folders:
      if os.path.splitext(name)[1].lower() in preparation.VIDEO_FILES:
        add(without_extension(name), pathlib.Path(top, name))
    pictures = any(
      os.path.splitext(f)[1].lower() in preparation.FRAME_FILES for f in files
    )
    if pictures and not videos and pathlib.Path(top) != folder:
      add(os.path.basename(top), pathlib.Path(top))
      folders.clear()
  return found


def _match(
  video: Listed, paths: dict[str, list[pathlib.Path]]
) -> pathlib.Path | None:
  """The file of a listed video; that in the right folders, if several."""
  parts = pathlib.PurePosixPath(video.name).parts
  name = '/'.join(parts[-2:] if video.in_folder else parts[-1:])
  candidates = paths.get(name) or paths.get(video.other_name, [])

  def agreement(path: pathlib.Path) -> int:
    folders = path.parts[-2::-1]
    wanted = parts[-2::-1]
    same = 0
    for mine, theirs in zip(folders, wanted, strict=False):
      if mine != theirs:
        break
      same += 1
    return 2 * same + (video.split in path.parts)

  return max(candidates, key=agreement, default=None)


def _once(listed: Sequence[Listed]) -> tuple[list[Listed], list[str]]:
  """Each video of a split once, and the names of those that were more."""
  first: dict[tuple[str, str], Listed] = {}
  twice = []
  for video in listed:
    name = video.video_id or video.name
    if first.setdefault((video.split, name), video) is not video:
      twice.append(name)
  return list(first.values()), twice
