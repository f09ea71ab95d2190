"""Checkpoints on the Hugging Face Hub, with the real client."""

from __future__ import annotations

import json
import logging
import pathlib
import re
import sys
from typing import Any

import huggingface_hub
import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest
from safetensors.numpy import save

from configs import common
from dualformer_jax import convert
from dualformer_jax.checkpoints import (
  checkpoint,
  hub,
  portable,
  pth_file,
  pytorch_names,
  transfer,
  weights,
)
from dualformer_jax.errors import UserError
from dualformer_jax.training import hub_revisions
from tests import hub_client, hub_server, in_process, small_checkpoint

URL = 'hf://owner/small'


@pytest.fixture(scope='module', name='local')
def _local(tmp_path_factory) -> pathlib.Path:
  return small_checkpoint.save(tmp_path_factory.mktemp('local') / 'small')


@pytest.fixture(scope='module', name='files')
def _files(local) -> dict[str, bytes]:
  """What a repository with this checkpoint has."""
  return {
    **portable.encode(*checkpoint.load_model(local)),
    'README.md': b'# Small\n',
  }


@pytest.fixture(name='cache')
def _cache(tmp_path) -> pathlib.Path:
  return tmp_path / 'home' / 'hub'


@pytest.fixture(name='server')
def _server(monkeypatch, cache, files):
  """A server with `owner/small`."""
  with hub_server.start() as server:
    server.add('owner/small', files)
    hub_client.use(monkeypatch, server, cache)
    yield server
  huggingface_hub.close_session()


def one_line(expected: str) -> Any:
  """Expects a UserError of one line with a text."""
  return pytest.raises(UserError, match=f'^[^\n]*{re.escape(expected)}[^\n]*$')


def assert_same_model(url: str, local: pathlib.Path) -> None:
  found, expected = checkpoint.load_model(url), checkpoint.load_model(local)
  jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
  assert found[1] == expected[1]


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('hf://owner/name', hub.Address('owner/name', 'main', '')),
    ('hf://owner/name/', hub.Address('owner/name', 'main', '')),
    ('hf://o-1/n.a_me@v1.0', hub.Address('o-1/n.a_me', 'v1.0', '')),
    ('hf://o/n@refs%2Fpr%2F1', hub.Address('o/n', 'refs/pr/1', '')),
    ('hf://o/n/a/b.pth', hub.Address('o/n', 'main', 'a/b.pth')),
    ('hf://o/n@abc/b@2.pth', hub.Address('o/n', 'abc', 'b@2.pth')),
  ],
)
def test_addresses_are_parsed_and_printed(text, expected):
  assert hub.Address.parse(text) == expected
  assert hub.Address.parse(str(expected)) == expected


@pytest.mark.parametrize(
  'text',
  [
    'hf://',
    'hf://name',
    'hf://owner/name@',
    'hf://owner/na me',
    'hf://owner/name/../../x',
    'hf://owner/name/a/../x.pth',
    'hf://owner/name//x.pth',
    'hf://owner/name/a//x.pth',
    'hf://datasets/owner/name',
    'hf://spaces/owner/name',
  ],
)
def test_invalid_addresses_raise(text):
  with one_line('expected hf://OWNER/NAME'):
    hub.Address.parse(text)


def test_model_of_the_hub_is_that_of_the_folder(server, local):
  assert_same_model(URL, local)
  # The files are also read from a folder, as of `git clone`.
  folder = checkpoint.find(URL)
  assert {path.name for path in folder.iterdir()} == {hub.CONFIG, hub.WEIGHTS}
  assert_same_model(str(folder), local)


