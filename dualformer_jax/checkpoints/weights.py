"""Reads weights from .pth and .safetensors files, also of other trainers."""

import os
import re
from typing import BinaryIO

from flax import traverse_util
import ml_dtypes
import numpy as np
import safetensors

from dualformer_jax.checkpoints import pth_file, pytorch_names, state_dicts
from dualformer_jax.checkpoints.messages import listed, quote
from dualformer_jax.checkpoints.state_dicts import Weights
from dualformer_jax.errors import UserError

# The beginning of what a download leaves in place of weights -> what it is.
_NOT_WEIGHTS = {
  rb'\s*<(!doctype html|html|head|body|!--)': (
    'a web page (HTML), not weights: the address leads to a page about the '
    'file; download the file itself'
  ),
  rb'\s*<\?xml': 'an XML answer of a server, not weights; download it again',
  rb'version https://git-lfs\.github\.com/': (
    'a Git LFS pointer, not weights: run `git lfs pull` in its repository'
  ),
  rb'\x1f\x8b': 'a gzip archive, not weights: unpack it first',
  rb'\0{256}': 'full of zeros, an unfinished download; download it again',
}
# Of safetensors to NumPy's types.
_DTYPES = {
  'F64': '<f8',
  'F32': '<f4',
  'F16': '<f2',
  'BF16': ml_dtypes.bfloat16,
  'I64': '<i8',
  'I32': '<i4',
  'I16': '<i2',
  'I8': 'i1',
  'U8': 'u1',
  'BOOL': '?',
}


def read(path: str | os.PathLike[str], ema: bool = False) -> Weights:
  """Reads a .pth or .safetensors file, whatever its name.

  Args:
    path: the file.
    ema: whether to choose averages of the weights; see state_dicts.select.

  Raises:
    UserError: the file is none of these, is damaged, or has no finite weights.
  """
  try:
    with open(path, 'rb') as file:
      return _read(file, ema)
  except UserError as error:
    raise UserError(f'{path}: {error}') from None
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'{path}: cannot be read: {reason}') from error
  except (safetensors.SafetensorError, *pth_file.DAMAGE) as error:
    raise UserError(
      f'{path}: truncated or damaged, {quote(error)}; download it again'
    ) from error


def _read(file: BinaryIO, ema: bool) -> Weights:
  start = file.read(512)
  file.seek(0)
  if not start:
    raise UserError('is empty; download it again')
  for pattern, problem in _NOT_WEIGHTS.items():
    if re.match(pattern, start, re.IGNORECASE):
      raise UserError(f'is {problem}')
  if start[8:9] == b'{':  # after the length of this header
    weights = _read_safetensors(file.read(), ema)
  else:
    weights = pth_file.read_pth(file, ema)
  broken = [
    name
    for name, array in weights.state_dict.items()
    if array.dtype.kind not in 'iub' and not np.isfinite(array).all()
  ]
  if broken:
    raise UserError(
      f'has NaN or infinite values in {len(broken)} of '
      f'{len(weights.state_dict)} weights: {listed(map(quote, broken), 3)}; '
      'its training diverged, so use an earlier checkpoint'
    )
  return weights


def _read_safetensors(content: bytes, ema: bool) -> Weights:
  arrays: dict[str, np.ndarray] = {}
  tensors = safetensors.deserialize(content)
  for name, tensor in sorted(tensors, key=lambda item: item[0]):
    dtype = _DTYPES.get(tensor['dtype'])
    if dtype is None:
      raise UserError(f'{quote(name)} is of type {tensor["dtype"]}')
    flat = np.frombuffer(tensor['data'], dtype)
    arrays[name] = flat.reshape(tensor['shape'])
  if any(name.startswith('params/') for name in arrays):  # of `export`
    variables = traverse_util.unflatten_dict(arrays, sep='/')
    return Weights(pytorch_names.to_pytorch(variables), [], [])
  return state_dicts.select(arrays, np.ndarray, ema)
