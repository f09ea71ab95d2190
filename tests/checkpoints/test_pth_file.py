"""Reading and writing .pth files: real, damaged and hostile ones."""

import collections
from collections.abc import Callable, Iterator
import contextlib
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

import ml_dtypes
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.checkpoints import pth_file
from dualformer_jax.checkpoints import weights as weights_lib
from tests import reference_arrays

CHECKPOINT = reference_arrays.DIRECTORY / 'checkpoint.pth'
LEGACY = reference_arrays.DIRECTORY / 'checkpoint_legacy.pth'


def _ramp(index: int, *shape: int) -> np.ndarray:
  return (np.arange(np.prod(shape)) / 8 + index).reshape(shape).astype('f4')


# What PyTorch saved to the two files, see tests/reference/README.md.
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
WEIGHTS = {'fc.weight': _ramp(0, 2, 3), 'fc.bias': _ramp(1, 3)}


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  with path.open('rb') as file:
    return pth_file.read_pth(file)[0]


def _assert_same(found: Any, expected: Any) -> None:
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, name, strict=True)


def _plain(value: object) -> bytes:
  """Returns the opcodes that push a plain value."""
  return pickle.dumps(value, 2)[2:-1]


def _tensor(
  key: object = '0',
  count: object = 4,
  offset: object = 0,
  shape: object = (4,),
  strides: object = (1,),
  storage: bytes = b'ctorch\nFloatStorage\n',
) -> bytes:
  """Returns the opcodes that push a tensor, as torch.save writes them."""
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
  """Returns the pickle of {'0': value, '1': value, ...}."""
  items = (_plain(str(i)) + value for i, value in enumerate(values))
  return b'\x80\x02}(' + b''.join(items) + b'u.'


def _save(
  path: pathlib.Path,
  data: bytes,
  storages: tuple[bytes, ...] = (bytes(16),),
  compression: int = zipfile.ZIP_STORED,
  byteorder: bytes = b'little',
) -> pathlib.Path:
  """Writes a zip file as torch.save does, around any pickle."""
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('weights/data.pkl', data)
    archive.writestr('weights/byteorder', byteorder)
    for key, storage in enumerate(storages):
      archive.writestr(f'weights/data/{key}', storage)
    archive.writestr('weights/version', b'3\n')
  return path


@pytest.fixture(name='path')
def _path(tmp_path):
  return tmp_path / 'model.pth'


def _assert_raises(path: pathlib.Path, pattern: str = '') -> None:
  """Asserts that reading fails with one line that names the file."""
  with pytest.raises(errors.UserError, match=pattern) as caught:
    weights_lib.read(path)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert message.isprintable(), 'several lines, or control characters'
  assert len(message) < 1000


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
  """Asserts that the block allocates less than 4 MiB at once."""
  tracemalloc.start()
  try:
    yield
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
  finally:
    tracemalloc.stop()


# --- Reading files of PyTorch


@pytest.mark.parametrize('path', [CHECKPOINT, LEGACY], ids=['zip', 'legacy'])
def test_checkpoint_of_torch_and_mmcv_is_read_exactly(path):
  weights, dropped, _ = weights_lib.read(path)
  _assert_same(weights, SAVED)
  others = ["'meta'", "'optimizer'", "'amp'", "'weight'"]
  assert sorted(dropped) == sorted([*others, "'module.' before all names"])
  assert not any(array.flags.writeable for array in weights.values())


def test_reading_and_writing_need_no_torch(path):
  program = (
    'import sys; sys.modules["torch"] = None\n'
    'from dualformer_jax.checkpoints import pth_file, weights\n'
    'found, *_ = weights.read(sys.argv[1])\n'
    'pth_file.write_pth(sys.argv[2], found)\n'
  )
  command = [sys.executable, '-c', program, CHECKPOINT, path]
  subprocess.run(command, check=True)
  _assert_same(_read(path), SAVED)


