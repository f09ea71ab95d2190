"""The export command: a program that runs with JAX alone, and weights."""

from __future__ import annotations

from collections.abc import Mapping
import datetime
import functools
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any
import zipfile

import jax
from jax import export as jax_export
import numpy as np
import pytest
from safetensors.numpy import load_file

import dualformer_jax
from dualformer_jax import export
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.errors import UserError
from dualformer_jax.inference import exported as exported_files
from dualformer_jax.inference import stored_weights
from dualformer_jax.inference.recognizer import Recognizer
from tests import training_command
from tests.inference import token_model


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('run') / 'model'
  checkpoint.save_model(
    folder,
    token_model.make_variables(),
    token_model.make_metadata(dtype='bfloat16'),
  )
  return folder


@pytest.fixture(scope='module', name='recognizer')
def _recognizer(folder) -> Recognizer:
  return dualformer_jax.load(folder, dtype='float32')


@pytest.fixture(scope='module', name='exported')
def _exported(folder, recognizer) -> pathlib.Path:
  """A folder with a program in float32 and the weights."""
  out = folder.parent / 'out'
  out.mkdir()
  weights = stored_weights.flatten(recognizer.variables)
  line = exported_files.export_program(recognizer, weights, out / 'model.zip')
  assert 'probabilities, for cpu, cuda, tpu;' in line
  exported_files.save_weights(weights, out / 'model.safetensors')
  return out


def rewrite(
  old: pathlib.Path, new: pathlib.Path, changes: Mapping[str, bytes | None]
) -> None:
  """Copies a .zip file with other content of some names, or without them."""
  with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, 'w') as target:
    contents = {name: source.read(name) for name in source.namelist()}
    for name, content in ({**contents, **changes}).items():
      if content is not None:
        target.writestr(name, content)


@pytest.fixture(name='run')
def _run(run_command):
  return functools.partial(run_command, export)


@pytest.mark.slow
def test_export_on_a_tpu_is_for_all_platforms(folder, monkeypatch, tmp_path):
  recognizer = dualformer_jax.load(folder, dtype='bfloat16')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  # A kernel for TPUs could not be lowered for CPUs.
  weights = stored_weights.flatten(recognizer.variables)
  exported_files.export_program(recognizer, weights, tmp_path / 'model.zip')
  assert (tmp_path / 'model.zip').exists()


@pytest.mark.slow
def test_program_agrees_with_recognizer(recognizer, exported):
  with zipfile.ZipFile(exported / 'model.zip') as file:
    program = jax_export.deserialize(bytearray(file.read('program.stablehlo')))
    weights: Any = dict(np.load(io.BytesIO(file.read('weights.npz'))))
    description = json.loads(file.read('description.json'))
  assert tuple(description['class_names']) == token_model.NAMES
  assert description['preprocessing']['num_clips'] == 2
  assert set(program.platforms) == {'cpu', 'cuda', 'tpu'}
  rng = np.random.default_rng(1)
  for shape in ((1, 3, 8, 68, 68, 3), (3, 2, 8, 68, 68, 3)):
    views = rng.integers(0, 256, shape).astype(np.uint8)
    found = np.asarray(program.call(weights, views))
    for row, video in zip(found, views, strict=True):
      np.testing.assert_allclose(
        row, recognizer.probabilities(video), atol=1e-5
      )
    assert np.ptp(found, axis=1).min() > 1e-3  # the classes differ


def test_check_needs_neither_flax_nor_the_model(exported):
  absent = ('flax', 'orbax', 'optax', 'dualformer_jax.models')
  code = (
    f'import sys; sys.modules.update(dict.fromkeys({absent!r}));'
    ' from dualformer_jax import export; export.cli()'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, f'--check={exported}/model.zip'],
    cwd=training_command.REPOSITORY,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 'agrees with its expected output' in done.stdout


def test_check_of_a_program_with_other_probabilities_fails(
  run, exported, tmp_path
):
  path = tmp_path / 'other.zip'
  with zipfile.ZipFile(exported / 'model.zip') as file:
    arrays = np.load(io.BytesIO(file.read('golden.npz')))
  golden = io.BytesIO()
  changed = arrays['probabilities'][:, ::-1]
  np.savez(golden, views=arrays['views'], probabilities=changed)
  rewrite(exported / 'model.zip', path, {'golden.npz': golden.getvalue()})
  done = run(f'--check={path}')
  assert done.returncode == 2
  assert 'do not use the file' in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_weights_are_those_of_the_checkpoint(folder, exported):
  arrays = load_file(exported / 'model.safetensors')
  variables = dualformer_jax.load(folder).variables
  for name, array in arrays.items():
    leaf: Any = variables
    for part in name.split('/'):
      leaf = leaf[part]
    assert array.shape == leaf.shape
    np.testing.assert_array_equal(array, leaf)
  assert len(arrays) == len(jax.tree.leaves(variables))


def test_check_of_a_damaged_file_raises(exported, tmp_path):
  whole = (exported / 'model.zip').read_bytes()
  middle = len(whole) // 2
  flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
  for content in (b'', b'nothing', whole[:-100], flipped):
    path = tmp_path / 'x.zip'
    path.write_bytes(content)
    with pytest.raises(UserError, match='is damaged, or was not'):
      exported_files.check_program(path)
  with pytest.raises(UserError, match='no such file'):
    exported_files.check_program(tmp_path / 'absent.zip')


def test_command_writes_both_files(run, folder, tmp_path):
  model, weights = tmp_path / 'model.zip', tmp_path / 'model.safetensors'
  done = run(
    f'--checkpoint={folder}',
    f'--weights={weights}',
    f'--out={model}',
    '--dtype=float32',
  )
  assert (done.returncode, done.stderr) == (0, '')
  first, second = done.stdout.splitlines()
  assert first == f'{weights}: {len(load_file(weights))} arrays'
  assert second.startswith(f'{model}: ')