def test_arrays_keep_their_shapes(tmp_path):
  """Also the scalars among the statistics of BatchNorm."""
  fields = small_checkpoint.FIELDS | {
    'depths': (2,),
    'coarse_sizes': ((2, 2, 2),),
  }
  metadata = checkpoint.CheckpointMetadata(
    fields, small_checkpoint.PREPROCESSING, small_checkpoint.CLASS_NAMES
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
    checkpoint.variable_shapes(metadata.build_model(), 'the test'),
  )
  assert any(leaf.shape == () for leaf in jax.tree.leaves(variables))
  for name, content in portable.encode(variables, metadata).items():
    (tmp_path / name).write_bytes(content)
  found, _ = checkpoint.load_model(tmp_path)
  jax.tree.map(
    lambda *arrays: np.testing.assert_array_equal(*arrays, strict=True),
    jax.tree.map(np.asarray, found),
    variables,
  )


def test_revisions_are_branches_tags_and_commits(server, files, local):
  repository = server.model('owner/small')
  first = repository.refs['main']
  repository.refs['v1'] = first
  repository.refs['refs/pr/1'] = first
  config = json.loads(files[hub.CONFIG])
  config['dualformer']['class_names'][0] = 'stand'
  changed = json.dumps(config).encode()
  second = repository.commit({hub.CONFIG: changed})
  repository.refs['next'] = second

  def first_class(revision: str) -> str:
    return checkpoint.load_model(f'{URL}{revision}')[1].class_names[0]

  for revision in ('@v1', f'@{first}', '@refs%2Fpr%2F1'):
    assert first_class(revision) == 'walk'
  for revision in ('', '@main', '@next', f'@{second}'):
    assert first_class(revision) == 'stand'
  with one_line("there is no revision 'v2'; expected a branch, a tag or a com"):
    checkpoint.find(f'{URL}@v2')
  assert hub.pinned(f'{URL}@v1') == f'{URL}@{first}'
  assert hub.pinned(URL) == f'{URL}@{second}'
  assert hub.pinned(f'{URL}@v1/a.pth') == f'{URL}@{first}/a.pth'


def test_commit_is_logged(server, caplog):
  with caplog.at_level(logging.INFO):
    checkpoint.find(URL)
  commit = server.model('owner/small').refs['main']
  assert f'{URL} is at commit {commit}' in caplog.messages


