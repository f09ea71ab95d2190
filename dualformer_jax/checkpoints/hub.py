"""Files in model repositories of the Hugging Face Hub, by hf:// addresses.

Files are downloaded to the cache of huggingface_hub and verified at each use.
This module needs the extra `hub` when it is used, not when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import sys
from typing import TYPE_CHECKING, Any
import urllib.parse

from dualformer_jax import files, progress
from dualformer_jax.checkpoints.messages import listed, quote
from dualformer_jax.errors import UserError, missing_extra

if TYPE_CHECKING:
  from types import ModuleType

# The files of a checkpoint in a repository; see portable.py.
CONFIG, WEIGHTS = 'config.json', 'model.safetensors'

_SCHEME = 'hf://'
_EXPECTED = 'hf://OWNER/NAME, hf://OWNER/NAME@REVISION or, for a file in it, '
_EXPECTED += 'hf://OWNER/NAME/FILE'
_ADDRESS = re.compile(
  r'hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?'
  r'(?:/(?P<file>.*[^/]))?/?',
  re.ASCII,
)
_COMMIT = re.compile('[0-9a-f]{40}')
_HASH = re.compile('[0-9a-f]{40}|[0-9a-f]{64}')  # of git, SHA-256
_BRANCH = 'main'
_LOG = logging.getLogger(__name__)


def is_address(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is an address on the Hub."""
  return isinstance(path, str) and path.startswith(_SCHEME)


