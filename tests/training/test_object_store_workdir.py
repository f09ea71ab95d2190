"""Workdirs in object stores, over bad networks: resumed on other machines."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
from typing import Any
import uuid

import fsspec
import pytest

from dualformer_jax import store_client
from dualformer_jax.checkpoints import checksums, stored_folder
from dualformer_jax.errors import UserError
from dualformer_jax.training import object_store_workdir
from dualformer_jax.training.object_store_workdir import Mirror
from tests import training_command
from tests.distributed import test_processes
from tests.input_pipeline import object_stores
from tests.input_pipeline.test_object_store import use

MARKER = '_CHECKPOINT_METADATA'


@pytest.fixture(name='machine')
def _machine(tmp_path, monkeypatch):
  """Moves this process to a machine of some name: an own cache folder."""
  monkeypatch.setattr(store_client, '_FIRST_WAIT', 0.01)
  monkeypatch.setattr(store_client, '_LONGEST_WAIT', 0.02)

  def machine(name: str) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / name))

  machine('first')
  return machine


@pytest.fixture(name='faults')
def _faults():
  return object_stores.Faults()


@pytest.fixture(name='url', params=['s3', 'gs'])
def _url(request, monkeypatch, faults):
  """A workdir in a new bucket."""
  protocol = request.param
  server = object_stores.s3 if protocol == 's3' else object_stores.gcs
  with server() as upstream, object_stores.proxy(upstream, faults) as proxied:
    use(monkeypatch, protocol, proxied)
    bucket = uuid.uuid4().hex
    store, _ = fsspec.url_to_fs(f'{protocol}://{bucket}')
    store.mkdir(bucket)
    yield f'{protocol}://{bucket}/a/run'


def names(url: str) -> set[str]:
  """The files in the store, without the record."""
  return set(stored_folder.StoredFolder(url).sizes()) - {'run.json'}


def content(folder: pathlib.Path) -> dict[str, bytes]:
  """The files in a folder that are not hidden, by their paths."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
    and not any(p.startswith('.') for p in path.relative_to(folder).parts)
  }


def save(mirror: Mirror | None, kind: str, step: int, text: str = '') -> None:
  """Stands in for a training that saves a checkpoint, and keeps it alone."""
  assert mirror is not None
  folder = mirror.folder / kind / str(step)
  (folder / 'params' / 'd').mkdir(parents=True)
  for name in ('params/d/1', 'params/_METADATA', MARKER):
    (folder / name).write_text(f'{name} of {kind} at step {step} {text}')
  checksums.write(folder)
  mirror.add(folder)
  for other in (mirror.folder / kind).iterdir():
    if other != folder:
      shutil.rmtree(other)


def checkpoint_names(*steps: str) -> set[str]:
  files = ('params/d/1', 'params/_METADATA', 'SHA256SUMS', MARKER)
  return {f'{step}/{name}' for step in steps for name in files}


def test_other_machine_has_what_was_uploaded(url, machine, faults):
  faults.share = 0.05
  with object_store_workdir.opened(url) as (folder, mirror):
    assert mirror is not None
    (folder / 'metrics.jsonl').write_text('{"step": 1}\n')
    save(mirror, 'checkpoints', 4)
    save(mirror, 'best', 4)
    save(mirror, 'checkpoints', 8)
    (folder / 'report.json').write_text('{}')
    expected = content(folder)
  assert names(url) == expected.keys()
  assert expected.keys() == checkpoint_names('checkpoints/8', 'best/4') | {
    'metrics.jsonl',
    'report.json',
  }
  machine('second')
  with object_store_workdir.opened(url) as (other, _):
    assert other != folder
    assert content(other) == expected
  assert faults.failed
  # What is only read has copies elsewhere.
  read = {
    name: text
    for name, text in expected.items()
    if name == 'report.json' or name.startswith('checkpoints')
  }
  found = stored_folder.local_path(url)
  assert content(found) == read
  array = found / 'checkpoints' / '8' / 'params' / 'd' / '1'
  array.write_bytes(bytes(array.stat().st_size))  # damaged
  assert content(stored_folder.local_path(url)) == read
  assert store_client.shown(found / 'checkpoints') == f'{url}/checkpoints'
  direct = stored_folder.local_path(f'{url}/best/4').absolute()
  assert (direct / MARKER).read_bytes() == expected[f'best/4/{MARKER}']


def test_half_uploaded_checkpoint_is_ignored_and_replaced(url, machine):
  with object_store_workdir.opened(url) as (_, mirror):
    save(mirror, 'checkpoints', 8)
  store = stored_folder.StoredFolder(url)
  store.write('checkpoints/12/params/d/other', b'of a run that was killed')
  store.write('checkpoints/12/SHA256SUMS', b'sums')
  machine('second')
  with object_store_workdir.opened(url) as (folder, mirror):
    assert content(folder).keys() == checkpoint_names('checkpoints/8')
    save(mirror, 'checkpoints', 12)
  assert names(url) == checkpoint_names('checkpoints/12')


