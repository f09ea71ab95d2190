"""Metadata of a checkpoint: the model, its preprocessing and its classes."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from dualformer_jax.checkpoints.hub import CONFIG
from dualformer_jax.checkpoints.messages import listed
from dualformer_jax.checkpoints.stored_folder import MARKER
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer

# Fields of a model that do not change its parameters.
_FREE_FIELDS = ('dtype', 'remat', 'drop_path_rate', 'head_dropout', 'kernels')

_KEY = 'dualformer'
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
  """Everything a checkpoint holds besides arrays.

  The fields of the model are those of DualFormer. A model that is not being
  trained has step 0 and no data position (state of the training loader),
  validation score, config, and record of training: `hours` so far, validation
  included, and `hardware`.
  """

  model: dict[str, Any]
  preprocessing: Preprocessing
  class_names: tuple[str, ...]
  multi_label: bool = False
  step: int = 0
  data_position: dict[str, Any] | None = None
  score: float | None = None
  config: dict[str, Any] | None = None
  training: dict[str, Any] | None = None

  def build_model(self, **changes: Any) -> DualFormer:
    """Returns the model, with some fields changed (such as dtype)."""
    return DualFormer(**{**self.model, **changes})

  def to_json(self) -> dict[str, Any]:
    """Returns the custom metadata that Orbax stores."""
    return {_KEY: {'format': _FORMAT, **dataclasses.asdict(self)}}


def read_metadata(folder: pathlib.Path) -> CheckpointMetadata:
  """Reads the metadata of a checkpoint folder; UserError if it is invalid."""
  try:
    if (folder / MARKER).is_file():
      content = json.loads((folder / MARKER).read_text('utf-8'))
      return from_json(content['custom_metadata'])
    return from_json(json.loads((folder / CONFIG).read_text('utf-8')))
  except UserError as error:
    raise UserError(f'{folder}: {error}') from error
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{folder} is not a complete checkpoint of dualformer_jax '
      f'({type(error).__name__}: {error}); copy or convert it again'
    ) from error


def from_json(custom_metadata: Any) -> CheckpointMetadata:
  """Validates and returns the content of `CheckpointMetadata.to_json`."""
  fields = dict(custom_metadata[_KEY])
  if fields.pop('format') != _FORMAT:
    raise UserError(
      f'not of format {_FORMAT}, but of another version; update dualformer_jax'
    )
  kinds = {'class_names': list, 'step': int, 'multi_label': bool}
  for name, kind in kinds.items():
    if type(fields[name]) is not kind:
      raise ValueError(f'{name} is {fields[name]!r}, not a {kind.__name__}')
  if not all(isinstance(name, str) for name in fields['class_names']):
    raise ValueError('class_names holds something other than strings')
  if record := fields.get('training'):
    hours, hardware = float(record['hours']), map(str, record['hardware'])
    fields['training'] = {'hours': hours, 'hardware': list(hardware)}
  for name in ('model', 'preprocessing', 'class_names'):
    fields[name] = _tuples(fields[name])
  fields['preprocessing'] = Preprocessing(**fields['preprocessing'])
  metadata = CheckpointMetadata(**fields)
  if len(metadata.class_names) != metadata.build_model().num_classes:
    raise ValueError('class_names does not have one name per class')
  return metadata


def model_differences(
  fields: Mapping[str, Any],
  saved: CheckpointMetadata,
  allowed: tuple[str, ...] = (),
) -> list[str]:
  """Lists the fields by which a model differs from that of a checkpoint.

  Fields that do not change the parameters may differ, and those in `allowed`.
  Fields that the checkpoint lacks, as it is older than they are, have their
  default.
  """
  model = saved.build_model()
  return [
    f'model.{name} is {value}, in the checkpoint {getattr(model, name)}'
    for name, value in fields.items()
    if name not in _FREE_FIELDS + allowed and value != getattr(model, name)
  ]


def check_same_model(
  wanted: CheckpointMetadata, saved: CheckpointMetadata, folder: pathlib.Path
) -> None:
  """Raises UserError if a checkpoint has another model or other classes."""
  differences = model_differences(wanted.model, saved)
  if saved.class_names != wanted.class_names:
    here, there = (listed(m.class_names, 3) for m in (wanted, saved))
    differences.append(f'the classes are {here}, in the checkpoint {there}')
  if differences:
    raise UserError(
      f'{folder} holds another model: {"; ".join(differences)}. Nothing was '
      'changed: use the config of the checkpoint, or another --workdir'
    )


def _tuples(value: Any) -> Any:
  """Turns the lists of JSON into tuples; Flax modules must be hashable."""
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_tuples(item) for item in value)
  return value
