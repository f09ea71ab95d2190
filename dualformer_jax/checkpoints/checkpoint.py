"""Checkpoint folders: metadata and trees of arrays, written by Orbax.

Reading verifies SHA256SUMS, because Orbax does not detect changed array values.
A checkpoint without this file is accepted: its process was killed between
saving and hashing.

Models are also read from portable checkpoints; see portable.py.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import functools
import hashlib
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from orbax.checkpoint import v1 as ocp

from dualformer_jax.checkpoints import checksums, portable, stored_folder
from dualformer_jax.checkpoints.messages import listed
from dualformer_jax.checkpoints.metadata import (
  CheckpointMetadata,
  read_metadata,
)
from dualformer_jax.errors import UserError
from dualformer_jax.models.dualformer import DualFormer

# Folders in the workdir of a training run.
LATEST, BEST = stored_folder.LATEST, stored_folder.BEST

_EMA = 'ema_params'  # averages, which readers use in place of 'params'


class Checkpoints:
  """The checkpoints of a training run, of which the latest `keep` are kept.

  Saving is asynchronous: `save` returns as soon as the arrays are copied to
  host memory. One save runs at a time. Not thread-safe.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    keep: int = 1,
    *,
    is_shared: bool = True,
    on_saved: Callable[[pathlib.Path], object] | None = None,
  ):
    """Opens the folder, and creates it if needed.

    Args:
      folder: where the checkpoints are.
      keep: how many there are at most.
      is_shared: whether all processes see the same folder. If not, process 0
        saves whole arrays in its own.
      on_saved: called by process 0 in a thread, with each complete checkpoint.
    """
    self._folder = pathlib.Path(os.path.abspath(folder))
    self._is_shared = is_shared or jax.process_count() == 1
    self._on_saved = on_saved
    if not self._is_shared:
      self._folder.mkdir(parents=True, exist_ok=True)
    # Any: for type checkers, Orbax's policies do not follow its protocols.
    last: Any = ocp.training.preservation_policies.LatestN(keep)
    self._checkpointer = ocp.training.Checkpointer(
      str(self._folder),
      preservation_policy=last,
      cleanup_tmp_directories=True,
    )
    self._executor = futures.ThreadPoolExecutor(1, 'checksums')
    self._pending: futures.Future[None] | None = None

  def latest(self) -> pathlib.Path | None:
    """Returns the latest checkpoint folder that is complete, if any."""
    return latest_of(self._folder)

  def save(
    self, trees: Mapping[str, Any], metadata: CheckpointMetadata
  ) -> None:
    """Starts to save, unless the step is saved already.

    Waits only if the previous save is still running.

    A tree may be None. Arrays may be donated once this returns.
    Raises UserError if this or the previous save fails.
    """
    self.wait()
    latest = self._checkpointer.latest
    if latest is not None and latest.step >= metadata.step:
      return
    arrays = _with_arrays(trees)
    if not self._is_shared:
      arrays = jax.tree.map(_whole, arrays)
    with _writing(self._folder):
      self._checkpointer.save_checkpointables_async(
        metadata.step, arrays, force=True, custom_metadata=metadata.to_json()
      )
    self._pending = self._executor.submit(self._finish, metadata.step)

  def restore(
    self, abstract_trees: Mapping[str, Any]
  ) -> tuple[dict[str, Any], CheckpointMetadata]:
    """Returns the trees and the metadata of the latest checkpoint.

    Abstract trees are of jax.ShapeDtypeStruct with shardings on any mesh, or
    None. Raises UserError if the checkpoint is damaged or has other arrays.
    """
    folder = self.latest()
    assert folder is not None
    metadata = read_metadata(folder)
    is_saved = (folder / _EMA).is_dir()
    if is_saved == (abstract_trees.get(_EMA) is None):
      raise UserError(
        f'{folder} was saved {"with" if is_saved else "without"} averaged '
        'parameters; keep config.ema_decay as it was, or use a new workdir'
      )
    return _load(folder, abstract_trees), metadata

  def wait(self) -> None:
    """Waits until the last save is complete; raises UserError if it failed."""
    pending, self._pending = self._pending, None
    if pending is not None:
      with _writing(self._folder):
        pending.result()

  def check(self) -> None:
    """Raises UserError if the last save has failed; does not wait."""
    if self._pending is not None and self._pending.done():
      self.wait()

  def close(self) -> None:
    """Waits until the last save is complete, and frees all resources."""
    self.wait()
    self._executor.shutdown()
    self._checkpointer.close()

  def _finish(self, step: int) -> None:
    """Waits for Orbax and writes the checksums; runs in its own thread."""
    self._checkpointer.wait()
    if jax.process_index() == 0:
      checksums.write(self._folder / str(step))
      if self._on_saved is not None:
        self._on_saved(self._folder / str(step))


def _whole(array: jax.Array) -> np.ndarray:
  """Returns a whole array on each host; Orbax saves that of process 0."""
  if not array.is_fully_replicated:
    assert isinstance(array.sharding, NamedSharding)
    replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
    array = jax.jit(lambda x: x, out_shardings=replicated)(array)
  return np.array(array.addressable_data(0))


def save_model(
  folder: str | os.PathLike[str],
  variables: Mapping[str, Any],
  metadata: CheckpointMetadata,
) -> None:
  """Writes a checkpoint folder of a model that is not being trained."""
  path = pathlib.Path(folder).expanduser().absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(
      f'{folder} exists and is not an empty folder; nothing was written: '
      'choose another, or remove it first'
    )
  arrays = jax.tree.map(jnp.asarray, _with_arrays(variables))
  with _writing(path):
    path.mkdir(parents=True, exist_ok=True)
    path.rmdir()  # Orbax renames a temporary folder to it
    ocp.save_checkpointables(
      str(path), arrays, custom_metadata=metadata.to_json()
    )
    checksums.write(path)


