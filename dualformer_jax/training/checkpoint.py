"""Checkpoint folders: all that is done with Orbax.

A checkpoint folder holds arrays ('params', 'batch_stats' and, while training,
'opt_state' and 'ema_params', if these are averaged) and a description in JSON:
the model's fields, how its input is prepared, and its classes. A training run
keeps a series of them.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.views import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import sharding
from dualformer_jax.training.step import TrainState

_FORMAT = 1

# Folders in the workdir of a training run.
NEWEST = 'checkpoints'
BEST = 'best'

_CHECKSUMS = 'SHA256SUMS'
# A network's file system may show late what another host has written.
_SECONDS_UNTIL_SHARED = 30
# Averaged parameters; where they are, a model is used with them.
_EMA = 'ema_params'


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint folder says of itself.

  Attributes:
    model: the fields of DualFormer.
    preprocessing: how videos become clips and test views.
    class_names: one for each class, in order.
    multi_label: whether a video may have several classes.
    step: optimiser steps done; 0 for a converted model.
    data_position: of the training input, at this step; None if not training.
    score: of validation at this step, for the best one of a run; else None.
    config: what the run was started with; None if not training.
  """

  model: dict[str, Any]
  preprocessing: Preprocessing
  class_names: tuple[str, ...]
  multi_label: bool = False
  step: int = 0
  data_position: dict[str, Any] | None = None
  score: float | None = None
  config: dict[str, Any] | None = None

  def build_model(self, **changes: Any) -> DualFormer:
    """Returns the model, with some fields changed (such as dtype)."""
    return DualFormer(**{**self.model, **changes})


class Checkpoints:
  """A series of checkpoints of one training run, of which the last are kept.

  Saving is asynchronous; a checkpoint appears under its step's number when it
  is whole. Not for use from several threads.
  """

  def __init__(self, folder: str | os.PathLike[str], keep: int = 1):
    """Opens a series, making its folder if need be.

    Args:
      folder: WORKDIR/checkpoints, say.
      keep: how many of the last to keep.
    """
    # Any: for type checkers, Orbax's policies do not follow its protocols.
    always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    latest: Any = ocp.training.preservation_policies.LatestN(keep)
    self._checkpointer = ocp.training.Checkpointer(
      os.path.abspath(folder),
      save_decision_policy=always,
      preservation_policy=latest,
      cleanup_tmp_directories=True,
    )

  def newest(self) -> pathlib.Path | None:
    """Returns the newest checkpoint folder, None if there is none."""
    latest = self._checkpointer.latest
    if latest is None:
      return None
    return pathlib.Path(self._checkpointer.directory) / str(latest.step)

  def save(self, state: TrainState, description: Description) -> None:
    """Starts to save the state, unless its step is saved already.

    If the last one is not on disk yet, waits for that first.

    Args:
      state: what to save; it may be donated as soon as this returns.
      description: with the state's step and the position of the input.
    """
    self.wait()  # Orbax already counts what it still writes
    latest = self._checkpointer.latest
    if latest is None or latest.step < description.step:
      self._checkpointer.save_checkpointables_async(
        description.step,
        _with_arrays(
          {
            'params': state.params,
            'batch_stats': state.batch_stats,
            'opt_state': state.opt_state,
            _EMA: state.ema_params,
          }
        ),
        custom_metadata=_to_json(description),
      )

  def restore(
    self, abstract_state: TrainState
  ) -> tuple[TrainState, Description]:
    """Returns the newest checkpoint.

    Args:
      abstract_state: shapes, types and shardings of the state to return; any
        mesh will do, whatever the mesh it was saved from.
    """
    folder = self.newest()
    assert folder is not None
    description = read_description(folder)
    if (abstract_state.ema_params is None) == (folder / _EMA).is_dir():
      saved = 'with' if (folder / _EMA).is_dir() else 'without'
      raise UserError(
        f'{folder} was saved {saved} averaged parameters; keep '
        'config.ema_decay as it was, or begin in a new workdir'
      )
    loaded = _load(
      folder,
      {
        'params': abstract_state.params,
        'batch_stats': abstract_state.batch_stats,
        'opt_state': abstract_state.opt_state,
        _EMA: abstract_state.ema_params,
      },
    )
    step = sharding.put_tree(
      np.asarray(description.step, abstract_state.step.dtype),
      abstract_state.step.sharding,
    )
    return TrainState(step=step, **loaded), description

  def wait(self) -> None:
    """Waits until what was saved is on disk."""
    self._checkpointer.wait()
    newest = self.newest()
    if newest and jax.process_index() == 0:
      _write_checksums(newest)

  def close(self) -> None:
    """Waits until all is on disk, and ends the series."""
    self.wait()
    self._checkpointer.close()