@dataclasses.dataclass(frozen=True)
class Address:
  """A repository of a model, or a file in it.

  Attributes:
    repository: OWNER/NAME.
    revision: a branch, a tag or a commit.
    file: path in the repository; '' for the checkpoint in it.
  """

  repository: str
  revision: str = _BRANCH
  file: str = ''

  @classmethod
  def parse(cls, text: str) -> Address:
    """Parses hf://OWNER/NAME[@REVISION][/FILE]; raises UserError.

    A slash in REVISION is written %2F.
    """
    found = _ADDRESS.fullmatch(text)
    file = (found and found['file']) or ''
    is_valid = not file or not {'', '.', '..'} & set(file.split('/'))
    if found is None or not is_valid:
      raise UserError(
        f'{text}: is not the address of a model; expected {_EXPECTED}'
      )
    owner = found['repository'].partition('/')[0]
    if owner in ('datasets', 'spaces'):
      raise UserError(
        f'{text}: is in {owner}, not a model; expected {_EXPECTED}'
      )
    revision = urllib.parse.unquote(found['revision'] or _BRANCH)
    return cls(found['repository'], revision, file)

  @property
  def is_commit(self) -> bool:
    """Whether the revision is a commit, which cannot change."""
    return _COMMIT.fullmatch(self.revision) is not None

  @property
  def is_default(self) -> bool:
    """Whether the revision is the default branch."""
    return self.revision == _BRANCH

  @property
  def names(self) -> tuple[str, ...]:
    """The files that the address stands for."""
    return (self.file,) if self.file else (CONFIG, WEIGHTS)

  def __str__(self) -> str:
    revision = urllib.parse.quote(self.revision, safe='')
    revision = '' if self.is_default else f'@{revision}'
    file = f'/{self.file}' if self.file else ''
    return f'{_SCHEME}{self.repository}{revision}{file}'


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path, or that of a local copy if it is an address on the Hub.

  The copy is a file, or a folder with the files of a checkpoint.

  Raises:
    UserError: it cannot be downloaded, or is not what the Hub lists.
  """
  if isinstance(path, str) and is_address(path):
    return _fetch(Address.parse(path))
  return pathlib.Path(path).expanduser()


def pinned(path: str) -> str:
  """Returns an address with the commit of its revision at this time.

  Raises:
    UserError: there is no such repository or revision.
  """
  address = Address.parse(path)
  if address.is_commit:
    return path
  commit = _resolve(address).commit
  return str(dataclasses.replace(address, revision=commit))


def client(address: object) -> ModuleType:
  """Returns huggingface_hub; raises UserError if it is not installed."""
  try:
    import huggingface_hub
  except ImportError as error:
    message = missing_extra(f'{address}: the Hugging Face Hub', 'hub')
    raise UserError(message) from error
  return huggingface_hub


@dataclasses.dataclass(frozen=True)
class _Snapshot:
  """A commit and, if the Hub was asked, the hashes of its files."""

  commit: str
  hashes: dict[str, str] | None = None


def _fetch(address: Address) -> pathlib.Path:
  """Downloads what is not in the cache, and verifies it."""
  found: _Snapshot | None = None
  if address.is_commit and _cached_commit(address):
    found = _Snapshot(address.revision)  # the Hub need not be asked
  found = found or _resolve(address)
  if found.hashes is not None:
    _check_listed(address, found.hashes)
  paths = [_download(address, found, name) for name in address.names]
  if found.hashes is not None and not address.is_commit:
    _remember(address, found.commit)
  # All files of a commit are in one folder.
  return paths[0] if address.file else paths[0].parent


def _resolve(address: Address) -> _Snapshot:
  """Asks the Hub, or the cache if it cannot be reached, for the commit."""
  hub = client(address)
  try:
    with client_errors(address):
      info = hub.HfApi().model_info(
        address.repository,
        revision=address.revision,
        timeout=hub.constants.HF_HUB_ETAG_TIMEOUT,
        files_metadata=True,
      )
  except _UnreachableError as error:
    commit = _cached_commit(address)
    if commit is None:
      raise UserError(f'{error}; and it is not in the cache') from error
    _LOG.warning('%s; using commit %s from the cache', error, commit)
    return _Snapshot(commit)
  hashes = {
    file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id
    for file in info.siblings
  }
  if not address.is_commit:
    _LOG.info('%s is at commit %s', address, info.sha)
  return _Snapshot(info.sha, hashes)


def _cached_commit(address: Address) -> str | None:
  """Returns the commit of a revision if all its files are in the cache."""
  hub = client(address)
  commits = set()
  for name in address.names:
    path = hub.try_to_load_from_cache(
      address.repository, name, revision=address.revision
    )
    if not isinstance(path, str):
      return None
    commits.add(pathlib.Path(path).parents[name.count('/')].name)
  return commits.pop() if len(commits) == 1 else None


def _check_listed(address: Address, hashes: dict[str, str]) -> None:
  """Raises UserError unless the repository has the files of an address."""
  if all(name in hashes for name in address.names):
    return
  if address.file:
    have = listed(map(quote, sorted(hashes)), 5) or 'no files'
    raise UserError(f'{address}: there is no such file; the model has {have}')
  others = [
    str(dataclasses.replace(address, file=name))
    for name in sorted(hashes)
    if name.endswith(('.pth', '.safetensors', '.pt', '.ckpt'))
  ]
  missing = ' and '.join(n for n in address.names if n not in hashes)
  raise UserError(
    f'{address}: has no {missing}, so it holds no checkpoint of dualformer_jax'
    + (f'; to convert a file of it, use {listed(others, 3)}' if others else '')
  )


def _download(address: Address, snapshot: _Snapshot, name: str) -> pathlib.Path:
  """Returns the verified copy of a file in the cache."""
  hub = client(address)
  with client_errors(address), client_progress(f'downloading {name}'):
    path = pathlib.Path(
      hub.hf_hub_download(
        address.repository,
        name,
        revision=snapshot.commit,
        library_name='dualformer_jax',
      )
    )
  # Links of the cache lead to content that is named by its hash.
  content = path.parent / os.readlink(path) if path.is_symlink() else path
  cached = content.name if path.is_symlink() else ''
  expected = (snapshot.hashes or {}).get(name) or cached
  if _HASH.fullmatch(expected) and _hash(path, len(expected)) != expected:
    for bad in (path, content):
      bad.unlink(missing_ok=True)
    raise UserError(
      f'{address}: {name} is not the file that the Hub lists (its hash differs '
      f'from {expected}), so it was removed: try again, and tell the owner if '
      'that does not help'
    )
  return path


def _hash(path: pathlib.Path, num_digits: int) -> str:
  """Returns the SHA-256 of a file, or the hash that git gives to it."""
  if num_digits == 64:
    digest = hashlib.sha256()
  else:
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b'blob %d\0' % path.stat().st_size)
  with path.open('rb') as file:
    return hashlib.file_digest(file, lambda: digest).hexdigest()


def _remember(address: Address, commit: str) -> None:
  """Writes the commit of a branch or tag to the cache, for offline use."""
  from huggingface_hub import constants, file_download

  name = file_download.repo_folder_name(
    repo_id=address.repository, repo_type='model'
  )
  folder = pathlib.Path(constants.HF_HUB_CACHE, name, 'refs')
  # A cache may be read-only.
  with (
    contextlib.suppress(OSError),
    files.atomic_write(folder / address.revision) as file,
  ):
    file.write(commit.encode())


@contextlib.contextmanager
def client_progress(description: str) -> Iterator[None]:
  """Shows the client's bars in a terminal, and logs lines elsewhere."""
  from huggingface_hub import constants, utils

  # The environment variable decides if it is set.
  is_free = constants.HF_HUB_DISABLE_PROGRESS_BARS is None
  if sys.stderr.isatty() or not is_free or utils.are_progress_bars_disabled():
    yield
    return
  utils.disable_progress_bars()
  try:
    with progress.waiting(description):
      yield
  finally:
    utils.enable_progress_bars()


