"""Initialize a model from the parameters of another one.

The classes may differ (fine-tuning), as may frames, image size and pyramid, and
the other model may be one of images (inflation). Everything else must match.
Parameters are matched by their PyTorch names, see pytorch_names.
"""

from collections.abc import Mapping
import dataclasses
import logging
import math
import os
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
from jaxtyping import Float
import numpy as np

from dualformer_jax.checkpoints import (
  checkpoint,
  metadata,
  pytorch_names,
  stored_folder,
  weights,
)
from dualformer_jax.checkpoints.messages import listed
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.models.dualformer import DualFormer

_SUFFIXES = ('.pth', '.safetensors')
_LOG = logging.getLogger(__name__)

# Fields of the model that may differ.
_ADAPTED_FIELDS = ('num_classes', 'head', 'token_label', 'num_frames')
_ADAPTED_FIELDS += ('image_size', 'window', 'fine_sizes', 'coarse_sizes')
# Parameters that depend on the pyramid of global attention, ...
_PYRAMID = re.compile(r'.*\.attn\.(sr|lr\.[013]|norm)\.\w+')
_PYRAMID_KERNEL = re.compile(r'.*\.attn\.(sr|lr\.[03])\.weight')
# ... on the classes (without `cls_` in an image model), ...
_HEAD = re.compile(r'(cls_)?head\..*')
# ... and kernels that have no time axis in an image model.
_WITH_TIME = re.compile(
  r'.*(patch_embeds\.\d+\.proj|pos_block\.\d+\.proj\.0|attn\.(sr|lr\.0))'
  r'\.weight'
)


# Kind of transfer -> title of its row in the printed table.
_KINDS = {
  'loaded': 'loaded',
  'inflated': 'inflated from images',
  'resized': 'resized to this pyramid',
  'reinitialized': 'reinitialized',
  'unused': 'unused',
}


@dataclasses.dataclass(frozen=True)
class Source:
  """A pretrained model: its file, parameters, and metadata if it is a folder.

  The PyTorch names in the file of an image model lack `backbone.`.
  """

  name: str
  state_dict: Mapping[str, np.ndarray]
  metadata: metadata.CheckpointMetadata | None


@dataclasses.dataclass(frozen=True)
class Transfer:
  """The parameters of a model by PyTorch name, and the names of each kind."""

  state_dict: dict[str, np.ndarray]
  names: dict[str, list[str]]

  def table(self) -> list[str]:
    """Returns one line per kind: the number of parameters and their names."""
    return [
      f'{_KINDS[kind] + ":":25}{len(names):4} parameters'
      + (f'  {_summary(names)}' if kind != 'loaded' else '')
      for kind, names in self.names.items()
      if names
    ]


def read(path: str | os.PathLike[str], ema: bool = False) -> Source:
  """Reads a .pth or .safetensors file, a checkpoint folder or a workdir.

  The path may be a URL with gs://, s3:// or hf://. With `ema`, the EMA
  weights of a file are chosen.
  """
  file = stored_folder.local_path(path)
  if file.is_file() or (file.suffix in _SUFFIXES and not file.is_dir()):
    state_dict, dropped, notes = weights.read(file, ema)
    for note in [*notes, f'dropped: {listed(dropped) or "nothing"}']:
      _LOG.info('%s: %s', path, note)
    return Source(str(path), state_dict, None)
  folder = checkpoint.find(file)
  variables, found = checkpoint.load_model(folder)
  return Source(str(folder), pytorch_names.to_pytorch(variables), found)


def check(source: Source, model: DualFormer) -> None:
  """Raises UserError if `initialize` could not; computes nothing with JAX.

  The number of classes of the model does not matter.
  """
  if source.metadata is not None:
    fields = {name: getattr(model, name) for name in source.metadata.model}
    differences = metadata.model_differences(
      fields, source.metadata, _ADAPTED_FIELDS
    )
    if differences:
      raise _other_model(source.name, differences)
  zeros = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype),
    checkpoint.variable_shapes(model, 'the config'),
  )
  initial = pytorch_names.to_pytorch(zeros)
  adapt(source.state_dict, initial, keep_head=False, name=source.name)


def initialize(
  source: Source,
  variables: Mapping[str, Any],
  model: metadata.CheckpointMetadata,
) -> tuple[dict[str, Any], Transfer]:
  """Initializes variables from a pretrained model.

  The new variables have the same shardings. The head is reinitialized if the
  classes or the kind of head differ; for a .pth file, if the number of classes
  differs. `check` verifies before that the models fit.
  """
  found = source.metadata
  keep_head = found is None or (
    found.class_names == model.class_names
    and found.build_model().head == model.build_model().head
  )
  # Each host may hold a part.
  initial = multihost_utils.process_allgather(dict(variables), tiled=True)
  result = adapt(
    source.state_dict,
    pytorch_names.to_pytorch(initial),
    keep_head=keep_head,
    name=source.name,
  )
  new, _ = pytorch_names.from_pytorch(
    result.state_dict, variables, source=source.name
  )
  new = {name: new.get(name, {}) for name in variables}
  shardings = jax.tree.map(lambda leaf: leaf.sharding, dict(variables))
  return sharding.put_tree(new, shardings), result


