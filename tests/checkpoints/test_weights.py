"""Weights of other trainers: prefixes, wrappers, averages, other files."""

from __future__ import annotations

import json
import pathlib
import pickle
import struct
from typing import Any
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dualformer_jax.checkpoints import pytorch_names, weights
from dualformer_jax.errors import UserError
from tests import reference_arrays

NAMES = ('backbone.norm.weight', 'cls_head.fc_cls.bias')
PLAIN = {name: np.arange(3, dtype='f4') + i for i, name in enumerate(NAMES)}
COMPILED = {n.replace('.norm', '._orig_mod.norm'): a for n, a in PLAIN.items()}
AVERAGE = {name: array + 100 for name, array in PLAIN.items()}


def prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  return {prefix + name: array for name, array in arrays.items()}


def save(path: pathlib.Path, root: Any) -> None:
  """Writes nested dictionaries of arrays and plain values as torch.save."""
  storages: list[bytes] = []

  def push(value: Any) -> bytes:
    if isinstance(value, dict):
      items = b''.join(push(key) + push(item) for key, item in value.items())
      return b'}(' + items + b'u'
    if not isinstance(value, np.ndarray):
      return pickle.dumps(value, 2)[2:-1]
    storages.append(value.astype('<f4').tobytes())
    storage = push(str(len(storages) - 1)) + push('cpu') + push(value.size)
    return (
      b'ctorch._utils\n_rebuild_tensor_v2\n(('
      + push('storage')
      + b'ctorch\nFloatStorage\n'
      + storage
      + b'tQ'
      + b''.join(map(push, (0, value.shape, (1,) * value.ndim, False, None)))
      + b'tR'
    )

  data = b'\x80\x02' + push(root) + b'.'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', data)
    for key, storage in enumerate(storages):
      archive.writestr(f'archive/data/{key}', storage)