class _UnreachableError(UserError):
  """The Hub cannot be reached, so that the cache may be used."""


@contextlib.contextmanager
def client_errors(address: Address) -> Iterator[None]:
  """Turns errors of huggingface_hub into UserErrors."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # of the client, of HTTP libraries and of sockets
    raise _user_error(address, error) from error


def _user_error(address: Address, error: Exception) -> UserError:
  from huggingface_hub import constants, errors, get_token

  if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
    error = error.__cause__  # of a file among several
  endpoint = constants.ENDPOINT
  login = 'log in with `hf auth login` or set HF_TOKEN'
  response: Any = getattr(error, 'response', None)
  status = getattr(response, 'status_code', None)
  reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
  if isinstance(error, errors.GatedRepoError):
    return UserError(
      f'{address}: access is restricted; ask for it at {endpoint}/'
      f'{address.repository}, then {login}'
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    access = 'the token has no access to it' if get_token() else login
    return UserError(
      f'{address}: {endpoint} has no such model; check OWNER/NAME. If it is '
      f'private: {access}'
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return UserError(
      f'{address}: there is no revision {address.revision!r}; expected a '
      'branch, a tag or a commit'
    )
  if status == 401:
    return UserError(f'{address}: {endpoint} refuses the token; {login}')
  if status == 403:
    return UserError(
      f'{address}: the token does not permit this; use one that may write to '
      f'{address.repository.partition("/")[0]}'
    )
  if status == 412:
    return UserError(
      f'{address}: the repository was changed at the same time, so '
      'nothing was changed; look at it, then run the command again'
    )
  if isinstance(error, OSError) and error.errno in files.DISK_ERRORS:
    where = error.filename or constants.HF_HUB_CACHE
    return UserError(f'{where} cannot be written: {error.strerror}')
  if isinstance(error, errors.OfflineModeIsEnabled):
    return _UnreachableError(f'{address}: HF_HUB_OFFLINE is set')
  cause = error.__cause__
  if isinstance(error, errors.LocalEntryNotFoundError) and cause is not None:
    reason = ' '.join(f'{type(cause).__name__}: {cause}'.split())[:300]
  if status is not None and status < 500:
    return UserError(f'{address}: {endpoint} answers {reason}')
  if isinstance(error, ValueError):  # as by invalid fields of a model card
    return UserError(f'{address}: {reason}')
  return _UnreachableError(f'{address}: {endpoint} cannot be read: {reason}')