def test_invalid_flags_fail_in_one_line_and_write_nothing(
  run, folder, exported, tmp_path
):
  before = (exported / 'model.zip').read_bytes()
  for flags, expected in (
    ((f'--checkpoint={folder}', f'--out={exported}/model.zip'), '--overwrite'),
    ((f'--checkpoint={tmp_path}', f'--out={tmp_path}/a.zip'), str(tmp_path)),
    ((f'--checkpoint={folder}', f'--out={tmp_path}/m.bin'), '.zip or .onnx'),
    ((f'--checkpoint={folder}', f'--weights={tmp_path}/m.pt'), '.safetensors'),
    (
      (
        f'--checkpoint={folder}',
        f'--out={tmp_path}/m.onnx',
        '--dtype=bfloat16',
      ),
      'ONNX has float32',
    ),
    ((f'--checkpoint={folder}',), '--out must be given'),
    ((), 'expected one of'),
    (('--check=m.zip', f'--weights={tmp_path}/a.safetensors'), 'needs --check'),
    ((f'--check={exported}/model.zip', f'--renew={folder}'), 'expected one of'),
    ((f'--renew={exported}/model.zip',), '--overwrite'),
  ):
    done = run(*flags)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
  assert (exported / 'model.zip').read_bytes() == before
  assert not list(tmp_path.iterdir())


def test_too_little_space_is_reported_before_the_export(
  run, folder, tmp_path, monkeypatch
):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  monkeypatch.setattr(jax_export, 'export', lambda *_, **__: pytest.fail())
  done = run(f'--checkpoint={folder}', f'--out={tmp_path}/model.zip')
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert 'are free' in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('today', 'words'),
  [
    ('2027-02-01', 'JAX was guaranteed to read it only until 2027-01-31'),
    ('2027-01-31', 'JAX is guaranteed to read it only until 2027-01-31'),
    ('2027-01-02', 'JAX is guaranteed to read it only until 2027-01-31'),
    ('2027-01-01', None),
  ],
)
def test_warning_in_the_last_month(today, words):
  warning = exported_files.expiry_warning(
    pathlib.Path('m.zip'),
    {'readable_until': '2027-01-31'},
    datetime.date.fromisoformat(today),
  )
  if words is None:
    assert warning is None
  else:
    assert warning is not None
    assert words in warning
    assert '--renew=m.zip --overwrite' in warning


def test_check_warns_of_a_file_that_expires(run_command, exported, tmp_path):
  path = tmp_path / 'model.zip'
  today = datetime.date.today()
  with zipfile.ZipFile(exported / 'model.zip') as file:
    description = json.loads(file.read('description.json'))
  assert description['jax'] == jax.__version__
  exported_at = datetime.date.fromisoformat(description['exported'])
  assert today - exported_at <= datetime.timedelta(days=1)
  until = datetime.date.fromisoformat(description['readable_until'])
  assert until - exported_at == datetime.timedelta(days=182)
  description['readable_until'] = today.isoformat()
  changes = {'description.json': json.dumps(description).encode()}
  rewrite(exported / 'model.zip', path, changes)
  done = run_command(export, f'--check={path}', with_log=True)
  assert done.returncode == 0, done.stderr
  [line] = [x for x in done.stderr.splitlines() if x.startswith('W')]
  assert f'{path}: JAX is guaranteed' in line

  broken = tmp_path / 'broken.zip'
  rewrite(path, broken, {'program.stablehlo': b'of an old version'})
  done = run_command(export, f'--check={broken}')
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert f'jax {jax.__version__} cannot read the program' in line
  assert f'--renew={broken}' in line


@pytest.mark.slow
def test_renewed_file_has_a_new_date_and_the_same_output(
  run, recognizer, exported, tmp_path
):
  path = tmp_path / 'model.zip'
  # A program that cannot be read any more.
  changes: Any = {'program.stablehlo': b'old', 'description.json': b'{}'}
  rewrite(exported / 'model.zip', path, changes)
  done = run(f'--renew={path}', '--overwrite')
  assert (done.returncode, done.stderr) == (0, '')
  assert f'jax {jax.__version__}, which new releases' in done.stdout
  with (
    zipfile.ZipFile(exported / 'model.zip') as old,
    zipfile.ZipFile(path) as new,
  ):
    for name in ('description.json', 'checkpoint.json', 'weights.npz'):
      assert new.read(name) == old.read(name), name
    golden = np.load(io.BytesIO(new.read('golden.npz')))
    weights: Any = dict(np.load(io.BytesIO(new.read('weights.npz'))))
    program = jax_export.deserialize(bytearray(new.read('program.stablehlo')))
  [views] = golden['views']
  [found] = np.asarray(program.call(weights, views[None]))
  np.testing.assert_allclose(found, recognizer.probabilities(views), atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'weights.npz': None}, 'export it again from the checkpoint'),
    ({'weights.npz': b'PK'}, 'is damaged'),
    ({'checkpoint.json': None}, 'is damaged'),
    ({'checkpoint.json': b'{}'}, 'is damaged'),
  ],
)
def test_file_that_cannot_be_renewed_is_left_alone(
  run, exported, tmp_path, changes, message
):
  path = tmp_path / 'model.zip'
  rewrite(exported / 'model.zip', path, changes)
  before = path.read_bytes()
  done = run(f'--renew={path}', '--overwrite')
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert message in line
  assert path.read_bytes() == before
