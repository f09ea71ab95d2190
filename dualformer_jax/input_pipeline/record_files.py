"""Random access to the records of TFRecord and ArrayRecord files.

TFRecord files get an index of record offsets. It is built in one scan of the
record headers and saved next to the files.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import functools
import itertools
import os
import pathlib
import struct
from typing import Any
import zipfile

from array_record.python import array_record_data_source
import google_crc32c
from jaxtyping import Int64
import numpy as np

from dualformer_jax import errors, files, progress
from dualformer_jax.input_pipeline import object_store

# A record of a TFRecord file: its length, the length's checksum, the data, the
# data's checksum.
_HEADER = struct.Struct('<QI')
_FOOTER = struct.Struct('<I')
_SCAN_THREADS = 16
# What reading a record raises. ArrayRecord raises RuntimeError.
READ_FAILURES = (OSError, ValueError, IndexError, RuntimeError, struct.error)


class ArrayRecordFiles:
  """ArrayRecord files, which have their own index."""

  def __init__(self, paths: list[str], lengths: list[int]):
    """Opens the files.

    Args:
      paths: paths of the shards.
      lengths: expected number of records in each shard.

    Raises:
      UserError: a file is damaged, or has another number of records.
    """

    def count_records(path: str) -> int:
      open_file = array_record_data_source.ArrayRecordDataSource
      with _damage_as_user_error(path), open_file([path]) as source:
        return len(source)

    with futures.ThreadPoolExecutor(_SCAN_THREADS) as threads:
      counts = threads.map(count_records, paths)
      for path, length, count in zip(paths, lengths, counts, strict=True):
        _check_count(path, count, length)
    self._source = array_record_data_source.ArrayRecordDataSource(paths)
    self._paths = paths
    self._first_indices = [0, *itertools.accumulate(lengths)]

  def read(self, index: int) -> bytes:
    """Returns a record; raises one of READ_FAILURES."""
    return self._source[index]

  def where(self, index: int) -> str:
    """Returns the file of a record and its position in it."""
    shard = bisect.bisect_right(self._first_indices, index) - 1
    return f'{self._paths[shard]}, record {index - self._first_indices[shard]}'


class TFRecordFiles:
  """TFRecord files with an index of record offsets."""

  def __init__(
    self,
    paths: list[str],
    lengths: list[int],
    index_path: pathlib.Path,
    store: object_store.ObjectStore | None = None,
    cache: object_store.DiskCache | None = None,
  ):
    """Loads the index, or builds and saves it.

    Args:
      paths: paths of the shards; in the object store, if one is given.
      lengths: expected number of records in each shard.
      index_path: file of the index.
      store: where the shards are, unless on a local disk.
      cache: where to keep records of the store.

    Raises:
      UserError: a file is damaged, or has another number of records.
    """
    self._paths, self._store, self._cache = paths, store, cache
    self._first_indices = [0, *itertools.accumulate(lengths)]
    # Identifies the files that the index was built from. Copies in a store have
    # other times.
    if store is None:
      stats = [os.stat(path) for path in paths]
      state = np.array([[s.st_size, s.st_mtime_ns] for s in stats], np.int64)
    else:
      state = np.array([[store.sizes[path], 0] for path in paths], np.int64)
    saved = load_arrays(index_path, 'state', 'starts')
    is_valid = saved is not None and _is_state(saved[0], state, store is None)
    offsets = saved[1] if saved else np.zeros(0, np.int64)
    size = sum(lengths) + len(paths)
    if not is_valid or len(offsets) != size:
      with futures.ThreadPoolExecutor(_SCAN_THREADS) as threads:
        found = threads.map(self._scan, paths)
        if store is not None:
          found = progress.track(
            found, f'Indexing {store.url} once', len(paths), 'files'
          )
        shards = list(found)
      for path, length, shard in zip(paths, lengths, shards, strict=True):
        _check_count(path, len(shard) - 1, length)
      offsets = np.concatenate(shards)
      save_arrays(index_path, state=state, starts=offsets)
    # Of each shard: the offset of each record, then the size of the file.
    self._offsets = offsets

  def read(self, index: int) -> bytes:
    """Returns a record; raises one of READ_FAILURES."""
    path, start, end = self._locate(index)
    if self._store is None:
      # Opened for each record, as there may be more shards than a process may
      # have files open.
      with open(path, 'rb', buffering=0) as file:
        content = os.pread(file.fileno(), end - start, start)
    elif self._cache is None:
      content = self._store.read(path, start, end)
    else:
      read = functools.partial(self._store.read, path, start, end)
      key = f'{self._store.url}/{path} {start} {end} {self._store.sizes[path]}'
      content = self._cache.get(key, read)
    if len(content) < end - start:
      raise ValueError('the file ends within it')
    _parse_header(content)
    data = content[_HEADER.size : -_FOOTER.size]
    if _FOOTER.unpack(content[-_FOOTER.size :])[0] != _masked_crc(data):
      raise ValueError('its checksum is wrong')
    return data

  def where(self, index: int) -> str:
    """Returns the file of a record and its position in it."""
    path, start, _ = self._locate(index)
    folder = f'{self._store.url}/' if self._store else ''
    return f'{folder}{path}, at byte {start}'

  def _scan(self, path: str) -> Int64[np.ndarray, ' n']:
    """Returns the offset of each record of a file, then its size."""
    with _damage_as_user_error(path):
      if self._store is not None:
        read = functools.partial(self._store.read, path)
        return _scan(self._store.sizes[path], read)
      with open(path, 'rb', buffering=0) as file:
        descriptor = file.fileno()
        return _scan(
          os.fstat(descriptor).st_size,
          lambda start, end: os.pread(descriptor, end - start, start),
        )

  def _locate(self, index: int) -> tuple[str, int, int]:
    """Returns a record's file, its first byte there, and its end."""
    shard = bisect.bisect_right(self._first_indices, index) - 1
    # Each shard before this one has one more entry than it has records.
    start, end = map(int, self._offsets[index + shard : index + shard + 2])
    return self._paths[shard], start, end


