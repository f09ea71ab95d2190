"""Random variables of a model, without compiling how it is initialized."""

import math
from typing import Any

import jax
import numpy as np

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.models.dualformer import DualFormer


def draw(model: DualFormer) -> dict[str, Any]:
  """Returns 'params' and 'batch_stats' of a model."""
  return draw_like(checkpoint.variable_shapes(model, 'the test'))


def draw_like(shapes: dict[str, Any]) -> dict[str, Any]:
  """Returns variables of these shapes: no weights and biases are zero."""
  rng = np.random.default_rng(0)

  def values(path, leaf):
    drawn = rng.standard_normal(leaf.shape)
    if path[-1].key in ('scale', 'var'):
      drawn = np.exp(0.3 * drawn)
    elif leaf.ndim < 2:
      drawn *= 0.1
    else:
      drawn /= math.sqrt(math.prod(leaf.shape[:-1]))
    return drawn.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(values, shapes)
