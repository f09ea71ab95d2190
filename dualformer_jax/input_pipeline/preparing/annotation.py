"""The base class for published datasets, and readers of annotation files."""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import inspect
import io
import itertools
import json
import os
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from dualformer_jax import errors, files
from dualformer_jax.input_pipeline import video_container
from dualformer_jax.input_pipeline.preparing import (
  builder,
  frame_folders,
  reports,
  transcoding,
)


@dataclasses.dataclass(frozen=True)
class ListedVideo:
  """A video named by an annotation file; see transcoding.Video.

  Attributes:
    name: file name without extension, or name of a folder of frames; may begin
      with folders.
    video_id: unique in the dataset; '' to use the name.
    in_folder: whether the file must be in the last folder of the name, because
      files in other folders have the same name.
    other_name: another name that the file may have.
  """

  name: str
  labels: tuple[str, ...]
  split: str
  seconds: tuple[float, float] | None = None
  video_id: str = ''
  in_folder: bool = False
  other_name: str = ''


class Listing:
  """The class names, by label, and the videos of a dataset."""

  def __init__(self, class_names: Iterable[str]):
    self.class_names = list(class_names)
    self.videos: list[ListedVideo] = []
    self._known = set(self.class_names)

  def add(self, name: str, label: Any, split: str, **fields: Any) -> None:
    """Adds a video; a label is a class name or number, or several of these."""
    labels = [label] if isinstance(label, str | int) else label
    names = tuple(map(self._class_name, labels))
    self.videos.append(ListedVideo(name, names, split, **fields))

  def _class_name(self, label: str | int) -> str:
    if isinstance(label, int) and 0 <= label < len(self.class_names):
      return self.class_names[label]
    if label not in self._known:
      raise ValueError(
        f'{label!r} is not one of {len(self.class_names)} classes'
      )
    return str(label)


class AnnotatedBuilder(builder.VideoDatasetBuilder, skip_registration=True):
  """Stores the videos named by annotation files, as far as they exist.

  FRAME_RATE is that of videos published as folders of frames.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'The videos and annotation files as published; README.md of the dataset'
    ' shows the expected folders.'
  )
  CONFIGS = builder.storage_configs()
  FRAME_RATE = 25.0

  def read_annotations(self, folder: pathlib.Path) -> Listing:
    """Reads the annotation files in a folder or below."""
    raise NotImplementedError

  @classmethod
  def read_labels(cls) -> list[str]:
    """Returns the names in labels.txt next to the builder's source file."""
    return read_lines(pathlib.Path(inspect.getfile(cls)).parent / 'labels.txt')

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    folder = self.manual_folder(dl_manager)
    listing = self.read_annotations(folder)
    self.class_label.names = listing.class_names
    listed: dict[tuple[str, str], ListedVideo] = {}
    notes = []
    for video in listing.videos:
      video_id = video.video_id or video.name
      kept = listed.setdefault((video.split, video_id), video)
      if kept.labels != video.labels:
        notes.append(
          f'{video_id} of {video.split} is listed with the labels'
          f' {", ".join(map(repr, kept.labels))} and'
          f' {", ".join(map(repr, video.labels))}; the first is kept'
        )
      elif kept is not video:
        notes.append(f'{video_id} of {video.split} is listed more than once')
    found, missing = [], []
    paths = index_videos(folder)
    for (split, video_id), video in listed.items():
      if path := _select_path(video, paths):
        rest = video.labels, split, video.seconds, self.FRAME_RATE
        found.append(transcoding.Video(video_id, path, *rest))
      else:
        missing.append(video)
    if not found:
      example = f' ({missing[0].name}.mp4, ...)' if missing else ''
      raise errors.UserError(
        f'{folder}: contains none of {len(missing)} listed videos{example}; see'
        f' data/{self.name}/README.md'
      )
    stored = self.store(found, folder)
    missing_labels = collections.defaultdict(list)
    for video in missing:
      missing_labels[video.split] += video.labels
    self.findings.update(
      listed=_count(split for split, _ in listed),
      missing={split: _count(n) for split, n in missing_labels.items()},
      missing_videos=_count(video.split for video in missing),
      notes=notes,
    )
    reports.write_text(
      pathlib.Path(self.data_path) / reports.MISSING,
      ''.join(f'{video.split} {video.name}\n' for video in missing),
    )
    return self.examples(stored, dict.fromkeys(split for split, _ in listed))


