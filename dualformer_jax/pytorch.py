"""PyTorch checkpoints without PyTorch: .pth files, and names to and from Flax.

Reading one never runs code from it. A .pth file is a pickle beside raw numbers,
and unpickling calls whatever the file asks for. Here its opcodes are only
decoded (pickletools), and a small interpreter that knows dictionaries, lists,
scalars and tensors follows them; all else is refused.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import io
import itertools
import math
import os
import pathlib
import pickle
import pickletools
import re
import struct
from typing import Any, BinaryIO
import zipfile
import zlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dualformer_jax.errors import UserError

# Reading

_ORDERED_DICT = 'collections.OrderedDict'
_REBUILD_TENSOR = 'torch._utils._rebuild_tensor_v2'
_REBUILD_PARAMETER = 'torch._utils._rebuild_parameter'
_STORAGES = {
  'torch.DoubleStorage': np.dtype('<f8'),
  'torch.FloatStorage': np.dtype('<f4'),
  'torch.HalfStorage': np.dtype('<f2'),
  'torch.BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'torch.LongStorage': np.dtype('<i8'),
  'torch.IntStorage': np.dtype('<i4'),
  'torch.ShortStorage': np.dtype('<i2'),
  'torch.CharStorage': np.dtype('i1'),
  'torch.ByteStorage': np.dtype('u1'),
  'torch.BoolStorage': np.dtype('?'),
}
_KNOWN = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES}
# Met in `meta` and `optimizer`, which are not used: a best score is a NumPy
# scalar. They are never looked up; whatever they make is one inert object.
_INERT = re.compile(
  r'torch\.(Size|device|bool|u?int[0-9]+|b?float[0-9]+)|_codecs\.encode'
  r'|numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))'
  r'|numpy\._?core\.numeric\._frombuffer'
)

# Opcodes whose argument is the value itself.
_VALUES = re.compile(
  'BININT[12]?|LONG[14]|BINFLOAT|(SHORT_)?BIN(STRING|BYTES|UNICODE)'
  '|BIN(BYTES|UNICODE)8|BYTEARRAY8'
)

# A checkpoint of the largest model with optimizer state has some 100,000
# opcodes; a few bytes of an endless pickle would otherwise fill the memory.
_MAX_OPCODES = 1_000_000
_MAX_PICKLE_BYTES = 64 << 20
# Weights hardly compress: a file that unpacks to much more than this many
# times its size is made to fill the memory.
_MAX_EXPANSION = 20

# What torch.save wrote before version 1.6: pickles in a row, these two first.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

_FOREIGN = 'not a checkpoint written by torch.save'
# What the libraries used here raise for files of another make.
_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  struct.error,
  EOFError,
  IndexError,  # an opcode that takes more from the stack than is there
  KeyError,  # from the memo, what was never put there
  NotImplementedError,  # a zip feature
  OverflowError,
  ValueError,
)


@dataclasses.dataclass(frozen=True)
class _Global:
  """The name of a function or class; never the thing itself."""

  name: str


@dataclasses.dataclass(frozen=True)
class _Inert:
  """Stands for an object that is not used."""


@dataclasses.dataclass(frozen=True)
class _Storage:
  """Numbers in a row, not read yet: `size` of them, kept as `key`."""

  dtype: np.dtype
  key: str
  size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """What a file says of a tensor; not checked before `_view`."""

  storage: object
  offset: object
  shape: object
  strides: object


def read_pth(
  path: str | os.PathLike[str], dropped: list[str] | None = None
) -> dict[str, np.ndarray]:
  """Returns the parameters in a .pth file, without PyTorch or running code.

  Understood are bare state_dicts and those under 'state_dict' or 'model', in
  the zip container of PyTorch 1.6 and later and in the older one. What stands
  beside the state_dict (meta, optimizer, amp) is dropped; so is 'module.' where
  all names begin with it.

  Args:
    path: file written by torch.save.
    dropped: where to note the names of what was dropped, for the user.

  Returns:
    Name -> array in the file's order, of the file's data types (bfloat16 by
    ml_dtypes). The arrays are read-only and may share memory.

  Raises:
    UserError: the file is absent, is no such checkpoint, is truncated or
      damaged, or asks for anything else than tensors and plain values.
  """
  try:
    with pathlib.Path(path).open('rb') as file:
      start = file.read(2)
      file.seek(0)
      if start == b'PK':
        root, fetch = _read_zip(file)
      elif start[:1] == pickle.PROTO:
        root, fetch = _read_legacy(file)
      else:
        raise UserError(_FOREIGN)
      dropped = [] if dropped is None else dropped
      return _arrays(_state_dict(root, dropped), functools.cache(fetch))
  except UserError as error:
    raise UserError(f'{path}: {error}') from None
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'{path}: cannot be read: {reason}') from error
  except _DAMAGE as error:
    raise UserError(
      f'{path}: truncated or damaged, {_quote(error)}; fetch it again'
    ) from error


def _read_zip(
  file: BinaryIO,
) -> tuple[object, Callable[[_Storage], bytes]]:
  """Returns the pickled object and what reads a storage, of the zip format."""
  archive = zipfile.ZipFile(file)
  length = file.seek(0, io.SEEK_END)
  pickles = [
    name
    for name in archive.namelist()
    if name.endswith('/data.pkl') and name.count('/') == 1
  ]
  if len(pickles) != 1:
    raise UserError(f'a zip file, but {_FOREIGN}')
  folder = pickles[0].removesuffix('data.pkl')
  budget = _MAX_EXPANSION * length + (1 << 20)

  def read(name: str, size: int | None = None) -> bytes:
    nonlocal budget
    try:
      entry = archive.getinfo(folder + name)
    except KeyError:
      raise UserError(
        f'incomplete: {_quote(folder + name)} is not in it; fetch it again'
      ) from None
    if size is not None and entry.file_size != size:
      raise UserError(
        f'damaged: {_quote(entry.filename)} holds {entry.file_size} bytes, '
        f'its tensors say {size}'
      )
    budget -= entry.file_size
    if budget < 0 or entry.compress_size > length:
      raise UserError(
        f'{_quote(entry.filename)} would unpack to {entry.file_size} bytes, '
        f'too much for a file of {length} bytes'
      )
    if entry.flag_bits & 1:
      raise UserError('encrypted')
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise UserError(
        f'{_quote(entry.filename)} is compressed in a way that torch.save and '
        'zip do not use'
      )
    # The size is named because a file may unpack to more than it says.
    with archive.open(entry) as stream:
      data = stream.read(entry.file_size)
    if len(data) != entry.file_size:
      raise EOFError(f'{_quote(entry.filename)} is cut short')
    return data

  if f'{folder}byteorder' in archive.namelist():
    _refuse_big_endian(read('byteorder') != b'little')
  if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
    raise UserError(f'{_quote(pickles[0])} is too large for a checkpoint')
  root = _unpickle(read('data.pkl'))
  return root, lambda storage: read(f'data/{storage.key}', _bytes(storage))


def _read_legacy(
  file: BinaryIO,
) -> tuple[object, Callable[[_Storage], bytes]]:
  """Returns the same of the format before PyTorch 1.6.

  That is pickles in a row: a magic number, a version, facts of the machine, the
  object itself, the keys of the storages; then each storage's size and numbers.
  """
  content = file.read()
  data = io.BytesIO(content)
  if _unpickle(data) != _LEGACY_MAGIC or _unpickle(data) != _LEGACY_VERSION:
    raise UserError(_FOREIGN)
  machine = _unpickle(data)
  _refuse_big_endian(
    type(machine) is not dict or machine.get('little_endian') is not True
  )
  storages: dict[str, _Storage] = {}
  root = _unpickle(data, storages)
  keys = _unpickle(data)
  if type(keys) is not list or not all(type(key) is str for key in keys):
    raise ValueError('its list of storages is none')
  places: dict[str, int] = {}
  for key in keys:
    (size,) = struct.unpack('<q', data.read(8))
    if key not in storages or storages[key].size != size:
      raise ValueError(f'storage {_quote(key)} has another size than announced')
    places[key] = data.tell()
    data.seek(_bytes(storages[key]), os.SEEK_CUR)
    if data.tell() > len(content):
      raise EOFError(f'ends {data.tell() - len(content)} bytes early')

  def read(storage: _Storage) -> bytes:
    begin = places[storage.key]
    return content[begin : begin + _bytes(storage)]

  return root, read


def _refuse_big_endian(big_endian: bool) -> None:
  if big_endian:
    raise UserError(
      'written on a big-endian machine; load it with torch and save it again '
      'on a little-endian one (x86, ARM)'
    )


def _bytes(storage: _Storage) -> int:
  return storage.size * storage.dtype.itemsize


def _unpickle(
  data: bytes | io.BytesIO, storages: dict[str, _Storage] | None = None
) -> object:
  """Returns the next pickled object of `data`, built of inert parts only.

  An OrderedDict becomes a dict, a tensor a `_Tensor`. Nothing is called,
  imported, hashed but scalars, or given attributes; nothing recurses, so depth
  is no matter either.

  Args:
    data: pickle of any protocol; a stream is read up to the pickle's end.
    storages: where to note the storages that it names, by key.

  Raises:
    UserError: it asks for a global or does a thing that is not allowed.
    ValueError, IndexError, KeyError: it is damaged.
  """
  stack: list[Any] = []
  below: list[list[Any]] = []  # the stacks below each mark
  memo: dict[int | None, Any] = {}
  opcodes = pickletools.genops(data)
  for opcode, argument, _ in itertools.islice(opcodes, _MAX_OPCODES):
    match opcode.name:
      case 'PROTO' | 'FRAME':
        pass
      case 'STOP':
        return stack.pop()
      case 'NONE':
        stack.append(None)
      case 'NEWTRUE':
        stack.append(True)
      case 'NEWFALSE':
        stack.append(False)
      case 'EMPTY_TUPLE':
        stack.append(())
      case 'EMPTY_LIST':
        stack.append([])
      case 'EMPTY_DICT':
        stack.append({})
      case name if _VALUES.fullmatch(name):
        stack.append(argument)
      case 'BINPUT' | 'LONG_BINPUT':
        memo[argument] = stack[-1]
      case 'MEMOIZE':
        memo[len(memo)] = stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        stack.append(memo[argument])
      case 'MARK':
        below.append(stack)
        stack = []
      case 'TUPLE':
        items, stack = tuple(stack), below.pop()
        stack.append(items)
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        items = [stack.pop() for _ in range(int(opcode.name[-1]))]
        stack.append(tuple(reversed(items)))
      case 'APPEND':
        items = [stack.pop()]
        _list(stack[-1]).extend(items)
      case 'APPENDS':
        items, stack = stack, below.pop()
        _list(stack[-1]).extend(items)
      case 'SETITEM':
        value, key = stack.pop(), stack.pop()
        _set_items(stack[-1], [key, value])
      case 'SETITEMS':
        items, stack = stack, below.pop()
        _set_items(stack[-1], items)
      case 'GLOBAL':
        stack.append(_global(str(argument).replace(' ', '.')))
      case 'STACK_GLOBAL':
        name, module = stack.pop(), stack.pop()
        stack.append(_global(f'{_text(module)}.{_text(name)}'))
      case 'BINPERSID':
        storage = _storage(stack.pop())
        if storages is not None:
          storages[storage.key] = storage
        stack.append(storage)
      case 'REDUCE':
        arguments, function = stack.pop(), stack.pop()
        stack.append(_reduce(function, arguments))
      case 'BUILD':
        # The attributes of an OrderedDict (_metadata), or of what is inert.
        stack.pop()
        if type(stack[-1]) not in (dict, _Inert):
          raise UserError('gives attributes to what should have none')
      case name:
        raise UserError(
          f'its pickle uses {name}, which checkpoints do not; nothing was run'
        )
  raise UserError('its pickle is too long for a checkpoint')


def _global(name: str) -> _Global:
  if not (name in _KNOWN or _INERT.fullmatch(name)):
    raise UserError(
      f'asks for {_quote(name)}, which weights do not need and which could run '
      'code; nothing was run. If you trust the file, load it with torch and '
      "save the weights alone: torch.save({'state_dict': ...}, path)"
    )
  return _Global(name)


def _reduce(function: object, arguments: object) -> object:
  """Returns what stands for `function(*arguments)`, without calling it."""
  if type(function) is not _Global or type(arguments) is not tuple:
    raise UserError('calls what is no function; nothing was run')
  name = function.name
  if _INERT.fullmatch(name):
    return _Inert()
  if name == _ORDERED_DICT and not arguments:
    return {}
  if name == _REBUILD_TENSOR and len(arguments) >= 4:
    return _Tensor(*arguments[:4])
  if name == _REBUILD_PARAMETER and arguments:
    return arguments[0]
  raise UserError(f'calls {name} with arguments that are none of its own')


def _storage(identifier: object) -> _Storage:
  if type(identifier) is not tuple or len(identifier) not in (5, 6):
    raise UserError('refers to something outside that is no storage')
  kind, storage_type, key, _, size = identifier[:5]
  if (
    kind != 'storage'
    or type(storage_type) is not _Global
    or storage_type.name not in _STORAGES
    or type(key) is not str
    or type(size) is not int
    or size < 0
    or any(view is not None for view in identifier[5:])
  ):
    raise UserError('refers to a storage of a kind that is not known')
  return _Storage(_STORAGES[storage_type.name], key, size)


def _list(value: object) -> list[Any]:
  if type(value) is not list:
    raise UserError('appends to what is no list')
  return value


def _set_items(target: object, items: list[Any]) -> None:
  if type(target) is not dict or len(items) % 2:
    raise UserError('sets items of what is no dictionary')
  for key, value in zip(items[::2], items[1::2], strict=True):
    # The hash of a tuple of tuples of tuples may take for ever.
    if type(key) not in (str, bytes, int, float, bool, type(None)):
      raise UserError('has a dictionary key that is neither text nor number')
    target[key] = value


def _text(value: object) -> str:
  if type(value) is not str:
    raise UserError('names a function by what is no text')
  return value


def _state_dict(root: object, dropped: list[str]) -> dict[str, _Tensor]:
  """Returns the state_dict in the unpickled object, by plain names."""
  found = root
  if type(root) is dict:
    for key in ('state_dict', 'model'):
      if type(root.get(key)) is dict:
        found = root[key]
        dropped.extend(_quote(other) for other in root if other != key)
        break
  if type(found) is not dict:
    raise UserError('holds no state_dict but a single object')
  strange = [
    name
    for name, value in found.items()
    if type(name) is not str or type(value) is not _Tensor
  ]
  if strange or not found:
    raise UserError(
      'holds no state_dict (name -> tensor), neither by itself nor under '
      f"'state_dict' or 'model'; no tensors are: {_listed(strange) or 'all'}"
    )
  if all(name.startswith('module.') for name in found):
    dropped.append("'module.' before all names")
    found = {
      name.removeprefix('module.'): tensor for name, tensor in found.items()
    }
  return found


def _arrays(
  tensors: dict[str, _Tensor], fetch: Callable[[_Storage], bytes]
) -> dict[str, np.ndarray]:
  arrays = {}
  for name, tensor in tensors.items():
    try:
      arrays[name] = _view(tensor, fetch)
    except (ValueError, OverflowError) as error:
      raise UserError(f'{_quote(name)}: {error}') from None
  return arrays


def _view(tensor: _Tensor, fetch: Callable[[_Storage], bytes]) -> np.ndarray:
  """Returns a tensor as a view of its storage; everything is checked."""
  storage = tensor.storage
  if type(storage) is not _Storage:
    raise ValueError('its numbers are no storage')
  shape, strides = _sizes(tensor.shape), _sizes(tensor.strides)
  (offset,) = _sizes((tensor.offset,))
  if len(shape) != len(strides):
    raise ValueError(f'has {len(shape)} sizes and {len(strides)} strides')
  count = math.prod(shape)
  last = offset + sum(
    (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
  )
  # More numbers than are stored come of a stride of 0: 4 bytes could stand for
  # as many numbers as the file says.
  if count and (count > storage.size or last >= storage.size):
    raise ValueError(
      f'shape {_cut(shape)}, strides {_cut(strides)} and offset '
      f'{_cut(offset)} reach beyond its {storage.size} stored numbers'
    )
  data = fetch(storage)
  if not count:
    return np.ndarray(shape, storage.dtype, data)
  size = storage.dtype.itemsize
  return np.ndarray(
    shape,
    storage.dtype,
    data,
    offset * size,
    # A dimension of 1 may have any stride; it is never taken.
    [s * size if n > 1 else 0 for n, s in zip(shape, strides, strict=True)],
  )


def _sizes(value: object) -> tuple[int, ...]:
  """Returns `value` if it is a tuple of sizes such as a tensor may have."""
  if type(value) is not tuple or len(value) > 32:
    raise ValueError('its shape, strides or offset are none')
  if not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
    raise ValueError('its shape, strides or offset are negative or too large')
  return value


# Writing


def write_pth(
  path: str | os.PathLike[str],
  state_dict: Mapping[str, np.ndarray],
  *,
  overwrite: bool = False,
) -> None:
  """Writes a .pth file that torch.load(path, weights_only=True) reads.

  The file holds the bare state_dict, an OrderedDict of tensors in the order
  given, of exactly the arrays' data types. It appears whole or not at all.

  Args:
    path: file to write; its folder must exist.
    state_dict: name -> array, of a floating or integer type or bool.
    overwrite: whether a file that exists may be replaced.

  Raises:
    UserError: the file exists, cannot be written, or PyTorch has no tensors of
      an array's data type.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    if path.is_dir() or (path.exists() and not overwrite):
      raise UserError(f'{path}: exists already; choose another name')
    try:
      with partial.open('wb') as file:
        _write_zip(file, state_dict)
        file.flush()
        os.fsync(file.fileno())
      partial.replace(path)
    finally:
      partial.unlink(missing_ok=True)
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'{path}: cannot be written: {reason}') from error