def save_safetensors(
  path: pathlib.Path, arrays: dict[str, np.ndarray], kinds: dict[str, str]
) -> None:
  """Writes the published format: length, JSON of offsets, data."""
  header, data = {}, b''
  for name, array in arrays.items():
    start, data = len(data), data + array.tobytes()
    header[name] = {
      'dtype': kinds.get(name, 'F32'),
      'shape': array.shape,
      'data_offsets': [start, len(data)],
    }
  text = json.dumps({'__metadata__': {'format': 'pt'}, **header}).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def assert_same(found: Any, expected: Any) -> None:
  assert sorted(found) == sorted(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize(
  ('root', 'dropped'),
  [
    (prefixed('_orig_mod.', PLAIN), "'_orig_mod.' before all names"),
    (prefixed('module._orig_mod.', PLAIN), "'module._orig_mod.' before all"),
    (prefixed('model.', PLAIN), "'model.' before all names"),
    (prefixed('model.module._orig_mod.', PLAIN), 'before all names'),
    (COMPILED, "'_orig_mod.' in 1 names"),
    ({'module': PLAIN, 'lr_scheduler': {}}, "'lr_scheduler'"),
    ({'model': prefixed('module.', PLAIN), 'epoch': 3}, "'epoch'"),
    ({'model_state_dict': PLAIN, 'loss': 0.5}, "'loss'"),
    ({'epoch': 1, 'model_state': PLAIN, 'optimizer_state': {}}, "'epoch'"),
    ({'params': PLAIN, 'params_ema': AVERAGE}, "'params_ema'"),
    ({'state_dict': {'model': PLAIN}, 'hyper_parameters': {}}, 'hyper'),
    (
      {'model': PLAIN, 'model_ema': AVERAGE, 'args': None},
      "'model_ema'",
    ),
    ({'state_dict': PLAIN, 'state_dict_ema': AVERAGE}, "'state_dict_ema'"),
    ({'model': PLAIN, 'ema': {'module': AVERAGE}}, "'ema'"),
    (
      {'state_dict': PLAIN | prefixed('ema_', AVERAGE)},
      '2 averages of weights (EMA); --ema chooses them',
    ),
    (
      PLAIN
      | {f'ema_{name.replace(".", "_")}': a for name, a in AVERAGE.items()},
      '2 averages',
    ),
    (
      prefixed('model.', PLAIN) | prefixed('ema_model.module.', AVERAGE),
      '2 averages',
    ),
  ],
)  # fmt: skip
def test_weights_of_other_trainers_are_found(tmp_path, root, dropped):
  save(tmp_path / 'model.pth', root)
  found = weights.read(tmp_path / 'model.pth')
  assert_same(found.state_dict, PLAIN)
  assert dropped in ', '.join(found.dropped)


@pytest.mark.parametrize(
  ('root', 'note'),
  [
    ({'model': PLAIN, 'model_ema': AVERAGE}, "under 'model_ema'"),
    ({'params': PLAIN, 'params_ema': AVERAGE}, "under 'params_ema'"),
    ({'state_dict': PLAIN, 'state_dict_ema': AVERAGE}, "'state_dict_ema'"),
    ({'model': PLAIN, 'ema': {'module': AVERAGE, 'decay': 0.9}}, "'ema'"),
    (
      {'state_dict': {**PLAIN, **prefixed('ema_', AVERAGE)}},
      '2 weights are averages',
    ),
    (
      {
        'state_dict': PLAIN,
        'ema_state_dict': prefixed('module.', AVERAGE)
        | {'steps': np.zeros((), 'f4')},
      },
      "'ema_state_dict'",
    ),
    (
      prefixed('model.', PLAIN) | prefixed('ema_model.module.', AVERAGE),
      '2 weights are averages',
    ),
  ],
)
def test_averages_are_chosen_with_ema_alone(tmp_path, root, note):
  save(tmp_path / 'model.pth', root)
  found = weights.read(tmp_path / 'model.pth', ema=True)
  assert_same(found.state_dict, AVERAGE)
  assert note in ', '.join(found.notes)
  assert_same(weights.read(tmp_path / 'model.pth').state_dict, PLAIN)


# As MMEngine, Lightning and argparse pickle their objects, with protocol 2.
OBJECTS = {
  'history': b'cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81}'
  b'X\x04\0\0\0meanc__builtin__\ngetattr\n'
  b'cmmengine.logging.history_buffer\nHistoryBuffer\nX\x04\0\0\0mean\x86Rsb',
  'namespace': b'cargparse\nNamespace\n)\x81}X\x02\0\0\0lrG?\0\0\0\0\0\0\0sb',
  'container': b'comegaconf.dictconfig\nDictConfig\n)\x81}NNsb',
  'path': b'cpathlib\nPosixPath\nX\x04\0\0\0/tmp\x85R',
  'defaults': b'ccollections\ndefaultdict\nc__builtin__\nset\n\x85RK\x01K\x02s',
}


@pytest.mark.parametrize('name', OBJECTS)
def test_objects_beside_the_weights_are_dropped(tmp_path, name):
  path = tmp_path / 'model.pth'
  save(path, {'state_dict': PLAIN, name: None})
  with zipfile.ZipFile(path) as archive:
    entries = {entry: archive.read(entry) for entry in archive.namelist()}
  data = entries['archive/data.pkl']
  assert data.count(b'Nu.') == 1  # the last value
  entries['archive/data.pkl'] = data.replace(b'Nu.', OBJECTS[name] + b'u.')
  with zipfile.ZipFile(path, 'w') as archive:
    for entry, content in entries.items():
      archive.writestr(entry, content)
  found = weights.read(path)
  assert_same(found.state_dict, PLAIN)
  assert found.dropped == [repr(name)]


def test_weights_without_averages_are_kept_and_named(tmp_path):
  first = NAMES[0]
  root = {**PLAIN, f'ema_{first}': AVERAGE[first]}
  save(tmp_path / 'model.pth', root)
  found = weights.read(tmp_path / 'model.pth', ema=True)
  assert_same(found.state_dict, {**PLAIN, first: AVERAGE[first]})
  assert f'1 weights have no averages: {NAMES[1]}' in found.notes


@pytest.mark.parametrize(
  ('root', 'ema', 'message'),
  [
    ({'model': PLAIN}, True, 'leave out --ema'),
    ({'ema': AVERAGE, 'epoch': 1}, False, 'add --ema'),
    (prefixed('ema_model.', AVERAGE), False, 'add --ema'),
    ({**PLAIN, **prefixed('model.', PLAIN)}, False, 'twice'),
  ],
)
def test_ambiguous_choice_raises(tmp_path, root, ema, message):
  path = tmp_path / 'model.pth'
  save(path, root)
  with pytest.raises(UserError, match=message) as error:
    weights.read(path, ema)
  assert str(error.value).startswith(f'{path}: ')


# --- Other files


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'is empty; download it again'),
    (b'\n<!DOCTYPE html><html><title>Sign in</title>', 'a web page'),
    (b'<HTML><body>404', 'a web page'),
    (
      b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n',
      'a Git LFS pointer, .* `git lfs pull`',
    ),
    (b'<?xml version="1.0"?><Error>', 'an XML answer'),
    (bytes(1000), 'full of zeros, an unfinished download'),
    (b'\x1f\x8b\x08' + bytes(20), 'a gzip archive'),
    (b'PK\x03\x04' + bytes(200), 'truncated or damaged'),
    (b'anything else', 'not weights written by torch.save'),
  ],
)
def test_what_is_not_weights_is_named(tmp_path, content, message):
  path = tmp_path / 'model.pth'
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    weights.read(path)
  assert str(error.value).startswith(f'{path}: ')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, value):
  broken = {**PLAIN, NAMES[1]: np.array([1, value, 2], 'f4')}
  save(tmp_path / 'model.pth', broken)
  with pytest.raises(UserError, match='NaN or infinite.* in 1 of 2.*fc_cls'):
    weights.read(tmp_path / 'model.pth')


