"""Datasets in object stores are read as local ones, over bad networks too."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pathlib
import re
import shutil
from typing import Any
import uuid

import fsspec
import fsspec.config
import numpy as np
import pytest

from dualformer_jax import errors, store_client
from dualformer_jax.input_pipeline import object_store
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from tests.input_pipeline import object_stores
from tests.input_pipeline.loaders import (
  assert_same,
  read_all,
  take,
  train_loader,
)

PROTOCOLS = ('s3', 'gs', 'hf')


def use(monkeypatch: pytest.MonkeyPatch, protocol: str, server: str) -> None:
  """Makes fsspec's clients use a local server."""
  # A client keeps its address.
  options: dict[str, Any] = {
    's3': {
      'key': 'a',
      'secret': 'b',
      'client_kwargs': {'endpoint_url': server},
      'config_kwargs': {'retries': {'total_max_attempts': 1}},
    },
    'gs': {'endpoint_url': server, 'token': 'anon', 'project': 'p'},
    'hf': {'endpoint': server, 'token': False},
  }[protocol]
  monkeypatch.setitem(fsspec.config.conf, protocol, options)
  if protocol == 'gs':
    monkeypatch.setitem(fsspec.config.conf, 'gcs', options)


@contextlib.contextmanager
def uploaded(
  monkeypatch: pytest.MonkeyPatch,
  protocol: str,
  folder: pathlib.Path,
  faults: object_stores.Faults | None = None,
) -> Iterator[str]:
  """Copies a data_dir to a store; yields its URL."""
  with contextlib.ExitStack() as stack:
    if protocol == 'hf':
      server = stack.enter_context(object_stores.hub('owner/name', folder))
      url = 'hf://datasets/owner/name'
    else:
      server = stack.enter_context(
        getattr(object_stores, {'s3': 's3', 'gs': 'gcs'}[protocol])()
      )
      bucket = uuid.uuid4().hex  # The S3 server's memory is the process's.
      url = f'{protocol}://{bucket}/data'
      use(monkeypatch, protocol, server)
      store, _ = fsspec.url_to_fs(url)
      store.mkdir(bucket)
      for path in sorted(folder.rglob('*')):
        if path.is_file():
          name = path.relative_to(folder).as_posix()
          store.pipe_file(f'{bucket}/data/{name}', path.read_bytes())
    if faults is not None:
      server = stack.enter_context(object_stores.proxy(server, faults))
    use(monkeypatch, protocol, server)
    yield url


