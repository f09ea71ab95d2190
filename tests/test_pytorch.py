"""The .pth files that torch writes and reads, hostile ones, and the names."""

import collections
from collections.abc import Callable
import os
import pathlib
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dualformer_jax import errors, pytorch
from dualformer_jax.models import dualformer
from tests import reference_arrays

CHECKPOINT = reference_arrays.DIRECTORY / 'checkpoint.pth'
LEGACY = reference_arrays.DIRECTORY / 'checkpoint_legacy.pth'


def _ramp(index: int, *shape: int) -> np.ndarray:
  return (np.arange(np.prod(shape)) / 8 + index).reshape(shape).astype('f4')


# What torch was told to save, see tests/reference/README.md.
SAVED = {
  'backbone.norm.weight': _ramp(0, 4),
  'backbone.conv.weight': _ramp(1, 2, 3, 1, 2, 2),
  'strided': _ramp(2, 4, 3).T,
  'shared.front': _ramp(3, 10)[:6].reshape(2, 3),
  'shared.back': _ramp(3, 10)[4:],
  'half': _ramp(4, 3).astype(np.float16),
  'bfloat16': _ramp(5, 3).astype(ml_dtypes.bfloat16),
  'double': _ramp(6, 3).astype(np.float64),
  'bn.num_batches_tracked': np.array(2**40 + 7),
  'int32': np.array([-1, 2**31 - 1], np.int32),
  'bool': np.array([True, False, True]),
  'scalar': np.array(0.25, np.float32),
  'empty': np.zeros((0, 5), np.float32),
}


def _assert_same(found: Any, expected: Any) -> None:
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, name, strict=True)


# --- Making files, torch or not


def _plain(value: object) -> bytes:
  """The opcodes that push a plain value."""
  return pickle.dumps(value, 2)[2:-1]


def _tensor(
  key: object = '0',
  count: object = 4,
  offset: object = 0,
  shape: object = (4,),
  strides: object = (1,),
  storage: bytes = b'ctorch\nFloatStorage\n',
) -> bytes:
  """The opcodes that push a tensor, as torch.save writes them."""
  return (
    b'ctorch._utils\n_rebuild_tensor_v2\n(('
    + _plain('storage')
    + storage
    + _plain(key)
    + _plain('cpu')
    + _plain(count)
    + b'tQ'
    + b''.join(map(_plain, (offset, shape, strides, False, None)))
    + b'tR'
  )


def _state_dict(*values: bytes) -> bytes:
  """The pickle of {'0': value, '1': value, ...}."""
  items = (_plain(str(i)) + value for i, value in enumerate(values))
  return b'\x80\x02}(' + b''.join(items) + b'u.'


def _save(
  path: pathlib.Path,
  data: bytes,
  storages: tuple[bytes, ...] = (bytes(16),),
  compression: int = zipfile.ZIP_STORED,
  byteorder: bytes = b'little',
) -> pathlib.Path:
  """Writes a zip as torch.save does, around any pickle."""
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('weights/data.pkl', data)
    archive.writestr('weights/byteorder', byteorder)
    for key, storage in enumerate(storages):
      archive.writestr(f'weights/data/{key}', storage)
    archive.writestr('weights/version', b'3\n')
  return path


def _pickled_checkpoint() -> bytes:
  with zipfile.ZipFile(CHECKPOINT) as archive:
    return archive.read('checkpoint/data.pkl')


class _Call:
  """Pickles as a call of `function` with `arguments`."""

  def __init__(self, function: Callable[..., Any], *arguments: Any):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.fixture(name='path')
def _path(tmp_path):
  return tmp_path / 'model.pth'


def _refused(path: pathlib.Path, pattern: str = '') -> str:
  """Asserts that reading fails in one line that names the file."""
  with pytest.raises(errors.UserError, match=pattern) as caught:
    pytorch.read_pth(path)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert message.isprintable(), 'more than one line, or control characters'
  assert len(message) < 1000
  return message


# --- Reading what torch wrote


@pytest.mark.parametrize('path', [CHECKPOINT, LEGACY], ids=['zip', 'legacy'])
def test_a_checkpoint_of_torch_and_mmcv_is_read_exactly(path):
  _assert_same(pytorch.read_pth(path), SAVED)


def test_reading_and_writing_need_no_torch(path):
  program = (
    'import sys; sys.modules["torch"] = None\n'
    'from dualformer_jax import pytorch\n'
    'weights = pytorch.read_pth(sys.argv[1])\n'
    'pytorch.write_pth(sys.argv[2], weights)\n'
    'print(len(weights))\n'
  )
  run = subprocess.run(
    [sys.executable, '-c', program, CHECKPOINT, path],
    capture_output=True,
    text=True,
    check=True,
  )
  assert run.stdout == f'{len(SAVED)}\n'
  _assert_same(pytorch.read_pth(path), SAVED)