def load_arrays(path: pathlib.Path, *names: str) -> list[Any] | None:
  """Loads arrays that save_arrays saved; None if the file is unusable."""
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as content:
      return [content[name] for name in names]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None


def save_arrays(path: pathlib.Path, **arrays: Any) -> None:
  """Saves arrays, unless the folder is not writable."""
  with contextlib.suppress(OSError), files.atomic_write(path) as file:
    np.savez(file, **arrays)


def one_line(error: BaseException) -> str:
  """Returns the message of an error in one line."""
  return ' '.join(str(error).split()) or type(error).__name__


def _masked_crc(data: bytes) -> int:
  """Returns TFRecord's checksum (tensorflow/core/lib/hash/crc32c.h)."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _parse_header(content: bytes) -> int:
  """Returns the length of the record that starts with `content`."""
  length, crc = _HEADER.unpack_from(content)
  if crc != _masked_crc(content[:8]):
    raise ValueError('the checksum of its length is wrong')
  return length


def _is_state(
  saved: Any, state: Int64[np.ndarray, 'files 2'], with_times: bool
) -> bool:
  columns = slice(None) if with_times else slice(1)
  return np.shape(saved) == state.shape and np.array_equal(
    saved[:, columns], state[:, columns]
  )


def _scan(
  size: int, read: Callable[[int, int], bytes]
) -> Int64[np.ndarray, ' n']:
  """Returns the offset of each record of a file, then its size.

  Args:
    size: its size in bytes.
    read: returns the bytes from an offset on and before another.
  """
  offsets = [0]
  while offsets[-1] < size:
    header = read(offsets[-1], min(offsets[-1] + _HEADER.size, size))
    if len(header) < _HEADER.size:
      raise ValueError(f'ends within record {len(offsets) - 1}')
    try:
      length = _parse_header(header)
    except ValueError:
      # A damaged length costs this record only, not those after it.
      start = offsets[-1] + _HEADER.size
      end = start + _next_header(read(start, size))
    else:
      end = offsets[-1] + len(header) + length + _FOOTER.size
    if end > size:
      raise ValueError(f'ends within record {len(offsets) - 1}')
    offsets.append(end)
  return np.array(offsets, np.int64)


def _next_header(rest: bytes) -> int:
  """Returns the offset of the first valid header, or else the length."""
  for offset in range(_FOOTER.size, len(rest) - _HEADER.size):
    length, crc = _HEADER.unpack_from(rest, offset)
    end = offset + _HEADER.size + length + _FOOTER.size
    if end <= len(rest) and crc == _masked_crc(rest[offset : offset + 8]):
      return offset
  return len(rest)


@contextlib.contextmanager
def _damage_as_user_error(path: str) -> Iterator[None]:
  try:
    yield
  except object_store.StoreError:
    raise
  except READ_FAILURES as error:
    raise errors.UserError(
      f'{path}: is damaged or truncated: {one_line(error)}; copy it again, or'
      ' prepare the dataset again'
    ) from error


def _check_count(path: str, count: int, expected: int) -> None:
  if count != expected:
    raise errors.UserError(
      f'{path}: has {count} records, expected {expected} as in'
      ' dataset_info.json; copy the whole folder again, or prepare the dataset'
      ' again'
    )