def test_compressed_zip_is_read(path):
  with (
    zipfile.ZipFile(CHECKPOINT) as source,
    zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as target,
  ):
    for name in source.namelist():
      target.writestr(name, source.read(name))
  _assert_same(_read(path), SAVED)


@pytest.mark.parametrize('protocol', [2, 5])
@pytest.mark.parametrize('legacy', [False, True])
def test_torch_save_of_any_protocol_is_read(path, protocol, legacy):
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
  _assert_same(_read(path), expected)


# What torch.save writes for parameters with attributes and for buffers of
# torch.nn.Buffer: a function and the arguments of _rebuild_tensor_v2.
_ARGUMENTS = _tensor().removeprefix(b'ctorch._utils\n_rebuild_tensor_v2\n')[:-1]
OTHER_TENSORS = {
  'parameter with attributes': (
    b'ctorch._utils\n_rebuild_parameter_with_state\n(' + _tensor() + b'\x88N}tR'
  ),
  'buffer': b'ctorch._tensor\n_rebuild_from_type_v2\n('
  b'ctorch._utils\n_rebuild_tensor_v2\nctorch.nn.parameter\nBuffer\n'
  + _ARGUMENTS
  + b'}tR',
}


@pytest.mark.parametrize('name', OTHER_TENSORS)
def test_tensors_with_attributes_are_read(path, name):
  numbers = np.arange(4, dtype='f4')
  _save(path, _state_dict(OTHER_TENSORS[name]), (numbers.tobytes(),))
  _assert_same(_read(path), {'0': numbers})


@pytest.mark.parametrize(
  'other',
  [
    # Paths of Python 3.13, sets of protocol 4, functions of defaultdicts.
    b'cpathlib._local\nPosixPath\n' + _plain(('/', 'data')) + b'R',
    b'\x8f(' + _plain('a') + _plain(1) + b'\x90',
    b'(' + _plain('a') + b'\x91',
    b'ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R',
    # Tensors of other kinds and types.
    b'ctorch._utils\n_rebuild_tensor_v3\nctorch\nfloat8_e4m3fn\n\x85R',
    b'ctorch._utils\n_rebuild_sparse_tensor\n)R',
    _tensor(key='9', storage=b'ctorch.storage\nUntypedStorage\n'),
  ],
)
def test_other_objects_beside_the_weights_are_ignored(path, other):
  weights = _plain('model') + _state_dict(_tensor())[2:-1]
  _save(path, b'\x80\x02}(' + weights + _plain('other') + other + b'u.')
  _assert_same(_read(path), {'0': np.zeros(4, np.float32)})


def test_file_without_checksums_is_read(path):
  # As after torch.serialization.set_crc32_options(False).
  content = bytearray(CHECKPOINT.read_bytes())
  with zipfile.ZipFile(CHECKPOINT) as archive:
    entries, directory = archive.infolist(), archive.start_dir
  for entry in entries:
    start = content.index(b'PK\x01\x02', directory)
    content[start + 16 : start + 20] = bytes(4)
    directory = start + 46 + len(entry.filename)
  path.write_bytes(content)
  _assert_same(_read(path), SAVED)


def test_module_prefix_is_removed_unless_names_become_ambiguous(path):
  weights = {'module.a': _ramp(0, 2), 'module.module.b': _ramp(1, 2)}
  pth_file.write_pth(path, weights)
  assert list(_read(path)) == ['a', 'b']
  path.unlink()
  pth_file.write_pth(path, {'module.a': _ramp(0, 2), 'a': _ramp(1, 2)})
  _assert_raises(path, "has 'a' twice")


@pytest.mark.parametrize('key', ['state_dict', 'model'])
def test_nested_state_dict_is_found(path, key):
  weights = _state_dict(_tensor())[2:-1]
  _save(
    path, b'\x80\x02}(' + _plain('x') + b'N' + _plain(key) + weights + b'u.'
  )
  _assert_same(_read(path), {'0': np.zeros(4, np.float32)})