def test_a_compressed_zip_is_read(path):
  with (
    zipfile.ZipFile(CHECKPOINT) as source,
    zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as target,
  ):
    for name in source.namelist():
      target.writestr(name, source.read(name))
  _assert_same(pytorch.read_pth(path), SAVED)


WEIGHTS = {'fc.weight': _ramp(0, 2, 3), 'fc.bias': _ramp(1, 3)}


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('legacy', [False, True])
def test_torch_of_any_protocol_is_read(path, protocol, legacy):
  torch = pytest.importorskip('torch')
  model = torch.nn.Sequential(
    torch.nn.Conv3d(2, 3, 2), torch.nn.BatchNorm3d(3), torch.nn.Linear(2, 2)
  )
  optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
  model(torch.ones(2, 2, 3, 3, 3)).sum().backward()
  optimizer.step()
  torch.save(
    {
      'meta': {'scores': [np.float32(0.5), np.arange(3)], 'time': 'now'},
      'state_dict': model.state_dict(),
      'optimizer': optimizer.state_dict(),
      'random': torch.get_rng_state(),
      'parameter': model[0].weight,
    },
    path,
    pickle_protocol=protocol,
    _use_new_zipfile_serialization=not legacy,
  )
  expected = {name: w.numpy() for name, w in model.state_dict().items()}
  assert expected['1.num_batches_tracked'] == 1
  _assert_same(pytorch.read_pth(path), expected)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda weights: weights,
    lambda weights: {'state_dict': weights},
    lambda weights: {'model': weights, 'epoch': 3},
    lambda weights: {'model': 'tiny', 'state_dict': weights},
    lambda weights: {f'module.{name}': w for name, w in weights.items()},
  ],
  ids=['bare', 'state_dict', 'model', 'both', 'module'],
)
def test_a_state_dict_is_found(path, wrap):
  torch = pytest.importorskip('torch')
  weights = {name: torch.from_numpy(w) for name, w in WEIGHTS.items()}
  torch.save(wrap(weights), path)
  _assert_same(pytorch.read_pth(path), WEIGHTS)


def test_what_is_dropped_is_told():
  dropped: list[str] = []
  pytorch.read_pth(CHECKPOINT, dropped)
  beside = ["'meta'", "'optimizer'", "'amp'", "'weight'"]
  assert sorted(dropped) == sorted([*beside, "'module.' before all names"])


def test_module_is_dropped_from_all_names_or_none(path):
  weights = {'module.a': _ramp(0, 2), 'module.module.b': _ramp(1, 2)}
  pytorch.write_pth(path, weights)
  assert list(pytorch.read_pth(path)) == ['a', 'module.b']
  mixed = {'module.a': _ramp(0, 2), 'a': _ramp(1, 2)}
  pytorch.write_pth(path, mixed, overwrite=True)
  _assert_same(pytorch.read_pth(path), mixed)


def test_the_parameters_read_cannot_be_changed_through_each_other():
  weights = pytorch.read_pth(CHECKPOINT)
  assert not any(array.flags.writeable for array in weights.values())


# --- Files that are no checkpoints, or broken ones


def test_an_absent_file_and_a_folder_are_named(tmp_path):
  _refused(tmp_path / 'absent.pth', 'No such file')
  _refused(tmp_path, 'Is a directory')


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'<!DOCTYPE html><html>404</html>',
    b'version https://git-lfs.github.com/spec/v1\n',
    pickle.dumps({'weights': [1, 2]}),
  ],
)
def test_what_torch_did_not_write_is_refused(path, content):
  path.write_bytes(content)
  _refused(path, 'not a checkpoint written by torch.save')


def test_another_zip_is_refused(path):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme.txt', 'hello')
  _refused(path, 'a zip file, but not a checkpoint written by torch.save')


@pytest.mark.parametrize('source', [CHECKPOINT, LEGACY])
def test_a_truncated_file_is_refused_wherever_it_ends(path, source):
  content = source.read_bytes()
  for length in range(len(content) - 1, 20, -37):
    path.write_bytes(content[:length])
    _refused(path, 'truncated or damaged')


def test_changed_numbers_are_noticed(path):
  content = CHECKPOINT.read_bytes()
  place = content.index(_ramp(1, 24).tobytes())
  path.write_bytes(content[:place] + b'\x01' + content[place + 1 :])
  _refused(path, 'truncated or damaged.*CRC')


def test_a_missing_storage_is_named(path):
  _save(path, _state_dict(_tensor(key='7')))
  _refused(path, "'0': incomplete: 'weights/data/7' is not in it")


