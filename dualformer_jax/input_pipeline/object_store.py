"""Files in object stores, gs://, s3:// and hf://, read by range requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
from typing import Any

from dualformer_jax import files, store_client
from dualformer_jax.store_client import StoreError

# Small files of a prepared dataset, which are copied.
_METADATA = (
  'dataset_info.json',
  'features.json',
  'label.labels.txt',
  'report.json',
)
_INDEX = '.index.npz'
_LOG = logging.getLogger(__name__)


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
    self._files, self._root = store_client.open_store(url)
    found = store_client.repeat(url, self._list)
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

    return store_client.repeat(f'{self.url}/{name}', read)

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
    self._folder, self._max_bytes = folder, max_bytes
    files.check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with self._total() as total:
      parts = folder.rglob('*.part')
      total[:] = [sum(path.stat().st_size for path in parts)]

  def get(self, key: str, read: Callable[[], bytes]) -> bytes:
    """Returns what `read` returns, from the cache if it is there."""
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = self._folder / digest[:2] / f'{digest}.part'
    try:
      return path.read_bytes()
    except OSError:
      content = read()
    try:
      with self._total() as total:
        has_room = total[0] + len(content) <= self._max_bytes
        total[0] += len(content) if has_room else 0
      if has_room:
        with files.atomic_write(path) as file:
          file.write(content)
    except OSError as error:  # as by a full disk
      _LOG.warning('the cache is no longer written: %s', error)
      self._max_bytes = 0
    return content

  @contextlib.contextmanager
  def _total(self) -> Iterator[list[int]]:
    """Locks the number of bytes of all files, which the block may change."""
    descriptor = os.open(self._folder / 'size', os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, 'r+') as file:
      fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
      text = file.read()
      total = [int(text) if text.isdigit() else 0]
      yield total
      file.seek(0)
      file.truncate()
      file.write(str(total[0]))


def local_folder(url: str) -> pathlib.Path:
  """Returns the local folder for what is kept of a URL."""
  digest = hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]
  return store_client.cache_folder() / digest
