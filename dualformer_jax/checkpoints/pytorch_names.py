"""Names and layouts of parameters: PyTorch to Flax, and back.

The Flax path of backbone.blocks.0.1.attn.lr.0.weight is
params/backbone/blocks_0_1/attn/lr_0/kernel.
"""

from collections.abc import Mapping
import re
from typing import Any

from einops import rearrange
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dualformer_jax.checkpoints.messages import listed, quote, shorten
from dualformer_jax.errors import UserError

# Flax name of an array -> PyTorch name, where they differ.
_ARRAYS = {
  'kernel': 'weight',
  'scale': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}
# End of a Flax path (regex) -> axes in Flax and in PyTorch; the first match is
# used. n: attention heads; e: channels of a head; c: 2 projections (key, value)
# or 3 (query, key, value).
_LAYOUTS = {
  r'patch_embeds_\d+/proj/kernel': 'd h w i o -> o i d h w',
  r'(attn/(sr|lr_0|lr_3)|pos_block_\d+/proj_0)/kernel': 'd h w o -> o 1 d h w',
  r'attn/(kv|qkv)/kernel': 'i c n e -> (c n e) i',
  r'attn/(kv|qkv)/bias': 'c n e -> (c n e)',
  r'attn/q/kernel': 'i n e -> (n e) i',
  r'attn/q/bias': 'n e -> (n e)',
  r'attn/proj/kernel': 'n e o -> o (n e)',
  r'(mlp/fc[12]|fc_cls|token_linear_[036])/kernel': 'i o -> o i',
  r'scale|bias|mean|var|query': 'o -> o',
  r'num_batches_tracked': '->',
}
# The parts of PyTorch names, in the order of a state_dict.
_ORDER = (
  ' backbone cls_head patch_embeds blocks attn query qkv q kv proj sr norm lr '
  'norm1 norm2 mlp fc1 fc2 pos_block fc_cls token_linear weight bias '
  'running_mean running_var num_batches_tracked '
)


def head_fields(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the heads of a PyTorch state_dict, as fields of DualFormer."""
  is_attentive = 'cls_head.attn.query' in state_dict
  return {
    'token_label': 'cls_head.token_linear.0.weight' in state_dict,
    'head': 'attentive' if is_attentive else 'linear',
  }


def num_classes(state_dict: Mapping[str, np.ndarray]) -> int | None:
  """Returns the number of classes of a state_dict, None without a head."""
  weight = state_dict.get('cls_head.fc_cls.weight')
  return None if weight is None or weight.ndim != 2 else weight.shape[0]


def from_pytorch(
  state_dict: Mapping[str, np.ndarray],
  target: Mapping[str, Any],
  *,
  source: str = 'the state_dict',
) -> tuple[dict[str, Any], list[str]]:
  """Converts a PyTorch state_dict to Flax variables.

  Returns:
    New NumPy arrays in the tree of `target`, which has the shapes of 'params'
    and 'batch_stats'. They are float32 (int32 for counts). And notes on
    parameters that had another floating type.

  Raises:
    UserError: names, shapes or types do not fit, or values are not finite; the
      message names `source` and lists all of them.
  """
  leaves: dict[str, Any] = traverse_util.flatten_dict(target, sep='/')
  names = {_find(path)[0] for path in leaves}
  missing, other_shape, other_type, impossible = [], [], [], []
  converted_types: dict[str, list[str]] = {}
  variables: dict[str, np.ndarray] = {}
  for path, leaf in leaves.items():
    name, layout = _find(path)
    shape = jax.eval_shape(lambda x, to=layout: rearrange(x, to), leaf).shape
    array = state_dict.get(name)
    is_count = name.endswith('num_batches_tracked')
    if is_count and array is not None and array.size == 1:
      array = array.reshape(())
      if np.isfinite(array) and array % 1 == 0:  # an average of checkpoints
        array = array.astype(np.int64)
    kind = np.integer if is_count else np.floating
    if array is None:
      missing.append(f'{name} {shape}')
    elif array.shape != shape:
      found = shorten(array.shape)
      other_shape.append(f'{name} expected {shape} found {found}')
    elif not jnp.issubdtype(array.dtype, kind):
      other_type.append(f'{name} expected {kind.__name__} found {array.dtype}')
    elif (value := _cast(array, is_count)) is None:
      impossible.append(name)
    else:
      if not is_count and array.dtype != np.float32:
        converted_types.setdefault(str(array.dtype), []).append(name)
      flax, pytorch = layout.split('->')
      sizes = dict(zip(flax.split(), leaf.shape, strict=True))
      value = rearrange(value, f'{pytorch} -> {flax}', **sizes)
      variables[path] = np.array(value, order='C')
  problems = {
    'unknown': [
      f'{quote(name)} {shorten(array.shape)}'
      for name, array in state_dict.items()
      if name not in names
    ],
    'missing': missing,
    'of another shape': other_shape,
    'of another type': other_type,
    'with NaN, infinite or impossible values': impossible,
  }
  lists = [f'{len(n)} {kind}: {listed(n)}' for kind, n in problems.items() if n]
  if lists:
    raise UserError(
      f'{source} does not fit the model of this config; nothing was converted. '
      f'Parameters {"; ".join(lists)}. Use the config that the checkpoint was '
      'trained with'
    )
  notes = [
    f'{len(names)} parameters were {dtype}, now float32: {listed(names)}'
    for dtype, names in converted_types.items()
  ]
  return traverse_util.unflatten_dict(variables, sep='/'), notes


def to_pytorch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Converts 'params' and 'batch_stats' to new arrays in PyTorch's order."""
  state_dict = {}
  for path, leaf in traverse_util.flatten_dict(variables, sep='/').items():
    name, layout = _find(path)
    array = np.asarray(leaf)
    dtype = np.int64 if name.endswith('num_batches_tracked') else array.dtype
    state_dict[name] = np.array(rearrange(array, layout), dtype, order='C')
  return dict(sorted(state_dict.items(), key=lambda item: _rank(item[0])))


def _find(path: str) -> tuple[str, str]:
  """Returns the PyTorch name and the layout of a Flax path."""
  _, *modules, array = path.split('/')
  for pattern, layout in _LAYOUTS.items():
    if re.search(f'/({pattern})$', path):
      module = re.sub(r'_(?=\d)', '.', '.'.join(modules))
      return f'{module}.{_ARRAYS.get(array, array)}', layout
  raise ValueError(f'{path} is no parameter or statistic of DualFormer')


def _rank(name: str) -> list[int]:
  return [
    int(part) if part.isdigit() else _ORDER.index(f' {part} ')
    for part in name.split('.')
  ]


def _cast(array: np.ndarray, is_count: bool) -> np.ndarray | None:
  """Casts to int32 (counts) or float32; None if a value does not fit."""
  if is_count:
    fits = 0 <= int(array) <= np.iinfo(np.int32).max
    return array.astype(np.int32) if fits else None
  with np.errstate(over='ignore'):  # infinity is detected below
    array = array.astype(np.float32)
  return array if np.isfinite(array).all() else None