def load_model(
  path: str | os.PathLike[str],
) -> tuple[dict[str, Any], CheckpointMetadata]:
  """Loads the variables of a model on the CPU, and its metadata.

  The path is that of `find`. Raises UserError if there is no checkpoint, it is
  damaged, or its arrays do not fit the model of its metadata.
  """
  folder = find(path)
  metadata = read_metadata(folder)
  shapes = variable_shapes(metadata.build_model(), str(folder))
  cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend='cpu')[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu),
    shapes,
  )
  params = _EMA if (folder / _EMA).is_dir() else 'params'
  abstract[params] = abstract.pop('params')
  variables = _load(folder, abstract)
  variables['params'] = variables.pop(params)
  return variables, metadata


def variables_hash(variables: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of the names, types, shapes and values of a model.

  It does not depend on how Orbax stores them, nor on the training state.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(variables):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    array = np.asarray(leaf)
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()


def variable_shapes(model: DualFormer, source: str) -> dict[str, Any]:
  """Returns the shapes and types of a model's 'params' and 'batch_stats'.

  Raises UserError, which names `source`, if its fields are invalid.
  """
  # Shapes do not depend on kernels, and reference kernels are traced fastest.
  # Any, as type checkers do not know that models are hashable.
  hashable: Any = model.clone(kernels='reference')
  try:
    variables = _init_shapes(hashable)
  except Exception as error:  # of many kinds, one for each field
    raise UserError(
      f'{source} describes no model ({type(error).__name__}: {error})'
    ) from error
  return {name: variables.get(name, {}) for name in ('params', 'batch_stats')}


@functools.lru_cache(maxsize=4)  # tracing takes a second
def _init_shapes(model: DualFormer) -> dict[str, Any]:
  clips = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  return dict(jax.eval_shape(model.init, jax.random.key(0), clips))


def find(path: str | os.PathLike[str]) -> pathlib.Path:
  """Finds a checkpoint folder; raises UserError if there is none.

  The path is a checkpoint folder, or the workdir of a training run or its
  folder of checkpoints, for the latest one. If it is a URL with gs:// or s3://,
  or an address on the Hugging Face Hub, hf://OWNER/NAME[@REVISION], the
  checkpoint is downloaded.
  """
  folder = stored_folder.local_path(path).absolute()
  if not folder.is_dir():
    raise UserError(
      f'no checkpoint folder at {path}; to convert a .pth file, run python -m '
      'dualformer_jax.convert'
    )
  if (folder / stored_folder.MARKER).is_file() or portable.is_portable(folder):
    return folder
  for parent in (folder / LATEST, folder):
    if latest := latest_of(parent):
      return latest
  raise UserError(
    f'{path} holds no checkpoint; expected a checkpoint folder or the workdir '
    'of a training run that has saved one'
  )


def latest_of(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns the latest complete checkpoint in WORKDIR/checkpoints, if any."""
  complete = [f.parent for f in folder.glob(f'*/{stored_folder.MARKER}')]
  steps = [child for child in complete if child.name.isdigit()]
  return max(steps, key=lambda child: int(child.name), default=None)


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
  """Makes errors in the block those of a folder that cannot be written."""
  try:
    yield
  except (OSError, ValueError) as error:
    # TensorStore's message has paths, and then the reason of the system.
    found = re.search(r'.*: (.+) \[os_error_code', str(error))
    reason = found[1] if found else getattr(error, 'strerror', None) or error
    raise UserError(f'{folder} cannot be written: {reason}') from error


def _load(
  folder: pathlib.Path, abstract_trees: Mapping[str, Any]
) -> dict[str, Any]:
  wanted = _with_arrays(abstract_trees)
  try:
    if jax.process_index() == 0:  # on behalf of all, as it reads every file
      checksums.verify(folder, wanted)
    if portable.is_portable(folder):
      arrays = portable.read_weights(folder)
      _compare(arrays, wanted)
      loaded = jax.tree.map(_put_like, arrays, wanted)
    else:
      _compare(ocp.checkpointables_metadata(str(folder)).metadata, wanted)
      loaded = ocp.load_checkpointables(str(folder), wanted)
  except Exception as error:  # of many kinds, one for each way to be broken
    cause: BaseException = error  # the first has the reason
    while before := cause.__cause__ or cause.__context__:
      cause = before
    reason = str(cause).strip().partition('\n')[0][:300]
    raise UserError(
      f'{folder} cannot be read: {reason}; it is damaged or does not fit the '
      'model of its metadata: copy or convert it again'
    ) from error
  return {**abstract_trees, **loaded}


def _put_like(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.device_put(array.astype(like.dtype), like.sharding)


def _compare(found: Any, wanted: dict[str, Any]) -> None:
  """Raises ValueError if arrays have other names or shapes than wanted."""

  def shapes(tree: Any) -> dict[str, Any]:
    trees = {name: tree.get(name) for name in wanted}
    return {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
      for path, leaf in jax.tree.leaves_with_path(trees)
    }

  has, needs = shapes(found), shapes(wanted)
  differences = [
    f'{name} is {has.get(name, "absent")}, expected {needs.get(name, "none")}'
    for name in sorted({**has, **needs})
    if has.get(name) != needs.get(name)
  ]
  if differences:
    raise ValueError(listed(differences, 3, '; '))


def _with_arrays(trees: Mapping[str, Any]) -> dict[str, Any]:
  """Drops the trees without arrays, which Orbax does not accept."""
  return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