def index_videos(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the videos below a folder by NAME (no extension) and FOLDER/NAME.

  Links are followed. A folder that contains images but no videos is a video.
  """
  found: dict[str, list[pathlib.Path]] = collections.defaultdict(list)

  def add(name: str, path: pathlib.Path) -> None:
    found[name].append(path)
    found[f'{path.parent.name}/{name}'].append(path)

  for top, folders, names in files.walk(folder):
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    has_videos = bool(suffixes & video_container.SUFFIXES)
    # Folders, too: one named like a video is to be reported as undecodable.
    for name in sorted(names) + folders:
      stem = without_extension(name)
      if stem != name:
        add(stem, pathlib.Path(top, name))
    is_root = pathlib.Path(top) == folder
    if suffixes & frame_folders.SUFFIXES and not has_videos and not is_root:
      add(os.path.basename(top), pathlib.Path(top))
      folders.clear()
  return found


def _select_path(
  video: ListedVideo, paths: Mapping[str, Sequence[pathlib.Path]]
) -> pathlib.Path | None:
  """Returns the file whose folders agree best with the listed name."""
  parts = pathlib.PurePosixPath(video.name).parts
  name = '/'.join(parts[-2:] if video.in_folder else parts[-1:])
  candidates = paths.get(name) or paths.get(video.other_name, [])

  def agreement(path: pathlib.Path) -> int:
    pairs = zip(path.parts[-2::-1], parts[-2::-1], strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return 2 * len(list(same)) + (video.split in path.parts)

  return max(candidates, key=agreement, default=None)


def _count(items: Iterable[str]) -> dict[str, int]:
  return dict(sorted(collections.Counter(items).items()))


def find_file(folder: pathlib.Path, *names: str) -> pathlib.Path | None:
  """Returns the first file with one of these names, at most two folders deep.

  Names may be patterns; they are in order of preference.
  """
  for below in ('', '*/', '*/*/'):
    for name in names:
      for path in sorted(folder.glob(below + name)):
        if path.is_file():
          return path
  return None


@contextlib.contextmanager
def open_file(folder: pathlib.Path, *names: str) -> Iterator[pathlib.Path]:
  """Finds a file as find_file; errors in the block are errors of the file.

  Raises:
    UserError: there is no such file, or its content is malformed.
  """
  path = find_file(folder, *names)
  if path is None:
    raise errors.UserError(
      f'{folder}: annotation file {" or ".join(names)} not found'
    )
  try:
    yield path
  except errors.UserError:  # Already names its file.
    raise
  except Exception as error:  # Malformed content can raise anything.
    raise errors.UserError(
      f'{path}: malformed annotation file ({type(error).__name__}: {error});'
      ' use the file as published'
    ) from error


def read_lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a text file, stripped, without empty ones."""
  lines = files.read_text(path).split('\n')
  return [line.strip() for line in lines if line.strip()]


def read_csv(path: pathlib.Path) -> list[list[str]]:
  """Returns the rows of a CSV file, without empty ones."""
  text = io.StringIO(files.read_text(path), newline='')
  return [row for row in csv.reader(text) if row]


def read_table(path: pathlib.Path, *columns: str) -> list[list[str]]:
  """Returns the named columns of a CSV file that has a header."""
  header, *rows = read_csv(path) or [[]]
  names = [name.strip() for name in header]
  if missing := [column for column in columns if column not in names]:
    raise ValueError(f'no column {missing[0]!r}, only {names}')
  indices = [names.index(column) for column in columns]
  for row in rows:
    if len(row) <= max(indices):
      raise ValueError(f'too few columns in line {",".join(row)!r}')
  return [[row[index].strip() for index in indices] for row in rows]


def read_json(path: pathlib.Path) -> Any:
  """Returns the content of a JSON file."""
  return json.loads(files.read_text(path))


def sort_classes(numbers: Mapping[str, Any], first: int = 0) -> list[str]:
  """Returns class names by number; numbers begin with `first`."""
  by_number = {int(number): name for name, number in numbers.items()}
  expected = range(first, first + len(numbers))
  if sorted(by_number) != list(expected):
    raise ValueError(f'class numbers are not {first}, {first + 1}, ...')
  return [by_number[number] for number in expected]


def without_extension(name: str) -> str:
  """Returns the name of a video file without its extension."""
  stem, extension = os.path.splitext(name)
  return stem if extension.lower() in video_container.SUFFIXES else name
