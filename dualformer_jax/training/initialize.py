"""What training starts from: a checkpoint folder or a .pth file.

Its classes, frames, image size and pyramid may differ from the model's, and it
may be the model of images; everything else must match.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp

from dualformer_jax import pytorch, transfer
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.views import Preprocessing
from dualformer_jax.training import checkpoint, sharding
from dualformer_jax.training.step import TrainState

# Fields of a model that do not change its parameters, ...
FREE_FIELDS = ('dtype', 'remat', 'drop_path_rate', 'head_dropout')
# ... and those that may differ from what training starts from.
_ADAPTED_FIELDS = (
  'window',
  'num_classes',
  'num_frames',
  'image_size',
  'fine_sizes',
  'coarse_sizes',
  'token_label',
)


@dataclasses.dataclass(frozen=True)
class Source:
  """A model to start from.

  Attributes:
    name: its file or folder.
    state_dict: its parameters by PyTorch's names; of an image model, as they
      are in its file.
    description: what the folder says of itself; None for a .pth file.
  """

  name: str
  state_dict: Mapping[str, Any]
  description: checkpoint.Description | None

  @property
  def preprocessing(self) -> Preprocessing | None:
    """How videos were prepared for it; None where a .pth file does not say."""
    return self.description.preprocessing if self.description else None


def read(path: str | os.PathLike[str]) -> Source:
  """Reads a .pth file, a checkpoint folder, or the workdir of a training run.

  Raises:
    UserError: there is none, or it is damaged or hostile.
  """
  file = pathlib.Path(path).expanduser()
  if file.is_file() or (file.suffix == '.pth' and not file.is_dir()):
    return Source(str(path), pytorch.read_pth(file), None)
  folder = checkpoint.find(file)
  variables, description = checkpoint.load_model(folder)
  return Source(str(folder), pytorch.to_pytorch(variables), description)


def make_variables(
  source: Source,
  initial: Mapping[str, Any],
  description: checkpoint.Description,
) -> tuple[dict[str, Any], transfer.Transfer]:
  """Returns a model's parameters and statistics, made from those of another.

  Args:
    source: the other model.
    initial: 'params' and 'batch_stats' as they are initialised.
    description: of the model. Its head is made anew where its classes are
      others, which of a .pth file only their number tells.

  Raises:
    UserError: the models differ in more than may be.
  """
  keep_head = True
  if source.description is not None:
    keep_head = source.description.class_names == description.class_names
    differences = [
      f'model.{name} is {value}, there {source.description.model.get(name)}'
      for name, value in description.model.items()
      if name not in FREE_FIELDS + _ADAPTED_FIELDS
      and value != source.description.model.get(name)
    ]
    if differences:
      raise UserError(
        f'{source.name} is of another model: {"; ".join(differences)}. Only '
        'classes, frames, image size and pyramid may differ: use the config '
        'of that model'
      )
  gathered: Any = dict(initial)
  if jax.process_count() > 1:  # of which each has a part
    gathered = multihost_utils.process_allgather(gathered, tiled=True)
  result = transfer.transfer(
    source.state_dict,
    pytorch.to_pytorch(jax.device_get(gathered)),
    keep_head=keep_head,
    name=source.name,
  )
  variables, _ = pytorch.from_pytorch(
    result.state_dict, initial, source=source.name
  )
  return variables, result


def start_from(
  state: TrainState, source: Source, description: checkpoint.Description
) -> tuple[TrainState, transfer.Transfer]:
  """Returns the first state with the parameters of another model.

  Args:
    state: as it is initialised, on the devices.
    source: the other model.
    description: of the model to train.

  Raises:
    UserError: as in make_variables.
  """
  variables, result = make_variables(
    source,
    {'params': state.params, 'batch_stats': state.batch_stats},
    description,
  )

  def put(new: Any, old: Any) -> Any:
    return sharding.put_tree(new, jax.tree.map(lambda x: x.sharding, old))

  params = put(variables['params'], state.params)
  return dataclasses.replace(
    state,
    params=params,
    batch_stats=put(variables.get('batch_stats', {}), state.batch_stats),
    ema_params=(
      None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    ),
  ), result
