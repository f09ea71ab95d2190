"""The training state: everything that a training step changes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualformer_jax.models.dualformer import DualFormer


@flax.struct.dataclass
class TrainState:
  """Training state; its leaves are arrays, their shapes or their shardings."""

  step: Any  # number of optimizer steps done
  params: Any  # float32
  batch_stats: Any  # running statistics of the BatchNorm layers
  opt_state: Any
  # Exponential moving average of the parameters, for validation, tests and
  # inference; None if it is off.
  ema_params: Any = None

  def variables(self) -> dict[str, Any]:
    """Returns the variables to evaluate the model with."""
    params = self.params if self.ema_params is None else self.ema_params
    return {'params': params, 'batch_stats': self.batch_stats}

  def trees(self) -> dict[str, Any]:
    """Returns what a checkpoint stores, by name; see `from_trees`."""
    names = ('params', 'batch_stats', 'opt_state', 'ema_params')
    return {name: getattr(self, name) for name in names}

  @classmethod
  def from_trees(
    cls, trees: dict[str, Any], step: int, like: jax.ShapeDtypeStruct
  ) -> 'TrainState':
    """Returns a stored state; the step has the type and sharding of `like`."""
    value = np.asarray(step, like.dtype)
    array = jax.make_array_from_callback((), like.sharding, lambda _: value)
    return cls(step=array, **trees)


def init_state(
  model: DualFormer,
  optimizer: optax.GradientTransformation,
  seed: int,
  with_ema: bool = False,
) -> TrainState:
  """Returns the initial state of a randomly initialized model."""
  variables = model.init(
    jax.random.key(seed), jnp.zeros(model.input_shape(), jnp.float32)
  )
  params = variables['params']
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    opt_state=optimizer.init(params),
    ema_params=jax.tree.map(jnp.copy, params) if with_ema else None,
  )