def test_older_checkpoint_stays_until_the_next_is_complete(
  url, machine, monkeypatch
):
  upload = stored_folder.StoredFolder.upload
  order = []

  def fail_last(self, name: str, path: pathlib.Path) -> None:
    order.append(name)
    if name.endswith(f'12/{MARKER}'):
      raise store_client.StoreError(f'{self.url}: is away')
    upload(self, name, path)

  monkeypatch.setattr(stored_folder.StoredFolder, 'upload', fail_last)
  mirror = Mirror(url)
  save(mirror, 'checkpoints', 8)
  mirror.wait()
  assert order[-1] == f'checkpoints/8/{MARKER}'
  save(mirror, 'checkpoints', 12)
  with pytest.raises(UserError) as caught:
    mirror.finish()
  assert str(caught.value) == (
    f'{url}: is away; checkpoints/12 and the latest small files are only in '
    f'{mirror.folder}: the same command on this machine uploads them'
  )
  found = names(url)
  assert checkpoint_names('checkpoints/8') <= found
  assert f'checkpoints/12/{MARKER}' not in found

  # The same machine has it, and nobody has written since.
  monkeypatch.setattr(stored_folder.StoredFolder, 'upload', upload)
  with object_store_workdir.opened(url) as (folder, _):
    assert content(folder).keys() == checkpoint_names('checkpoints/12')
  assert names(url) == checkpoint_names('checkpoints/12')


def test_copy_of_a_run_that_was_resumed_elsewhere_is_replaced(
  url, machine, monkeypatch
):
  mirror = Mirror(url)
  save(mirror, 'checkpoints', 8, 'here')
  mirror.wait()
  first = mirror.folder
  # A checkpoint that was not uploaded when the process was killed.
  monkeypatch.setattr(mirror, 'sync', lambda: None)
  save(mirror, 'checkpoints', 12, 'here')
  (first / 'notes').write_text('here')
  monkeypatch.setattr(object_store_workdir, '_BEAT_SECONDS', 0.1)
  machine('second')
  with object_store_workdir.opened(url) as (folder, second):
    assert content(folder).keys() == checkpoint_names('checkpoints/8')
    save(second, 'checkpoints', 12, 'there')
    expected = content(folder)
  monkeypatch.undo()
  mirror.sync()  # of the first, if it was not killed
  with pytest.raises(UserError, match='trains there now, so this run ends'):
    mirror.wait()
  assert content(first) != expected


def test_training_twice_is_refused_and_a_dead_process_is_not(
  machine, monkeypatch, tmp_path
):
  monkeypatch.setattr(object_store_workdir, '_BEAT_SECONDS', 0.1)
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(object_stores.s3())
    use(monkeypatch, 's3', server)
    url = f's3://{uuid.uuid4().hex}/run'
    store, _ = fsspec.url_to_fs(url)
    store.mkdir(url.split('/')[2])
    mirror = Mirror(url)
    with pytest.raises(UserError, match='another process trains there'):
      Mirror(url)  # on the same machine
    machine('second')
    with pytest.raises(UserError, match=rf'{url}: process \d+ on .* trains'):
      Mirror(url)
    Mirror(url, 'test').finish()  # what a test reads and writes is no conflict
    mirror._ended.set()  # killed
    time.sleep(0.2)
    with object_store_workdir.opened(url) as (_, second):
      assert second is not None
    # The record has ended, so that this does not wait.
    machine('third')
    monkeypatch.setattr(object_store_workdir, '_BEAT_SECONDS', 1000.0)
    Mirror(url).finish()


def test_store_that_cannot_be_used_is_one_line(url, machine, monkeypatch):
  protocol, _, rest = url.partition('://')
  nowhere = f'{protocol}://{uuid.uuid4().hex}/run'
  with pytest.raises(UserError) as caught:
    Mirror(nowhere)
  assert str(caught.value) == (
    f'{nowhere}: there is no such bucket; create it, or choose another'
  )

  def deny(*_, **__):
    raise PermissionError('Access Denied')

  store, _ = fsspec.url_to_fs(url)
  monkeypatch.setattr(store, 'pipe_file', deny)
  with pytest.raises(UserError) as caught:
    Mirror(url)
  assert str(caught.value).startswith(f'{url}: access is denied (Permission')
  with pytest.raises(UserError, match=rf'^{url}/no: does not exist'):
    stored_folder.local_path(f'{url}/no')


@pytest.mark.parametrize('url', ['s3'], indirect=True)
def test_names_that_lead_out_of_the_copy_are_refused(url, machine, tmp_path):
  store, root = fsspec.url_to_fs(url)
  store.pipe_file(f'{root}/checkpoints/1/{MARKER}', b'{}')
  store.pipe_file(f'{root}/checkpoints/1/../../../../evil', b'evil')
  with pytest.raises(UserError, match=r'evil: has \.\. in its name'):
    Mirror(url, mode='test')
  with pytest.raises(UserError, match=r'evil: has \.\. in its name'):
    stored_folder.local_path(url)
  assert not list(tmp_path.rglob('evil'))


