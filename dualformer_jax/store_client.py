"""Clients of object stores, and where copies of their files are on this disk.

Failed requests are repeated.
"""

from __future__ import annotations

from collections.abc import Callable
import logging
import math
import os
import pathlib
import re
import tempfile
import time
from typing import Any, TypeVar

import fsspec

from dualformer_jax.errors import UserError, missing_extra

# The package's extra with the client of each protocol.
_EXTRAS = {'gs': 'gcs', 's3': 's3', 'hf': 'hub'}
# Half a minute in all, besides the time of the requests.
_ATTEMPTS = 8
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0
# Folders of `copy_folder`; those of processes other than 0 have a number.
_COPIES = re.compile(r'(?:workdirs|tests|copies)(?:-\d+)?')
_LOG = logging.getLogger(__name__)

_Result = TypeVar('_Result')


class StoreError(UserError):
  """An object store that cannot be used. Unlike a damaged video, it ends a run.

  Otherwise, what a run sees would depend on the network.
  """


def open_store(url: str, purpose: str = 'reading it') -> tuple[Any, str]:
  """Returns fsspec's client of a URL, and the path of the URL there.

  Raises:
    StoreError: the URL is invalid, or the client is not installed.
  """
  protocol = url.partition('://')[0]
  if protocol not in _EXTRAS:
    expected = ', '.join(f'{name}://' for name in _EXTRAS)
    raise StoreError(f'{url}: expected a path, or a URL with {expected}')
  try:
    return fsspec.url_to_fs(url.rstrip('/'))
  except ImportError as error:
    message = missing_extra(f'{url}: {purpose}', _EXTRAS[protocol])
    raise StoreError(message) from error
  except ValueError as error:
    raise StoreError(f'{url}: is not a valid URL: {error}') from error


def repeat(
  what: str,
  function: Callable[[], _Result],
  verb: str = 'read',
  seconds: float = math.inf,
) -> _Result:
  """Calls a function, which accesses `what`, until it succeeds.

  After `seconds`, three attempts are enough; the clients repeat requests, too.

  Raises:
    StoreError: repeating does not help, or did not. The message says that
      `what` cannot be `verb`.
  """
  wait, start = _FIRST_WAIT, time.monotonic()
  for attempt in range(1, _ATTEMPTS + 1):
    try:
      return function()
    except FileNotFoundError as error:
      raise StoreError(f'{what}: does not exist') from error
    except Exception as error:  # The clients of the stores raise anything.
      reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
      # Of gcsfs, 'Forbidden' is an OSError.
      is_denied = re.search('Credential|Forbidden|Anonymous caller', reason)
      if isinstance(error, PermissionError) or is_denied:
        raise StoreError(
          f'{what}: access is denied ({reason}); log in with the tools of the'
          ' store, or check its permissions'
        ) from error
      is_late = attempt >= 3 and time.monotonic() - start > seconds
      if attempt == _ATTEMPTS or is_late:
        raise StoreError(
          f'{what}: cannot be {verb}, after {attempt} attempts: {reason}'
        ) from error
      is_news = attempt >= 3 and seconds == math.inf
      level = logging.INFO if is_news else logging.DEBUG
      _LOG.log(level, '%s: %s; trying again', what, reason)
      time.sleep(wait)
      wait = min(2 * wait, _LONGEST_WAIT)
  raise AssertionError


def cache_folder() -> pathlib.Path:
  """Returns this package's folder in XDG_CACHE_HOME or ~/.cache."""
  try:
    folder = pathlib.Path('~/.cache').expanduser()
  except RuntimeError:  # There is no home folder.
    folder = pathlib.Path(tempfile.gettempdir())
  folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or folder)
  return folder.absolute() / 'dualformer_jax'


def copy_folder(kind: str, url: str) -> pathlib.Path:
  """Returns the local folder for copies of files below a URL.

  Args:
    kind: 'workdirs' of runs, 'tests' of runs that only test, or 'copies' of
      what is only read; processes other than 0 append '-' and their index.
    url: URL of a folder or file.

  Raises:
    StoreError: the URL has a part that is no name.
  """
  protocol, _, rest = url.partition('://')
  parts = rest.strip('/').split('/')
  if {'', '.', '..'} & set(parts):
    raise StoreError(f'{url}: expected {protocol}://BUCKET/FOLDER')
  return cache_folder().joinpath(kind, protocol, *parts)


def shown(path: str | os.PathLike[str]) -> str:
  """Returns the URL that a path is a copy of, or else the path."""
  path = pathlib.Path(path)
  if path.is_relative_to(cache_folder()):
    kind, *rest = path.relative_to(cache_folder()).parts or ('',)
    if _COPIES.fullmatch(kind) and len(rest) > 1:
      return f'{rest[0]}://{"/".join(rest[1:])}'
  return str(path)
