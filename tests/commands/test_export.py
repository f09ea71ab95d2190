"""The export command: a program that runs with JAX alone, and weights."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
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


@pytest.fixture(scope='module', name='exported')
def _exported(folder) -> pathlib.Path:
  """A folder with a program in float32 and the weights."""
  out = folder.parent / 'out'
  out.mkdir()
  recognizer = dualformer_jax.load(folder, dtype='float32')
  line = exported_files.export_program(recognizer, out / 'model.zip')
  assert line.endswith('probabilities, for cpu, cuda, tpu')
  exported_files.save_weights(recognizer, out / 'model.safetensors')
  return out


@pytest.fixture(name='run')
def _run(run_command):
  return functools.partial(run_command, export)


@pytest.mark.slow
def test_export_on_a_tpu_is_for_all_platforms(folder, monkeypatch, tmp_path):
  recognizer = dualformer_jax.load(folder, dtype='bfloat16')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  # A kernel for TPUs could not be lowered for CPUs.
  exported_files.export_program(recognizer, tmp_path / 'model.zip')
  assert (tmp_path / 'model.zip').exists()


@pytest.mark.slow
@pytest.mark.parametrize('videos', [1, 3])
def test_program_agrees_with_recognizer(folder, exported, videos):
  recognizer = dualformer_jax.load(folder, dtype='float32')
  with zipfile.ZipFile(exported / 'model.zip') as file:
    program = jax_export.deserialize(bytearray(file.read('program.stablehlo')))
    description = json.loads(file.read('description.json'))
  assert tuple(description['class_names']) == token_model.NAMES
  assert description['preprocessing']['num_clips'] == 2
  assert set(program.platforms) == {'cpu', 'cuda', 'tpu'}
  rng = np.random.default_rng(1)
  for count in (2, 3):
    shape = (videos, count, 8, 68, 68, 3)
    views = rng.integers(0, 256, shape).astype(np.uint8)
    found = np.asarray(program.call(views))
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
  assert 'agrees with its golden input' in done.stdout


def test_check_of_a_program_with_other_probabilities_fails(
  run, exported, tmp_path
):
  path = tmp_path / 'other.zip'
  with (
    zipfile.ZipFile(exported / 'model.zip') as old,
    zipfile.ZipFile(path, 'w') as new,
  ):
    for name in old.namelist():
      if name != 'golden.npz':
        new.writestr(name, old.read(name))
        continue
      with old.open(name) as file, np.load(file) as arrays:
        changed = arrays['probabilities'][:, ::-1]
        with new.open(name, 'w') as target:
          np.savez(target, views=arrays['views'], probabilities=changed)
  done = run(f'--check={path}')
  assert done.returncode == 2
  assert 'do not use the file' in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_weights_are_those_of_the_checkpoint(folder, exported):
  arrays = load_file(exported / 'model.safetensors')
  variables = dualformer_jax.load(folder).variables
  for name, array in arrays.items():
    leaf = variables
    for part in name.split('/'):
      leaf = leaf[part]
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
  assert first.startswith(f'{model}: ')
  assert second == f'{weights}: {len(load_file(weights))} arrays'


def test_invalid_flags_fail_in_one_line_and_write_nothing(
  run, folder, exported, tmp_path
):
  before = (exported / 'model.zip').read_bytes()
  for flags, expected in (
    ((f'--checkpoint={folder}', f'--out={exported}/model.zip'), '--overwrite'),
    ((f'--checkpoint={tmp_path}', f'--out={tmp_path}/a.zip'), str(tmp_path)),
    ((f'--checkpoint={folder}', f'--out={tmp_path}'), 'is a folder'),
    ((f'--checkpoint={folder}',), '--out must be given'),
  ):
    done = run(*flags)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
  assert (exported / 'model.zip').read_bytes() == before
  assert not list(tmp_path.glob('*.zip*'))