@pytest.mark.parametrize('order', [b'big', b'middle'])
def test_another_byte_order_is_refused(path, order):
  _save(path, _state_dict(_tensor()), byteorder=order)
  _refused(path, 'big-endian')


def test_an_encrypted_file_is_refused(path):
  content = _save(path, _state_dict(_tensor())).read_bytes()
  content = bytearray(content)
  for signature, place in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
    for match in re.finditer(signature, bytes(content)):
      content[match.start() + place] |= 1
  path.write_bytes(content)
  _refused(path, 'encrypted')


def test_an_unusual_compression_is_refused(path):
  _save(path, _state_dict(_tensor()), compression=zipfile.ZIP_LZMA)
  _refused(path, 'compressed in a way')


@pytest.mark.parametrize(
  'content, pattern',
  [
    (_plain([1, 2]), 'a single object'),
    (_tensor(), 'a single object'),
    (_plain({}), 'no tensors are: all'),
    (_plain({'epoch': 3}), "no tensors are: 'epoch'"),
    (_plain({'state_dict': {'a': 1, 'b': None}}), "no tensors are: 'a', 'b'"),
    (b'}' + _plain(3) + _tensor() + b's', "no tensors are: '3'"),
  ],
)
def test_a_file_without_a_state_dict_says_what_is_there(path, content, pattern):
  _save(path, b'\x80\x02' + content + b'.')
  _refused(path, pattern)


# --- Files made to do harm

CODE = {
  'system': _Call(os.system, 'touch MARKER'),
  'eval': _Call(eval, '__import__("pathlib").Path("MARKER").touch()'),
  'exec': _Call(exec, 'import pathlib; pathlib.Path("MARKER").touch()'),
  'getattr': _Call(getattr, 'os', 'system'),
  'open': _Call(open, 'MARKER', 'w'),
  'Popen': _Call(subprocess.Popen, ['touch', 'MARKER']),
  'Counter': collections.Counter('a'),
}


@pytest.mark.parametrize('name', CODE)
@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('container', ['zip', 'legacy', 'none'])
def test_a_call_of_code_is_named_and_nothing_runs(
  tmp_path, monkeypatch, name, protocol, container
):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'model.pth'
  data = pickle.dumps({'meta': CODE[name], 'state_dict': {}}, protocol)
  if container == 'zip':
    _save(path, data)
  elif container == 'none':
    path.write_bytes(data)
  else:
    parts = [0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}]
    head = b''.join(pickle.dumps(part, 2) for part in parts)
    path.write_bytes(head + data)
  _refused(path, rf"asks for '\w+\.{name}'.*nothing was run")
  assert os.listdir(tmp_path) == ['model.pth']
  # The same bytes are harmful indeed.
  if name in ('system', 'eval', 'exec'):
    pickle.loads(data)['meta']
    assert (tmp_path / 'MARKER').exists()


@pytest.mark.parametrize(
  'name',
  [
    'torch.load',
    'torch.jit.load',
    'torch.storage._load_from_bytes',
    'torch.hub.load',
    'torch._utils._rebuild_tensor_v2.__globals__',
    'torch.FloatStorage.__init__',
    'collections.OrderedDict.__subclasses__',
    'numpy.load',
    'numpy.f2py.diagnose.run',
    'numpy.core.multiarray.scalar.__class__',
    'dualformer_jax.pytorch.write_pth',
    'os\x1b[31m.system',
  ],
)
def test_a_name_that_resembles_an_allowed_one_is_refused(path, name):
  module, _, attribute = name.rpartition('.')
  for names in (
    f'c{module}\n{attribute}\n'.encode(),
    _plain(module) + _plain(attribute) + b'\x93',
  ):
    _save(path, b'\x80\x02' + names + b'.')
    _refused(path, 'asks for .*nothing was run')


LAUGHS = b')' + b'q\x00h\x00\x86' * 200  # a pair of pairs of pairs of ...
SIZE = b'ctorch\nSize\n'
DICT = b'ccollections\nOrderedDict\n'


