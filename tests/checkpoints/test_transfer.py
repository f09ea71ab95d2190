"""Transfer of parameters between models agrees with the published code."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualformer_jax import errors
from dualformer_jax.checkpoints import (
  checkpoint,
  pth_file,
  pytorch_names,
  transfer,
)
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training.state import init_state
from tests import reference_arrays, small_checkpoint


def of_model(name: str, seed: int = 1) -> dict[str, np.ndarray]:
  return reference_arrays.state_dict(name, seed)


@pytest.mark.parametrize('name', ['micro', 'tiny'])
def test_inflation_agrees_with_the_published_implementation(name):
  text = reference_arrays.DIRECTORY / f'inflate_{name}_seed1.json'
  figures = json.loads(text.read_text())
  images, initial = of_model(f'{name}_2d'), of_model(name, seed=2)
  result = transfer.adapt(images, initial, keep_head=False, name='images.pth')
  assert list(result.state_dict) == list(initial)
  backbone = {
    key.removeprefix('backbone.'): array
    for key, array in result.state_dict.items()
    if key.startswith('backbone.')
  }
  assert set(backbone) == set(figures)
  for key, (total, norm, shape) in figures.items():
    array = backbone[key].astype(np.float64)
    assert list(array.shape) == shape, key
    assert abs(array.sum() - total) <= 1e-5 * max(norm, 1), key
    if f'backbone.{key}' in result.names['loaded']:
      # The figure is a float32 sum, itself off by 1e-5 for a million values.
      np.testing.assert_array_equal(array, images[key], key)
    else:
      assert abs(np.linalg.norm(array) - norm) <= 1e-5 * norm, key
  for key in ('cls_head.fc_cls.weight', 'cls_head.fc_cls.bias'):
    np.testing.assert_array_equal(result.state_dict[key], initial[key])
    assert key in result.names['reinitialized']
  assert result.names['unused'] == ['head.weight', 'head.bias']
  assert result.names['resized'] == []


def test_same_model_is_loaded_unchanged():
  source = of_model('micro_tokenlabel')
  result = transfer.adapt(
    source, of_model('micro_tokenlabel', 2), keep_head=True, name='x.pth'
  )
  assert result.names['loaded'] == list(source)
  for key, array in source.items():
    np.testing.assert_array_equal(result.state_dict[key], array)


def test_half_the_frames_sum_kernels_over_time():
  source, initial = of_model('tiny'), of_model('tiny16', 2)
  result = transfer.adapt(source, initial, keep_head=False, name='x.pth')
  kernels = {
    key
    for key in initial
    if key.startswith('backbone') and source[key].shape != initial[key].shape
  }
  assert set(result.names['resized']) == kernels
  assert all('.sr.' in key or '.lr.3.' in key for key in kernels)
  key = 'backbone.blocks.0.1.attn.sr.weight'  # 2x8x8 there, 1x8x8 here
  assert initial[key].shape[2] == 1
  np.testing.assert_allclose(
    result.state_dict[key][:, :, 0], source[key].sum(axis=2), rtol=1e-5
  )
  key = 'backbone.blocks.0.1.attn.lr.3.weight'  # 4x2x2 there, 2x2x2 here
  old, new = source[key], result.state_dict[key]
  assert (old.shape[2], new.shape[2]) == (4, 2)
  # By hand: new frame 0 is between old frames 0 and 1, at 0.5, and a triangle
  # of half-width 2 gives 3/8, 3/8, 1/8 of 2 to those at distance 1/2, 3/2;
  # the weight of what precedes the first frame is distributed to the others.
  weights = np.array([0.75, 0.75, 0.25])
  weights *= 2 / weights.sum()
  expected = np.tensordot(old[:, :, :3], weights, ((2,), (0,)))
  np.testing.assert_allclose(new[:, :, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('size', [4, 5, 8, 16])
def test_resized_mean_is_still_a_mean(size):
  key = 'backbone.blocks.0.1.attn.sr.weight'
  source = of_model('micro')
  source[key] = np.full_like(source[key], 1 / source[key][0].size)
  initial = of_model('micro', 2)
  initial[key] = np.zeros((16, 1, 2, size, size), np.float32)
  result = transfer.adapt(source, initial, keep_head=True, name='x.pth')
  np.testing.assert_allclose(result.state_dict[key], 1 / (2 * size**2))


def test_missing_level_computes_a_mean():
  initial = of_model('micro', 2)
  source = of_model('micro')
  gone = [key for key in source if '.blocks.1.1.attn.lr.' in key]
  source = {key: a for key, a in source.items() if key not in gone}
  result = transfer.adapt(source, initial, keep_head=True, name='x.pth')
  assert result.names['reinitialized'] == gone
  kernel = result.state_dict['backbone.blocks.1.1.attn.lr.0.weight']
  np.testing.assert_allclose(kernel, 1 / 49, rtol=1e-6)
  for name, value in (
    ('0.bias', 0),
    ('1.weight', 1),
    ('1.bias', 0),
    ('1.running_mean', 0),
    ('1.running_var', 1),
    ('1.num_batches_tracked', 0),
  ):
    array = result.state_dict[f'backbone.blocks.1.1.attn.lr.{name}']
    np.testing.assert_array_equal(array, value, name)
  back = transfer.adapt(initial, source, keep_head=True, name='x.pth')
  assert back.names['unused'] == gone


def test_token_head_is_reinitialized_or_unused():
  plain, with_head = of_model('micro'), of_model('micro_tokenlabel', 2)
  result = transfer.adapt(plain, with_head, keep_head=True, name='x.pth')
  assert result.names['reinitialized'] == [
    key for key in with_head if 'token_linear' in key
  ]
  result = transfer.adapt(with_head, plain, keep_head=True, name='x.pth')
  assert result.names['unused'] == [
    key for key in with_head if 'token_linear' in key
  ]
  np.testing.assert_array_equal(
    result.state_dict['cls_head.fc_cls.weight'],
    with_head['cls_head.fc_cls.weight'],
  )


def test_other_model_raises_one_error_that_lists_everything():
  source: dict[str, Any] = of_model('micro')
  source['backbone.stranger\n'] = np.zeros(3, np.float32)
  del source['backbone.norm.bias']
  key = 'backbone.blocks.0.0.mlp.fc1.bias'
  source[key] = source[key][:5]
  with pytest.raises(errors.UserError) as error:
    transfer.adapt(source, of_model('micro'), keep_head=True, name='x.pth')
  message = str(error.value)
  assert 'x.pth holds another model' in message
  assert 'backbone.norm.bias (128,) is missing' in message
  assert f'{key} is (5,), expected (64,)' in message
  assert r"'backbone.stranger\n' (3,) is unknown" in message
  assert '\n' not in message


def test_table_counts_and_names_parameters():
  lines = transfer.adapt(
    of_model('tiny_2d'), of_model('tiny16'), keep_head=False, name='x.pth'
  ).table()
  text = '\n'.join(lines)
  for words in (
    'loaded:',
    'inflated from images:',
    'reinitialized:',
    'unused:',
  ):
    assert words in text
  assert 'cls_head.fc_cls.weight' in text
  assert 'head.weight' in text


# --- From files and folders

FIELDS = small_checkpoint.FIELDS
NAMES = small_checkpoint.CLASS_NAMES


def describe(**fields: Any) -> checkpoint.CheckpointMetadata:
  names = fields.pop('class_names', NAMES)
  return checkpoint.CheckpointMetadata(
    {**FIELDS, **fields, 'num_classes': len(names)},
    Preprocessing(8, 2, 32),
    names,
  )


def start(source: transfer.Source, description: checkpoint.CheckpointMetadata):
  model = description.build_model()
  state = jax.jit(lambda: init_state(model, optax.sgd(0.1), seed=5))()
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  new, result = transfer.initialize(source, variables, description)
  return state, new, result


def test_folder_of_the_same_model_is_loaded_entirely(tmp_path):
  source = transfer.read(small_checkpoint.save(tmp_path / 'folder'))
  assert (
    source.metadata
    and source.metadata.preprocessing == small_checkpoint.PREPROCESSING
  )
  _, new, result = start(source, describe())
  variables, _ = checkpoint.load_model(tmp_path / 'folder')
  jax.tree.map(
    np.testing.assert_array_equal, new['params'], variables['params']
  )
  assert not result.names['reinitialized']
  assert not result.names['resized']


def test_other_classes_reinitialize_the_head(tmp_path):
  source = transfer.read(small_checkpoint.save(tmp_path / 'folder'))
  for names in (('a', 'b', 'c', 'd', 'e'), ('a', 'b')):
    state, new, result = start(source, describe(class_names=names))
    jax.tree.map(
      np.testing.assert_array_equal,
      new['params']['cls_head'],
      state.params['cls_head'],
    )
    assert result.names['reinitialized'] == [
      'cls_head.fc_cls.weight',
      'cls_head.fc_cls.bias',
    ]


def test_another_kind_of_head_reinitializes_the_head(tmp_path):
  source = transfer.read(small_checkpoint.save(tmp_path / 'folder'))
  state, new, result = start(source, describe(head='attentive'))
  jax.tree.map(
    np.testing.assert_array_equal,
    new['params']['cls_head'],
    state.params['cls_head'],
  )
  assert 'cls_head.attn.query' in result.names['reinitialized']
  assert all(name.startswith('cls') for name in result.names['reinitialized'])


@pytest.mark.slow
def test_other_frames_and_sizes_change_no_other_parameters(tmp_path):
  source = transfer.read(small_checkpoint.save(tmp_path / 'folder'))
  other = describe(
    depths=FIELDS['depths'],
    num_frames=16,
    image_size=64,
    window=(8, 4, 4),
  )
  _, new, result = start(source, other)
  # One block with windows: nothing depends on the sizes.
  assert not result.names['resized']
  output: Any = jax.jit(other.build_model().apply)(
    {'params': new['params']}, jnp.zeros((1, 16, 64, 64, 3))
  )
  assert np.isfinite(output.logits).all()


def test_pth_files_of_images_and_videos_are_loaded(tmp_path):
  fields = reference_arrays.MODELS['micro']
  names = tuple(map(str, range(10)))
  description = checkpoint.CheckpointMetadata(
    {**fields, 'dtype': 'float32'}, Preprocessing(32, 2, 224), names
  )
  images = reference_arrays.state_dict('micro_2d', 1)
  pth_file.write_pth(tmp_path / 'images.pth', images)
  source = transfer.read(tmp_path / 'images.pth')
  assert source.metadata is None
  model = DualFormer(**fields, dtype='float32')
  shapes = jax.eval_shape(lambda: init_state(model, optax.identity(), seed=0))
  initial: Any = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
    {'params': shapes.params, 'batch_stats': shapes.batch_stats},
  )
  variables, result = transfer.initialize(source, initial, description)
  assert result.names['unused'] == ['head.weight', 'head.bias']
  kernel = variables['params']['backbone']['pos_block_0']['proj_0']['kernel']
  expected = images['pos_block.0.proj.0.weight'][:, 0].transpose(1, 2, 0) / 3
  for time in range(3):
    np.testing.assert_allclose(kernel[time], expected, rtol=1e-6)

  video = reference_arrays.state_dict('micro', 1)
  pth_file.write_pth(tmp_path / 'video.pth', video)
  variables, result = transfer.initialize(
    transfer.read(tmp_path / 'video.pth'), initial, description
  )
  assert not result.names['reinitialized']
  back = pytorch_names.to_pytorch(variables)
  for name, array in video.items():
    np.testing.assert_array_equal(back[name], array)


def test_other_model_raises_one_line(tmp_path):
  source = transfer.read(small_checkpoint.save(tmp_path / 'folder'))
  for fields, words in (
    (
      {'num_heads': (4,)},
      r'model.num_heads is \(4,\), in the checkpoint \(2,\)',
    ),
    ({'embed_dims': (32,)}, 'model.embed_dims'),
  ):
    with pytest.raises(errors.UserError, match=words):
      transfer.check(source, describe(**fields).build_model())


def test_averaged_parameters_are_used_to_initialize(tmp_path):
  description = describe()
  model = description.build_model()
  state = jax.jit(lambda: init_state(model, optax.sgd(0.1), 0, with_ema=True))()
  state = dataclasses.replace(
    state, ema_params=jax.tree.map(lambda p: p + 1, state.params)
  )
  series = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  series.save(
    state.trees(), dataclasses.replace(description, step=1, data_position={})
  )
  series.wait()
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    state.trees(),
  )
  restored, _ = series.restore(abstract)
  jax.tree.map(
    np.testing.assert_array_equal, restored['ema_params'], state.ema_params
  )
  jax.tree.map(np.testing.assert_array_equal, restored['params'], state.params)
  with pytest.raises(errors.UserError, match='saved with averaged parameters'):
    series.restore(abstract | {'ema_params': None})
  series.close()
  variables, _ = checkpoint.load_model(tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal, variables['params'], state.ema_params
  )
  source = transfer.read(tmp_path)
  _, new, _ = start(source, description)
  jax.tree.map(np.testing.assert_array_equal, new['params'], state.ema_params)


def test_averages_of_a_file_are_read_if_they_are_asked_for(tmp_path, caplog):
  path = tmp_path / 'model.pth'
  weights = {'backbone.norm.weight': np.arange(4, dtype=np.float32)}
  copies = {f'ema_{name}': weight + 1 for name, weight in weights.items()}
  pth_file.write_pth(path, weights | copies)
  for ema, expected, note in (
    (False, 0, 'dropped: 1 averages of weights'),
    (True, 1, '1 weights are averages'),
  ):
    with caplog.at_level('INFO'):
      source = transfer.read(path, ema)
    [found] = source.state_dict.values()
    np.testing.assert_array_equal(found, np.arange(4) + expected)
    assert note in caplog.text