@pytest.mark.parametrize(
  'tensor, expected',
  [
    (_tensor(shape=(2, 2), strides=(1, 2)), [[0, 2], [1, 3]]),
    (_tensor(shape=(2,), offset=1, strides=(2,)), [1, 3]),
    (_tensor(shape=(3,), strides=(0,)), [0, 0, 0]),
    (_tensor(shape=(1, 2), strides=(1 << 47, 2)), [[0, 2]]),
    (_tensor(shape=(), offset=3, strides=()), 3),
  ],
)
def test_strides_and_offsets_are_followed(path, tensor, expected):
  _save(path, _state_dict(tensor), (np.arange(4, dtype='f4').tobytes(),))
  _assert_same(_read(path), {'0': np.array(expected, np.float32)})


# --- Other and damaged files


def test_other_files_raise(path):
  _assert_raises(path.parent / 'absent.pth', 'No such file')
  path.write_bytes(pickle.dumps({'weights': [1, 2]}))
  _assert_raises(path, 'not weights written by torch.save')


def test_other_zip_file_raises(path):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme.txt', 'hello')
  _assert_raises(path, 'a zip file, but not one written by torch.save')


@pytest.mark.parametrize('source', [CHECKPOINT, LEGACY])
def test_truncated_file_raises_wherever_it_ends(path, source):
  content = source.read_bytes()
  for length in range(len(content) - 1, 20, -97):
    path.write_bytes(content[:length])
    _assert_raises(path, 'truncated or damaged')


def test_changed_number_raises(path):
  content = CHECKPOINT.read_bytes()
  start = content.index(_ramp(1, 24).tobytes())
  path.write_bytes(content[:start] + b'\x01' + content[start + 1 :])
  _assert_raises(path, 'truncated or damaged.*CRC')


def test_missing_storage_big_endian_and_lzma_raise(path):
  _save(path, _state_dict(_tensor(key='7')))
  _assert_raises(path, "incomplete: 'weights/data/7' is missing")
  _save(path, _state_dict(_tensor()), byteorder=b'big')
  _assert_raises(path, 'big-endian')
  _save(path, _state_dict(_tensor()), compression=zipfile.ZIP_LZMA)
  _assert_raises(path, 'encrypted or has an unusual compression')


@pytest.mark.parametrize(
  'content, pattern',
  [
    (_plain([1, 2]), 'a single object'),
    (_plain({}), 'not tensors: everything'),
    (_plain({'state_dict': {'a': 1, 'b': None}}), "not tensors: 'a', 'b'"),
    (b'}' + _plain(3) + _tensor() + b's', "not tensors: '3'"),
  ],
)
def test_file_without_state_dict_raises(path, content, pattern):
  _save(path, b'\x80\x02' + content + b'.')
  _assert_raises(path, pattern)


@pytest.mark.slow
@pytest.mark.parametrize('source', ['pickle', 'zip', 'legacy'])
def test_random_damage_raises_one_line_or_is_harmless(path, source):
  with zipfile.ZipFile(CHECKPOINT) as archive:
    storages = tuple(
      archive.read(f'checkpoint/data/{key}')
      for key in range(sum('/data/' in n for n in archive.namelist()))
    )
    original = archive.read('checkpoint/data.pkl')
  if source != 'pickle':
    original = (LEGACY if source == 'legacy' else CHECKPOINT).read_bytes()
  generator = random.Random(1)
  raised = 0
  for _ in range(300):
    content = bytearray(original)
    for _ in range(generator.randint(1, 3)):
      content[generator.randrange(len(content))] = generator.randrange(256)
    if source == 'pickle':
      _save(path, bytes(content), storages)
    else:
      path.write_bytes(content)
    try:
      weights_lib.read(path)
    except errors.UserError as error:
      raised += 1
      assert str(error).isprintable()
  assert 0 < raised < 300


# --- Hostile files


class _Call:
  """Pickles as a call of `function` with `arguments`."""

  def __init__(self, function: Callable[..., Any], *arguments: Any):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