def _write_zip(file: BinaryIO, state_dict: Mapping[str, np.ndarray]) -> None:
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr(
      zipfile.ZipInfo('archive/data.pkl'), _pickle_tensors(state_dict)
    )
    archive.writestr(zipfile.ZipInfo('archive/byteorder'), b'little')
    for key, array in enumerate(state_dict.values()):
      entry = zipfile.ZipInfo(f'archive/data/{key}')
      # PyTorch maps storages into memory where they begin at multiples of 64
      # bytes; an extra field, named as PyTorch does, makes up for the rest.
      begin = file.tell() + 30 + len(entry.filename) + 4
      padding = -begin % 64
      entry.extra = b'FB' + struct.pack('<H', padding) + bytes(padding)
      little = array.dtype.newbyteorder('<')
      archive.writestr(entry, array.astype(little, copy=False).tobytes())
    archive.writestr(zipfile.ZipInfo('archive/version'), b'3\n')


def _pickle_tensors(state_dict: Mapping[str, np.ndarray]) -> bytes:
  """Returns the pickle of an OrderedDict of tensors, by the opcodes.

  Python's pickler can name torch's functions only where torch is installed.
  """
  names = {dtype: name for name, dtype in _STORAGES.items()}
  new_dict = _pickle_global(_ORDERED_DICT) + pickle.EMPTY_TUPLE + pickle.REDUCE
  parts = [pickle.PROTO, b'\x02', new_dict, pickle.MARK]
  for key, (name, array) in enumerate(state_dict.items()):
    dtype = array.dtype.newbyteorder('<')
    if dtype not in names:
      raise UserError(
        f'{name}: PyTorch has no tensors of type {array.dtype}; convert it'
      )
    # A tensor's strides count numbers, as if no dimension were 0.
    sizes = [max(size, 1) for size in array.shape]
    strides = tuple(math.prod(sizes[i + 1 :]) for i in range(array.ndim))
    parts += [
      _pickle_plain(name),
      _pickle_global(_REBUILD_TENSOR),
      pickle.MARK,
      pickle.MARK,
      _pickle_plain('storage'),
      _pickle_global(names[dtype]),
      _pickle_plain(str(key)),
      _pickle_plain('cpu'),
      _pickle_plain(array.size),
      pickle.TUPLE,
      pickle.BINPERSID,
      _pickle_plain(0),  # offset
      _pickle_plain(array.shape),
      _pickle_plain(strides),
      _pickle_plain(False),  # requires no gradient
      new_dict,  # backward hooks: none
      pickle.TUPLE,
      pickle.REDUCE,
    ]
  return b''.join([*parts, pickle.SETITEMS, pickle.STOP])


