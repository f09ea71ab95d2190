"""Weights as they are stored in exported files: float32, or int8 with scales.

Names are paths such as 'params/backbone/norm/scale'. An int8 array has a
second one, its float32 scales, whose name ends in '_int8_scale'.
"""

from __future__ import annotations

from collections.abc import Mapping
import copy
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dualformer_jax.inference.golden import golden_views

if TYPE_CHECKING:
  from dualformer_jax.inference.recognizer import Recognizer

SCALE = '_int8_scale'

Weights = dict[str, np.ndarray]


def flatten(variables: Mapping[str, Any]) -> Weights:
  """Returns the arrays of nested dictionaries by their paths."""
  import flax.traverse_util  # Checking an exported file needs no Flax.

  flat = flax.traverse_util.flatten_dict(variables, sep='/')
  return {name: np.asarray(x, order='C') for name, x in flat.items()}


def restore(weights: Mapping[str, np.ndarray | jax.Array]) -> dict[str, Any]:
  """Returns variables of the model, in float32. Can be traced by JAX."""
  import flax.traverse_util

  flat = {
    name: x * weights[name + SCALE] if name + SCALE in weights else x
    for name, x in weights.items()
    if not name.endswith(SCALE)
  }
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def quantize(weights: Weights) -> Weights:
  """Returns the weights with the kernels of matrix products in int8.

  Each output channel has its own scale: the largest absolute value becomes 127.
  """
  import qwix  # An extra, which the caller requires.

  quantized = {}
  for name, array in weights.items():
    bias = weights.get(f'{name.removesuffix("kernel")}bias')
    if (
      not name.endswith('/kernel') or bias is None or _is_depthwise(array, bias)
    ):
      quantized[name] = array
      continue
    axes = range(array.ndim - bias.ndim, array.ndim)
    result = qwix.quantize(
      jnp.asarray(array), jnp.int8, channelwise_axes=tuple(axes)
    )
    quantized[name] = np.asarray(result.qvalue)
    quantized[name + SCALE] = np.asarray(result.scale)
  return quantized


def _is_depthwise(kernel: np.ndarray, bias: np.ndarray) -> bool:
  """Whether a kernel is [i, j, k, c]: few weights, and no matrix product."""
  return kernel.ndim == 4 and bias.ndim == 1


def quantize_recognizer(
  recognizer: Recognizer,
) -> tuple[Recognizer, Weights, float]:
  """Returns a copy of a recognizer with int8 weights.

  Returns:
    The copy, its weights as they are stored, and the largest change of the
    probabilities of a test input.
  """
  weights = quantize(flatten(recognizer.variables))
  quantized = copy.copy(recognizer)
  quantized.variables = jax.jit(restore)(weights)
  p = recognizer.preprocessing
  views = golden_views(1, p.num_frames, p.image_size, p.image_size, 3)
  (before, _), (after, _) = recognizer.score(views), quantized.score(views)
  return quantized, weights, float(np.abs(after - before).max())
