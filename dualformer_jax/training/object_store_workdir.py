"""Workdirs at gs:// and s3://: a run works in a local copy of them.

At the start, what the run needs is downloaded; the store is the truth. Process
0 uploads small files and complete checkpoints in a thread. The last file of a
checkpoint to be uploaded, and the first to be removed, is MARKER, without which
it is not complete: neither here nor on a disk.

WORKDIR/run.json states which process trains there. It is no lock, as stores
have none: two that start within seconds are not noticed at the start, but the
one that has lost the record ends at its next checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
import contextlib
import json
import logging
import os
import pathlib
import shutil
import socket
import threading
import time
from typing import Any
import uuid

import jax
from jax.experimental import multihost_utils

from dualformer_jax import files, progress, store_client
from dualformer_jax.checkpoints import stored_folder
from dualformer_jax.checkpoints.stored_folder import BEST, LATEST, MARKER
from dualformer_jax.distributed import processes
from dualformer_jax.errors import UserError
from dualformer_jax.training import guards

RECORD = 'run.json'
# Local: which session the copy is of, and complete checkpoints (hard links)
# that the store does not have yet; and whether an upload has failed.
_SESSION, _PENDING, _UNSENT = '.session', '.pending', '.unsent'
_BEAT_SECONDS = 30.0  # between two updates of the record
_DEAD_SECONDS = 600.0  # without an update, by the clocks of two hosts
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def opened(
  workdir: str, mode: str = 'train', keep: int = 1
) -> Iterator[tuple[pathlib.Path, Mirror | None]]:
  """Yields the local folder of a workdir and, if it is a URL, its mirror.

  When the block ends, what is left is uploaded.

  Raises:
    UserError: the store cannot be used, or another process trains there.
  """
  if not stored_folder.is_address(workdir):
    yield pathlib.Path(workdir).expanduser().absolute(), None
    return
  mirror = Mirror(workdir, mode, keep)
  try:
    yield mirror.folder, mirror
  except BaseException:
    try:
      mirror.finish()
    except UserError as error:
      _LOG.error('%s', error)
    raise
  mirror.finish()


class Mirror:
  """The local copy of a workdir in a store; uploads what is new in it.

  Of several processes, each has a copy, and only process 0 uploads: for the
  others, `add`, `sync` and `finish` do nothing.

  Attributes:
    folder: the local copy.
  """

  def __init__(self, url: str, mode: str = 'train', keep: int = 1):
    """Downloads what the run needs, and begins to update the record.

    Args:
      url: the workdir.
      mode: 'train', 'test' or, which needs no checkpoints, 'profile'.
      keep: how many checkpoints to keep in the store.
    """
    index, is_training = jax.process_index(), mode == 'train'
    kind = 'workdirs' if is_training else 'tests'
    kind += f'-{index}' if index else ''
    self.folder = store_client.copy_folder(kind, url)
    self._store = stored_folder.StoredFolder(url)
    self._keep = {} if mode == 'profile' else {BEST: 1, LATEST: keep}
    self._is_writer, self._is_training = index == 0, is_training
    self._uploaded: dict[str, tuple[int, int]] = {}  # small files
    self._error: UserError | None = None  # of the present period of failures
    self._lost = ''  # who has taken the record
    self._executor = futures.ThreadPoolExecutor(1, 'upload')
    self._next: futures.Future[None] = futures.Future()
    self._calls, self._records = threading.Lock(), threading.Lock()
    self._ended = threading.Event()
    self._lock: guards.WorkdirLock | None = None
    files.check_writable(self.folder / RECORD)
    self.folder.mkdir(parents=True, exist_ok=True)
    if self._is_writer:
      self._store.check_writable()
    if is_training:
      self._lock = guards.WorkdirLock(self.folder)
      self._claim()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('claimed')
    step = self._download()
    processes.check_same(step, f'the latest checkpoint in {url}')

  # ------------------------------------------------------------------- the run

  def add(self, checkpoint: pathlib.Path) -> None:
    """Starts to upload a complete checkpoint, FOLDER/KIND/STEP."""
    if not self._is_writer:
      return
    pending = self.folder / _PENDING / checkpoint.relative_to(self.folder)
    partial = self.folder / f'.{uuid.uuid4().hex}.partial'
    # Links, as the checkpoint may be removed when there is a later one.
    shutil.copytree(checkpoint, partial, copy_function=os.link)
    shutil.rmtree(pending, ignore_errors=True)
    pending.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(pending)
    self.sync()

  def sync(self) -> None:
    """Starts to upload what is new; does not wait."""
    with self._calls:
      if self._is_writer and not self._ended.is_set():
        self._next.cancel()  # unless it runs
        self._next = self._executor.submit(self._upload)

  def check(self) -> None:
    """Raises UserError if another process trains there now."""
    if self._lost:
      raise UserError(
        f'{self._store.url}: {self._lost} trains there now, so this run ends; '
        f'what it has not uploaded is in {self.folder}'
      )

  def wait(self) -> None:
    """Uploads what is new; raises UserError if that fails."""
    if not self._is_writer or self._ended.is_set():
      return
    self.sync()
    if not futures.wait([self._next], timeout=1).done:
      _LOG.info('waiting for uploads to %s', self._store.url)
    with progress.waiting(f'uploading to {self._store.url}'):
      while not futures.wait([self._next]).done or self._next.cancelled():
        pass  # replaced by a later one
    self._next.result()
    self.check()
    if self._error is not None:
      local = [
        path.relative_to(self.folder / _PENDING).as_posix()
        for path in sorted((self.folder / _PENDING).glob('*/*'))
      ]
      what = f'{", ".join(local)} and ' if local else ''
      raise UserError(
        f'{self._error}; {what}the latest small files are only in '
        f'{self.folder}: the same command on this machine uploads them'
      )

  def share(self) -> None:
    """Uploads what is new; then all processes have the latest checkpoints.

    All processes must call this. A single one need not wait.
    """
    if jax.process_count() > 1:
      self.wait()
      multihost_utils.sync_global_devices('uploaded')
      if not self._is_writer:
        self._download()

  def finish(self) -> None:
    """Uploads what is new, and ends; raises UserError if that fails."""
    if self._ended.is_set():
      return
    try:
      self.wait()
    finally:
      with self._calls:
        self._ended.set()
      if self._is_training and self._is_writer and not self._lost:
        with contextlib.suppress(UserError), self._records:
          self._write_record(ended=True)
      self._executor.shutdown()
      self._lock = None

  # -------------------------------------------------------------------- upload

  def _upload(self) -> None:
    try:
      self._upload_new()
    except UserError as error:
      if self._error is None:
        _LOG.warning(
          '%s; what is new is kept here, to be uploaded later', error
        )
      self._error = error
      (self.folder / _UNSENT).touch()
    except Exception:
      _LOG.exception('uploading to %s failed', self._store.url)
      raise
    else:
      (self.folder / _UNSENT).unlink(missing_ok=True)
      if self._error is not None:
        _LOG.info('%s: all is uploaded again', self._store.url)
      self._error = None

  def _upload_new(self) -> None:
    # Metrics and the best checkpoint until a step come before the checkpoint of
    # that step, from which a run would resume; hence this order of looking.
    pending = [self._last_pending(kind) for kind in (LATEST, BEST)]
    if self._is_training:
      record = self._read_record()
      if record.get('session') not in (None, self._session):
        self._lost = _who(record)
      if self._lost:
        return
    self._upload_small_files()
    for path in filter(None, reversed(pending)):
      self._upload_checkpoint(path)
      shutil.rmtree(path)

  def _last_pending(self, kind: str) -> pathlib.Path | None:
    """Returns the last checkpoint to be uploaded, and removes earlier ones."""
    paths = (self.folder / _PENDING / kind).glob('*')
    steps = sorted(paths, key=lambda path: int(path.name))
    for path in steps[:-1]:
      shutil.rmtree(path)
    return steps[-1] if steps else None

  def _upload_small_files(self) -> None:
    changed = {
      name: state
      for name, state in self._small_files().items()
      if self._uploaded.get(name) != state
    }

    def upload(name: str) -> None:
      # Not as a file, which may grow meanwhile.
      with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        self._store.write(name, (self.folder / name).read_bytes())
        self._uploaded[name] = changed[name]

    stored_folder.for_all(upload, changed)

  def _small_files(self) -> dict[str, tuple[int, int]]:
    """Returns size and time of change of files outside of checkpoints."""
    found = {}
    for folder, below, names in files.walk(self.folder):
      top = pathlib.Path(folder) == self.folder
      hidden = {n for n in (*below, *names) if n.startswith('.')}
      skipped = hidden | ({LATEST, BEST, RECORD} if top else set())
      below[:] = [name for name in below if name not in skipped]
      for path in (pathlib.Path(folder, n) for n in names if n not in skipped):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
          status = path.stat()
          name = path.relative_to(self.folder).as_posix()
          found[name] = status.st_size, status.st_mtime_ns
    return found

  def _upload_checkpoint(self, path: pathlib.Path) -> None:
    """Uploads a checkpoint; then removes those that are not to be kept."""
    below, kind = f'{path.parent.name}/{path.name}', path.parent.name
    local = {
      f'{below}/{file.relative_to(path).as_posix()}': file
      for file in path.rglob('*')
      if file.is_file()
    }
    marker = f'{below}/{MARKER}'
    if self._store.read(marker) != local[marker].read_bytes():
      # What was uploaded before by a run that was killed.
      self._store.remove(self._store.sizes(below))
      stored_folder.for_all(
        lambda name: self._store.upload(name, local[name]),
        local.keys() - {marker},
      )
      self._store.upload(marker, local[marker])
    sizes = self._store.sizes(kind)
    kept = stored_folder.complete_steps(sizes, kind)[-self._keep[kind] :]
    starts = tuple(f'{kind}/{step}/' for step in kept)
    self._store.remove(name for name in sizes if not name.startswith(starts))

  # ---------------------------------------------------------- start and record

  def _claim(self) -> None:
    """Writes the record, unless another process trains there."""
    self._session = uuid.uuid4().hex
    if not self._is_writer:
      return
    local = self.folder / _SESSION
    mine = local.read_text() if local.exists() else ''
    record = self._read_record()
    # This process has the lock of the copy, so that its last session has ended.
    if record.get('session') not in (None, mine):
      self._wait_until_silent(record)
    self._started = time.time()
    if record and record['session'] == mine:
      # Nobody has written there since.
      self._session = mine
      unsent = (self.folder / _UNSENT).exists()
      if unsent or any(map(self._last_pending, (BEST, LATEST))):
        _LOG.info('uploading what was not yet in %s', self._store.url)
        self._upload_new()
        self.check()
    else:
      shutil.rmtree(self.folder / _PENDING, ignore_errors=True)
    self._session = uuid.uuid4().hex
    self._write_record()
    with files.output_file(local) as file:
      file.write(self._session.encode())
    threading.Thread(target=self._beat, daemon=True).start()

  def _wait_until_silent(self, record: dict[str, Any]) -> None:
    """Returns when a record is not updated any more; UserError if it is."""
    if record['ended'] or time.time() - record['updated'] > _DEAD_SECONDS:
      return
    seconds = 2.5 * _BEAT_SECONDS
    _LOG.info(
      '%s: %s trained there; waiting for %.0f s, to see whether it still does',
      self._store.url,
      _who(record),
      seconds,
    )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
      time.sleep(_BEAT_SECONDS / 10)
      now = self._read_record()
      if now.get('ended', True):
        return
      if now != record:
        raise UserError(
          f'{self._store.url}: {_who(now)} trains there; wait until it ends, or'
          ' choose another --workdir'
        )

  def _read_record(self) -> dict[str, Any]:
    content = self._store.read(RECORD)
    try:
      return json.loads(content) if content else {}
    except ValueError as error:
      raise UserError(
        f'{self._store.url}/{RECORD}: is no record of a run; remove it'
      ) from error

  def _write_record(self, ended: bool = False) -> None:
    record = {
      'session': self._session,
      'host': socket.gethostname(),
      'process': os.getpid(),
      'started': self._started,
      'updated': time.time(),
      'ended': ended,
    }
    self._store.write(RECORD, f'{json.dumps(record, indent=2)}\n'.encode())

  def _beat(self) -> None:
    """Updates the record; runs in its own thread."""
    while not self._ended.wait(_BEAT_SECONDS) and not self._lost:
      with contextlib.suppress(UserError), self._records:
        record = self._read_record()
        if record.get('session') not in (None, self._session):
          self._lost = _who(record)
        elif not self._ended.is_set():
          self._write_record()

  def _download(self) -> int:
    """Makes the copy what the store has; returns the latest step, or 0."""
    sizes = self._store.sizes()
    for kind in self._keep:
      stored_folder.copy_latest(self._store, sizes, kind, self.folder)
    for name in self._small_files():
      (self.folder / name).unlink()
    small = {
      name: size
      for name, size in sizes.items()
      if name.partition('/')[0] not in ('', LATEST, BEST, RECORD)
      and not any(part.startswith('.') for part in name.split('/'))
    }
    stored_folder.for_all(
      lambda name: self._store.download(name, self.folder / name, small[name]),
      small,
    )
    self._uploaded = self._small_files()
    return max(stored_folder.complete_steps(sizes, LATEST), default=0)


def _who(record: dict[str, Any]) -> str:
  since = time.strftime('%H:%M', time.localtime(record.get('started')))
  return (
    f'process {record.get("process")} on {record.get("host")} (since {since})'
  )