def _pickle_global(name: str) -> bytes:
  module, _, attribute = name.rpartition('.')
  return pickle.GLOBAL + f'{module}\n{attribute}\n'.encode()


def _pickle_plain(value: str | int | tuple[int, ...]) -> bytes:
  """Returns the opcodes that push `value`: its pickle without head and stop."""
  return pickle.dumps(value, 2)[2:-1]


# Names


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How the axes of a parameter differ.

  Attributes:
    to_pytorch: Flax array -> PyTorch's.
    to_flax: PyTorch array and the shape of the Flax one -> the Flax one.
  """

  to_pytorch: Callable[[Any], Any]
  to_flax: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


# Biases and norms: [c] there, here also [3, n, e] (heads n of size e).
_VECTOR = _Layout(lambda x: x.reshape(-1), lambda w, shape: w.reshape(shape))
# BatchNorm's step count: a scalar, int64 there and int32 here.
_COUNT = _Layout(lambda x: x, lambda w, shape: w)
# Linear layers: [out, in] there, [in, out] here; attention splits `out` into
# [3, n, e], [2, n, e] or [n, e] ...
_LINEAR = _Layout(
  lambda x: x.reshape(x.shape[0], -1).T,
  lambda w, shape: w.T.reshape(shape),
)
# ... and merges `in` from [n, e].
_MERGE = _Layout(
  lambda x: x.reshape(-1, x.shape[-1]).T,
  lambda w, shape: w.T.reshape(shape),
)
# Convolutions: [out, in, d, h, w] there, [d, h, w, in, out] here;
_CONVOLUTION = _Layout(
  lambda x: x.transpose(4, 3, 0, 1, 2),
  lambda w, shape: w.transpose(2, 3, 4, 1, 0),
)
# depthwise: [c, 1, d, h, w] there, [d, h, w, c] here.
_DEPTHWISE = _Layout(
  lambda x: x.transpose(3, 0, 1, 2)[:, None],
  lambda w, shape: w[:, 0].transpose(1, 2, 3, 0),
)

_EMBED = r'params/backbone/patch_embeds_(\d+)'
_BLOCK = r'params/backbone/blocks_(\d+)_(\d+)'
_STATISTICS = r'batch_stats/backbone/blocks_(\d+)_(\d+)/attn/lr_1'
_PT_EMBED = r'backbone.patch_embeds.\1'
_PT_BLOCK = r'backbone.blocks.\1.\2'
# Flax path (regex) -> PyTorch name, and layout. Each path matches one row.
_TABLE = (
  (f'{_EMBED}/proj/kernel', f'{_PT_EMBED}.proj.weight', _CONVOLUTION),
  (f'{_EMBED}/norm/scale', f'{_PT_EMBED}.norm.weight', _VECTOR),
  (f'{_EMBED}/(proj|norm)/bias', rf'{_PT_EMBED}.\2.bias', _VECTOR),
  (f'{_BLOCK}/attn/(qkv|q|kv)/kernel', rf'{_PT_BLOCK}.attn.\3.weight', _LINEAR),
  (f'{_BLOCK}/attn/proj/kernel', f'{_PT_BLOCK}.attn.proj.weight', _MERGE),
  (f'{_BLOCK}/attn/sr/kernel', f'{_PT_BLOCK}.attn.sr.weight', _DEPTHWISE),
  (f'{_BLOCK}/attn/norm/scale', f'{_PT_BLOCK}.attn.norm.weight', _VECTOR),
  (
    f'{_BLOCK}/attn/(qkv|q|kv|proj|sr|norm)/bias',
    rf'{_PT_BLOCK}.attn.\3.bias',
    _VECTOR,
  ),
  (
    f'{_BLOCK}/attn/lr_(0|3)/kernel',
    rf'{_PT_BLOCK}.attn.lr.\3.weight',
    _DEPTHWISE,
  ),
  (f'{_BLOCK}/attn/lr_1/scale', f'{_PT_BLOCK}.attn.lr.1.weight', _VECTOR),
  (f'{_BLOCK}/attn/lr_(0|1|3)/bias', rf'{_PT_BLOCK}.attn.lr.\3.bias', _VECTOR),
  (f'{_STATISTICS}/(mean|var)', rf'{_PT_BLOCK}.attn.lr.1.running_\3', _VECTOR),
  (
    f'{_STATISTICS}/num_batches_tracked',
    f'{_PT_BLOCK}.attn.lr.1.num_batches_tracked',
    _COUNT,
  ),
  (f'{_BLOCK}/(norm1|norm2)/scale', rf'{_PT_BLOCK}.\3.weight', _VECTOR),
  (f'{_BLOCK}/(norm1|norm2)/bias', rf'{_PT_BLOCK}.\3.bias', _VECTOR),
  (f'{_BLOCK}/mlp/(fc1|fc2)/kernel', rf'{_PT_BLOCK}.mlp.\3.weight', _LINEAR),
  (f'{_BLOCK}/mlp/(fc1|fc2)/bias', rf'{_PT_BLOCK}.mlp.\3.bias', _VECTOR),
  ('params/backbone/norm/scale', 'backbone.norm.weight', _VECTOR),
  ('params/backbone/norm/bias', 'backbone.norm.bias', _VECTOR),
  (
    r'params/backbone/pos_block_(\d+)/proj_0/kernel',
    r'backbone.pos_block.\1.proj.0.weight',
    _DEPTHWISE,
  ),
  (
    r'params/backbone/pos_block_(\d+)/proj_0/bias',
    r'backbone.pos_block.\1.proj.0.bias',
    _VECTOR,
  ),
  ('params/cls_head/fc_cls/kernel', 'cls_head.fc_cls.weight', _LINEAR),
  ('params/cls_head/fc_cls/bias', 'cls_head.fc_cls.bias', _VECTOR),
  (
    'params/cls_head/token_linear_(0|3|6)/kernel',
    r'cls_head.token_linear.\1.weight',
    _LINEAR,
  ),
  (
    'params/cls_head/token_linear_(0|3|6)/bias',
    r'cls_head.token_linear.\1.bias',
    _VECTOR,
  ),
)

# The parts of PyTorch's names in the order in which its modules hold them.
_ORDER = (
  ' backbone cls_head patch_embeds blocks attn qkv q kv proj sr norm lr norm1 '
  'norm2 mlp fc1 fc2 pos_block fc_cls token_linear weight bias running_mean '
  'running_var num_batches_tracked '
)


def has_token_head(state_dict: Mapping[str, np.ndarray]) -> bool:
  """Returns whether a PyTorch state_dict has the token-label head."""
  return 'cls_head.token_linear.0.weight' in state_dict


def num_classes(state_dict: Mapping[str, np.ndarray]) -> int | None:
  """Returns the classes of a PyTorch state_dict; None without a classifier."""
  weight = state_dict.get('cls_head.fc_cls.weight')
  return None if weight is None or weight.ndim != 2 else weight.shape[0]


def from_pytorch(
  state_dict: Mapping[str, np.ndarray],
  target: Mapping[str, Any],
  *,
  source: str = 'the state_dict',
) -> tuple[dict[str, Any], list[str]]:
  """Returns the Flax variables of a PyTorch state_dict.

  Every name is accounted for: `state_dict` must hold what `target` has, in
  PyTorch's names and shapes, and nothing else.

  Args:
    state_dict: PyTorch parameter name -> array.
    target: {'params': ..., 'batch_stats': ...} with leaves that have a shape,
      such as jax.eval_shape of the model's init gives.
    source: what to call the state_dict in an error: its file.

  Returns:
    Variables as in `target`, of new NumPy arrays, float32 (int32 for counts);
    and notes for the user: which parameters had another floating type.

  Raises:
    UserError: one, which lists all unknown, missing and mis-shaped names and
      all that have the wrong type, NaN, infinite or impossible values.
  """
  paths = traverse_util.flatten_dict(target, sep='/')
  expected = {}
  for path, leaf in paths.items():
    name, layout = _find(path)
    expected[name] = path, leaf, layout
  problems: dict[str, list[str]] = {
    'unknown': [
      f'{_quote(name)} {_cut(array.shape)}'
      for name, array in state_dict.items()
      if name not in expected
    ],
    'missing': [],
    'of another shape': [],
    'of another type': [],
    'with NaN, infinite or impossible values': [],
  }
  converted: dict[str, np.ndarray] = {}
  other_types: dict[str, list[str]] = {}
  for name, (path, leaf, layout) in expected.items():
    shape = jax.eval_shape(layout.to_pytorch, leaf).shape
    if name not in state_dict:
      problems['missing'].append(f'{name} {shape}')
      continue
    array = state_dict[name]
    kind = np.integer if layout is _COUNT else np.floating
    if array.shape != shape:
      problems['of another shape'].append(
        f'{name} expected {shape} found {_cut(array.shape)}'
      )
    elif not jnp.issubdtype(array.dtype, kind):
      problems['of another type'].append(
        f'{name} expected {kind.__name__} found {array.dtype}'
      )
    else:
      value = _number(array, layout is _COUNT)
      if value is None:
        problems['with NaN, infinite or impossible values'].append(name)
        continue
      if layout is not _COUNT and array.dtype != np.float32:
        other_types.setdefault(str(array.dtype), []).append(name)
      converted[path] = np.array(
        layout.to_flax(value, leaf.shape), value.dtype, order='C'
      )
  found = [
    f'{len(names)} {kind}: {_listed(names, quoted=False)}'
    for kind, names in problems.items()
    if names
  ]
  if found:
    raise UserError(
      f'{source} does not fit the model of this config; nothing was converted. '
      f'Parameters {"; ".join(found)}. Take the config that the checkpoint was '
      'trained with'
    )
  notes = [
    f'{len(names)} parameters were {dtype}, now float32: {_listed(names)}'
    for dtype, names in other_types.items()
  ]
  return traverse_util.unflatten_dict(converted, sep='/'), notes


def to_pytorch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the PyTorch state_dict of Flax variables: from_pytorch's inverse.

  Args:
    variables: {'params': ..., 'batch_stats': ...} of arrays.

  Returns:
    PyTorch parameter name -> new array, in the order of a state_dict.

  Raises:
    ValueError: a path is none of this model's.
  """
  state_dict = {}
  for path, leaf in traverse_util.flatten_dict(variables, sep='/').items():
    name, layout = _find(path)
    array = np.asarray(leaf)
    dtype = np.int64 if layout is _COUNT else array.dtype
    state_dict[name] = np.array(layout.to_pytorch(array), dtype, order='C')
  return dict(sorted(state_dict.items(), key=lambda item: _rank(item[0])))


