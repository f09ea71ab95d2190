"""Read and write .pth files without PyTorch.

A .pth file is a pickle and raw arrays. Reading it never runs its code, see
safe_pickle.
"""

from collections.abc import Callable, Mapping
import functools
import io
import math
import os
import pathlib
import pickle
import re
import struct
from typing import BinaryIO
import zipfile
import zlib

import numpy as np

from dualformer_jax.checkpoints import state_dicts
from dualformer_jax.checkpoints.messages import quote, shorten
from dualformer_jax.checkpoints.safe_pickle import (
  ORDERED_DICT,
  REBUILD_TENSOR,
  STORAGES,
  Storage,
  Tensor,
  unpickle,
)
from dualformer_jax.checkpoints.state_dicts import Weights
from dualformer_jax.errors import UserError
from dualformer_jax.files import output_file

_MAX_PICKLE_BYTES = 64 << 20
# Weights hardly compress: a file that unpacks to more than this many times its
# size is meant to exhaust the memory.
_MAX_EXPANSION = 20
# zipfile does not limit the memory of other methods.
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

# torch.save before version 1.6 wrote a sequence of pickles, these two first.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

_FOREIGN = 'not weights written by torch.save, nor a .safetensors file'
# What malformed files make zipfile, struct and the code below raise, such as a
# LookupError for an empty stack or an unknown memo.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError)
DAMAGE += (NotImplementedError, OverflowError, ValueError)


def read_pth(file: BinaryIO, ema: bool = False) -> Weights:
  """Reads the weights of a .pth file, without running any of its code.

  Both formats of torch.save, zip and legacy, are supported. For `ema` see
  state_dicts.select.

  Returns:
    Weights in the order and with the types of the file; the arrays are
    read-only and may share memory.

  Raises:
    UserError: torch.save did not write the file, or it needs something other
      than tensors and plain values.
    One of DAMAGE: the file is damaged.
  """
  start = file.read(2)
  file.seek(0)
  if start == b'PK':
    root, fetch = _read_zip(file)
  elif start[:1] == pickle.PROTO:
    root, fetch = _read_legacy(file)
  else:
    raise UserError(_FOREIGN)
  tensors, *notes = state_dicts.select(root, Tensor, ema)
  fetch = functools.cache(fetch)
  arrays = {
    name: _view(name, tensor, fetch) for name, tensor in tensors.items()
  }
  return Weights(arrays, *notes)


def _read_zip(file: BinaryIO) -> tuple[object, Callable[[Storage], bytes]]:
  """Returns the unpickled object, and a function that reads a storage."""
  archive = zipfile.ZipFile(file)
  length = file.seek(0, io.SEEK_END)
  entries = {entry.filename: entry for entry in archive.infolist()}
  if not any(entry.CRC for entry in entries.values()):
    # torch.serialization.set_crc32_options(False): they are not checked.
    for entry in entries.values():
      del entry.CRC
  pickles = [name for name in entries if re.fullmatch(r'[^/]*/data\.pkl', name)]
  if len(pickles) != 1:
    raise UserError('a zip file, but not one written by torch.save')
  folder = pickles[0].removesuffix('data.pkl')
  budget = _MAX_EXPANSION * length + (1 << 20)

  def read(name: str, size: int | None = None) -> bytes:
    nonlocal budget
    path = quote(folder + name)
    entry = entries.get(folder + name)
    if entry is None:
      raise UserError(f'incomplete: {path} is missing; download it again')
    budget -= entry.file_size
    problem = ''
    if size not in (None, entry.file_size):
      problem = f'has {entry.file_size} bytes, its tensors need {size}'
    elif budget < 0 or entry.compress_size > length:
      problem = (
        f'would unpack to {entry.file_size} bytes, too much for a file of '
        f'{length} bytes'
      )
    elif name == 'data.pkl' and entry.file_size > _MAX_PICKLE_BYTES:
      problem = 'is too large for a checkpoint'
    elif entry.flag_bits & 1 or entry.compress_type not in _COMPRESSION:
      problem = 'is encrypted or has an unusual compression'
    if problem:
      raise UserError(f'{path} {problem}')
    with archive.open(entry) as stream:
      data = stream.read(entry.file_size)  # it may unpack to more
    if len(data) != entry.file_size:
      raise EOFError(f'{path} is cut short')
    return data

  if f'{folder}byteorder' in entries:
    _check_byte_order(read('byteorder') == b'little')
  root = unpickle(read('data.pkl'))
  return root, lambda storage: read(f'data/{storage.key}', storage.nbytes)


def _read_legacy(file: BinaryIO) -> tuple[object, Callable[[Storage], bytes]]:
  """Returns the same as `_read_zip` for a file of PyTorch before 1.6.

  The file holds pickles: magic number, version, machine, the object, the keys
  of its storages. The size and the numbers of each storage follow.
  """
  content = file.read()
  data = io.BytesIO(content)
  if unpickle(data) != _LEGACY_MAGIC or unpickle(data) != _LEGACY_VERSION:
    raise UserError(_FOREIGN)
  machine = unpickle(data)
  _check_byte_order(
    type(machine) is dict and machine.get('little_endian') is True
  )
  storages: dict[str, Storage] = {}
  root, keys = unpickle(data, storages), unpickle(data)
  if type(keys) is not list or not all(type(key) is str for key in keys):
    raise ValueError('its list of storages is malformed')
  starts: dict[str, int] = {}
  for key in keys:
    (size,) = struct.unpack('<q', data.read(8))
    if key not in storages or storages[key].size != size:
      raise ValueError(f'storage {quote(key)} does not have the announced size')
    starts[key] = data.tell()
    data.seek(storages[key].nbytes, os.SEEK_CUR)
    if data.tell() > len(content):
      raise EOFError(f'{data.tell() - len(content)} bytes are missing')

  def read(storage: Storage) -> bytes:
    start = starts[storage.key]
    return content[start : start + storage.nbytes]

  return root, read


