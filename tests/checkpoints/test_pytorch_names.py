"""The names and layouts of PyTorch parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.checkpoints import pth_file, pytorch_names
from dualformer_jax.checkpoints import weights as weights_lib
from dualformer_jax.models import dualformer
from tests import reference_arrays


def _assert_same(found: Any, expected: Any) -> None:
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, name, strict=True)


HEADS = {
  'micro': (1, 2, 4, 8),
  'micro_tokenlabel': (1, 2, 4, 8),
  'micro16': (2, 4, 8, 16),
  'tiny': (2, 4, 8, 16),
  'tiny_tokenlabel': (2, 4, 8, 16),
  'small': (3, 6, 12, 24),
}


def _flax(name: str, weight: np.ndarray, heads: tuple[int, ...]):
  """Returns the Flax path and array of a PyTorch parameter, independently."""
  parts = name.split('.')
  leaf = parts.pop()
  modules: list[str] = []
  for part in parts:  # numbers belong to the preceding name
    if part.isdigit():
      modules[-1] += f'_{part}'
    else:
      modules.append(part)
  statistics = {
    'running_mean': 'mean',
    'running_var': 'var',
    'num_batches_tracked': 'num_batches_tracked',
  }
  collection = 'batch_stats' if leaf in statistics else 'params'
  if leaf in statistics:
    leaf = statistics[leaf]
    if weight.dtype == np.int64:
      weight = weight.astype(np.int32)
  elif leaf == 'weight' and weight.ndim == 1:
    leaf = 'scale'
  elif leaf == 'weight':
    leaf = 'kernel'
  if weight.ndim == 5 and modules[-1] == 'proj' and 'patch' in modules[-2]:
    weight = np.einsum('oidhw->dhwio', weight)
  elif weight.ndim == 5:
    weight = np.einsum('oidhw->dhwo', weight)  # i is 1
  elif weight.ndim == 2:
    weight = np.einsum('oi->io', weight)
  if modules[-1] in ('qkv', 'q', 'kv') or modules[-2:] == ['attn', 'proj']:
    n = heads[int(modules[1].split('_')[1])]
    size = weight.shape[0] // n
    split = {'qkv': (3, n, -1), 'q': (n, -1), 'kv': (2, n, -1)}
    if modules[-1] in split:
      weight = weight.reshape(*weight.shape[:-1], *split[modules[-1]])
    elif weight.ndim == 2:
      weight = weight.reshape(n, size, -1)
  return (collection, *modules, leaf), weight


def _variables(name: str, weights: dict[str, np.ndarray]) -> dict[str, Any]:
  variables: dict[str, Any] = {}
  for key, weight in weights.items():
    path, array = _flax(key, weight, HEADS[name])
    tree = variables
    for part in path[:-1]:
      tree = tree.setdefault(part, {})
    tree[path[-1]] = array
  return variables


def _target(name: str) -> dict[str, Any]:
  weights = {
    key: np.broadcast_to(np.int64(0) if 'num' in key else np.float32(0), shape)
    for key, shape in reference_arrays.shapes(name).items()
  }
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _variables(name, weights)
  )


@pytest.fixture(scope='module', name='micro')
def _micro():
  weights = reference_arrays.state_dict('micro', 1)
  weights['backbone.blocks.0.1.attn.lr.1.num_batches_tracked'] += 12345
  return weights


@pytest.fixture(scope='module', name='target')
def _micro_target():
  return _target('micro')


@pytest.mark.parametrize('name', ['micro', 'micro_tokenlabel', 'micro16'])
def test_from_pytorch_agrees_with_an_independent_translation(name):
  weights = reference_arrays.state_dict(name, 1)
  variables, notes = pytorch_names.from_pytorch(weights, _target(name))
  expected = _variables(name, weights)
  assert jax.tree.structure(variables) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
    variables,
    expected,
  )
  assert notes == []
  assert not any(
    np.shares_memory(a, b)
    for a, b in zip(jax.tree.leaves(variables), weights.values(), strict=True)
  )


def test_heads_are_split_like_in_pytorch(micro, target):
  variables, _ = pytorch_names.from_pytorch(micro, target)
  attention = variables['params']['backbone']['blocks_3_0']['attn']
  x = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
  weight = micro['backbone.blocks.3.0.attn.qkv.weight']
  bias = micro['backbone.blocks.3.0.attn.qkv.bias']
  # PyTorch: (x @ weight.T + bias).reshape(tokens, 3, heads, head_dim)
  expected = (x @ weight.T + bias).reshape(5, 3, 8, 16)
  found = np.einsum('tc,csne->tsne', x, attention['qkv']['kernel'])
  found += attention['qkv']['bias']
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  out = found[:, 0]
  weight = micro['backbone.blocks.3.0.attn.proj.weight']
  np.testing.assert_allclose(
    np.einsum('tne,nec->tc', out, attention['proj']['kernel']),
    out.reshape(5, 128) @ weight.T,
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize('name', HEADS)
def test_to_pytorch_is_exact_and_in_the_order_of_pytorch(name):
  weights = {
    key: np.arange(
      np.prod(shape, dtype=int), dtype='i8' if 'num_batches' in key else 'f4'
    ).reshape(shape)
    for key, shape in reference_arrays.shapes(name).items()
  }
  _assert_same(pytorch_names.to_pytorch(_variables(name, weights)), weights)


def test_round_trip_through_a_file_is_exact(micro, target, tmp_path):
  path = tmp_path / 'model.pth'
  pth_file.write_pth(path, micro)
  variables, _ = pytorch_names.from_pytorch(weights_lib.read(path)[0], target)
  variables = jax.tree.map(jnp.asarray, variables)
  _assert_same(pytorch_names.to_pytorch(variables), micro)


def test_order_of_the_tree_does_not_matter(micro):
  def turned(tree):
    if not isinstance(tree, dict):
      return tree
    return {name: turned(tree[name]) for name in reversed(tree)}

  _assert_same(
    pytorch_names.to_pytorch(turned(_variables('micro', micro))), micro
  )


@pytest.mark.parametrize('name', reference_arrays.MODELS)
def test_model_has_the_parameters_of_pytorch(name):
  fields = reference_arrays.MODELS[name]
  model = dualformer.DualFormer(image_size=224, dtype='float32', **fields)
  frames = fields['num_frames']
  clips = jax.ShapeDtypeStruct((1, frames, 224, 224, 3), jnp.float32)
  target = jax.eval_shape(model.init, jax.random.key(0), clips)
  weights = reference_arrays.state_dict(name, 1)
  variables, _ = pytorch_names.from_pytorch(
    weights, {key: target[key] for key in ('params', 'batch_stats')}
  )
  _assert_same(pytorch_names.to_pytorch(variables), weights)


def _problem(weights, target, pattern: str) -> str:
  with pytest.raises(errors.UserError, match=pattern) as caught:
    pytorch_names.from_pytorch(weights, target, source='tiny.pth')
  message = str(caught.value)
  assert message.startswith('tiny.pth does not fit the model')
  assert message.isprintable()
  return message


def test_error_lists_everything_that_does_not_fit(micro, target):
  weights = dict(micro)
  weights['backbone.extra'] = np.zeros((2, 3), np.float32)
  weights['evil\n\x1b[31m'] = np.zeros(1, np.float32)
  del weights['backbone.norm.bias']
  del weights['cls_head.fc_cls.bias']
  weights['cls_head.fc_cls.weight'] = np.zeros((400, 128), np.float32)
  weights['backbone.norm.weight'] = np.zeros(128, np.int64)
  weights['backbone.pos_block.0.proj.0.bias'] = np.full(16, np.nan, 'f4')
  message = _problem(weights, target, 'does not fit')
  for part in (
    "2 unknown: 'backbone.extra' (2, 3), 'evil\\n\\x1b[31m' (1,);",
    '2 missing: backbone.norm.bias (128,), cls_head.fc_cls.bias (10,);',
    '1 of another shape: cls_head.fc_cls.weight expected (10, 128) found '
    '(400, 128);',
    '1 of another type: backbone.norm.weight expected floating found int64;',
    '1 with NaN, infinite or impossible values: '
    'backbone.pos_block.0.proj.0.bias.',
  ):
    assert part in message


def test_long_lists_are_shortened(micro, target):
  renamed = {f'encoder.{name}': array for name, array in micro.items()}
  message = _problem(renamed, target, 'does not fit')
  assert f'{len(micro)} unknown: ' in message
  assert f'{len(micro)} missing: ' in message
  assert message.count(f' and {len(micro) - 10} more') == 2
  assert len(message) < 2500


def test_unexpected_token_head_raises(target):
  weights = reference_arrays.state_dict('micro_tokenlabel', 1)
  _problem(weights, target, "6 unknown: 'cls_head.token_linear.0.weight'")


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_other_floats_are_cast_and_noted(micro, target, dtype):
  def cast(array):
    return array if array.dtype == np.int64 else array.astype(np.dtype(dtype))

  weights = {name: cast(array) for name, array in micro.items()}
  variables, notes = pytorch_names.from_pytorch(weights, target)
  assert {x.dtype for x in jax.tree.leaves(variables['params'])} == {
    np.dtype('float32')
  }
  rounded = {
    name: array if array.dtype == np.int64 else array.astype(np.float32)
    for name, array in weights.items()
  }
  _assert_same(pytorch_names.to_pytorch(variables), rounded)
  (note,) = notes
  floats = sum(array.dtype != np.int64 for array in micro.values())
  assert note.startswith(f'{floats} parameters were {dtype}, now float32: ')
  assert note.isprintable()


@pytest.mark.parametrize(
  'value',
  [np.float32('nan'), np.float32('inf'), np.float32('-inf'), np.float64(1e39)],
)
def test_one_non_finite_weight_raises(micro, target, value):
  name = 'backbone.blocks.2.1.mlp.fc1.weight'
  array = micro[name].astype(value.dtype)
  array[3, 5] = value
  _problem(micro | {name: array}, target, f'1 with NaN, infinite.*{name}')


COUNT = 'backbone.blocks.1.1.attn.lr.1.num_batches_tracked'


@pytest.mark.parametrize('count', [0, 1, 2**31 - 1])
def test_batch_count_is_kept(micro, target, count):
  weights = micro | {COUNT: np.array(count)}
  variables, _ = pytorch_names.from_pytorch(weights, target)
  found = variables['batch_stats']['backbone']['blocks_1_1']['attn']['lr_1']
  assert found['num_batches_tracked'].dtype == np.int32
  assert found['num_batches_tracked'] == count
  _assert_same(pytorch_names.to_pytorch(variables), weights)


@pytest.mark.parametrize(
  'value', [np.array([7]), np.array(7.0), np.array([7.0])]
)
def test_averaged_batch_count_is_read(micro, target, value):
  variables, _ = pytorch_names.from_pytorch(micro | {COUNT: value}, target)
  found = variables['batch_stats']['backbone']['blocks_1_1']['attn']['lr_1']
  assert found['num_batches_tracked'].shape == ()
  assert found['num_batches_tracked'] == 7


@pytest.mark.parametrize('value', [np.array(7.5), np.array(np.nan)])
def test_batch_count_that_is_no_number_raises(micro, target, value):
  _problem(micro | {COUNT: value}, target, f'{COUNT} expected integer')


@pytest.mark.parametrize('count', [-1, 2**31, 2**40])
def test_invalid_batch_count_raises(micro, target, count):
  _problem(micro | {COUNT: np.array(count)}, target, f'impossible.*{COUNT}')


def test_unknown_flax_path_raises():
  variables = {'params': {'backbone': {'conv1': {'kernel': np.zeros(1)}}}}
  with pytest.raises(ValueError, match='params/backbone/conv1/kernel is no'):
    pytorch_names.to_pytorch(variables)


def test_head_is_recognized():
  plain, token = (
    reference_arrays.state_dict(name, 1)
    for name in ('micro', 'micro_tokenlabel')
  )
  fields = {'token_label': False, 'head': 'linear'}
  assert pytorch_names.head_fields(plain) == fields
  assert pytorch_names.head_fields(token) == fields | {'token_label': True}
  assert (
    pytorch_names.num_classes(plain) == pytorch_names.num_classes(token) == 10
  )
  assert pytorch_names.num_classes({'head.weight': np.zeros((3, 4))}) is None