def _find(path: str) -> tuple[str, _Layout]:
  """Returns the PyTorch name and the layout of a Flax path."""
  for pattern, name, layout in _TABLE:
    if match := re.fullmatch(pattern, path):
      return match.expand(name), layout
  raise ValueError(f'{path} is no parameter or statistic of DualFormer')


def _rank(name: str) -> list[int]:
  return [
    int(part) if part.isdigit() else _ORDER.index(f' {part} ')
    for part in name.split('.')
  ]


def _number(array: np.ndarray, is_count: bool) -> np.ndarray | None:
  """Returns the values in the type that they have here; None if they cannot."""
  if is_count:
    possible = 0 <= int(array) <= np.iinfo(np.int32).max
    return array.astype(np.int32) if possible else None
  with np.errstate(over='ignore'):  # becomes infinite, and is found so
    array = array.astype(np.float32)
  return array if np.isfinite(array).all() else None


# Names and numbers from a stranger's file, fit for one line of a terminal


def _listed(names: list[Any], quoted: bool = True, limit: int = 10) -> str:
  shown = [_quote(name) if quoted else name for name in names[:limit]]
  more = len(names) - limit
  return ', '.join(shown) + (f' and {more} more' if more > 0 else '')


def _quote(text: object) -> str:
  return repr(_cut(text))


def _cut(value: object, limit: int = 100) -> str:
  text = str(value)
  return text if len(text) <= limit else f'{text[:limit]}...'