def _check_byte_order(is_little_endian: bool) -> None:
  if not is_little_endian:
    raise UserError(
      'written on a big-endian machine; save it again on a little-endian one'
    )


def _view(
  name: str, tensor: Tensor, fetch: Callable[[Storage], bytes]
) -> np.ndarray:
  """Returns a tensor as a view of its storage; checks everything."""
  try:
    storage = tensor.storage
    if type(storage) is not Storage:
      raise ValueError('its numbers are of a type that weights do not have')
    shape, strides = _sizes(tensor.shape), _sizes(tensor.strides)
    (offset,) = _sizes((tensor.offset,))
    if len(shape) != len(strides):
      raise ValueError(f'it has {len(shape)} sizes and {len(strides)} strides')
    count = math.prod(shape)
    last = offset + sum(
      (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
    # Strides of 0 would make a huge array of a few stored numbers.
    if count and (count > storage.size or last >= storage.size):
      raise ValueError(
        f'shape {shorten(shape)}, strides {shorten(strides)} and offset '
        f'{shorten(offset)} reach beyond its {storage.size} stored numbers'
      )
    data, itemsize = fetch(storage), storage.dtype.itemsize
    steps = [stride * itemsize for stride in strides]
    return np.ndarray(shape, storage.dtype, data, offset * itemsize, steps)
  except (ValueError, OverflowError) as error:
    raise UserError(f'{quote(name)}: {error}') from None


def _sizes(value: object) -> tuple[int, ...]:
  """Returns `value` if it is a tuple of sizes that a tensor may have."""
  if type(value) is not tuple or len(value) > 32:
    raise ValueError('its shape, strides or offset are malformed')
  if not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
    raise ValueError('its shape, strides or offset are negative or too large')
  return value


def write_pth(
  path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]
) -> None:
  """Writes a state_dict that torch.load(path, weights_only=True) reads.

  Raises UserError if the file exists or cannot be written, or PyTorch has no
  tensors of an array's type.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise UserError(f'{path} exists already; choose another name')
  with output_file(path) as file, zipfile.ZipFile(file, 'w') as archive:
    content = _pickle_tensors(state_dict)
    archive.writestr(zipfile.ZipInfo('archive/data.pkl'), content)
    archive.writestr(zipfile.ZipInfo('archive/byteorder'), b'little')
    for key, array in enumerate(state_dict.values()):
      entry = zipfile.ZipInfo(f'archive/data/{key}')
      # PyTorch maps storages into memory if they begin at multiples of 64
      # bytes; it pads with an extra field of this name.
      begin = file.tell() + 30 + len(entry.filename) + 4
      padding = -begin % 64
      entry.extra = b'FB' + struct.pack('<H', padding) + bytes(padding)
      little = array.dtype.newbyteorder('<')
      archive.writestr(entry, array.astype(little, copy=False).tobytes())
    archive.writestr(zipfile.ZipInfo('archive/version'), b'3\n')


def _pickle_tensors(state_dict: Mapping[str, np.ndarray]) -> bytes:
  """Returns the pickle of an OrderedDict of tensors.

  Python's pickler can only name torch's functions if torch is installed.
  """
  names = {dtype: name for name, dtype in STORAGES.items()}
  new_dict = _pickle_global(ORDERED_DICT) + pickle.EMPTY_TUPLE + pickle.REDUCE
  parts = [pickle.PROTO, b'\x02', new_dict, pickle.MARK]
  for key, (name, array) in enumerate(state_dict.items()):
    dtype = array.dtype.newbyteorder('<')
    if dtype not in names:
      raise UserError(
        f'{name}: PyTorch has no tensors of type {array.dtype}; convert it'
      )
    # Strides count numbers, as if no dimension were 0.
    sizes = [max(size, 1) for size in array.shape]
    strides = tuple(math.prod(sizes[i + 1 :]) for i in range(array.ndim))
    parts += [
      _pickle_plain(name),
      _pickle_global(REBUILD_TENSOR),
      2 * pickle.MARK,
      _pickle_plain('storage'),
      _pickle_global(names[dtype]),
      *map(_pickle_plain, (str(key), 'cpu', array.size)),
      pickle.TUPLE + pickle.BINPERSID,
      # Offset, shape, strides, and whether it requires a gradient.
      *map(_pickle_plain, (0, array.shape, strides, False)),
      new_dict,  # backward hooks
      pickle.TUPLE + pickle.REDUCE,
    ]
  return b''.join([*parts, pickle.SETITEMS, pickle.STOP])


def _pickle_global(name: str) -> bytes:
  module, _, attribute = name.rpartition('.')
  return pickle.GLOBAL + f'{module}\n{attribute}\n'.encode()


def _pickle_plain(value: str | int | tuple[int, ...]) -> bytes:
  """Returns the opcodes that push `value`: its pickle without head and stop."""
  return pickle.dumps(value, 2)[2:-1]
