"""Walks folders, reads text files, and writes files atomically."""

from collections.abc import Iterator, Sequence
import contextlib
import errno
import os
import pathlib
import re
import shutil
import tempfile
from typing import IO
import uuid

from dualformer_jax.errors import UserError

# A full disk or quota, a read-only file system, no permission.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

# A URL that was made a path, in which // is /.
_URL = re.compile(r'(?:.*/)?(gs|s3|hf|https?|file):/(.*)', re.IGNORECASE)

_unfinished: set[pathlib.Path] = set()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """Opens a temporary file that replaces `path` when the block succeeds.

  If the block raises, `path` is left as it was and the temporary file is
  removed. Missing parent folders are created.

  Raises:
    OSError: the file cannot be written.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name[:100]}.{uuid.uuid4().hex}.partial')
  with unfinished(partial):
    with open(partial, 'xb') as file:
      yield file
    os.replace(partial, path)


@contextlib.contextmanager
def unfinished(path: pathlib.Path) -> Iterator[None]:
  """Removes a file or folder if the block fails, or the process is ended."""
  _unfinished.add(path)
  try:
    yield
  except BaseException:
    _remove(path)
    raise
  finally:
    _unfinished.discard(path)


def remove_unfinished() -> None:
  """Removes temporary files and folders before the process is ended."""
  for path in tuple(_unfinished):
    _remove(path)


def _remove(path: pathlib.Path) -> None:
  shutil.rmtree(path, ignore_errors=True)  # unless it is a file
  with contextlib.suppress(OSError):
    path.unlink(missing_ok=True)


def check_target(
  path: pathlib.Path,
  overwrite: bool = False,
  suffixes: Sequence[str] = (),
) -> None:
  """Raises a UserError unless a file can be written to `path`.

  Args:
    path: the file; its parent folders need not exist.
    overwrite: whether the file may exist.
    suffixes: allowed suffixes; () for any.
  """
  if suffixes and path.suffix.lower() not in suffixes:
    expected = ' or '.join(suffixes)
    raise UserError(f'{path}: expected a name that ends in {expected}')
  if path.is_dir():
    raise UserError(f'{path} is a folder; expected the name of a file')
  if path.exists() and not overwrite:
    raise UserError(
      f'{path} already exists; choose another name, or add --overwrite'
    )
  check_writable(path)


def check_writable(path: pathlib.Path, num_bytes: int = 0) -> None:
  """Raises a UserError unless a file or folder can be created at `path`.

  Tries it with an unnamed temporary file in the nearest folder that exists.
  """
  if url := _URL.fullmatch(str(path)):
    raise UserError(
      f'{url[1]}://{url[2]} cannot be written: it is a URL; expected a path on'
      ' this machine'
    )
  parent = next(f for f in path.absolute().parents if f.exists())
  if not parent.is_dir():
    raise UserError(f'{path} cannot be written: {parent} is not a folder')
  try:
    with tempfile.TemporaryFile(dir=parent) as file:
      file.write(bytes(4096))
    free = shutil.disk_usage(parent).free
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from error
  if num_bytes > free:
    raise UserError(
      f'{path} cannot be written: it needs {num_bytes / 1e6:.1f} MB, but '
      f'{free / 1e6:.1f} MB are free in {parent}'
    )


@contextlib.contextmanager
def output_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """Opens a file as atomic_write does; an OSError becomes a UserError."""
  try:
    with atomic_write(path) as file:
      yield file
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'{path} cannot be written: {reason}') from error


def walk(
  top: str | os.PathLike[str],
) -> Iterator[tuple[str, list[str], list[str]]]:
  """Walks folders as os.walk does; follows links and visits a folder once."""
  seen = set()
  for folder, below, names in os.walk(top, followlinks=True):
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:  # a loop, or a second link
      below.clear()
    else:
      seen.add((status.st_dev, status.st_ino))
      below.sort()
      yield folder, below, names


def read_text(path: str | os.PathLike[str]) -> str:
  """Reads a text file of a user: UTF-8 with or without a byte-order mark.

  Raises:
    UserError: the file cannot be read, or is not UTF-8.
  """
  try:
    return pathlib.Path(path).read_text('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{path}: is not UTF-8 text (byte {error.start} is'
      f' 0x{error.object[error.start]:02x}); save it as UTF-8'
    ) from error
  except OSError as error:
    raise UserError(f'{path}: cannot be read: {error.strerror}') from error
