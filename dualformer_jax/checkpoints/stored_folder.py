"""Folders at gs:// and s3://, and local copies of checkpoints in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent import futures
import contextlib
import fcntl
import logging
import os
import pathlib
import re
import shutil
from typing import Any, TypeVar
import uuid

from dualformer_jax import files, store_client
from dualformer_jax.checkpoints import checksums, hub
from dualformer_jax.errors import UserError

# Folders in the workdir of a training run.
LATEST, BEST = 'checkpoints', 'best'
# Orbax writes this file last, so a folder that has it is complete.
MARKER = '_CHECKPOINT_METADATA'

_ADDRESS = re.compile(r'(?:gs|s3)://.*', re.ASCII)
_PARALLEL = 16  # files that are copied at once
_SECONDS = 30.0  # to repeat a request for
_LOG = logging.getLogger(__name__)

_Item = TypeVar('_Item')


def is_address(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is the URL of a folder or file in a store."""
  return isinstance(path, str) and _ADDRESS.fullmatch(path) is not None


class StoredFolder:
  """The files below a URL; names are paths below it.

  Failed requests are repeated. All methods raise StoreError if that does not
  help. Can be shared by threads.
  """

  def __init__(self, url: str):
    """Opens the client of the store; raises StoreError if there is none."""
    self.url = url.rstrip('/')
    self._files, self._root = store_client.open_store(self.url, 'it')

  def sizes(self, below: str = '') -> dict[str, int]:
    """Returns the size of each file, whose name is '' if the URL is of one.

    Raises:
      StoreError: also if a name would lead out of a local copy.
    """
    path = f'{self._root}/{below}' if below else self._root

    def find() -> dict[str, Any]:
      self._files.invalidate_cache()
      return self._files.find(path, detail=True)

    found = _repeat(self.url, find)
    for name in found:
      if '..' in name.split('/'):
        raise store_client.StoreError(f'{name}: has .. in its name; remove it')
    return {
      name[len(self._root) :].strip('/'): int(entry['size'] or 0)
      for name, entry in found.items()
      if not name.endswith('/')  # of folders, as some tools make
    }

  def read(self, name: str) -> bytes | None:
    """Returns the content of a file; None if it does not exist."""

    def read() -> bytes | None:
      try:
        return self._files.cat_file(self._path(name))
      except FileNotFoundError:
        return None

    return _repeat(self._url(name), read)

  def write(self, name: str, content: bytes) -> None:
    """Writes a file."""
    _repeat(
      self._url(name),
      lambda: self._files.pipe_file(self._path(name), content),
      'written',
    )

  def check_writable(self) -> None:
    """Writes and removes a small file."""
    probe = f'.{uuid.uuid4().hex}.probe'
    try:
      self.write(probe, b'dualformer_jax can write here\n')
      self.remove([probe])
    except store_client.StoreError as error:
      reason = str(error).replace(f'/{probe}', '', 1)
      if isinstance(error.__cause__, FileNotFoundError):
        reason = f'{self.url}: there is no such bucket; create it, or choose'
        reason += ' another'
      raise store_client.StoreError(reason) from error

  def upload(self, name: str, path: pathlib.Path) -> None:
    """Writes a file, with the content of a local one."""
    _repeat(
      self._url(name),
      lambda: self._files.put_file(str(path), self._path(name)),
      'written',
    )

  def download(self, name: str, path: pathlib.Path, size: int) -> None:
    """Writes a local file; raises StoreError unless it has so many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{uuid.uuid4().hex}.partial')

    def get() -> None:
      self._files.get_file(self._path(name), str(partial))
      if partial.stat().st_size != size:
        raise ConnectionError(f'got {partial.stat().st_size} of {size} bytes')

    try:
      _repeat(self._url(name), get)
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)

  def remove(self, names: Iterable[str]) -> None:
    """Removes files; the markers of complete checkpoints first."""
    names = list(names)

    def remove(name: str) -> None:
      with contextlib.suppress(FileNotFoundError):
        self._files.rm_file(self._path(name))

    def repeat(name: str) -> None:
      _repeat(self._url(name), lambda: remove(name), 'removed')

    for_all(repeat, [name for name in names if name.endswith(MARKER)])
    for_all(repeat, [name for name in names if not name.endswith(MARKER)])

  def _path(self, name: str) -> str:
    return f'{self._root}/{name}' if name else self._root

  def _url(self, name: str) -> str:
    return f'{self.url}/{name}' if name else self.url


def _repeat(
  what: str, function: Callable[[], _Item], verb: str = 'read'
) -> _Item:
  return store_client.repeat(what, function, verb, _SECONDS)


def complete_steps(names: Collection[str], kind: str) -> list[int]:
  """Returns the steps of complete checkpoints below a folder, sorted."""
  start = f'{re.escape(kind)}/' if kind else ''
  pattern = re.compile(rf'{start}(\d+)/{MARKER}')
  return sorted(int(found[1]) for n in names if (found := pattern.fullmatch(n)))


def for_all(
  function: Callable[[_Item], object], items: Iterable[_Item]
) -> None:
  """Calls a function for several items at a time; raises its first error."""
  with futures.ThreadPoolExecutor(_PARALLEL) as pool:
    calls = [pool.submit(function, item) for item in items]
    try:
      for call in futures.as_completed(calls):
        call.result()
    finally:
      for call in calls:
        call.cancel()


def copy_checkpoint(
  store: StoredFolder, sizes: dict[str, int], below: str, folder: pathlib.Path
) -> None:
  """Makes a local folder a copy of a stored checkpoint, unless it is one.

  Args:
    store: where the checkpoint is.
    sizes: of the files there, as of `store.sizes`.
    below: the checkpoint's folder; '' if it is `store` itself.
    folder: the copy, which appears when it is complete.
  """
  start = f'{below}/' if below else ''
  wanted = {n[len(start) :]: s for n, s in sizes.items() if n.startswith(start)}
  if _is_copy(store, wanted, start, folder):
    return
  _LOG.info(
    'downloading %s/%s: %.1f MB', store.url, below, sum(wanted.values()) / 1e6
  )
  partial = folder.parent.parent / f'.{uuid.uuid4().hex}.partial'
  files.check_writable(partial, sum(wanted.values()))
  with files.unfinished(partial):
    for_all(
      lambda name: store.download(start + name, partial / name, wanted[name]),
      wanted,
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)


def _is_copy(
  store: StoredFolder, sizes: dict[str, int], start: str, folder: pathlib.Path
) -> bool:
  """Returns whether a folder has the same files, by sizes and checksums."""
  local = {
    path.relative_to(folder).as_posix(): path.stat().st_size
    for path in folder.rglob('*')
    if path.is_file()
  }
  # The marker states when the checkpoint was written.
  small = [name for name in (MARKER, checksums.FILE) if name in sizes]
  if len(small) < 2 or local != sizes:
    return False
  if any((folder / n).read_bytes() != store.read(start + n) for n in small):
    return False
  try:
    checksums.verify(folder)
  except ValueError:
    return False
  return True


def copy_latest(
  store: StoredFolder, sizes: dict[str, int], kind: str, folder: pathlib.Path
) -> None:
  """Makes FOLDER/KIND a copy of the latest complete checkpoint in KIND.

  Other checkpoints in it are removed.
  """
  steps = complete_steps(sizes, kind)
  below = [f'{kind}/{step}' if kind else str(step) for step in steps[-1:]]
  parent = folder / kind if kind else folder
  for other in parent.glob('*'):
    is_kept = other in [folder / name for name in below]
    if other.is_dir() and other.name.isdigit() and not is_kept:
      shutil.rmtree(other)
  for name in below:
    copy_checkpoint(store, sizes, name, folder / name)


def local_path(
  path: str | os.PathLike[str],
  kinds: Sequence[str] = (LATEST,),
  names: Sequence[str] = ('report.json',),
) -> pathlib.Path:
  """Returns a path, or that of a local copy if it is a URL.

  Of a URL with gs:// or s3://, the copy is a file, a checkpoint folder, or a
  folder with the latest complete checkpoints. For hf://, see `hub.local_path`.

  Args:
    path: a path or a URL.
    kinds: folders in a workdir to copy the latest checkpoint of.
    names: files in a workdir to copy as well.

  Raises:
    UserError: there is no such file or folder, or it cannot be read.
  """
  if not (isinstance(path, str) and is_address(path)):
    return hub.local_path(path)
  folder = store_client.copy_folder('copies', path)
  store = StoredFolder(path)
  sizes = store.sizes()
  if not sizes:
    raise store_client.StoreError(f'{path}: does not exist, or has no files')
  with _locked(folder):
    if '' in sizes:
      store.download('', folder, sizes[''])
    elif MARKER in sizes or {hub.CONFIG, hub.WEIGHTS} <= sizes.keys():
      copy_checkpoint(store, sizes, '', folder)
    else:
      folder.mkdir(parents=True, exist_ok=True)
      is_workdir = any(complete_steps(sizes, kind) for kind in kinds)
      for kind in kinds if is_workdir or not kinds else ('',):
        copy_latest(store, sizes, kind, folder)
      for name in names:
        (folder / name).unlink(missing_ok=True)
        if name in sizes:
          store.download(name, folder / name, sizes[name])
  return folder


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Lets one process at a time change a copy."""
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f'.{folder.name}.lock'), 'wb') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
      yield
  except OSError as error:
    raise UserError(
      f'{error.filename or folder} cannot be written: {error.strerror}; set '
      'XDG_CACHE_HOME to a folder that can'
    ) from error
