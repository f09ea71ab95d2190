"""Checkpoints are restored exactly, on any mesh; damage raises."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualformer_jax.checkpoints import checkpoint, checksums, metadata
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training.state import TrainState, init_state
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


def make_metadata(**changes: Any) -> checkpoint.CheckpointMetadata:
  """Returns the metadata of the model of FIELDS."""
  return dataclasses.replace(
    checkpoint.CheckpointMetadata(
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
def _state() -> TrainState:
  """Returns a state of distinct numbers, none of them an initial value."""
  model = DualFormer(**FIELDS)
  shapes = jax.eval_shape(lambda: init_state(model, optax.adam(1e-3), 0))
  leaves, structure = jax.tree.flatten(shapes)
  # By NumPy, as JAX would compile a program for each shape.
  leaves = [
    (np.arange(leaf.size) * 7 + 1000 * i + 1).astype(leaf.dtype)
    for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(
    structure,
    [
      jnp.asarray(leaf.reshape(like.shape))
      for leaf, like in zip(leaves, jax.tree.leaves(shapes), strict=True)
    ],
  )


def _scaled(state: TrainState, by: int) -> TrainState:
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * by), state)


@pytest.fixture(scope='module', name='variables')
def _variables(state) -> dict[str, Any]:
  return {'params': state.params, 'batch_stats': state.batch_stats}


@pytest.fixture(scope='module', name='saved')
def _saved(tmp_path_factory, variables) -> pathlib.Path:
  """Returns a checkpoint folder; to be copied before it is changed."""
  folder = tmp_path_factory.mktemp('saved') / 'model'
  checkpoint.save_model(folder, variables, make_metadata())
  return folder


@pytest.fixture(name='copy')
def _copy(saved, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'copy'))


def _abstract(state: TrainState) -> dict[str, Any]:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state.trees(),
  )


# --- A model


def test_hash_is_of_names_types_shapes_and_values(saved, variables):
  arrays = {
    'params': {'b': np.ones((2, 1), np.float32), 'a': np.zeros(3, np.float32)}
  }
  content = (
    b'params/a float32 (3,)\n'
    + bytes(12)
    + b'params/b float32 (2, 1)\n'
    + b'\x00\x00\x80\x3f' * 2
  )
  expected = hashlib.sha256(content).hexdigest()
  assert checkpoint.variables_hash(arrays) == expected
  loaded, _ = checkpoint.load_model(saved)
  before = checkpoint.variables_hash(variables)
  assert checkpoint.variables_hash(loaded) == before
  leaves, tree = jax.tree.flatten(variables)
  leaves[-1] = np.nextafter(leaves[-1], np.float32(1))
  changed = jax.tree.unflatten(tree, leaves)
  assert checkpoint.variables_hash(changed) != before


def test_model_and_metadata_are_loaded_exactly(saved, variables):
  loaded, loaded_metadata = checkpoint.load_model(saved)
  _assert_same(loaded, variables)
  assert loaded_metadata == make_metadata()
  assert hash(loaded_metadata.build_model()) == hash(DualFormer(**FIELDS))
  assert loaded_metadata.build_model(dtype='bfloat16').dtype == 'bfloat16'


def test_model_without_batch_norm_is_loaded(tmp_path):
  fields = {**FIELDS, 'coarse_sizes': (None,) * 4}
  shapes = checkpoint.variable_shapes(DualFormer(**fields), 'it')
  assert shapes['batch_stats'] == {}
  variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.25), shapes)
  checkpoint.save_model(tmp_path / 'a', variables, make_metadata(model=fields))
  loaded, _ = checkpoint.load_model(tmp_path / 'a')
  _assert_same(loaded, variables)


def test_save_model_keeps_existing_files(tmp_path, variables):
  taken = tmp_path / 'taken'
  taken.mkdir()
  (taken / 'file').write_text('mine')
  for folder in (taken, taken / 'file'):
    with pytest.raises(UserError, match='nothing was written'):
      checkpoint.save_model(folder, variables, make_metadata())
  assert [path.name for path in taken.iterdir()] == ['file']
  assert (taken / 'file').read_text() == 'mine'
  (taken / 'file').unlink()
  checkpoint.save_model(taken, variables, make_metadata())
  assert (taken / METADATA).is_file()


# --- A training run


def test_last_checkpoints_are_kept_and_restored_exactly(tmp_path, state):
  series = checkpoint.Checkpoints(tmp_path / checkpoint.LATEST, keep=2)
  assert series.latest() is None
  for number in (10, 20, 30):
    scaled = _scaled(state, number)
    series.save(
      scaled.trees(), make_metadata(step=number, data_position={'at': number})
    )
    for leaf in jax.tree.leaves(scaled):
      leaf.delete()  # as a step does with a state that is donated to it
  series.close()
  folder = tmp_path / checkpoint.LATEST
  assert sorted(path.name for path in folder.iterdir()) == ['20', '30']

  again = checkpoint.Checkpoints(folder, keep=2)
  assert again.latest() == folder / '30'
  restored, loaded_metadata = again.restore(_abstract(state))
  expected = _scaled(state, 30)
  _assert_same(restored, expected.trees())
  assert loaded_metadata.data_position == {'at': 30}
  # A step that is saved already, as after a validation, is not saved again.
  again.save(state.trees(), make_metadata(step=30, data_position={'at': 0}))
  again.close()
  assert checkpoint.read_metadata(folder / '30').data_position == {'at': 30}
  # The model of a training run loads like any other.
  loaded, _ = checkpoint.load_model(tmp_path)
  _assert_same(loaded['params'], expected.params)


@pytest.mark.slow
def test_best_checkpoint_is_separate(tmp_path, state):
  best = checkpoint.Checkpoints(tmp_path / checkpoint.BEST)
  latest = checkpoint.Checkpoints(tmp_path / checkpoint.LATEST)
  for number, score in ((1, 0.25), (2, 0.75), (3, 0.5)):
    latest.save(state.trees(), make_metadata(step=number))
    if score != 0.5:
      best.save(state.trees(), make_metadata(step=number, score=score))
  best.close()
  latest.close()
  assert checkpoint.find(tmp_path).name == '3'
  assert checkpoint.find(tmp_path / checkpoint.BEST).name == '2'
  found = checkpoint.find(tmp_path / checkpoint.BEST)
  assert checkpoint.read_metadata(found).score == 0.75


def test_incomplete_checkpoint_is_ignored(tmp_path, state):
  folder = tmp_path / checkpoint.LATEST
  series = checkpoint.Checkpoints(folder)
  series.save(state.trees(), make_metadata(step=5))
  series.close()
  (folder / '5' / 'SHA256SUMS').unlink()  # killed before it was written
  half = shutil.copytree(folder / '5', folder / '6.orbax-checkpoint-tmp')
  (half / METADATA).unlink()
  assert checkpoint.find(tmp_path).name == '5'
  series = checkpoint.Checkpoints(folder)
  assert series.latest() == folder / '5'
  restored, _ = series.restore(_abstract(state))
  _assert_same(restored['opt_state'], state.opt_state)
  series.save(state.trees(), make_metadata(step=6))
  series.close()
  assert [path.name for path in folder.iterdir()] == ['6']
  assert (folder / '6' / 'SHA256SUMS').is_file()


def test_save_returns_before_the_checksums_are_computed(
  tmp_path, state, monkeypatch
):
  may_finish = threading.Event()
  write_checksums = checksums.write

  def wait_and_write(folder: pathlib.Path) -> None:
    assert may_finish.wait(60)
    write_checksums(folder)

  monkeypatch.setattr(checksums, 'write', wait_and_write)
  series = checkpoint.Checkpoints(tmp_path)
  series.save(state.trees(), make_metadata(step=1))
  may_finish.set()
  series.close()
  assert (tmp_path / '1' / 'SHA256SUMS').is_file()


def test_failed_save_raises_at_the_next_call(tmp_path, state, monkeypatch):
  def fail(folder: pathlib.Path) -> None:
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checksums, 'write', fail)
  series = checkpoint.Checkpoints(tmp_path)
  series.save(state.trees(), make_metadata(step=1))
  with pytest.raises(UserError, match='cannot be written: No space left'):
    series.wait()
  series.close()


def test_failed_save_is_found_without_waiting(tmp_path, state, monkeypatch):
  may_fail, has_failed = threading.Event(), threading.Event()

  def fail(folder: pathlib.Path) -> None:
    assert may_fail.wait(60)
    has_failed.set()
    # As TensorStore reports it, in Orbax's threads.
    raise ValueError(
      'RESOURCE_EXHAUSTED: Failed writing: "/a/b": Failed to write 5627 bytes '
      "to file 31: No space left on device [os_error_code='28']"
    )

  monkeypatch.setattr(checksums, 'write', fail)
  series = checkpoint.Checkpoints(tmp_path)
  series.save(state.trees(), make_metadata(step=1))
  series.check()  # it is still being written
  may_fail.set()
  assert has_failed.wait(60)
  with pytest.raises(UserError) as error:
    for _ in range(1000):
      series.check()
      time.sleep(0.01)
  assert str(error.value) == (
    f'{tmp_path} cannot be written: No space left on device'
  )
  series.close()


@pytest.mark.slow
def test_state_is_restored_exactly_on_another_mesh(tmp_path):
  printed = eight_devices.run('save_and_restore_elsewhere', tmp_path / 'run')
  # What a device holds of a kernel [16, 64], on data=8 and on 2 x 2 x 2.
  assert printed.splitlines() == ['(16, 64)', '(8, 32)']


# --- Damage


def _assert_raises(folder: pathlib.Path, expected: str) -> None:
  with pytest.raises(UserError, match=expected) as error:
    checkpoint.load_model(folder)
  message = str(error.value)
  assert str(folder) in message
  assert '\n' not in message
  assert len(message) < 1000


@pytest.mark.parametrize('of_folder', ['params', 'batch_stats'])
@pytest.mark.parametrize('damage', ['removed', 'cut', 'one bit'])
def test_damaged_file_of_arrays_raises(copy, of_folder, damage):
  files = sorted(path for path in (copy / of_folder).rglob('*'))
  files = [path for path in files if path.is_file()]
  assert len(files) >= 5
  for path in files[::3]:
    content = bytearray(path.read_bytes())
    if damage == 'removed':
      path.unlink()
    elif damage == 'cut':
      path.write_bytes(content[:-1])
    else:
      changed = content.copy()
      changed[len(content) // 2] ^= 1
      path.write_bytes(changed)
    _assert_raises(
      copy, f'{path.relative_to(copy)} has changed since it was written'
    )
    path.write_bytes(content)
  checkpoint.load_model(copy)


@pytest.mark.parametrize('name', ['params', 'batch_stats'])
def test_missing_folder_of_arrays_raises(copy, name):
  shutil.rmtree(copy / name)
  (copy / 'SHA256SUMS').unlink()
  _assert_raises(copy, f'{name}.* absent|{name}')


def test_checkpoint_without_metadata_raises(copy):
  (copy / METADATA).unlink()
  _assert_raises(copy, 'holds no checkpoint')


@pytest.mark.parametrize(
  'content',
  ['', '{', '[]', '{}', '{"custom_metadata": null}', '{"custom_metadata": {}}'],
)
def test_malformed_metadata_raises(copy, content):
  (copy / METADATA).write_text(content)
  _assert_raises(copy, 'not a complete checkpoint')


def test_truncated_metadata_raises_wherever_it_ends(copy):
  content = (copy / METADATA).read_bytes()
  for length in range(0, len(content), 97):
    (copy / METADATA).write_bytes(content[:length])
    _assert_raises(copy, 'not a complete checkpoint')


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'format': 2}, 'another version'),
    ({'class_names': ['a', 'b']}, 'one name per class'),
    ({'class_names': [1, 2, 3]}, 'class_names'),
    ({'class_names': 'abc'}, 'class_names'),
    ({'step': 'three'}, 'step'),
    ({'multi_label': 1}, 'multi_label'),
    ({'surprise': 1}, 'surprise'),
    ({'preprocessing': {'num_frames': 4}}, 'frame_interval'),
  ],
)
def test_invalid_metadata_fields_raise(copy, changes, expected):
  _change_metadata(copy, lambda fields: fields.update(changes))
  _assert_raises(copy, expected)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'embed_dims': [8, 8, 8, 32]}, r'bias is \(16,\), expected \(32,\)'),
    ({'depths': [1, 2, 2, 1]}, 'blocks_2_1.* is absent, expected'),
    ({'depths': [1, 1, 1, 1]}, 'blocks_1_1.*, expected none'),
    ({'num_heads': [1, 1, 1, 1]}, r'is \(2, 8, 16\), expected \(1, 16, 16\)'),
    ({'token_label': True}, 'token_linear_0/bias is absent'),
    ({'token_label': 'yes', 'surprise': 1}, 'surprise'),
    ({'image_size': -64}, 'model.image_size is -64'),
    ({'fine_sizes': [[1, 2, 2]] * 3}, 'expected 4 values'),
    ({'dtype': 'float23'}, "model.dtype is 'float23'"),
  ],
)
def test_metadata_of_another_model_raises(copy, changes, expected):
  _change_metadata(copy, lambda fields: fields['model'].update(changes))
  _assert_raises(copy, expected)


def test_fields_that_an_older_checkpoint_lacks_have_their_default(tmp_path):
  older = make_metadata()
  assert 'head' not in older.model
  wanted = make_metadata(model={**FIELDS, 'head': 'linear'})
  metadata.check_same_model(wanted, older, tmp_path)
  other = make_metadata(model={**FIELDS, 'head': 'attentive'})
  with pytest.raises(UserError, match='attentive, in the checkpoint linear'):
    metadata.check_same_model(other, older, tmp_path)


def _change_metadata(folder: pathlib.Path, change) -> None:
  metadata = json.loads((folder / METADATA).read_text())
  change(metadata['custom_metadata']['dualformer'])
  (folder / METADATA).write_text(json.dumps(metadata))


def test_find_raises_without_checkpoint(tmp_path):
  (tmp_path / 'file').write_text('')
  for path, expected in (
    (tmp_path / 'none', 'no checkpoint folder at'),
    (tmp_path / 'file', 'no checkpoint folder at'),
    (tmp_path, 'holds no checkpoint'),
  ):
    with pytest.raises(UserError, match=expected):
      checkpoint.find(path)
