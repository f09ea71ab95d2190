"""Parameters and multiply-adds of each layer, from the shapes of a traced call.

The rules are those of fvcore, which published numbers use: a multiply-add is
one operation; linear layers, convolutions and the two products of attention
count; a LayerNorm counts five operations per value, a BatchNorm two, a mean
one. Biases, softmax, activations and sums do not count.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.models.heads import ClassificationHead
from dualformer_jax.models.layers import BatchNorm

TOKEN_HEAD = 'token-label head'

# Parameter path (regex) -> part of the model; the first match counts.
_PARTS = {
  r'token_linear': TOKEN_HEAD,
  r'cls_head': 'head',
  r'patch_embeds': 'patch embedding',
  r'pos_block': 'positional convolution',
  r'blocks_\d+_\d*[02468]/attn': 'local attention',
  r'attn': 'global attention',
  r'mlp': 'MLPs',
  r'norm[12]': 'norms',
  r'norm': 'last norm',
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A layer, or the products that a module computes between its layers.

  Attributes:
    module: parameter path, such as 'backbone/blocks_0_1/attn/q'.
    stage: stage of the backbone; None after the last one.
    part: part of the model, for reports.
  """

  module: str
  stage: int | None
  part: str
  parameters: int
  multiply_adds: int


def count(model: DualFormer) -> tuple[Row, ...]:
  """Returns the layers of a model in order of execution.

  Windows count with their padding; TOKEN_HEAD is used in training only.
  """
  plain: Any = model.clone(remat='none', kernels='reference')
  return _count(plain)


@functools.cache
def _count(model: Any) -> tuple[Row, ...]:
  rows: list[Row] = []

  def add(module: nn.Module, parameters: int, multiply_adds: int) -> None:
    path = '/'.join(map(str, module.path))
    stage = re.match(r'backbone/[a-z_]+_(\d)', path)
    part = next(part for p, part in _PARTS.items() if re.search(p, path))
    index = int(stage[1]) if stage else None
    rows.append(Row(path, index, part, parameters, multiply_adds))

  def measure(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module, method = context.module, context.method_name
    if method == 'attend':
      queries, keys, _ = args[0]
      # Queries times keys, attention weights times values.
      add(module, 0, 2 * queries.size * keys.shape[2])
    if method == '__call__' and isinstance(module, ClassificationHead):
      # After a mean over tokens.
      add(module, 0, math.prod(model.token_grid()) * module.channels)
    output = call(*args, **kwargs)
    # Larger operations use the weights of layers that they do not call.
    counted = 'weights' if hasattr(module, 'weights') else '__call__'
    if method != counted:
      return output
    params = module.variables.get('params', {})
    if 'bias' in params:
      operations = 2 if isinstance(module, BatchNorm) else 5
      if 'kernel' in params:
        operations = params['kernel'].size // params['bias'].size
      if method == 'weights':
        (shape,) = args
        size = math.prod(shape[:-1]) * params['bias'].size
      else:
        size = sum(leaf.size for leaf in jax.tree.leaves(output))
      parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
      add(module, parameters, size * operations)
    return output

  with nn.intercept_methods(measure):
    clips = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
    jax.eval_shape(model.init, jax.random.key(0), clips)
  return tuple(rows)
