"""One file that JAX alone runs, with the same probabilities everywhere."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any
import zipfile

import jax
from jax import export as jax_export
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import dualformer_jax
from dualformer_jax import export
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.views import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import checkpoint, step
from tests import training_command

CLASSES = ('walking', 'running', 'jumping <b>')
FIELDS: dict[str, Any] = dict(
  depths=(2, 2),
  embed_dims=(16, 32),
  num_heads=(1, 2),
  num_classes=3,
  num_frames=8,
  image_size=32,
  window=(4, 4, 4),
  fine_sizes=((4, 4, 4), (4, 4, 4)),
  coarse_sizes=((2, 2, 2), None),
)


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory) -> pathlib.Path:
  """A checkpoint of a small model that was not trained."""
  model = DualFormer(**FIELDS)
  state = jax.jit(
    lambda: step.init_state(model, optax.sgd(0.1), 0),
  )()
  # Such that classes differ.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: p + 0.05 * rng.standard_normal(p.shape).astype(np.float32),
    state.params,
  )
  folder = tmp_path_factory.mktemp('run') / 'model'
  checkpoint.save_model(
    folder,
    {'params': params, 'batch_stats': state.batch_stats},
    checkpoint.Description(
      model={**FIELDS, 'dtype': 'bfloat16'},
      preprocessing=Preprocessing(8, 2, 32, num_clips=2, num_crops=3),
      class_names=CLASSES,
    ),
  )
  return folder


def test_where_there_is_a_tpu_it_is_made_for_all_platforms(
  folder, monkeypatch, tmp_path
):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  out = tmp_path / 'model.zip'
  # With the kernel for TPUs in it, it could not be lowered for CPUs.
  export.export(str(folder), out, dtype='bfloat16')
  assert out.exists()


def run(
  *flags: object, absent: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
  code = (
    f'import sys; sys.modules.update(dict.fromkeys({absent!r}));'
    ' from dualformer_jax import export; export.cli()'
  )
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, flags)],
    cwd=training_command.REPOSITORY,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.fixture(scope='module', name='exported')
def _exported(folder, tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp('out')
  done = run(
    f'--checkpoint={folder}',
    f'--out={out}/model.zip',
    f'--weights={out}/model.safetensors',
  )
  assert done.returncode == 0, done.stderr
  assert 'for cpu, cuda, tpu' in done.stdout
  return out


@pytest.mark.parametrize('videos', [1, 3])
def test_it_gives_the_probabilities_of_the_recognizer(folder, exported, videos):
  recognizer = dualformer_jax.load(folder, dtype='float32')
  with zipfile.ZipFile(exported / 'model.zip') as file:
    program = jax_export.deserialize(bytearray(file.read('program.stablehlo')))
    description = json.loads(file.read('description.json'))
  assert tuple(description['class_names']) == CLASSES
  assert description['preprocessing']['num_crops'] == 3
  assert set(program.platforms) == {'cpu', 'cuda', 'tpu'}
  rng = np.random.default_rng(1)
  for count in (6, 2):
    shape = (videos, count, 8, 32, 32, 3)
    views = rng.integers(0, 256, shape).astype(np.uint8)
    found = np.asarray(program.call(views))
    for row, video in zip(found, views, strict=True):
      np.testing.assert_allclose(
        row, recognizer.probabilities(video), atol=1e-5
      )
  assert np.ptp(found, axis=1).min() > 1e-3  # It does tell classes apart.


def test_the_check_needs_neither_flax_nor_the_model(exported):
  done = run(
    f'--check={exported}/model.zip',
    absent=('flax', 'orbax', 'optax', 'dualformer_jax.models'),
  )
  assert done.returncode == 0, done.stderr
  assert 'agrees with its golden clip' in done.stdout


def test_the_golden_clip_tells_another_program(exported, tmp_path):
  path = tmp_path / 'other.zip'
  with (
    zipfile.ZipFile(exported / 'model.zip') as old,
    zipfile.ZipFile(path, 'w') as new,
  ):
    for name in old.namelist():
      content = old.read(name)
      if name == 'golden.npz':
        with old.open(name) as file, np.load(file) as arrays:
          changed = arrays['probabilities'][:, ::-1]
          with new.open(name, 'w') as target:
            np.savez(target, views=arrays['views'], probabilities=changed)
      else:
        new.writestr(name, content)
  done = run(f'--check={path}')
  assert done.returncode == 2
  assert 'do not use it' in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_the_weights_are_those_of_the_checkpoint(folder, exported):
  arrays = load_file(exported / 'model.safetensors')
  variables = dualformer_jax.load(folder).variables
  for name, array in arrays.items():
    leaf = variables
    for part in name.split('/'):
      leaf = leaf[part]
    np.testing.assert_array_equal(array, leaf)
  assert len(arrays) == len(jax.tree.leaves(variables))


def test_files_that_are_none_are_told_in_one_line(exported, tmp_path):
  whole = (exported / 'model.zip').read_bytes()
  middle = len(whole) // 2
  flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
  for content in (b'', b'nothing', whole[:-100], flipped):
    path = tmp_path / 'x.zip'
    path.write_bytes(content)
    with pytest.raises(UserError, match='is damaged, or was not') as caught:
      export.check(path)
    assert len(str(caught.value).splitlines()) == 1
  with pytest.raises(UserError, match='there is no such file'):
    export.check(tmp_path / 'absent.zip')


def test_nothing_is_overwritten_and_mistakes_are_one_line(
  folder, exported, tmp_path
):
  before = (exported / 'model.zip').read_bytes()
  for flags, words in (
    ((f'--checkpoint={folder}', f'--out={exported}/model.zip'), '--overwrite'),
    ((f'--checkpoint={tmp_path}', f'--out={tmp_path}/a.zip'), str(tmp_path)),
    ((f'--checkpoint={folder}', f'--out={tmp_path}/no/a'), 'no such folder'),
    ((f'--checkpoint={folder}',), '--out must be given'),
  ):
    done = run(*flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
  assert (exported / 'model.zip').read_bytes() == before
  assert not list(tmp_path.glob('*.zip*'))