@pytest.mark.parametrize(
  'content, pattern',
  [
    # Opcodes that make things in other ways
    (b'(ios\nsystem\n', 'uses INST'),
    (b'(' + SIZE + b'o', 'uses OBJ'),
    (SIZE + b')\x81', 'uses NEWOBJ'),
    (SIZE + b')}\x92', 'uses NEWOBJ_EX'),
    (b'\x82\x01', 'uses EXT1'),
    (b'P/etc/passwd\n', 'uses PERSID'),
    (b'\x97', 'uses NEXT_BUFFER'),
    (b'\x8f', 'uses EMPTY_SET'),
    (_plain('os') + _plain(3) + b'\x93', 'by what is no text'),
    (_plain('os') + LAUGHS + b'\x93', 'by what is no text'),
    # Calls of what may not be called, or not so
    (_plain(3) + b')R', 'calls what is no function'),
    (b')' + b')R' + b')R', 'calls what is no function'),
    (SIZE + b']R', 'calls what is no function'),
    (b'ctorch\nFloatStorage\n' + _plain((1 << 40,)) + b'R', 'none of its own'),
    (DICT + _plain(([[1, 2]],)) + b'R', 'none of its own'),
    (b'ctorch._utils\n_rebuild_tensor_v2\n)R', 'none of its own'),
    (b'ctorch._utils\n_rebuild_parameter\n)R', 'none of its own'),
    # Attributes and items of what has none
    (SIZE + _plain({'__call__': 1}) + b'b', 'gives attributes'),
    (DICT + _plain((None, {'__init__': 1})) + b'b', 'gives attributes'),
    (_tensor() + _plain({'shape': 1}) + b'b', 'gives attributes'),
    (_plain([1]) + _plain({'a': 1}) + b'b', 'gives attributes'),
    (_plain('text') + b'Na', 'appends to what is no list'),
    (DICT + b'(NNe', 'appends to what is no list'),
    (_plain([1]) + b'NNs', 'no dictionary'),
    (SIZE + b')R' + b'NNs', 'no dictionary'),
    (b'}(NNNu', 'no dictionary'),
    (b'}' + LAUGHS + b'Ns', 'neither text nor number'),
    (b'}]Ns', 'neither text nor number'),
    (b'}' + SIZE + b'Ns', 'neither text nor number'),
    # Storages that are none
    (_plain(('file', '/etc/passwd')) + b'Q', 'no storage'),
    (_plain('/etc/passwd') + b'Q', 'no storage'),
    (LAUGHS + b'Q', 'no storage'),
    (_tensor(storage=_plain('FloatStorage')), 'of a kind'),
    (_tensor(storage=SIZE), 'of a kind'),
    (_tensor(storage=LAUGHS), 'of a kind'),
    (_tensor(key=0), 'of a kind'),
    (_tensor(count=-4), 'of a kind'),
    (_tensor(count=True), 'of a kind'),
    (_tensor(count=4.0), 'of a kind'),
    (_tensor(storage=b'ctorch\nComplexFloatStorage\n'), 'asks for'),
    # Damage
    (b'', 'damaged'),
    (b'R', 'damaged'),
    (b'b', 'damaged'),
    (b't', 'damaged'),
    (b's', 'damaged'),
    (b'a', 'damaged'),
    (b'u', 'damaged'),
    (b'((N', 'holds no state_dict'),
    (b'h\x05', 'damaged'),
    (b'\x85', 'damaged'),
    (b'\xff', 'damaged'),
    (b'X\xff\xff\xff\xff', 'damaged'),
    (b'\x8d' + struct.pack('<Q', 1 << 62), 'damaged'),
    (b'\x8b\xff\xff\xff\x7f', 'damaged'),
    (b'X\x01\x00\x00\x00\xff', 'damaged'),
    (b'cos\xff\nsystem\n', 'damaged'),
    # A place in the memo that a list of all places would fill the memory for
    (b'Nr\xff\xff\xff\x7f', 'holds no state_dict'),
    (b'Nr\xff\xff\xff\xff', 'holds no state_dict'),
  ],
)
def test_no_opcode_is_turned_against_the_reader(path, content, pattern):
  _save(path, b'\x80\x02' + content + b'.')
  tracemalloc.start()
  _refused(path, pattern)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 << 20


def test_attributes_of_a_dictionary_are_dropped(path):
  # torch keeps _metadata so; as attributes these would replace methods.
  state = _plain({'items': 1, '__class__': 2, '__dict__': 3})
  data = b'\x80\x02' + DICT + b')R' + _plain('a') + _tensor() + b's' + state
  _save(path, data + b'b.')
  weights = pytorch.read_pth(path)
  _assert_same(weights, {'a': np.zeros(4, np.float32)})
  assert type(weights) is dict


@pytest.mark.parametrize(
  'deep',
  [
    b']' * 100_000 + b'a' * 99_999,
    b'}' + b'N}' * 100_000 + b's' * 100_000,
    b'N' + b'\x85' * 100_000,
    LAUGHS,
    b']q\x00h\x00a',  # itself
  ],
  ids=['lists', 'dicts', 'tuples', 'laughs', 'itself'],
)
def test_depth_beside_the_state_dict_does_no_harm(path, deep):
  weights = _state_dict(_tensor())[2:-1]
  meta = _plain('meta') + deep
  _save(path, b'\x80\x02}(' + meta + _plain('model') + weights + b'u.')
  _assert_same(pytorch.read_pth(path), {'0': np.zeros(4, np.float32)})


