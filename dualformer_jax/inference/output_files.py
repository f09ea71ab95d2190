"""Files that predictions are written to, checked before any work is done."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import NamedTuple

from dualformer_jax.errors import UserError
from dualformer_jax.files import check_target
from dualformer_jax.inference import sources, timeline


class OutputFiles(NamedTuple):
  """Files to write."""

  timelines: Sequence[pathlib.Path]  # for the windows of one video
  copies: Mapping[str, pathlib.Path]  # for each video, with predictions on it
  features: pathlib.Path | None
  with_tokens: bool  # whether that file has the features of tokens, too


def plan(
  videos: Sequence[str],
  *,
  timelines: Sequence[str],
  save: str | None,
  features: str | None,
  with_tokens: bool,
  overwrite: bool,
) -> OutputFiles:
  """Returns the files that the flags of `predict` ask for.

  Raises a UserError unless all can be written and replace no video.
  """
  if with_tokens and not features:
    raise UserError('--features_per_token needs --features=FILE.npz')
  if save and any(map(sources.is_live, videos)):
    raise UserError('--save needs a file; record the camera or address first')
  timelines = ','.join(timelines).split(',') if timelines else []
  if timelines and len(videos) > 1:
    raise UserError(
      f'--timeline is for one video, but there are {len(videos)}; for '
      'several, use --sliding --json instead'
    )
  files = OutputFiles(
    [pathlib.Path(name).expanduser() for name in timelines],
    _copy_paths(save, videos) if save else {},
    pathlib.Path(features).expanduser() if features else None,
    with_tokens,
  )
  inputs = {pathlib.Path(video).resolve() for video in videos}
  for suffixes, paths in (
    (timeline.SUFFIXES, files.timelines),
    (('.npz',), [files.features] if files.features else []),
    ((), files.copies.values()),
  ):
    for path in paths:
      if path.resolve() in inputs:
        raise UserError(f'{path} is an input video; choose another name')
      check_target(path, overwrite, suffixes)
  return files


def _copy_paths(save: str, videos: Sequence[str]) -> dict[str, pathlib.Path]:
  """Returns the .mp4 file for the copy of each video.

  In the folder `save`, copies are placed as the videos are in the folder that
  is common to all of them.

  Raises:
    UserError: `save` is neither a folder nor an .mp4 file for one video.
  """
  target = pathlib.Path(save).expanduser()
  if not save.endswith('/') and not target.is_dir():
    if target.suffix != '.mp4' or len(videos) > 1:
      raise UserError(
        f'--save={save}: expected a name that ends in .mp4 for one video, or '
        f'in / for a folder of several; there are {len(videos)}'
      )
    return dict.fromkeys(videos, target)
  absolute = [os.path.abspath(video) for video in videos]
  common = os.path.commonpath([os.path.dirname(path) for path in absolute])
  copies = {}
  for video, path in zip(videos, absolute, strict=True):
    relative = os.path.relpath(path, common)
    suffix = '' if relative.lower().endswith('.mp4') else '.mp4'
    copies[video] = target / (relative + suffix)
  return copies