def check_shared(workdir: pathlib.Path) -> None:
  """Makes sure that a workdir is one folder for all hosts, and makes it.

  Raises:
    UserError: this host does not see what the first one writes there.
  """
  if jax.process_count() == 1:
    return
  number = int(
    multihost_utils.broadcast_one_to_all(np.uint32(time.time_ns() % 2**32))
  )
  mark = workdir / f'.seen_by_all_hosts_{number}'
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    mark.touch()
  multihost_utils.sync_global_devices('marked')
  deadline = time.monotonic() + _SECONDS_UNTIL_SHARED
  while not mark.exists():
    if time.monotonic() > deadline:
      raise UserError(
        f'{workdir} is not the same folder on all hosts; expected one on a '
        'file system that they share (NFS, Filestore, a mounted bucket): give '
        'that as --workdir'
      )
    time.sleep(1)
  multihost_utils.sync_global_devices('seen')
  if jax.process_index() == 0:
    mark.unlink()


def save_model(
  folder: str | os.PathLike[str],
  variables: Mapping[str, Any],
  description: Description,
) -> None:
  """Writes a checkpoint folder of a model that is not being trained.

  Args:
    folder: where to; it must not exist, or be empty.
    variables: 'params' and, if the model has any, 'batch_stats'.
    description: what the folder says of itself.

  Raises:
    UserError: there is something in the folder already, or it cannot be
      written.
  """
  path = pathlib.Path(folder).expanduser().absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(
      f'{folder} exists and is not an empty folder; nothing was written: '
      'choose another, or remove it first'
    )
  try:
    if path.exists():
      path.rmdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    ocp.save_checkpointables(
      str(path),
      _with_arrays(jax.tree.map(jnp.asarray, dict(variables))),
      custom_metadata=_to_json(description),
    )
    _write_checksums(path)
  except OSError as error:
    raise UserError(f'{folder} cannot be written: {error}') from error


def load_model(
  path: str | os.PathLike[str],
) -> tuple[dict[str, Any], Description]:
  """Returns parameters and BatchNorm statistics, on the CPU, and description.

  If parameters were averaged while training, it is the average.

  Args:
    path: as in `find`.

  Raises:
    UserError: there is no checkpoint, it is damaged, or its arrays are not
      those of the model that it describes.
  """
  folder = find(path)
  description = read_description(folder)
  shapes = variable_shapes(description.build_model(), str(folder))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend='cpu')[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    shapes,
  )
  if not (folder / _EMA).is_dir():
    return _load(folder, abstract), description
  loaded = _load(
    folder, {_EMA: abstract['params'], 'batch_stats': abstract['batch_stats']}
  )
  loaded['params'] = loaded.pop(_EMA)
  return loaded, description


def variable_shapes(model: DualFormer, source: str) -> dict[str, Any]:
  """Returns the shapes and types of a model's 'params' and 'batch_stats'.

  Args:
    model: the model.
    source: where its fields are from, for the error.

  Raises:
    UserError: its fields do not make a model.
  """
  clips = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  try:
    variables = jax.eval_shape(model.init, jax.random.key(0), clips)
  except Exception as error:  # of many kinds, one for each field
    raise UserError(
      f'{source} describes no model ({type(error).__name__}: {error})'
    ) from error
  return {name: variables.get(name, {}) for name in ('params', 'batch_stats')}


