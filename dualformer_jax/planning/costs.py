"""Estimates costs of training from the fields of a model, without compiling."""

import math
from typing import Any

import jax
import numpy as np

from dualformer_jax.models import flops
from dualformer_jax.models.dualformer import DualFormer


def training_flops(
  model: DualFormer, teacher_model: DualFormer | None = None
) -> float:
  """Returns the FLOPs (2 per multiply-add) of training on one clip.

  Each product runs once forward and twice backward, except that the first layer
  needs no gradient of its input, attention always recomputes its scores, and
  remat='block' recomputes all but the last product. A teacher runs once.
  """
  total = 0.0
  for row in flops.count(model):
    *parents, name = ('', *row.module.split('/'))
    if name == 'attn':
      runs, recomputed = 3.5, 1
    elif _is_linear(name):
      runs, recomputed = 3.0, int(name != 'fc2')
    else:
      continue  # norms, pooling and positional convolutions
    if parents[-1] == 'patch_embeds_0':
      runs = 2.0
    if model.remat == 'block' and 'blocks_' in row.module:
      runs += recomputed
    total += 2 * row.multiply_adds * runs
  if teacher_model is not None:
    tokens = math.prod(teacher_model.token_grid())
    for row in flops.count(teacher_model):
      name = row.module.split('/')[-1]
      if name == 'attn' or _is_linear(name):
        # Classifies every token instead of the clip.
        total += 2 * row.multiply_adds * (tokens if name == 'fc_cls' else 1)
  return total


def _is_linear(layer: str) -> bool:
  linear = ('qkv', 'q', 'kv', 'proj', 'fc1', 'fc2', 'fc_cls')
  return layer in linear or layer.startswith('token_linear')


def block_outputs(model: DualFormer) -> float:
  """Returns the number of elements of all block outputs for one clip."""
  rows = flops.count(model)
  # flops.count counts five operations per element of a LayerNorm.
  return sum(r.multiply_adds / 5 for r in rows if r.module.endswith('norm1'))


def shard_size(leaf: Any) -> int:
  """Returns the number of elements of a sharded array on each device."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape))


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes of a tree of sharded arrays on each device."""
  return sum(
    shard_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def saved_activation_bytes(model: DualFormer) -> int:
  """Returns the bytes that the backward pass of one clip needs, as traced."""
  clips = jax.ShapeDtypeStruct(model.input_shape(), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), clips)

  def pullback(params, rest, clips):
    def forward(params):
      return model.apply(
        {'params': params, **rest},
        clips,
        train=True,
        rngs={'dropout': jax.random.key(0)},
        mutable=['batch_stats'],
      )[0].logits

    return jax.vjp(forward, params)[1]

  rest = {name: v for name, v in variables.items() if name != 'params'}
  residuals = jax.eval_shape(pullback, variables['params'], rest, clips)
  parameter_shapes = {leaf.shape for leaf in jax.tree.leaves(variables)}
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(residuals)
    if leaf.shape not in parameter_shapes
  )