CODE = {
  'system': _Call(os.system, 'touch MARKER'),
  'eval': _Call(eval, '__import__("pathlib").Path("MARKER").touch()'),
  'getattr': _Call(getattr, 'os', 'system'),
  'Popen': _Call(subprocess.Popen, ['touch', 'MARKER']),
}


@pytest.mark.parametrize('name', CODE)
@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('container', ['zip', 'legacy', 'none'])
def test_code_is_named_and_does_not_run(
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
    path.write_bytes(b''.join(pickle.dumps(part, 2) for part in parts) + data)
  _assert_raises(path, rf"asks for '\w+\.{name}'.*nothing was run")
  assert os.listdir(tmp_path) == ['model.pth']
  if name in ('system', 'eval'):  # the test itself works
    pickle.loads(data)['meta']
    assert (tmp_path / 'MARKER').exists()


@pytest.mark.parametrize(
  'name',
  [
    'torch.load',
    'torch.storage._load_from_bytes',
    'torch._utils._rebuild_tensor_v2.__globals__',
    'torch.FloatStorage.__init__',
    'collections.OrderedDict.__subclasses__',
    'numpy.load',
    'numpy.core.multiarray.scalar.__class__',
    'os\x1b[31m.system',
  ],
)
def test_name_similar_to_an_allowed_one_raises(path, name):
  module, _, attribute = name.rpartition('.')
  for names in (
    f'c{module}\n{attribute}\n'.encode(),
    _plain(module) + _plain(attribute) + b'\x93',
  ):
    _save(path, b'\x80\x02' + names + b'.')
    _assert_raises(path, 'asks for .*nothing was run')


LAUGHS = b')' + b'q\x00h\x00\x86' * 200  # a pair of pairs of pairs of ...
SIZE = b'ctorch\nSize\n'
DICT = b'ccollections\nOrderedDict\n'


@pytest.mark.parametrize(
  'content, pattern',
  [
    # Opcodes that create objects in other ways
    (b'(ios\nsystem\n', 'uses INST'),
    (b'(' + SIZE + b'o', 'uses OBJ'),
    (b'cos\nsystem\n)\x81', 'asks for'),
    (b'\x82\x01', 'uses EXT1'),
    (b'P/etc/passwd\n', 'uses PERSID'),
    (b'\x97', 'uses NEXT_BUFFER'),
    (_plain('os') + LAUGHS + b'\x93', 'names a function by no text'),
    # Calls
    (_plain(3) + b')R', 'something else than a function'),
    (SIZE + b']R', 'something else than a function'),
    (
      b'ctorch\nFloatStorage\n' + _plain((1 << 40,)) + b'R',
      'invalid arguments',
    ),
    (DICT + _plain(([[1, 2]],)) + b'R', 'invalid arguments'),
    (b'ctorch._utils\n_rebuild_tensor_v2\n)R', 'invalid arguments'),
    # Attributes and items
    (SIZE + _plain({'__call__': 1}) + b'b', 'sets attributes'),
    (_tensor() + _plain({'shape': 1}) + b'b', 'sets attributes'),
    (_plain('text') + b'Na', 'else than a list'),
    (_plain([1]) + b'NNs', 'else than a dictionary'),
    (SIZE + b')R' + b'NNs', 'else than a dictionary'),
    (b'}(NNNu', 'else than a dictionary'),
    (b'}' + LAUGHS + b'Ns', 'neither text nor number'),
    (b'}]Ns', 'neither text nor number'),
    # Storages
    (_plain(('file', '/etc/passwd')) + b'Q', 'kind of storage'),
    (_plain('/etc/passwd') + b'Q', 'kind of storage'),
    (LAUGHS + b'Q', 'kind of storage'),
    (_tensor(storage=_plain('FloatStorage')), 'kind of storage'),
    (_tensor(storage=SIZE), 'kind of storage'),
    (_tensor(key=0), 'kind of storage'),
    (_tensor(count=-4), 'kind of storage'),
    (_tensor(count=True), 'kind of storage'),
    (
      _state_dict(_tensor(storage=b'ctorch\nComplexFloatStorage\n'))[2:-1],
      "'0': its numbers are of a type",
    ),
    # Damage
    (b'', 'damaged'),
    (b'R', 'damaged'),
    (b't', 'damaged'),
    (b's', 'damaged'),
    (b'h\x05', 'damaged'),
    (b'X\xff\xff\xff\xff', 'damaged'),
    (b'\x8d' + struct.pack('<Q', 1 << 62), 'damaged'),
    (b'X\x01\x00\x00\x00\xff', 'damaged'),
    # A memo index that would exhaust the memory if the memo were a list
    (b'Nr\xff\xff\xff\xff', 'single object'),
  ],
)
def test_hostile_opcodes_raise(path, content, pattern):
  _save(path, b'\x80\x02' + content + b'.')
  with _little_memory():
    _assert_raises(path, pattern)


def test_attributes_of_a_dictionary_are_dropped(path):
  # PyTorch stores _metadata as an attribute; these would replace methods.
  state = _plain({'items': 1, '__class__': 2, '__dict__': 3})
  data = b'\x80\x02' + DICT + b')R' + _plain('a') + _tensor() + b's' + state
  _save(path, data + b'b.')
  weights = _read(path)
  _assert_same(weights, {'a': np.zeros(4, np.float32)})
  assert type(weights) is dict


@pytest.mark.slow
@pytest.mark.parametrize(
  'deep',
  [
    b']' * 100_000 + b'a' * 99_999,
    b'}' + b'N}' * 100_000 + b's' * 100_000,
    b'N' + b'\x85' * 100_000,
    LAUGHS,
    b']q\x00h\x00a',
  ],
  ids=['lists', 'dicts', 'tuples', 'laughs', 'contains itself'],
)
def test_deep_nesting_outside_of_the_state_dict_is_harmless(path, deep):
  weights = _state_dict(_tensor())[2:-1]
  meta = _plain('meta') + deep
  _save(path, b'\x80\x02}(' + meta + _plain('model') + weights + b'u.')
  _assert_same(_read(path), {'0': np.zeros(4, np.float32)})


def test_deeply_nested_tensors_raise(path):
  rebuild = b'ctorch._utils\n_rebuild_tensor_v2\nq\x00'
  nested = rebuild + b'(' + b'h\x00(' * 50_000 + b'NNNNtR' * 50_000
  _save(path, b'\x80\x02}' + _plain('a') + nested + b'NNNtRs.')
  _assert_raises(path, "'a': its numbers are of a type")


def test_endless_pickle_raises(path):
  _save(path, b'\x80\x02' + b']' * 1_100_000 + b'.')
  _assert_raises(path, 'too long')


@pytest.mark.parametrize(
  'tensor, pattern',
  [
    (_tensor(shape=(5,)), 'beyond its 4 stored numbers'),
    (_tensor(offset=1), 'beyond its 4 stored numbers'),
    (_tensor(strides=(2,)), 'beyond its 4 stored numbers'),
    (_tensor(shape=(3, 3), strides=(1, 1)), 'beyond its 4 stored numbers'),
    (_tensor(shape=(1 << 40,), strides=(0,)), 'beyond its 4 stored numbers'),
    (_tensor(shape=(1 << 47,) * 32, strides=(0,) * 32), 'beyond its 4'),
    (_tensor(shape=(-1,)), 'negative or too large'),
    (_tensor(offset=-1), 'negative or too large'),
    (_tensor(offset=3, strides=(-1,)), 'negative or too large'),
    (_tensor(offset=1 << 2000), 'negative or too large'),
    (_tensor(shape=(True,)), 'negative or too large'),
    (_tensor(shape=(4.0,)), 'negative or too large'),
    (_tensor(shape=[4]), 'are malformed'),
    (_tensor(shape=(1,) * 33, strides=(1,) * 33), 'are malformed'),
    (_tensor(shape=(2, 2)), '2 sizes and 1 strides'),
    (_tensor(shape=(0, 1 << 47, 1 << 47), strides=(1, 1, 1)), "'0': "),
    (_tensor(count=3, shape=(3,)), 'has 16 bytes, its tensors need 12'),
    (_tensor(count=1 << 62), 'has 16 bytes, its tensors need'),
    (_tensor(storage=b'ctorch\nDoubleStorage\n'), 'its tensors need 32'),
    (_tensor(key='../../etc/passwd'), 'is missing'),
  ],
)
def test_tensor_beyond_its_storage_raises(path, tensor, pattern):
  _save(path, _state_dict(tensor))
  with _little_memory():
    _assert_raises(path, pattern)


@pytest.mark.parametrize('announced', [1 << 26, 16, 1 << 31])
def test_zip_bomb_raises_before_it_is_unpacked(path, announced):
  data = _state_dict(_tensor(count=announced // 4))
  _save(path, data, (bytes(1 << 26),), zipfile.ZIP_DEFLATED)
  content = bytearray(path.read_bytes())
  starts = [m.start() for m in re.finditer(b'weights/data/0', content)]
  # The size precedes the name in the header and in the directory.
  for start, before in zip(starts, (8, 22), strict=True):
    (size,) = struct.unpack_from('<I', content, start - before)
    assert size == 1 << 26
    struct.pack_into('<I', content, start - before, announced)
  path.write_bytes(content)
  with _little_memory():
    _assert_raises(path, 'CRC' if announced == 16 else 'too much for a file of')


def test_huge_pickle_raises_before_it_is_unpacked(path):
  _save(path, bytes(65 << 20), (), zipfile.ZIP_DEFLATED)
  with _little_memory():
    _assert_raises(path, 'too large|too much')


def test_legacy_file_with_a_false_size_raises(path):
  content = LEGACY.read_bytes()
  numbers = _ramp(1, 24).tobytes()
  entry = struct.pack('<q', 24) + numbers
  assert content.count(entry) == 1
  for size in (-1, 23, 1 << 60):
    path.write_bytes(content.replace(entry, struct.pack('<q', size) + numbers))
    _assert_raises(path, 'does not have the announced size')


# --- Writing


def _every_type() -> dict[str, np.ndarray]:
  """Returns arrays of every type and of unusual shapes, not sorted."""
  types = (
    *('float64', 'float32', 'float16', 'bfloat16'),
    *('int64', 'int32', 'int16', 'int8', 'uint8', 'bool'),
  )
  weights = {
    f'{name}.weight': np.arange(-3, 3).reshape(2, 3).astype(np.dtype(name))
    for name in types
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


def test_written_file_is_read_back_exactly_and_is_deterministic(tmp_path):
  weights = _every_type()
  for name in ('a.pth', 'b.pth'):
    pth_file.write_pth(tmp_path / name, weights)
  first, second = (tmp_path / name for name in ('a.pth', 'b.pth'))
  assert first.read_bytes() == second.read_bytes()
  weights['big_endian'] = weights['big_endian'].astype('<f4')
  _assert_same(_read(first), weights)


@pytest.mark.parametrize('mmap', [False, True])
def test_torch_reads_the_written_file(path, mmap):
  torch = pytest.importorskip('torch')
  weights = _every_type()
  pth_file.write_pth(path, weights)
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
    assert not mmap or array.size == 0 or found[name].data_ptr() % 64 == 0


def test_failed_write_keeps_existing_files(tmp_path):
  path = tmp_path / 'model.pth'
  path.write_text('precious')
  for existing in (path, tmp_path):
    with pytest.raises(errors.UserError, match='exists already'):
      pth_file.write_pth(existing, WEIGHTS)
  odd = WEIGHTS | {'odd': np.zeros(3, 'complex64')}
  with pytest.raises(errors.UserError, match='odd: PyTorch has no tensors of'):
    pth_file.write_pth(tmp_path / 'odd.pth', odd)
  assert path.read_text() == 'precious'
  assert os.listdir(tmp_path) == ['model.pth']
