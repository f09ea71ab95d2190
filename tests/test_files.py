"""Files are written whole or not at all; why not is said in one line."""

from __future__ import annotations

import collections
import errno
import os
import pathlib
import resource
import shutil
import tempfile
from typing import Any

import pytest

from dualformer_jax import files
from dualformer_jax.errors import UserError


@pytest.fixture
def small_files():
  """Lets files have 64 KiB at most, as on a disk that is nearly full."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures('small_files')
def test_file_that_cannot_be_completed_leaves_nothing(tmp_path):
  path = tmp_path / 'new' / 'file'
  with pytest.raises(UserError) as error, files.output_file(path) as file:
    file.write(bytes(1 << 20))
  reason = os.strerror(errno.EFBIG)
  assert str(error.value) == f'{path} cannot be written: {reason}'
  assert not list(path.parent.iterdir())


def test_writable_path_is_left_as_it_is(tmp_path):
  before = tmp_path.stat().st_mtime_ns
  files.check_writable(tmp_path / 'new' / 'folder' / 'file')
  files.check_target(pathlib.Path('file'))  # in the current folder
  assert not list(tmp_path.iterdir())
  assert tmp_path.stat().st_mtime_ns == before


def test_room_is_checked_before(tmp_path, monkeypatch):
  usage = collections.namedtuple('usage', 'total used free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(9e6, 8e6, 1e6))
  files.check_writable(tmp_path / 'file', 1_000_000)
  message = rf'needs 1\.1 MB, but 1\.0 MB are free in {tmp_path}'
  with pytest.raises(UserError, match=message):
    files.check_writable(tmp_path / 'file', 1_100_000)


@pytest.mark.parametrize('code', [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_refused_probe_names_path_and_cause(tmp_path, monkeypatch, code):
  def refuse(**_: object) -> None:
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
  path = tmp_path / 'new' / 'file'
  with pytest.raises(UserError) as error:
    files.check_writable(path)
  assert str(error.value) == f'{path} cannot be written: {os.strerror(code)}'


@pytest.mark.parametrize('url', ['gs://b/run', 's3://b/a/run', 'HF://b/run'])
def test_url_is_no_place_to_write_to(tmp_path, monkeypatch, url):
  monkeypatch.chdir(tmp_path)
  for path in (pathlib.Path(url), pathlib.Path(url).absolute()):
    with pytest.raises(UserError, match=f'^{url} cannot be written: .* a URL'):
      files.check_writable(path)
  files.check_writable(tmp_path / 'notes: s3' / 'file')
  assert not list(tmp_path.iterdir())


def test_target_must_be_new_of_a_kind_and_below_a_folder(tmp_path):
  taken = tmp_path / 'taken.png'
  taken.write_text('kept')
  files.check_target(taken, overwrite=True, suffixes=('.PNG', '.png'))
  cases: list[tuple[pathlib.Path, dict[str, Any], str]] = [
    (taken, {}, 'already exists'),
    (tmp_path, {'overwrite': True}, 'is a folder'),
    (taken / 'x.png', {}, 'is not a folder'),
    (tmp_path / 'x', {'suffixes': ('.a', '.b')}, 'ends in .a or .b'),
  ]
  for path, options, expected in cases:
    with pytest.raises(UserError, match=expected):
      files.check_target(path, **options)
  assert taken.read_text() == 'kept'


def test_unfinished_folder_is_removed_unless_the_block_succeeds(tmp_path):
  kept, failed, ended = (tmp_path / name for name in ('a', 'b', 'c'))
  for folder in (kept, failed, ended):
    folder.mkdir()
    (folder / 'file').touch()
  with files.unfinished(kept):
    pass
  with pytest.raises(OSError), files.unfinished(failed):
    raise OSError
  with files.unfinished(ended):
    files.remove_unfinished()  # as at a signal
    assert not ended.exists()
  assert (kept / 'file').exists()
  assert not failed.exists()