def is_image_model(state_dict: Mapping[str, np.ndarray]) -> bool:
  """Returns whether a state_dict is that of an image model (ImageNet)."""
  weight = state_dict.get('patch_embeds.0.proj.weight')
  return weight is not None and weight.ndim == 4


def adapt(
  source: Mapping[str, np.ndarray],
  initial: Mapping[str, np.ndarray],
  *,
  keep_head: bool,
  name: str,
) -> Transfer:
  """Adapts the parameters of one model to the shapes of another.

  Kernels of an image model are repeated along time and divided by the number of
  repeats, as in the published implementation. Kernels that pool to another
  pyramid are resized linearly and scaled so that a kernel that computes a mean
  still does. Kernels of levels that the source lacks compute a mean.

  Both are PyTorch name -> array; `initial` is the wanted model after its own
  initialization. Without `keep_head`, the head is that of `initial`.
  """
  is_image = is_image_model(source)
  if is_image:
    source = {
      key if _HEAD.fullmatch(key) else f'backbone.{key}': array
      for key, array in source.items()
    }
  result = Transfer({}, {kind: [] for kind in _KINDS})
  problems = []
  for key, start in initial.items():
    found = source.get(key)
    array, kind = start, 'reinitialized'
    if _HEAD.fullmatch(key) and (
      not keep_head or found is None or found.shape != start.shape
    ):
      pass
    elif found is None and _PYRAMID.fullmatch(key):
      if _PYRAMID_KERNEL.fullmatch(key):
        array = np.full_like(start, 1 / math.prod(start.shape[2:]))
      else:  # an identity: a bias of 0, a norm of scale 1
        is_scale = key.endswith(('.weight', '.running_var'))
        array = np.full_like(start, is_scale)
      if is_image and '.lr.3.' in key:
        kind = 'inflated'
    elif found is None:
      problems.append(f'{key} {start.shape} is missing')
      continue
    elif found.shape == start.shape:
      array, kind = found, 'loaded'
    elif is_image and _WITH_TIME.fullmatch(key) and found.ndim == 4:
      array = _resize(found[:, :, None], start.shape)
      kind = 'inflated' if found.shape[2:] == start.shape[3:] else 'resized'
    elif _PYRAMID_KERNEL.fullmatch(key) and found.shape[:2] == start.shape[:2]:
      array, kind = _resize(found, start.shape), 'resized'
    else:
      problems.append(f'{key} is {found.shape}, expected {start.shape}')
      continue
    result.state_dict[key] = array
    result.names[kind].append(key)
  for key in (key for key in source if key not in initial):
    if _HEAD.fullmatch(key) or _PYRAMID.fullmatch(key):
      result.names['unused'].append(key)
    else:
      problems.append(f'{key[:100]!r} {source[key].shape} is unknown')
  if problems:
    raise _other_model(name, problems)
  return result


def _other_model(name: str, differences: list[str]) -> UserError:
  return UserError(
    f'{name} holds another model: {listed(differences, separator="; ")}. Only '
    'classes, frames, image size and pyramid may differ: use the config of '
    'that model'
  )


def _resize(
  kernel: Float[np.ndarray, 'o i t h w'], shape: tuple[int, ...]
) -> Float[np.ndarray, 'o i t2 h2 w2']:
  """Resizes the last three axes linearly and keeps the sum of the kernel."""
  matrices = (
    _resize_matrix(old, new)
    for old, new in zip(kernel.shape[2:], shape[2:], strict=True)
  )
  resized = np.einsum('oithw,at,bh,cw->oiabc', kernel, *matrices, optimize=True)
  return resized.astype(kernel.dtype)


def _resize_matrix(old: int, new: int) -> Float[np.ndarray, 'new old']:
  """Returns the matrix of a linear resize, times old / new.

  Pixel centers are at half-integers. Shrinking averages the pixels that fall
  into a new one. Rows sum to old / new, so a constant kernel keeps its sum.
  """
  scale = old / new
  centers = (np.arange(new) + 0.5) * scale - 0.5
  if new > old:
    centers = np.clip(centers, 0, old - 1)
  distances = np.abs(centers[:, None] - np.arange(old))
  weights = np.maximum(1 - distances / max(scale, 1), 0)
  return weights / weights.sum(axis=1, keepdims=True) * scale


def _summary(names: list[str]) -> str:
  """Lists names, those of different blocks once, as 'blocks.*.attn.sr'."""
  patterns = (
    re.sub(r'(blocks|patch_embeds|pos_block)(\.\d+)+', r'\1.*', name)
    for name in names
  )
  return ', '.join(dict.fromkeys(p.removeprefix('backbone.') for p in patterns))