def test_depth_of_tensors_does_no_harm(path):
  rebuild = b'ctorch._utils\n_rebuild_tensor_v2\nq\x00'
  nested = rebuild + b'(' + b'h\x00(' * 50_000 + b'NNNNtR' * 50_000
  _save(path, b'\x80\x02}' + _plain('a') + nested + b'NNNtRs.')
  _refused(path, "'a': its numbers are no storage")


def test_a_pickle_without_end_is_refused(path):
  _save(path, b'\x80\x02' + b']' * 1_100_000 + b'.')
  _refused(path, 'too long')


@pytest.mark.parametrize(
  'tensor, pattern',
  [
    (_tensor(shape=(5,)), 'beyond its 4 stored numbers'),
    (_tensor(offset=1), 'beyond its 4 stored numbers'),
    (_tensor(strides=(2,)), 'beyond its 4 stored numbers'),
    (_tensor(shape=(2, 2), strides=(3, 1)), 'beyond its 4 stored numbers'),
    (_tensor(shape=(1,), offset=4), 'beyond its 4 stored numbers'),
    (_tensor(shape=(3, 3), strides=(1, 1)), 'beyond its 4 stored numbers'),
    (_tensor(shape=(1 << 40,), strides=(0,)), 'beyond its 4 stored numbers'),
    (_tensor(shape=(1 << 47,) * 32, strides=(0,) * 32), 'beyond its 4'),
    (_tensor(shape=(-1,)), 'negative or too large'),
    (_tensor(shape=(-2, -2), strides=(1, 1)), 'negative or too large'),
    (_tensor(offset=-1), 'negative or too large'),
    (_tensor(offset=3, strides=(-1,)), 'negative or too large'),
    (_tensor(shape=(1 << 64,)), 'negative or too large'),
    (_tensor(strides=(1 << 64,)), 'negative or too large'),
    (_tensor(offset=1 << 2000), 'negative or too large'),
    (_tensor(shape=(True,)), 'negative or too large'),
    (_tensor(shape=(4.0,)), 'negative or too large'),
    (_tensor(shape=((4,),)), 'negative or too large'),
    (_tensor(shape=[4]), 'its shape, strides or offset are none'),
    (_tensor(shape=None), 'its shape, strides or offset are none'),
    (_tensor(shape=(1,) * 33, strides=(1,) * 33), 'offset are none'),
    (_tensor(shape=(2, 2)), '2 sizes and 1 strides'),
    (_tensor(shape=(0, 1 << 47, 1 << 47), strides=(1, 1, 1)), "'0': "),
    (_tensor(count=3, shape=(3,)), 'holds 16 bytes, its tensors say 12'),
    (_tensor(count=5), 'holds 16 bytes, its tensors say 20'),
    (_tensor(count=1 << 62), 'holds 16 bytes, its tensors say'),
    (_tensor(storage=b'ctorch\nDoubleStorage\n'), 'its tensors say 32'),
    (_tensor(key='../../etc/passwd'), 'is not in it'),
  ],
)
def test_a_tensor_that_lies_is_refused(path, tensor, pattern):
  _save(path, _state_dict(tensor))
  tracemalloc.start()
  _refused(path, pattern)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 << 20


@pytest.mark.parametrize(
  'tensor, expected',
  [
    (_tensor(shape=(2, 2), strides=(1, 2)), [[0, 2], [1, 3]]),
    (_tensor(shape=(2,), offset=1, strides=(2,)), [1, 3]),
    (_tensor(shape=(2, 2), strides=(1, 1)), [[0, 1], [1, 2]]),
    (_tensor(shape=(3,), strides=(0,)), [0, 0, 0]),
    (_tensor(shape=(1, 2), strides=(1 << 47, 2)), [[0, 2]]),
    (_tensor(shape=(), offset=3, strides=()), 3),
  ],
)
def test_strides_and_offsets_within_the_storage_are_followed(
  path, tensor, expected
):
  _save(path, _state_dict(tensor), (np.arange(4, dtype='f4').tobytes(),))
  _assert_same(pytorch.read_pth(path), {'0': np.array(expected, np.float32)})


