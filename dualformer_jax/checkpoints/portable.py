"""Checkpoints of two plain files, as in repositories of the Hugging Face Hub.

config.json has the metadata and the SHA-256 of model.safetensors, which has the
arrays. Neither can contain code.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

from flax import traverse_util
import numpy as np
import safetensors.numpy

from dualformer_jax.checkpoints.hub import CONFIG, WEIGHTS, is_address
from dualformer_jax.checkpoints.metadata import CheckpointMetadata

_DIGEST = 'weights_sha256'
# Fields of a training config whose values are paths on the user's machine.
_PATHS = (
  ('init_from',),
  ('dataset', 'name'),
  ('dataset', 'data_dir'),
  ('dataset', 'cache_dir'),
  ('token_labels', 'teacher'),
  ('token_labels', 'stored'),
)


def is_portable(folder: pathlib.Path) -> bool:
  """Returns whether a folder has the files of such a checkpoint."""
  return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def encode(
  variables: Mapping[str, Any], metadata: CheckpointMetadata
) -> dict[str, bytes]:
  """Returns the content of the two files by name."""
  arrays = {
    name: np.asarray(array, order='C')
    for name, array in traverse_util.flatten_dict(
      dict(variables), sep='/'
    ).items()
  }
  weights = safetensors.numpy.save(arrays)
  config = {
    'model_type': 'dualformer',
    **metadata.to_json(),
    _DIGEST: hashlib.sha256(weights).hexdigest(),
  }
  text = json.dumps(config, indent=2, ensure_ascii=False)
  return {CONFIG: f'{text}\n'.encode(), WEIGHTS: weights}


def public_metadata(metadata: CheckpointMetadata) -> CheckpointMetadata:
  """Returns metadata without local folders and the position in the data."""
  config = without_folders(metadata.config) if metadata.config else None
  return dataclasses.replace(metadata, data_position=None, config=config)


def read_weights(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the trees of arrays; raises ValueError if they have changed."""
  content = (folder / WEIGHTS).read_bytes()
  config = json.loads((folder / CONFIG).read_text('utf-8'))
  if hashlib.sha256(content).hexdigest() != config[_DIGEST]:
    raise ValueError(f'{WEIGHTS} does not have the SHA-256 that {CONFIG} names')
  arrays = safetensors.numpy.load(content)
  return traverse_util.unflatten_dict(arrays, sep='/')


def without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a training config with the last part of each local path."""
  result = json.loads(json.dumps(config))
  for *groups, name in _PATHS:
    fields: Any = result
    for group in groups:
      fields = fields.get(group, {})
    value = fields.get(name)
    is_name = name == 'name' and not re.match(r'[/~.]|\w+://', value or '')
    if isinstance(value, str) and not (is_name or is_address(value)):
      fields[name] = pathlib.PurePath(value).name
  return result
