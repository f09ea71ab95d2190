"""Files in object stores, gs://, s3:// and hf://, read by range requests."""

from __future__ import annotations

from collections.abc import Callable
import hashlib
import logging
import os
import pathlib
import tempfile
import time
from typing import Any, TypeVar

import fsspec

from dualformer_jax import errors, files

# The package's extra with the client of each protocol.
_EXTRAS = {'gs': 'gcs', 's3': 's3', 'hf': 'hub'}
# Small files of a prepared dataset, which are copied.
_METADATA = (
  'dataset_info.json',
  'features.json',
  'label.labels.txt',
  'report.json',
)
_INDEX = '.index.npz'
# Half a minute in all, besides the time of the requests.
_ATTEMPTS = 8
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0
_LOG = logging.getLogger(__name__)

_Result = TypeVar('_Result')


class StoreError(errors.UserError):
  """An object store that cannot be read. Unlike a damaged video, it ends a run.

  Otherwise, what a run sees would depend on the network.
  """


def is_url(path: str) -> bool:
  """Whether a path is a URL of an object store, rather than of a local file."""
  return '://' in path


class ObjectStore:
  """Files below a URL. Can be shared by threads, and pickled.

  Failed requests are retried.

  Attributes:
    url: the URL of the folder.
    sizes: size in bytes of each file, by its path below `url`.
    metadata: local folder with copies of the small files of prepared datasets.
  """

  def __init__(self, url: str, metadata: pathlib.Path):
    """Lists the files, and copies small ones.

    Args:
      url: URL of a folder, such as 's3://BUCKET/FOLDER'.
      metadata: folder to copy the small files of prepared datasets to.

    Raises:
      StoreError: the folder does not exist or cannot be read, or the client of
        the protocol is not installed.
      UserError: the files cannot be copied.
    """
    self.url, self.metadata = url.rstrip('/'), metadata
    protocol = url.partition('://')[0]
    if protocol not in _EXTRAS:
      expected = ', '.join(f'{name}://' for name in _EXTRAS)
      raise StoreError(f'{url}: expected a path, or a URL with {expected}')
    try:
      self._files, self._root = fsspec.url_to_fs(self.url)
    except ImportError as error:
      extra = _EXTRAS[protocol]
      message = errors.missing_extra(f'{url}: reading it', extra)
      raise StoreError(message) from error
    except ValueError as error:
      raise StoreError(f'{url}: is not a valid URL: {error}') from error
    found = self._repeat(url, self._list)
    self.sizes = {
      path[len(self._root) :].strip('/'): int(entry['size'] or 0)
      for path, entry in found.items()
    }
    if not self.sizes:
      raise StoreError(f'{url}: does not exist, or has no files')
    self._copy_metadata()

  def _list(self) -> dict[str, Any]:
    self._files.invalidate_cache()
    return self._files.find(self._root, detail=True)

  def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
    """Returns the bytes from `start` on and before `end` of a file.

    Raises:
      StoreError: the file cannot be read, or ends before `end`.
    """
    if name not in self.sizes:
      raise StoreError(f'{self.url}/{name}: does not exist')
    end = self.sizes[name] if end is None else end
    path = f'{self._root}/{name}'

    def read() -> bytes:
      if self._files.async_impl:
        content = self._files.cat_file(path, start=start, end=end)
      else:
        # Without a cache, which would read several megabytes ahead.
        with self._files.open(path, 'rb', cache_type='none') as file:
          file.seek(start)
          content = file.read(end - start)
      if len(content) != end - start:
        raise OSError(f'got {len(content)} of {end - start} bytes')
      return content

    return self._repeat(f'{self.url}/{name}', read)

  def _copy_metadata(self) -> None:
    folder = self.metadata
    wanted = {
      name
      for name in self.sizes
      if name.endswith(_INDEX) or name.rpartition('/')[2] in _METADATA
    }
    # Not the indices and labels that were made here.
    for path in folder.rglob('*'):
      if path.name in _METADATA and str(path.relative_to(folder)) not in wanted:
        path.unlink(missing_ok=True)
    for name in sorted(wanted):
      path = folder / name
      if name.endswith(_INDEX) and path.exists():
        continue  # It has the sizes of the files that it is for.
      content = self.read(name)
      if path.exists() and path.read_bytes() == content:
        continue
      with files.output_file(path) as file:
        file.write(content)

  def _repeat(self, what: str, function: Callable[[], _Result]) -> _Result:
    """Calls a function until it succeeds.

    Raises:
      StoreError: repeating does not help, or did not.
    """
    wait = _FIRST_WAIT
    for attempt in range(1, _ATTEMPTS + 1):
      try:
        return function()
      except FileNotFoundError as error:
        raise StoreError(f'{what}: does not exist') from error
      except Exception as error:  # The clients of the stores raise anything.
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        if isinstance(error, PermissionError) or 'Credential' in reason:
          raise StoreError(
            f'{what}: access is denied ({reason}); log in with the tools of the'
            ' store, or check its permissions'
          ) from error
        if attempt == _ATTEMPTS:
          raise StoreError(
            f'{what}: cannot be read, after {attempt} attempts: {reason}'
          ) from error
        _LOG.info('%s: %s; trying again', what, reason)
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)
    raise AssertionError


class DiskCache:
  """Parts of files on a local disk, up to a total size. Shared by processes.

  Nothing is evicted: with videos in random order, that would lower the hit
  rate.
  """

  def __init__(self, folder: pathlib.Path, max_bytes: int):
    """Creates the folder.

    Raises:
      UserError: the folder cannot be written.
    """
    self._folder = folder
    files.check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._free = max_bytes - sum(
      p.stat().st_size for p in folder.rglob('*.part')
    )

  def get(self, key: str, read: Callable[[], bytes]) -> bytes:
    """Returns what `read` returns, from the cache if it is there."""
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = self._folder / digest[:2] / f'{digest}.part'
    try:
      return path.read_bytes()
    except OSError:
      content = read()
    if len(content) <= self._free:
      try:
        with files.atomic_write(path) as file:
          file.write(content)
        self._free -= len(content)
      except OSError as error:  # as by a full disk
        _LOG.warning('the cache is no longer written: %s', error)
        self._free = 0
    return content


def local_folder(url: str) -> pathlib.Path:
  """Returns the local folder for what is kept of a URL."""
  digest = hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]
  try:
    folder = pathlib.Path('~/.cache').expanduser()
  except RuntimeError:  # There is no home folder.
    folder = pathlib.Path(tempfile.gettempdir())
  folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or folder)
  return folder / 'dualformer_jax' / digest