def find(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the checkpoint folder that `path` means.

  Args:
    path: a checkpoint folder, or a training run's workdir (or its folder of
      checkpoints), of which the newest is meant.

  Raises:
    UserError: there is none.
  """
  folder = pathlib.Path(path).expanduser().absolute()
  if not folder.is_dir():
    raise UserError(
      f'no checkpoint folder at {path}; expected one made by dualformer_jax: '
      'to convert a .pth file, run python -m dualformer_jax.convert'
    )
  if (folder / '_CHECKPOINT_METADATA').is_file():
    return folder
  for parent in (folder / NEWEST, folder):
    if newest := newest_of(parent):
      return newest
  raise UserError(
    f'{path} holds no checkpoint; expected a checkpoint folder or the workdir '
    'of a training run that has saved one'
  )


def newest_of(series: pathlib.Path) -> pathlib.Path | None:
  """Returns the newest checkpoint folder of a series, None if there is none."""
  steps = [
    int(child.name)
    for child in (series.iterdir() if series.is_dir() else ())
    if child.name.isdigit() and (child / '_CHECKPOINT_METADATA').is_file()
  ]
  return series / str(max(steps)) if steps else None


def read_description(folder: pathlib.Path) -> Description:
  """Returns what a checkpoint folder says of itself.

  Raises:
    UserError: it is damaged or not a checkpoint of this project.
  """
  try:
    text = (folder / '_CHECKPOINT_METADATA').read_text()
    fields = json.loads(text)['custom_metadata']['dualformer']
    if fields.pop('format') != _FORMAT:
      raise UserError(
        f'was written by another version of dualformer_jax; expected format '
        f'{_FORMAT}: update dualformer_jax'
      )
    for name, kind in (
      ('class_names', list),
      ('step', int),
      ('multi_label', bool),
    ):
      if type(fields[name]) is not kind:
        raise ValueError(f'{name} is {fields[name]!r}, not a {kind.__name__}')
    if not all(isinstance(name, str) for name in fields['class_names']):
      raise ValueError('class_names holds what is no name')
    fields['model'] = _tuples(fields['model'])
    fields['preprocessing'] = Preprocessing(**_tuples(fields['preprocessing']))
    fields['class_names'] = tuple(fields['class_names'])
    description = Description(**fields)
    if len(description.class_names) != description.build_model().num_classes:
      raise ValueError('class_names does not have one name for each class')
    return description
  except UserError as error:
    raise UserError(f'{folder}: {error}') from error
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{folder} is not a whole checkpoint of dualformer_jax '
      f'({type(error).__name__}: {error}); copy or convert it again'
    ) from error


def _to_json(description: Description) -> dict[str, Any]:
  return {'dualformer': {'format': _FORMAT, **dataclasses.asdict(description)}}


def _tuples(value: Any) -> Any:
  """Undoes what JSON does to tuples, which modules need to be hashable."""
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_tuples(item) for item in value)
  return value


def _load(folder: pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
  wanted = _with_arrays(abstract)
  try:
    if jax.process_index() == 0:  # for all hosts, as it reads everything
      _verify(folder, wanted)
    _compare(ocp.checkpointables_metadata(str(folder)).metadata, wanted)
    loaded = ocp.load_checkpointables(str(folder), wanted)
  except Exception as error:  # of many kinds, one for each way to be broken
    cause: BaseException = error  # Orbax's own is of little help; its first is
    while before := cause.__cause__ or cause.__context__:
      cause = before
    reason = str(cause).strip().partition('\n')[0][:300]
    raise UserError(
      f'{folder} cannot be read: {reason}; it is damaged, or of a model other '
      'than it says: copy or convert it again'
    ) from error
  return {**abstract, **loaded}


def _compare(found: Any, wanted: dict[str, Any]) -> None:
  """Raises ValueError where arrays have other names or shapes than wanted."""
  shapes = [
    {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in ({name: found.get(name, {}) for name in wanted}, wanted)
  ]
  differences = [
    f'{name} is {shapes[0].get(name, "absent")}, expected '
    f'{shapes[1].get(name, "none")}'
    for name in sorted({**shapes[0], **shapes[1]})
    if shapes[0].get(name) != shapes[1].get(name)
  ]
  if differences:
    more = len(differences) - 3
    raise ValueError(
      '; '.join(differences[:3]) + (f'; and {more} more' if more > 0 else '')
    )


def _write_checksums(folder: pathlib.Path) -> None:
  """Writes the file that _verify reads, unless it is there, of a whole folder.

  Orbax would not notice a change among the numbers of an array. The format is
  that of the program sha256sum.
  """
  if (folder / _CHECKSUMS).exists():
    return
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  lines = [f'{_digest(path)}  {path.relative_to(folder)}\n' for path in files]
  partial = folder / f'.{_CHECKSUMS}.partial'
  partial.write_text(''.join(lines))
  partial.replace(folder / _CHECKSUMS)


def _verify(folder: pathlib.Path, wanted: dict[str, Any]) -> None:
  """Raises ValueError where a file that is needed is not as it was written.

  A folder without checksums passes: a training run that was killed had saved
  it, but not come to write them.
  """
  checksums = folder / _CHECKSUMS
  for line in checksums.read_text().splitlines() if checksums.exists() else ():
    digest, _, name = line.partition('  ')
    path = folder / name
    if name.partition('/')[0] in wanted and (
      not path.is_file() or _digest(path) != digest
    ):
      raise ValueError(f'{name} is not as it was written')


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _with_arrays(trees: dict[str, Any]) -> dict[str, Any]:
  """Leaves out the trees without arrays, which Orbax does not take."""
  return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