@pytest.mark.parametrize('name', [hub.CONFIG, hub.WEIGHTS])
def test_tampered_file_is_refused_and_not_kept(
  server, cache, local, files, name
):
  content = bytearray(files[name])
  content[len(content) // 2] ^= 1
  server.replaced[name] = bytes(content)
  for url in (URL, f'{URL}@{server.model("owner/small").refs["main"]}'):
    with one_line(f'{name} is not the file that the Hub lists'):
      checkpoint.find(url)
    for path in cache.rglob('*'):
      assert path.is_dir() or path.read_bytes() != content, path
  server.replaced.clear()
  assert_same_model(URL, local)


def test_file_that_changes_in_the_cache_is_refused(
  server, monkeypatch, cache, local
):
  folder = checkpoint.find(URL)
  hub_client.go_offline(monkeypatch)
  blob = (folder / hub.WEIGHTS).resolve()
  content = bytearray(blob.read_bytes())
  content[-1] ^= 1
  blob.write_bytes(content)
  with one_line(f'{hub.WEIGHTS} is not the file that the Hub lists'):
    checkpoint.find(URL)
  assert not blob.exists()
  hub_client.go_offline(monkeypatch, False)
  assert_same_model(URL, local)


def test_weights_of_another_model_are_refused(server, files):
  """As if somebody had committed weights alone."""
  arrays = {'params/backbone/norm/scale': np.ones(3, 'float32')}
  server.model('owner/small').commit({hub.WEIGHTS: save(arrays)})
  with one_line('does not have the SHA-256 that config.json names'):
    checkpoint.load_model(URL)


def test_cache_is_used_offline(server, monkeypatch, local, caplog):
  commit = server.model('owner/small').refs['main']
  server.model('owner/small').refs['v1'] = commit
  for revision in ('', '@v1'):
    checkpoint.find(f'{URL}{revision}')
  hub_client.go_offline(monkeypatch)
  before = len(server.requests)
  for revision in ('', '@v1', f'@{commit}'):
    assert_same_model(f'{URL}{revision}', local)
    assert hub.pinned(f'{URL}{revision}') == f'{URL}@{commit}'
  assert f'HF_HUB_OFFLINE is set; using commit {commit}' in caplog.text
  for url in (f'{URL}@v2', 'hf://owner/other', f'{URL}/README.md'):
    with one_line('HF_HUB_OFFLINE is set; and it is not in the cache'):
      hub.local_path(url)
  assert len(server.requests) == before


def test_cached_commit_needs_no_requests(server, local):
  commit = server.model('owner/small').refs['main']
  checkpoint.find(URL)
  before = len(server.requests)
  assert_same_model(f'{URL}@{commit}', local)
  assert len(server.requests) == before


def test_hub_that_cannot_be_reached(monkeypatch, cache, files, local, caplog):
  with hub_server.start() as server:
    server.add('owner/small', files)
    hub_client.use(monkeypatch, server, cache)
    checkpoint.find(URL)
  huggingface_hub.close_session()  # the server is gone
  assert_same_model(URL, local)
  assert f'{server.url} cannot be read: ' in caplog.text
  with one_line(f'{server.url} cannot be read: ConnectError'):
    checkpoint.find('hf://owner/other')


def test_access_is_checked(server, monkeypatch, files, local):
  server.add('owner/private', files, private=True)
  server.add('owner/gated', files, gated=True)
  with one_line(
    'has no such model; check OWNER/NAME. If it is private: log in'
  ):
    checkpoint.find('hf://owner/absent')
  with one_line(
    'If it is private: log in with `hf auth login` or set HF_TOKEN'
  ):
    checkpoint.find('hf://owner/private')
  with one_line(
    f'access is restricted; ask for it at {server.url}/owner/gated'
  ):
    checkpoint.find('hf://owner/gated')
  monkeypatch.setenv('HF_TOKEN', 'hf_revoked')
  with one_line(
    'refuses the token; log in with `hf auth login` or set HF_TOKEN'
  ):
    checkpoint.find('hf://owner/private')
  monkeypatch.setenv('HF_TOKEN', hub_server.TOKEN)
  for name in ('private', 'gated'):
    assert_same_model(f'hf://owner/{name}', local)
  with one_line('If it is private: the token has no access to it'):
    checkpoint.find('hf://owner/absent')


def test_repositories_without_a_checkpoint_raise(server):
  server.add('owner/others', {'a.pth': b'x', 'README.md': b'y'})
  with one_line(
    'has no config.json and model.safetensors, so it holds no checkpoint of '
    'dualformer_jax; to convert a file of it, use hf://owner/others/a.pth'
  ):
    checkpoint.find('hf://owner/others')
  with one_line("there is no such file; the model has 'README.md', 'a.pth'"):
    hub.local_path('hf://owner/others/b.pth')
  files = {hub.CONFIG: b'{"model_type": "bert"}', hub.WEIGHTS: save({})}
  server.add('owner/bert', files)
  with one_line('is not a complete checkpoint of dualformer_jax'):
    checkpoint.load_model('hf://owner/bert')


def test_extra_is_named_if_it_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with one_line("needs the extra 'hub': pip install 'dualformer_jax[hub]'"):
    checkpoint.find(URL)


def test_files_of_repositories_are_sources(server, local, tmp_path):
  """Of convert and init_from: checkpoints, .pth and .safetensors files."""
  variables, metadata = checkpoint.load_model(local)
  state_dict = pytorch_names.to_pytorch(variables)
  pth_file.write_pth(tmp_path / 'a.pth', state_dict)
  content = {
    'old/a.pth': (tmp_path / 'a.pth').read_bytes(),
    'b.safetensors': save({f'module.{k}': v for k, v in state_dict.items()}),
  }
  server.add('owner/torch', content)
  sources = [URL, *(f'hf://owner/torch/{name}' for name in content)]
  for source in sources:
    found = transfer.read(source)
    assert set(found.state_dict) == set(state_dict)
    for name, array in state_dict.items():
      np.testing.assert_array_equal(found.state_dict[name], array)
  model = dict(small_checkpoint.FIELDS)
  config = pathlib.Path(common.__file__).with_name('k400_tiny.py')
  for source in sources[1:]:
    folder = tmp_path / f'of_{len(source)}'
    done = in_process.run(
      convert,
      f'--config={config}',
      f'--src={source}',
      f'--dst={folder}',
      *(f'--config.model.{k}={v}' for k, v in model.items()),
    )
    assert done.returncode == 0, done.stderr
    loaded, _ = checkpoint.load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  done = in_process.run(convert, f'--src={URL}', f'--dst={tmp_path}/c.pth')
  assert done.returncode == 0, done.stderr
  written, *_ = weights.read(tmp_path / 'c.pth')
  assert set(written) == set(state_dict)


# ------------------------------------------------------- revisions during a run
def config_with(**fields: str) -> Any:
  config: Any = common.get_config()
  config.init_from = fields.get('init_from', '')
  config.token_labels.teacher = fields.get('teacher', '')
  return config


def test_run_keeps_the_commits_that_it_began_with(server, tmp_path, files):
  repository = server.model('owner/small')
  first = repository.refs['main']
  config = config_with(init_from=URL, teacher=f'{URL}@main')
  started = hub_revisions.pinned(config, tmp_path, record=True)
  assert started.init_from == f'{URL}@{first}'
  assert started.token_labels.teacher == f'{URL}@{first}'
  assert config.init_from == URL
  second = repository.commit({'README.md': b'moved'})
  before = len(server.requests)
  resumed = hub_revisions.pinned(config, tmp_path, record=True)
  assert resumed == started
  assert len(server.requests) == before
  # Another address, and a workdir without a record, have the present commit.
  repository.refs['next'] = second
  config.init_from = f'{URL}@next'
  changed = hub_revisions.pinned(config, tmp_path)
  assert changed.init_from == f'{URL}@{second}'
  assert changed.token_labels.teacher == f'{URL}@{first}'
  other = hub_revisions.pinned(config_with(init_from=URL), tmp_path / 'other')
  assert other.init_from == f'{URL}@{second}'
  assert not (tmp_path / 'other').exists()


def test_hosts_have_the_commits_of_the_first(server, monkeypatch, tmp_path):
  sent: list[np.ndarray] = []

  def broadcast(array: np.ndarray) -> np.ndarray:
    """Sends from process 0, and receives in others."""
    if jax.process_index():
      return sent.pop(0)
    sent.append(array)
    return array

  def pinned_on(index: int, config: Any) -> Any:
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    return hub_revisions.pinned(config, tmp_path, record=True)

  monkeypatch.setattr(multihost_utils, 'broadcast_one_to_all', broadcast)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  repository = server.model('owner/small')
  first = repository.refs['main']
  config = config_with(init_from=URL, teacher=f'{URL}@main')
  on_first = pinned_on(0, config)
  assert on_first.init_from == f'{URL}@{first}'
  repository.commit({'README.md': b'moved'})
  before = len(server.requests)
  assert pinned_on(1, config) == on_first
  assert len(server.requests) == before
  config = config_with(init_from='hf://owner/absent')
  with one_line('has no such model'):
    pinned_on(0, config)
  with one_line('process 0 cannot resolve an hf:// address'):
    pinned_on(1, config)


def test_local_paths_of_a_run_are_unchanged(tmp_path):
  config = config_with(init_from='runs/a', teacher='~/b')
  assert hub_revisions.pinned(config, tmp_path, record=True) == config
  assert not list(tmp_path.iterdir())


def test_damaged_record_raises(tmp_path):
  (tmp_path / hub_revisions.FILE).write_text('{')
  with one_line('remove it to use the latest commits'):
    hub_revisions.pinned(config_with(init_from=URL), tmp_path)