# --- Safetensors


def test_safetensors_file_is_read_with_its_types(tmp_path):
  arrays = {
    'model.backbone.norm.weight': np.arange(6, dtype='<f4').reshape(2, 3),
    'model.half': np.array([0.5, -2], '<f2'),
    'model.brain': np.array([1.5, -3], ml_dtypes.bfloat16),
    'model.double': np.array(0.25, '<f8'),
    'model.num_batches_tracked': np.array(2**40, '<i8'),
    'model.empty': np.zeros((0, 4), '<f4'),
  }
  kinds = ('F32', 'F16', 'BF16', 'F64', 'I64', 'F32')
  # The name says nothing about the format.
  path = tmp_path / 'pytorch_model.bin'
  save_safetensors(path, arrays, dict(zip(arrays, kinds, strict=True)))
  found = weights.read(path)
  assert found.dropped == ["'model.' before all names"]
  assert len(found.state_dict) == len(arrays)
  for name, array in arrays.items():
    loaded = found.state_dict[name.removeprefix('model.')]
    assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(loaded, array)


def test_truncated_safetensors_file_raises(tmp_path):
  path = tmp_path / 'model.safetensors'
  save_safetensors(path, PLAIN, {})
  content = path.read_bytes()
  for length in (len(content) - 1, len(content) - 20, 60, 9):
    path.write_bytes(content[:length])
    with pytest.raises(UserError, match='truncated or damaged'):
      weights.read(path)


def test_unknown_type_of_safetensors_raises(tmp_path):
  path = tmp_path / 'model.safetensors'
  save_safetensors(path, {'a': np.zeros(2, 'u1')}, {'a': 'F8_E4M3'})
  with pytest.raises(UserError, match="'a' is of type F8_E4M3"):
    weights.read(path)


def test_exported_weights_get_their_names_back(tmp_path):
  """The command `export --weights` writes paths of Flax."""
  state_dict = reference_arrays.state_dict('micro', 1)
  state_dict = {'backbone.norm.weight': state_dict['backbone.norm.weight']}
  flax = {'params/backbone/norm/scale': state_dict['backbone.norm.weight']}
  save_safetensors(tmp_path / 'model.safetensors', flax, {})
  found = weights.read(tmp_path / 'model.safetensors')
  assert_same(found.state_dict, state_dict)
  assert pytorch_names.num_classes(found.state_dict) is None
