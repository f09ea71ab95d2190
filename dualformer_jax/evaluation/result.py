"""The result of a test: the logits of every view, stored as views.npz."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import IO
import zipfile

from jaxtyping import Float, Int, Num
import numpy as np

from dualformer_jax import store_client
from dualformer_jax.checkpoints import stored_folder
from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import metrics

VIEWS_FILE = 'views.npz'


@dataclasses.dataclass(frozen=True)
class Result:
  """The logits of every view of a test, and the labels of its videos.

  Of the views of a video, the clips of the first crop come first, in the order
  of time. Labels are class indices or multi-hot. The folder is the workdir.
  """

  logits: Float[np.ndarray, 'v n k']
  labels: Num[np.ndarray, ' v'] | Num[np.ndarray, 'v k']
  video_ids: list[str]
  class_names: tuple[str, ...]
  num_clips: int
  folder: str

  @property
  def multi_label(self) -> bool:
    """Whether a video may have several labels."""
    return self.labels.ndim == 2

  @property
  def num_crops(self) -> int:
    """Number of crops of each clip."""
    return self.logits.shape[1] // self.num_clips

  @functools.cached_property
  def predictions(self) -> Int[np.ndarray, ' v']:
    """The most probable class of each video."""
    return self.probabilities().argmax(axis=1)

  def probabilities(
    self, views: Sequence[int] | None = None
  ) -> Float[np.ndarray, 'v k']:
    """Returns the class probabilities of each video, averaged over views."""
    logits = self.logits if views is None else self.logits[:, list(views)]
    return metrics.mean_probabilities(logits, self.multi_label)

  def confusion_matrix(self) -> Int[np.ndarray, 'k k']:
    """Returns the number of videos by class (row) and prediction (column)."""
    k = len(self.class_names)
    pairs = self.labels.astype(np.int64) * k + self.predictions
    return np.bincount(pairs, minlength=k * k).reshape(k, k)

  def save(self, file: IO[bytes]) -> None:
    """Writes the content of views.npz, which `read` reads."""
    np.savez(
      file,
      logits=self.logits,
      labels=self.labels,
      video_ids=np.array(self.video_ids, np.str_),
      class_names=np.array(self.class_names, np.str_),
      num_clips=np.array(self.num_clips),
    )


def read(path: str, class_names: tuple[str, ...]) -> Result:
  """Reads the views of an earlier test, to compare with it.

  The path is its workdir, or a file in it such as report.json, also at gs:// or
  s3://. Raises UserError
  if it is damaged, or has other classes or several labels per video.
  """
  workdir = path
  if path.endswith(('.html', '.json', '.npz')):
    workdir = path.rpartition('/')[0] or '.'
  if stored_folder.is_address(path):
    folder = stored_folder.local_path(workdir, kinds=(), names=(VIEWS_FILE,))
  else:
    folder = pathlib.Path(workdir).expanduser().absolute()
  file = folder / VIEWS_FILE
  try:
    with open(file, 'rb') as opened, np.load(opened) as arrays:
      result = Result(
        logits=arrays['logits'],
        labels=arrays['labels'],
        video_ids=arrays['video_ids'].tolist(),
        class_names=tuple(arrays['class_names'].tolist()),
        num_clips=int(arrays['num_clips']),
        folder=store_client.shown(folder),
      )
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(
      f'--compare={path}: cannot read {file} ({type(error).__name__}: {error});'
      ' run that test again with --mode=test to write it'
    ) from error
  if result.class_names != class_names:
    raise UserError(
      f'--compare={path}: {file} has {len(result.class_names)} classes, '
      f'{result.class_names[0]!r} first, but the dataset has '
      f'{len(class_names)}, {class_names[0]!r} first; compare with a test on '
      'the same classes in the same order'
    )
  if result.multi_label:
    raise UserError(
      f'--compare={path}: its videos have several labels each; only tests with '
      'one label per video can be compared'
    )
  return result
