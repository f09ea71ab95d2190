"""Checkpoints come back exactly, on any mesh; damage is noticed and told."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.views import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import checkpoint, step
from tests import eight_devices

METADATA = '_CHECKPOINT_METADATA'
FIELDS: dict[str, Any] = {
  'depths': (1, 2, 1, 1),
  'embed_dims': (8, 8, 8, 16),
  'num_heads': (1, 1, 1, 2),
  'num_classes': 3,
  'num_frames': 4,
  'image_size': 64,
  'window': (2, 4, 4),
  'fine_sizes': ((1, 2, 2),) * 4,
  'coarse_sizes': ((1, 1, 1), (1, 1, 1), None, None),
  'drop_path_rate': 0.1,
  'head_dropout': 0.5,
  'token_label': False,
  'remat': 'none',
  'dtype': 'float32',
}


def description(**changes: Any) -> checkpoint.Description:
  """Returns a description of the model of FIELDS."""
  return dataclasses.replace(
    checkpoint.Description(
      model=FIELDS,
      preprocessing=Preprocessing(4, 2, 64, pixel_mean=(1.5, 2.5, 3.25)),
      class_names=('walking', 'ходьба', 'a "quoted" name'),
    ),
    **changes,
  )


def _assert_same(found: Any, expected: Any) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
    found,
    expected,
  )


@pytest.fixture(scope='module', name='state')
def _state() -> step.TrainState:
  """A state in which each number is of its own, none what arrays begin with."""
  model = DualFormer(**FIELDS)
  shapes = jax.eval_shape(lambda: step.init_state(model, optax.adam(1e-3), 0))
  leaves, structure = jax.tree.flatten(shapes)
  leaves = [
    jnp.asarray(np.arange(leaf.size) * 7 + 1000 * i + 1, leaf.dtype)
    for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(
    structure,
    [
      leaf.reshape(like.shape)
      for leaf, like in zip(leaves, jax.tree.leaves(shapes), strict=True)
    ],
  )


@pytest.fixture(scope='module', name='variables')
def _variables(state) -> dict[str, Any]:
  return {'params': state.params, 'batch_stats': state.batch_stats}


@pytest.fixture(scope='module', name='saved')
def _saved(tmp_path_factory, variables) -> pathlib.Path:
  """A checkpoint folder, to be copied before it is changed."""
  folder = tmp_path_factory.mktemp('saved') / 'model'
  checkpoint.save_model(folder, variables, description())
  return folder


@pytest.fixture(name='copy')
def _copy(saved, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'copy'))


def _abstract(state: step.TrainState) -> step.TrainState:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


# --- A model


def test_a_model_comes_back_exactly_with_its_description(saved, variables):
  loaded, of_itself = checkpoint.load_model(saved)
  _assert_same(loaded, variables)
  assert of_itself == description()
  assert hash(of_itself.build_model()) == hash(DualFormer(**FIELDS))
  assert of_itself.build_model(dtype='bfloat16').dtype == 'bfloat16'


def test_a_model_without_batch_norm_comes_back(tmp_path):
  fields = {**FIELDS, 'coarse_sizes': (None,) * 4}
  shapes = checkpoint.variable_shapes(DualFormer(**fields), 'it')
  assert shapes['batch_stats'] == {}
  variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.25), shapes)
  checkpoint.save_model(tmp_path / 'a', variables, description(model=fields))
  loaded, _ = checkpoint.load_model(tmp_path / 'a')
  _assert_same(loaded, variables)


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path, variables):
  taken = tmp_path / 'taken'
  taken.mkdir()
  (taken / 'file').write_text('mine')
  for folder in (taken, taken / 'file'):
    with pytest.raises(UserError, match='nothing was written'):
      checkpoint.save_model(folder, variables, description())
  assert [path.name for path in taken.iterdir()] == ['file']
  assert (taken / 'file').read_text() == 'mine'
  (taken / 'file').unlink()
  checkpoint.save_model(taken, variables, description())
  assert (taken / METADATA).is_file()


# --- A training run


def test_the_newest_are_kept_and_a_state_comes_back_exactly(tmp_path, state):
  series = checkpoint.Checkpoints(tmp_path / checkpoint.NEWEST, keep=2)
  assert series.newest() is None
  for number in (10, 20, 30):
    scaled = jax.tree.map(lambda x, by=number: x * by, state)
    series.save(scaled, description(step=number, data_position={'at': number}))
    for leaf in jax.tree.leaves(scaled):
      leaf.delete()  # as a step does with a state that is donated to it
  series.close()
  folder = tmp_path / checkpoint.NEWEST
  assert sorted(path.name for path in folder.iterdir()) == ['20', '30']

  again = checkpoint.Checkpoints(folder, keep=2)
  assert again.newest() == folder / '30'
  restored, of_itself = again.restore(_abstract(state))
  expected = jax.tree.map(lambda x: x * 30, state)
  _assert_same(restored, expected.replace(step=jnp.asarray(30, jnp.int32)))
  assert of_itself.data_position == {'at': 30}
  # A step that is saved already, as after a validation, is not saved again.
  again.save(state, description(step=30, data_position={'at': 0}))
  again.close()
  assert checkpoint.read_description(folder / '30').data_position == {'at': 30}
  # The model of a training run loads like any other.
  loaded, _ = checkpoint.load_model(tmp_path)
  _assert_same(loaded['params'], expected.params)


def test_the_best_is_a_series_of_its_own(tmp_path, state):
  best = checkpoint.Checkpoints(tmp_path / checkpoint.BEST)
  newest = checkpoint.Checkpoints(tmp_path / checkpoint.NEWEST)
  for number, score in ((1, 0.25), (2, 0.75), (3, 0.5)):
    newest.save(state, description(step=number))
    if score != 0.5:
      best.save(state, description(step=number, score=score))
  best.close()
  newest.close()
  assert checkpoint.find(tmp_path).name == '3'
  assert checkpoint.find(tmp_path / checkpoint.BEST).name == '2'
  found = checkpoint.find(tmp_path / checkpoint.BEST)
  assert checkpoint.read_description(found).score == 0.75


def test_what_a_killed_process_left_unfinished_does_not_count(tmp_path, state):
  folder = tmp_path / checkpoint.NEWEST
  series = checkpoint.Checkpoints(folder)
  series.save(state, description(step=5))
  series.close()
  (folder / '5' / 'SHA256SUMS').unlink()  # killed before it was written
  half = shutil.copytree(folder / '5', folder / '6.orbax-checkpoint-tmp')
  (half / METADATA).unlink()
  assert checkpoint.find(tmp_path).name == '5'
  series = checkpoint.Checkpoints(folder)
  assert series.newest() == folder / '5'
  restored, _ = series.restore(_abstract(state))
  _assert_same(restored.opt_state, state.opt_state)
  series.save(state, description(step=6))
  series.close()
  assert [path.name for path in folder.iterdir()] == ['6']
  assert (folder / '6' / 'SHA256SUMS').is_file()


def test_a_state_comes_back_exactly_on_another_mesh(tmp_path):
  printed = eight_devices.run('save_and_restore_elsewhere', tmp_path / 'run')
  # What a device holds of a kernel [16, 64], on data=8 and on 2 x 2 x 2.
  assert printed.splitlines() == ['(16, 64)', '(8, 32)']


# --- What is damaged, absent or none


def _refused(folder: pathlib.Path, expected: str) -> None:
  with pytest.raises(UserError, match=expected) as error:
    checkpoint.load_model(folder)
  message = str(error.value)
  assert str(folder) in message
  assert '\n' not in message
  assert len(message) < 1000


@pytest.mark.parametrize('of_folder', ['params', 'batch_stats'])
@pytest.mark.parametrize('damage', ['removed', 'cut', 'one bit'])
def test_any_damaged_file_of_arrays_is_noticed(copy, of_folder, damage):
  files = sorted(path for path in (copy / of_folder).rglob('*'))
  files = [path for path in files if path.is_file()]
  assert len(files) >= 5
  for path in files[:: 1 if damage == 'one bit' else 3]:
    content = bytearray(path.read_bytes())
    if damage == 'removed':
      path.unlink()
    elif damage == 'cut':
      path.write_bytes(content[:-1])
    else:
      changed = content.copy()
      changed[len(content) // 2] ^= 1
      path.write_bytes(changed)
    _refused(copy, f'{path.relative_to(copy)} is not as it was written')
    path.write_bytes(content)
  checkpoint.load_model(copy)


@pytest.mark.parametrize('name', ['params', 'batch_stats'])
def test_a_missing_folder_of_arrays_is_noticed(copy, name):
  shutil.rmtree(copy / name)
  (copy / 'SHA256SUMS').unlink()
  _refused(copy, f'{name}.* absent|{name}')


def test_a_checkpoint_without_metadata_is_none(copy):
  (copy / METADATA).unlink()
  _refused(copy, 'holds no checkpoint')


@pytest.mark.parametrize(
  'content',
  ['', '{', '[]', '{}', '{"custom_metadata": null}', '{"custom_metadata": {}}'],
)
def test_metadata_that_is_malformed_is_told(copy, content):
  (copy / METADATA).write_text(content)
  _refused(copy, 'not a whole checkpoint')


def test_metadata_that_is_cut_short_is_told_wherever_it_ends(copy):
  content = (copy / METADATA).read_bytes()
  for length in range(0, len(content), 97):
    (copy / METADATA).write_bytes(content[:length])
    _refused(copy, 'not a whole checkpoint')


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'format': 2}, 'another version'),
    ({'class_names': ['a', 'b']}, 'one name for each class'),
    ({'class_names': [1, 2, 3]}, 'class_names'),
    ({'class_names': 'abc'}, 'class_names'),
    ({'step': 'three'}, 'step'),
    ({'multi_label': 1}, 'multi_label'),
    ({'surprise': 1}, 'surprise'),
    ({'preprocessing': {'num_frames': 4}}, 'frame_interval'),
  ],
)
def test_a_description_that_is_malformed_is_told(copy, changes, expected):
  _change_description(copy, lambda fields: fields.update(changes))
  _refused(copy, expected)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'embed_dims': [8, 8, 8, 32]}, r'bias is \(16,\), expected \(32,\)'),
    ({'depths': [1, 2, 2, 1]}, 'blocks_2_1.* is absent, expected'),
    ({'depths': [1, 1, 1, 1]}, 'blocks_1_1.*, expected none'),
    ({'num_heads': [1, 1, 1, 1]}, r'is \(2, 8, 16\), expected \(1, 16, 16\)'),
    ({'token_label': True}, 'token_linear_0/bias is absent'),
    ({'token_label': 'yes', 'surprise': 1}, 'surprise'),
    ({'image_size': -64}, 'model.image_size -64'),
    ({'fine_sizes': [[1, 2, 2]] * 3}, 'expected 4 values'),
    ({'dtype': 'float23'}, "model.dtype is 'float23'"),
  ],
)
def test_a_description_of_another_model_is_told(copy, changes, expected):
  _change_description(copy, lambda fields: fields['model'].update(changes))
  _refused(copy, expected)


def _change_description(folder: pathlib.Path, change) -> None:
  metadata = json.loads((folder / METADATA).read_text())
  change(metadata['custom_metadata']['dualformer'])
  (folder / METADATA).write_text(json.dumps(metadata))


def test_what_is_no_checkpoint_is_told(tmp_path):
  (tmp_path / 'file').write_text('')
  for path, expected in (
    (tmp_path / 'none', 'no checkpoint folder at'),
    (tmp_path / 'file', 'no checkpoint folder at'),
    (tmp_path, 'holds no checkpoint'),
  ):
    with pytest.raises(UserError, match=expected):
      checkpoint.find(path)
