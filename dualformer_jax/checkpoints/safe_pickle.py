"""Unpickle tensors of untrusted files without running their code.

Unpickling calls any function that the pickle names. This module decodes the
opcodes (pickletools) and interprets those of dictionaries, lists, scalars and
tensors; it rejects all others.
"""

import dataclasses
import io
import itertools
import pickletools
import re
from typing import Any

import ml_dtypes
import numpy as np

from dualformer_jax.checkpoints.messages import quote
from dualformer_jax.errors import UserError

ORDERED_DICT = 'collections.OrderedDict'
REBUILD_TENSOR = 'torch._utils._rebuild_tensor_v2'
_REBUILD_PARAMETER = 'torch._utils._rebuild_parameter'
_REBUILD_WITH_STATE = 'torch._utils._rebuild_parameter_with_state'
_REBUILD_FROM_TYPE = 'torch._tensor._rebuild_from_type_v2'
STORAGES = {
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
_DEFAULT_DICT = 'collections.defaultdict'
_KNOWN = {ORDERED_DICT, _DEFAULT_DICT, REBUILD_TENSOR, _REBUILD_PARAMETER}
_KNOWN |= {_REBUILD_WITH_STATE, _REBUILD_FROM_TYPE, *STORAGES}
# Found next to the weights in real files, such as a best score that is a NumPy
# scalar, the hyperparameters of Lightning, the history of losses of MMEngine or
# a sparse tensor. They are never looked up; a placeholder stands for the
# result.
_PLACEHOLDERS = re.compile(
  r'torch\.(Size|device|bool|Tensor|[a-z]+[0-9]+\w*|per_\w+)|_codecs\.encode'
  r'|torch\.(_utils\._rebuild_|_tensor\._rebuild_from_|serialization\.)\w+'
  r'|torch\.(storage\.)?\w+Storage|torch\.nn\.parameter\.\w+'
  r'|numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))'
  r'|numpy\._?core\.numeric\._frombuffer|numpy\.dtypes\.\w+'
  r'|argparse\.Namespace|pathlib\.(_local\.)?\w+Path|datetime\.\w+'
  r'|(__builtin__|builtins)\.(set|frozenset|list|dict|tuple|getattr)|enum\.\w+'
  r'|(__builtin__|builtins)\.(int|float|complex|slice|range|bytearray)'
  r'|(mmcv|mmengine|omegaconf|(pytorch_)?lightning\w*)(\.\w+)+'
)

# Opcodes that push their argument.
_VALUES = re.compile(
  'BININT[12]?|LONG[14]|BINFLOAT|(SHORT_)?BIN(STRING|BYTES|UNICODE)'
  '|BIN(BYTES|UNICODE)8|BYTEARRAY8'
)
# The largest model with optimizer state takes some 100,000 opcodes.
_MAX_OPCODES = 1_000_000


@dataclasses.dataclass(frozen=True)
class _Global:
  """The name of a function or class, never the object itself."""

  name: str


class _Placeholder:
  """Stands for an object that is not needed."""


@dataclasses.dataclass(frozen=True)
class Storage:
  """A flat array of `size` numbers in the entry `key` of the file."""

  dtype: np.dtype
  key: str
  size: int

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor as the file describes it; no field has been checked."""

  storage: object
  offset: object
  shape: object
  strides: object


def unpickle(
  data: bytes | io.BytesIO, storages: dict[str, Storage] | None = None
) -> object:
  """Returns the next pickled object of `data`, made of inert parts only.

  An OrderedDict becomes a dict, a tensor a `Tensor`. Nothing is called,
  imported or given attributes, only scalars are hashed, and nothing recurses.

  A stream is read up to the end of the pickle. `storages` receives the storages
  that the pickle refers to, by key.

  Raises:
    UserError: the pickle asks for something that is not allowed.
    ValueError, IndexError, KeyError: the pickle is damaged.
  """
  stack: list[Any] = []
  outer: list[list[Any]] = []  # the stacks below each mark
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
      case 'NEWTRUE' | 'NEWFALSE':
        stack.append(opcode.name == 'NEWTRUE')
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
      case 'EMPTY_SET':
        stack.append(_Placeholder())
      case 'ADDITEMS':
        stack = outer.pop()
      case 'FROZENSET':
        stack = [*outer.pop(), _Placeholder()]
      case 'MARK':
        outer.append(stack)
        stack = []
      case 'TUPLE':
        items, stack = tuple(stack), outer.pop()
        stack.append(items)
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        items = [stack.pop() for _ in range(int(opcode.name[-1]))]
        stack.append(tuple(reversed(items)))
      case 'APPEND':
        _append(stack[-2], [stack.pop()])
      case 'APPENDS':
        items, stack = stack, outer.pop()
        _append(stack[-1], items)
      case 'SETITEM':
        value, key = stack.pop(), stack.pop()
        _set_items(stack[-1], [key, value])
      case 'SETITEMS':
        items, stack = stack, outer.pop()
        _set_items(stack[-1], items)
      case 'GLOBAL':
        stack.append(_global(str(argument).replace(' ', '.')))
      case 'STACK_GLOBAL':
        attribute, module = stack.pop(), stack.pop()
        is_text = type(attribute) is str and type(module) is str
        _require(is_text, 'names a function by no text')
        stack.append(_global(f'{module}.{attribute}'))
      case 'BINPERSID':
        storage = _storage(stack.pop())
        if storages is not None:
          if not isinstance(storage, Storage):  # its size is unknown
            raise UserError('its pickle refers to an unknown kind of storage')
          storages[storage.key] = storage
        stack.append(storage)
      case 'REDUCE' | 'NEWOBJ':
        arguments, function = stack.pop(), stack.pop()
        stack.append(_reduce(function, arguments))
      case 'BUILD':  # attributes of an OrderedDict or a placeholder: dropped
        stack.pop()
        has_attributes = type(stack[-1]) in (dict, _Placeholder)
        _require(has_attributes, 'sets attributes of an object that has none')
      case name:
        _require(False, f'uses {name}, which checkpoints do not')
  raise UserError('its pickle is too long for a checkpoint')


def _require(condition: bool, otherwise: str) -> None:
  if not condition:
    raise UserError(f'its pickle {otherwise}; nothing was run')


def _global(name: str) -> _Global:
  if not (name in _KNOWN or _PLACEHOLDERS.fullmatch(name)):
    raise _refusal(name)
  return _Global(name)


def _refusal(name: str) -> UserError:
  return UserError(
    f'asks for {quote(name)}, which weights do not need and which could run '
    'code; nothing was run. If you trust the file, load it with torch and save '
    "the weights alone: torch.save({'state_dict': ...}, path)"
  )


def _reduce(function: Any, arguments: Any) -> object:
  """Returns what represents `function(*arguments)`, without calling it."""
  is_call = type(function) in (_Global, _Placeholder)
  is_call = is_call and type(arguments) is tuple
  _require(is_call, 'calls something else than a function')
  if type(function) is _Placeholder:
    return _Placeholder()
  name = function.name
  if name.endswith('.getattr') and type(arguments[0]) is str:
    raise _refusal(name)  # methods are attributes of placeholders
  if name not in _KNOWN:
    return _Placeholder()
  if name == ORDERED_DICT and not arguments or name == _DEFAULT_DICT:
    return {}
  if name == REBUILD_TENSOR and len(arguments) >= 4:
    return Tensor(*arguments[:4])
  if name in (_REBUILD_PARAMETER, _REBUILD_WITH_STATE) and arguments:
    return arguments[0]
  if name == _REBUILD_FROM_TYPE:  # of a buffer: function, type, arguments
    match arguments:
      case (_Global(name=inner), _Global(), (_, _, _, _, *_) as parts, *_):
        if inner == REBUILD_TENSOR:
          return Tensor(*parts[:4])
  raise UserError(f'its pickle calls {name} with invalid arguments')


def _storage(identifier: object) -> Storage | _Placeholder:
  match identifier:
    case ('storage', _Global(name), *_) if (
      name.endswith('Storage') and name not in STORAGES
    ):
      return _Placeholder()
    case ('storage', _Global(name), str(key), _, int(size), *views):
      known = name in STORAGES and type(size) is int and size >= 0
      if known and len(views) <= 1 and all(view is None for view in views):
        return Storage(STORAGES[name], key, size)
  raise UserError('its pickle refers to an unknown kind of storage')


def _append(target: Any, items: list[Any]) -> None:
  _require(type(target) is list, 'appends to something else than a list')
  target.extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
  is_dict = type(target) is dict and len(items) % 2 == 0
  _require(is_dict, 'sets items of something else than a dictionary')
  for key, value in zip(items[::2], items[1::2], strict=True):
    # Hashing deeply nested tuples may take forever.
    is_scalar = type(key) in (str, bytes, int, float, bool, type(None))
    _require(is_scalar, 'has a dictionary key that is neither text nor number')
    target[key] = value