def test_outage_is_warned_of_once_and_made_up_for(
  url, machine, monkeypatch, caplog
):
  write = stored_folder.StoredFolder.write
  is_away = True

  def sometimes(self, name: str, content: bytes) -> None:
    if is_away and name != 'run.json':
      raise store_client.StoreError(f'{self.url}: is away')
    write(self, name, content)

  mirror = Mirror(url)
  monkeypatch.setattr(stored_folder.StoredFolder, 'write', sometimes)
  (mirror.folder / 'metrics.jsonl').write_text('1')
  for step in (4, 8, 12):
    save(mirror, 'checkpoints', step)
    with pytest.raises(UserError, match=f'is away; checkpoints/{step} and the'):
      mirror.wait()
  warnings = [r for r in caplog.records if r.levelname == 'WARNING']
  assert len(warnings) == 1
  is_away = False
  mirror.finish()
  assert names(url) == checkpoint_names('checkpoints/12') | {'metrics.jsonl'}


@pytest.mark.slow
def test_two_processes_resume_bit_by_bit_on_other_machines(
  motion_dataset, compilation_cache, monkeypatch, tmp_path
):
  """Stopped by SIGTERM, over a network that fails; each has its own disk."""
  flags = (
    *training_command.TINY,
    '--config.num_epochs=2',
    '--config.validation.every_epochs=1',
    '--config.checkpoint.every_steps=4',
    '--config.log_every_steps=1',
    '--config.mesh.fsdp=2',
    f'--config.dataset.data_dir={motion_dataset}',
  )
  environment = {
    **training_command.environment(compilation_cache),
    'AWS_ACCESS_KEY_ID': 'a',
    'AWS_SECRET_ACCESS_KEY': 'b',
  }

  def start(workdir: str | pathlib.Path, run: str) -> list[Any]:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    started = []
    for index in range(2):
      command = training_command.command(
        *flags,
        f'--coordinator_address=127.0.0.1:{port}',
        '--num_processes=2',
        f'--process_id={index}',
        workdir=workdir,
      )
      machine = tmp_path / f'{run}.{index}'
      with machine.with_suffix(f'{machine.suffix}.log').open('w') as log:
        started.append(
          subprocess.Popen(
            command,
            env={**environment, 'XDG_CACHE_HOME': str(machine)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
          )
        )
    return started

  def log(run: str) -> str:
    return ''.join((tmp_path / f'{run}.{i}.log').read_text() for i in (0, 1))

  def wait(started: list[Any], expected: int, run: str) -> None:
    try:
      assert [p.wait(300) for p in started] == 2 * [expected], log(run)
    finally:
      for process in started:
        process.kill()

  faults = object_stores.Faults(latency=0.01, share=0.01)
  with (
    object_stores.s3() as upstream,
    object_stores.proxy(upstream, faults) as proxied,
  ):
    environment['AWS_ENDPOINT_URL'] = proxied
    use(monkeypatch, 's3', upstream)
    bucket = uuid.uuid4().hex
    url = f's3://{bucket}/run'
    fsspec.url_to_fs(url)[0].mkdir(bucket)
    whole = start(tmp_path / 'whole', 'whole')
    wait(whole, 0, 'whole')
    stopped = start(url, 'stopped')
    while ' step 5/12' not in log('stopped'):
      assert stopped[0].poll() is None, log('stopped')
      time.sleep(0.05)
    stopped[1].send_signal(signal.SIGTERM)
    wait(stopped, 128 + signal.SIGTERM, 'stopped')
    resumed = start(url, 'resumed')
    wait(resumed, 0, 'resumed')
  assert re.search(rf'resumed {url}/checkpoints/\d+\n', log('resumed'))
  assert faults.failed
  local = [
    tmp_path / f'resumed.{i}/dualformer_jax' / kind / 's3' / bucket / 'run'
    for i, kind in enumerate(('workdirs', 'workdirs-1'))
  ]
  expected, metadata = test_processes.read(
    tmp_path / 'whole' / 'checkpoints/12'
  )
  for workdir in local:
    arrays, found = test_processes.read(workdir / 'checkpoints' / '12')
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
      assert array.tobytes() == arrays[name].tobytes(), name
    for same in ('step', 'data_position', 'class_names', 'model'):
      assert found[same] == metadata[same]
  reports = [
    json.loads((workdir / 'report.json').read_text())
    for workdir in (tmp_path / 'whole', local[0])
  ]
  assert reports[0]['top1'] == reports[1]['top1']
  assert reports[1]['checkpoint'].startswith(f'{url}/')