def test_a_zip_that_unpacks_to_far_more_is_refused_unpacked(path):
  tensors = [_tensor(key=str(i), count=1 << 22) for i in range(4)]
  storages = (bytes(1 << 24),) * 4
  _save(path, _state_dict(*tensors), storages, zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 100_000
  tracemalloc.start()
  _refused(path, 'too much for a file of')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 << 20


@pytest.mark.parametrize('said', [16, 1 << 31])
def test_a_zip_that_lies_about_sizes_is_refused(path, said):
  data = _state_dict(_tensor(count=said // 4))
  _save(path, data, (bytes(1 << 26),), zipfile.ZIP_DEFLATED)
  content = bytearray(path.read_bytes())
  name = b'weights/data/0'
  places = [match.start() for match in re.finditer(name, content)]
  # The size stands before the name in the header and in the directory.
  for place, before in zip(places, (8, 22), strict=True):
    (size,) = struct.unpack_from('<I', content, place - before)
    assert size == 1 << 26
    struct.pack_into('<I', content, place - before, said)
  path.write_bytes(content)
  tracemalloc.start()
  _refused(path, 'CRC' if said == 16 else 'too much for a file of')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 << 20


def test_a_storage_that_unpacks_to_less_than_said_is_refused(path):
  storage = np.random.default_rng(1).bytes(4000)
  data = _state_dict(_tensor(count=1001))
  _save(path, data, (storage,), zipfile.ZIP_DEFLATED)
  _refused(path, 'holds 4000 bytes, its tensors say 4004')
  content = path.read_bytes()
  assert content.count(struct.pack('<I', 4000)) == 2
  size = struct.pack('<I', 4004)
  path.write_bytes(content.replace(struct.pack('<I', 4000), size))
  _refused(path, 'truncated or damaged.*cut short')


def test_a_legacy_file_that_lies_about_a_size_is_refused(path):
  content = LEGACY.read_bytes()
  numbers = _ramp(1, 24).tobytes()  # stand after their number
  told = struct.pack('<q', 24) + numbers
  assert content.count(told) == 1
  for lie in (-1, 23, 1 << 60):
    path.write_bytes(content.replace(told, struct.pack('<q', lie) + numbers))
    _refused(path, 'another size than announced')


def test_a_huge_pickle_is_refused_unpacked(path):
  _save(path, bytes(65 << 20), (), zipfile.ZIP_DEFLATED)
  tracemalloc.start()
  _refused(path, 'too large|too much')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 << 20


@pytest.mark.parametrize('what', ['pickle', 'zip', 'legacy'])
def test_any_damage_is_one_clear_line_or_harmless(path, what):
  source = LEGACY if what == 'legacy' else CHECKPOINT
  original = _pickled_checkpoint() if what == 'pickle' else source.read_bytes()
  generator = random.Random(1)
  refused = 0
  for _ in range(300):
    content = bytearray(original)
    for _ in range(generator.randint(1, 3)):
      content[generator.randrange(len(content))] = generator.randrange(256)
    if what == 'pickle':
      with zipfile.ZipFile(CHECKPOINT) as archive:
        storages = tuple(
          archive.read(f'checkpoint/data/{key}')
          for key in range(sum('/data/' in n for n in archive.namelist()))
        )
      _save(path, bytes(content), storages)
    else:
      path.write_bytes(content)
    try:
      pytorch.read_pth(path)
    except errors.UserError as error:
      refused += 1
      assert str(error).isprintable()
  assert 0 < refused < 300


# --- Writing

TYPES = [
  'float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16',
  'int8', 'uint8', 'bool',
]  # fmt: skip


def _every_type() -> dict[str, np.ndarray]:
  """Arrays of every type and of strange shapes, in no alphabetical order."""
  weights = {
    f'{name}.weight': np.arange(-3, 3).reshape(2, 3).astype(np.dtype(name))
    for name in TYPES
  }
  return weights | {
    'transposed': _ramp(0, 4, 3).T,
    'strided': _ramp(0, 4, 6)[::2, 1::2],
    'reversed': _ramp(0, 5)[::-1],
    'big_endian': _ramp(0, 5).astype('>f4'),
    'scalar': np.array(7),
    'empty': np.zeros((3, 0, 2), np.float32),
    'name \u2013 with\nall sorts': np.array([1.5]),
    '': np.array([np.nan, np.inf, -0.0], np.float32),
  }


def test_what_is_written_is_read_back_exactly(path):
  weights = _every_type()
  pytorch.write_pth(path, weights)
  weights['big_endian'] = weights['big_endian'].astype('<f4')
  _assert_same(pytorch.read_pth(path), weights)


@pytest.mark.parametrize('mmap', [False, True])
def test_torch_reads_what_is_written(path, mmap):
  torch = pytest.importorskip('torch')
  weights = _every_type()
  pytorch.write_pth(path, weights)
  found = torch.load(path, weights_only=True, mmap=mmap)
  assert type(found) is collections.OrderedDict
  assert list(found) == list(weights)
  for name, array in weights.items():
    assert found[name].shape == array.shape, name
    assert found[name].is_contiguous(), name
    if array.dtype == ml_dtypes.bfloat16:
      assert found[name].dtype == torch.bfloat16
      found[name], array = found[name].float(), array.astype(np.float32)
    array = array.astype(array.dtype.newbyteorder('='))
    np.testing.assert_array_equal(found[name].numpy(), array, strict=True)
    # Mapped into memory, numbers begin where vector instructions want them.
    assert not mmap or array.size == 0 or found[name].data_ptr() % 64 == 0


def test_the_same_weights_give_the_same_bytes(tmp_path):
  for name in ('a.pth', 'b.pth'):
    pytorch.write_pth(tmp_path / name, _every_type())
  first, second = (tmp_path / name for name in ('a.pth', 'b.pth'))
  assert first.read_bytes() == second.read_bytes()


def test_a_file_is_replaced_only_on_demand(tmp_path):
  path = tmp_path / 'model.pth'
  path.write_text('precious')
  with pytest.raises(errors.UserError, match='model.pth: exists already'):
    pytorch.write_pth(path, WEIGHTS)
  assert path.read_text() == 'precious'
  with pytest.raises(errors.UserError, match='exists already'):
    pytorch.write_pth(tmp_path, WEIGHTS, overwrite=True)
  pytorch.write_pth(path, WEIGHTS, overwrite=True)
  _assert_same(pytorch.read_pth(path), WEIGHTS)
  assert os.listdir(tmp_path) == ['model.pth']


@pytest.mark.parametrize('dtype', ['complex64', 'uint32', 'U3', 'object'])
def test_a_type_that_torch_lacks_is_refused_and_nothing_is_lost(
  tmp_path, dtype
):
  path = tmp_path / 'model.pth'
  path.write_text('precious')
  weights = WEIGHTS | {'odd': np.zeros(3, dtype)}
  with pytest.raises(errors.UserError, match='odd: PyTorch has no tensors of'):
    pytorch.write_pth(path, weights, overwrite=True)
  assert path.read_text() == 'precious'
  assert os.listdir(tmp_path) == ['model.pth']


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'model.pth'
  path.write_text('precious')

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(errors.UserError, match='cannot be written: No space'):
    pytorch.write_pth(path, WEIGHTS, overwrite=True)
  assert path.read_text() == 'precious'
  assert os.listdir(tmp_path) == ['model.pth']


def test_a_folder_that_is_absent_is_named(tmp_path):
  with pytest.raises(errors.UserError, match='absent.*No such file'):
    pytorch.write_pth(tmp_path / 'absent' / 'model.pth', WEIGHTS)


# --- Names

HEADS = {
  'micro': (1, 2, 4, 8),
  'micro_tokenlabel': (1, 2, 4, 8),
  'micro16': (2, 4, 8, 16),
  'tiny': (2, 4, 8, 16),
  'tiny_tokenlabel': (2, 4, 8, 16),
  'small': (3, 6, 12, 24),
}


def _flax(name: str, weight: np.ndarray, heads: tuple[int, ...]):
  """Returns the Flax path and array of a PyTorch parameter, worked out here."""
  parts = name.split('.')
  leaf = parts.pop()
  modules: list[str] = []
  for part in parts:  # numbers belong to the name before them
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
def test_every_parameter_goes_to_its_place(name):
  weights = reference_arrays.state_dict(name, 1)
  variables, notes = pytorch.from_pytorch(weights, _target(name))
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


def test_heads_are_split_as_the_attention_of_pytorch_does(micro, target):
  variables, _ = pytorch.from_pytorch(micro, target)
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
def test_back_to_pytorch_is_in_its_order_and_exact(name):
  weights = {
    key: np.arange(
      np.prod(shape, dtype=int), dtype='i8' if 'num_batches' in key else 'f4'
    ).reshape(shape)
    for key, shape in reference_arrays.shapes(name).items()
  }
  _assert_same(pytorch.to_pytorch(_variables(name, weights)), weights)


def test_through_a_file_and_back_nothing_changes(micro, target, path):
  pytorch.write_pth(path, micro)
  variables, _ = pytorch.from_pytorch(pytorch.read_pth(path), target)
  variables = jax.tree.map(jnp.asarray, variables)
  _assert_same(pytorch.to_pytorch(variables), micro)


def test_the_order_of_the_tree_does_not_matter(micro):
  def turned(tree):
    if not isinstance(tree, dict):
      return tree
    return {name: turned(tree[name]) for name in reversed(tree)}

  _assert_same(pytorch.to_pytorch(turned(_variables('micro', micro))), micro)


@pytest.mark.parametrize('name', reference_arrays.MODELS)
def test_the_model_has_the_parameters_of_pytorch(name):
  fields = reference_arrays.MODELS[name]
  model = dualformer.DualFormer(image_size=224, dtype='float32', **fields)
  frames = fields['num_frames']
  clips = jax.ShapeDtypeStruct((1, frames, 224, 224, 3), jnp.float32)
  target = jax.eval_shape(model.init, jax.random.key(0), clips)
  weights = reference_arrays.state_dict(name, 1)
  variables, _ = pytorch.from_pytorch(
    weights, {key: target[key] for key in ('params', 'batch_stats')}
  )
  _assert_same(pytorch.to_pytorch(variables), weights)


def _problem(weights, target, pattern: str) -> str:
  with pytest.raises(errors.UserError, match=pattern) as caught:
    pytorch.from_pytorch(weights, target, source='tiny.pth')
  message = str(caught.value)
  assert message.startswith('tiny.pth does not fit the model')
  assert message.isprintable()
  return message


def test_all_that_does_not_fit_is_listed_at_once(micro, target):
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


def test_long_lists_are_cut_and_counted(micro, target):
  renamed = {f'encoder.{name}': array for name, array in micro.items()}
  message = _problem(renamed, target, 'does not fit')
  assert f'{len(micro)} unknown: ' in message
  assert f'{len(micro)} missing: ' in message
  assert message.count(f' and {len(micro) - 10} more') == 2
  assert len(message) < 2500


def test_a_token_head_without_a_place_is_unknown(target):
  weights = reference_arrays.state_dict('micro_tokenlabel', 1)
  _problem(weights, target, "6 unknown: 'cls_head.token_linear.0.weight'")


def test_a_transposed_square_kernel_of_another_grid_is_noticed(micro, target):
  weights = dict(micro)
  name = 'backbone.blocks.0.1.attn.sr.weight'
  weights[name] = weights[name].transpose(0, 1, 4, 3, 2)
  _problem(weights, target, r'expected \(16, 1, 2, 8, 8\) found')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_other_floats_become_float32_and_that_is_said(micro, target, dtype):
  def cast(array):
    return array if array.dtype == np.int64 else array.astype(np.dtype(dtype))

  weights = {name: cast(array) for name, array in micro.items()}
  variables, notes = pytorch.from_pytorch(weights, target)
  assert {x.dtype for x in jax.tree.leaves(variables['params'])} == {
    np.dtype('float32')
  }
  rounded = {
    name: array if array.dtype == np.int64 else array.astype(np.float32)
    for name, array in weights.items()
  }
  _assert_same(pytorch.to_pytorch(variables), rounded)
  (note,) = notes
  floats = sum(array.dtype != np.int64 for array in micro.values())
  assert note.startswith(f'{floats} parameters were {dtype}, now float32: ')
  assert note.isprintable()


@pytest.mark.parametrize(
  'value',
  [np.float32('nan'), np.float32('inf'), np.float32('-inf'), np.float64(1e39)],
)
def test_a_single_bad_weight_does_not_pass(micro, target, value):
  name = 'backbone.blocks.2.1.mlp.fc1.weight'
  array = micro[name].astype(value.dtype)
  array[3, 5] = value
  _problem(micro | {name: array}, target, f'1 with NaN, infinite.*{name}')


COUNT = 'backbone.blocks.1.1.attn.lr.1.num_batches_tracked'


@pytest.mark.parametrize('count', [0, 1, 2**31 - 1])
def test_a_count_of_batches_is_kept(micro, target, count):
  weights = micro | {COUNT: np.array(count)}
  variables, _ = pytorch.from_pytorch(weights, target)
  found = variables['batch_stats']['backbone']['blocks_1_1']['attn']['lr_1']
  assert found['num_batches_tracked'].dtype == np.int32
  assert found['num_batches_tracked'] == count
  _assert_same(pytorch.to_pytorch(variables), weights)


@pytest.mark.parametrize('count', [-1, 2**31, 2**40])
def test_an_impossible_count_of_batches_is_refused(micro, target, count):
  _problem(micro | {COUNT: np.array(count)}, target, f'impossible.*{COUNT}')


def test_a_count_that_is_no_integer_is_refused(micro, target):
  weights = micro | {COUNT: np.array(1.0)}
  _problem(weights, target, f'{COUNT} expected integer found float64')


def test_a_path_of_another_model_is_a_mistake_of_the_programmer():
  variables = {'params': {'backbone': {'conv1': {'kernel': np.zeros(1)}}}}
  with pytest.raises(ValueError, match='params/backbone/conv1/kernel is no'):
    pytorch.to_pytorch(variables)


def test_the_head_is_recognised():
  plain, token = (
    reference_arrays.state_dict(name, 1)
    for name in ('micro', 'micro_tokenlabel')
  )
  assert not pytorch.has_token_head(plain)
  assert pytorch.has_token_head(token)
  assert pytorch.num_classes(plain) == pytorch.num_classes(token) == 10
  assert pytorch.num_classes({'head.weight': np.zeros((3, 4))}) is None