@pytest.fixture(name='folder')
def _folder(prepared_datasets, tmp_path, monkeypatch) -> pathlib.Path:
  """A data_dir with the dataset `levels`."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(store_client, '_FIRST_WAIT', 0.01)
  source = prepared_datasets / 'tfrecord' / 'levels'
  shutil.copytree(source, tmp_path / 'data' / 'levels')
  return tmp_path / 'data'


@pytest.mark.parametrize(
  'with_index', [True, pytest.param(False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_dataset_of_a_store_is_that_of_a_disk(
  folder, monkeypatch, protocol, with_index
):
  expected = PreparedDataset('levels', 'train', str(folder))
  if not with_index:
    for path in folder.rglob('*.npz'):
      path.unlink()
  version = expected.folder.relative_to(folder).as_posix()
  with uploaded(monkeypatch, protocol, folder) as url:
    for name, data_dir in (('levels', url), (f'{url}/{version}', '')):
      found = PreparedDataset(name, 'train', data_dir)
      assert found.fingerprint == expected.fingerprint
      assert found.class_names == expected.class_names
      assert len(found) == len(expected)
      for i in range(len(expected)):
        assert found[i] == expected[i]
    np.testing.assert_array_equal(found.labels(), expected.labels())


@pytest.mark.slow
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_mistakes_are_one_line(folder, monkeypatch, protocol):
  with uploaded(monkeypatch, protocol, folder) as url:
    for name, data_dir, split, expected in (
      ('absent', url, 'train', f'{url}/absent: does not exist'),
      ('levels', f'{url}/nowhere', 'train', f'{url}/nowhere/levels: does not'),
      ('levels', url, 'nosplit', f"{url}/levels/1.0.0: has no split 'nosplit'"),
    ):
      with pytest.raises(errors.UserError) as caught:
        PreparedDataset(name, split, data_dir)
      assert str(caught.value).startswith(expected)
      assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_failing_requests_change_nothing(folder, monkeypatch):
  expected = read_all(next(folder.glob('levels/*')))
  faults = object_stores.Faults(share=0.2)
  with uploaded(monkeypatch, 's3', folder, faults) as url:
    found = PreparedDataset('levels', 'train', url)
    for _ in range(3):
      assert [found[i] for i in range(len(found))] == expected
    batches = train_loader(found)
    others = train_loader(PreparedDataset('levels', 'train', str(folder)))
    for batch, other in zip(take(batches, 8), take(others, 8), strict=True):
      assert_same(batch, other)
    batches.close()
    others.close()
  assert faults.failed > 5


@pytest.mark.slow
def test_store_that_is_gone_ends_the_stream(folder, monkeypatch):
  """A video that cannot be fetched is not replaced by another."""
  with uploaded(monkeypatch, 's3', folder) as url:
    dataset = PreparedDataset('levels', 'train', url)
    batches = train_loader(dataset)
    next(batches)
    store, _ = fsspec.url_to_fs(url)
    store.rm(store.glob(f'{url}/levels/1.0.0/*train*'))
    message = f'{url}/levels/1.0.0/levels-train.tfrecord-0000'
    with pytest.raises(errors.UserError, match=re.escape(message)) as caught:
      for _ in range(100):
        next(batches)
    batches.close()
  assert str(caught.value).endswith('does not exist')
  monkeypatch.setattr(store_client, '_ATTEMPTS', 2)
  with pytest.raises(
    errors.UserError, match='cannot be read, after 2 attempts'
  ):
    PreparedDataset('levels', 'train', url)


@pytest.mark.parametrize(
  ('url', 'expected'),
  [
    ('ftp://host/data', 'expected a path, or a URL with gs://, s3://, hf://'),
    (
      's3://bucket/data',
      "needs the extra 's3': pip install 'dualformer_jax[s3]'",
    ),
  ],
)
def test_protocols_without_a_client(url, expected, monkeypatch):
  def fail(*_):
    raise ImportError('Install s3fs to access S3')

  monkeypatch.setattr(fsspec, 'url_to_fs', fail)
  with pytest.raises(errors.UserError, match=re.escape(expected)):
    PreparedDataset('levels', 'train', url)


def test_denied_access_is_not_tried_again(folder, monkeypatch):
  with uploaded(monkeypatch, 's3', folder) as url:
    dataset = PreparedDataset('levels', 'train', url)
    calls = []

    def deny(*arguments, **options):
      calls.append(arguments)
      raise PermissionError('Access Denied')

    store, _ = fsspec.url_to_fs(url)
    monkeypatch.setattr(store, 'cat_file', deny)
    with pytest.raises(errors.UserError, match='access is denied'):
      dataset[0]
  assert len(calls) == 1


@pytest.mark.slow
def test_cache_spares_requests_up_to_its_size(folder, monkeypatch, tmp_path):
  faults = object_stores.Faults()
  expected = read_all(next(folder.glob('levels/*')))
  size = sum(len(example.video) for example in expected)

  def read(max_bytes: int) -> int:
    cache = object_store.DiskCache(tmp_path / 'kept', max_bytes)
    found = PreparedDataset('levels', 'train', url, cache)
    before = faults.requests
    assert [found[i] for i in range(len(found))] == expected
    return faults.requests - before

  with uploaded(monkeypatch, 's3', folder, faults) as url:
    assert read(0) == len(expected)
    assert read(size // 2) == len(expected)
    kept = [p.stat().st_size for p in (tmp_path / 'kept').rglob('*.part')]
    assert 0 < sum(kept) <= size // 2
    assert read(size // 2) == len(expected) - len(kept)
    read(2 * size)
    assert read(2 * size) == 0
    # A damaged or removed file is read again.
    for path in (tmp_path / 'kept').rglob('*.part'):
      path.unlink()
    assert read(0) == len(expected)
