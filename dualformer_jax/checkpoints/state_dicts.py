"""Chooses the weights among what other trainers save in a checkpoint.

Trainers wrap a state_dict in dictionaries, put prefixes before its names, and
save averages (EMA) of the weights next to them.
"""

import collections
from collections.abc import Mapping
import itertools
from typing import Any, NamedTuple

from dualformer_jax.checkpoints.messages import listed, quote
from dualformer_jax.errors import UserError


class Weights(NamedTuple):
  """Weights without prefixes, what was dropped, and notes on the choice."""

  state_dict: dict[str, Any]
  dropped: list[str]
  notes: list[str]


# Keys of dictionaries that hold a state_dict; the first that is there counts.
_WRAPPERS = ('state_dict', 'model_state_dict', 'model_state', 'model')
_WRAPPERS += ('module', 'params', 'shadow')
_EMA_WRAPPERS = ('state_dict_ema', 'ema_state_dict', 'ema_state', 'model_ema')
_EMA_WRAPPERS += ('ema_model', 'params_ema', 'ema')
# First parts of names: of DistributedDataParallel, Lightning and the like.
_PREFIXES = ('module', 'model')
_EMA_PREFIXES = ('ema', 'ema_model', 'model_ema', 'averaged_model')
_COMPILED = '_orig_mod'  # torch.compile adds it, anywhere in a name
_EMA_COPY = 'ema_'  # MMCV: before the name, with underscores instead of dots
# Counters that averaging adds to a state_dict.
_COUNTERS = ('n_averaged', 'steps', 'num_updates')


def select(root: object, tensor_type: type, ema: bool = False) -> Weights:
  """Finds the weights in the content of a checkpoint.

  Args:
    root: the unpickled object, of plain dictionaries.
    tensor_type: the type of tensors in it.
    ema: whether to choose the averages of the weights.

  Raises:
    UserError: there are no weights, or no averages, or a name is ambiguous.
  """
  found, is_ema, dropped, notes = _unwrap(root, ema)
  found = {key: value for key, value in found.items() if key not in _COUNTERS}
  others = [
    name
    for name, value in found.items()
    if type(name) is not str or type(value) is not tensor_type
  ]
  if others or not found:
    names = listed(map(quote, others)) or 'everything'
    raise UserError(
      'holds no state_dict (name -> tensor), neither directly nor under one of '
      f'{", ".join(map(repr, _WRAPPERS))}; not tensors: {names}'
    )
  weights: dict[str, Any] = {}
  averages: dict[str, Any] = {}
  removed = collections.Counter[str]()
  for name, tensor in found.items():
    prefix, is_average, plain = _split(name)
    if plain != name:
      inside = f'{quote(_COMPILED + ".")} in'
      removed[f'{quote(prefix)} before' if prefix else inside] += 1
    target = averages if is_average else weights
    if plain in target:
      raise UserError(f'has {quote(plain)} twice, with and without a prefix')
    target[plain] = tensor
  copies = {name.replace('.', '_'): name for name in weights}
  for name in [name for name in weights if name.startswith(_EMA_COPY)]:
    original = copies.get(name.removeprefix(_EMA_COPY).replace('.', '_'))
    if original is not None:
      averages[original] = weights.pop(name)
  for what, count in removed.items():
    names = 'all' if count == len(found) else f'{count}'
    dropped.append(f'{what} {names} names')
  if ema and averages:
    notes.append(f'{len(averages)} weights are averages (EMA)')
    if others := weights.keys() - averages:
      notes.append(f'{len(others)} weights have no averages: {listed(others)}')
    weights |= averages
  elif ema and not is_ema:
    raise UserError('holds no averages of weights (EMA); leave out --ema')
  elif averages:
    if not weights:
      raise _only_averages()
    dropped.append(
      f'{len(averages)} averages of weights (EMA); --ema chooses them'
    )
  return Weights(weights, dropped, notes)


def _unwrap(
  root: object, ema: bool
) -> tuple[Mapping[Any, Any], bool, list[str], list[str]]:
  """Returns the innermost dictionary, whether it is of EMA, keys and notes."""
  found, is_ema, dropped, notes = root, False, [], []
  while type(found) is dict:
    averages = [key for key in _EMA_WRAPPERS if type(found.get(key)) is dict]
    wrappers = [key for key in _WRAPPERS if type(found.get(key)) is dict]
    if ema and averages and not is_ema:
      key, is_ema = averages[0], True
    elif wrappers:
      key = wrappers[0]
    elif averages:
      raise _only_averages()
    else:
      return found, is_ema, dropped, notes
    dropped += [quote(other) for other in found if other != key]
    notes.append(f'the weights are those under {quote(key)}')
    found = found[key]
  raise UserError('holds a single object instead of a state_dict')


def _only_averages() -> UserError:
  return UserError('holds averages of weights (EMA) alone; add --ema')


def _split(name: str) -> tuple[str, bool, str]:
  """Returns the prefix of a name, whether it is of EMA, and the rest."""
  parts, known = name.split('.'), (_COMPILED, *_PREFIXES, *_EMA_PREFIXES)
  start = list(itertools.takewhile(lambda part: part in known, parts[:-1]))
  is_average = any(part in _EMA_PREFIXES for part in start)
  rest = [part for part in parts[len(start) :] if part != _COMPILED]
  return ''.join(f'{part}.' for part in start), is_average, '.'.join(rest)
