"""Parameters and multiply-adds of every layer, from a model's fields alone.

Counted as fvcore does, and so as in tables of published figures: a multiply-add
is one operation; linear layers, convolutions and the two products of attention
count; a LayerNorm counts five operations a value, a BatchNorm two, a mean one.
Biases, softmax, activations and sums are left out.
"""

import dataclasses
import math

from dualformer_jax.models.attention import pyramid_kernels
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.models.layers import Size

# Parameters and multiply-adds.
_Cost = tuple[int, int]

TOKEN_HEAD = 'token-label head'


@dataclasses.dataclass(frozen=True)
class Row:
  """A layer, or what a module computes between its layers.

  Attributes:
    module: its name among the parameters, such as 'backbone/blocks_0_1/attn/q'.
    stage: the stage that it is in; None after the last one.
    part: of what it is a part, in words.
    parameters: how many it has.
    multiply_adds: how many it does for one view.
  """

  module: str
  stage: int | None
  part: str
  parameters: int
  multiply_adds: int


def count(model: DualFormer) -> list[Row]:
  """Returns the layers of a model in the order in which they compute.

  Windows that do not fit are counted with their padding. The part TOKEN_HEAD
  takes part in training alone.
  """
  rows: list[Row] = []
  stage: int | None = None
  part = ''

  def add(module: str, cost: _Cost) -> None:
    rows.append(Row(module, stage, part, *cost))

  c = 3
  grid = (model.num_frames, model.image_size, model.image_size)
  for stage, depth in enumerate(model.depths):
    patch = (2, 4, 4) if stage == 0 else (1, 2, 2)
    grid = _pooled(grid, patch)
    inputs, c = math.prod(patch) * c, model.embed_dims[stage]
    size = math.prod(grid)
    part = 'patch embedding'
    name = f'backbone/patch_embeds_{stage}'
    add(f'{name}/proj', _linear(size, inputs, c))
    add(f'{name}/norm', _norm(size, c))

    for index in range(depth):
      name = f'backbone/blocks_{stage}_{index}'
      part = 'norms'
      add(f'{name}/norm1', _norm(size, c))
      if index % 2 == 0:
        part = 'local attention'
        window = [min(w, g) for w, g in zip(model.window, grid, strict=True)]
        keys = math.prod(window)
        queries = keys * math.prod(
          math.ceil(g / w) for g, w in zip(grid, window, strict=True)
        )
        add(f'{name}/attn/qkv', _linear(queries, c, 3 * c))
      else:
        part = 'global attention'
        queries, keys = size, 0
        add(f'{name}/attn/q', _linear(size, c, c))
        fine, coarse = model.fine_sizes[stage], model.coarse_sizes[stage]
        for kernels in pyramid_kernels(grid, fine, coarse):
          pooled = grid
          layers = ('sr',) if len(kernels) == 1 else ('lr_0', 'lr_3')
          for layer, kernel in zip(layers, kernels, strict=True):
            pooled = _pooled(pooled, kernel)
            cost = _depthwise(math.prod(pooled), math.prod(kernel), c)
            add(f'{name}/attn/{layer}', cost)
            if layer == 'lr_0':
              cost = _norm(math.prod(pooled), c, operations=2)
              add(f'{name}/attn/lr_1', cost)
          keys += math.prod(pooled)
        if keys:
          add(f'{name}/attn/norm', _norm(keys, c))
        keys = keys or size
        add(f'{name}/attn/kv', _linear(keys, c, 2 * c))
      # Queries times keys, and weights times values.
      add(f'{name}/attn', (0, 2 * queries * keys * c))
      add(f'{name}/attn/proj', _linear(queries, c, c))
      part = 'norms'
      add(f'{name}/norm2', _norm(size, c))
      part = 'MLPs'
      add(f'{name}/mlp/fc1', _linear(size, c, 4 * c))
      add(f'{name}/mlp/fc2', _linear(size, 4 * c, c))
      if index == 0:
        part = 'positional convolution'
        add(f'backbone/pos_block_{stage}/proj_0', _depthwise(size, 27, c))

  stage = None
  size = math.prod(grid)
  part = 'last norm'
  add('backbone/norm', _norm(size, c))
  part = 'head'
  add('cls_head', (0, size * c))
  add('cls_head/fc_cls', _linear(1, c, model.num_classes))
  if model.token_label:
    part = TOKEN_HEAD
    add('cls_head/token_linear_0', _linear(size, c, 2 * c))
    add('cls_head/token_linear_3', _linear(size, 2 * c, 4 * c))
    add('cls_head/token_linear_6', _linear(size, 4 * c, model.num_classes))
  return rows


def _linear(tokens: int, inputs: int, outputs: int) -> _Cost:
  return (inputs + 1) * outputs, tokens * inputs * outputs


def _depthwise(tokens: int, weights: int, channels: int) -> _Cost:
  return (weights + 1) * channels, tokens * weights * channels


def _norm(tokens: int, channels: int, operations: int = 5) -> _Cost:
  return 2 * channels, operations * tokens * channels


def _pooled(grid: Size, kernel: Size) -> Size:
  t, y, x = (g // k for g, k in zip(grid, kernel, strict=True))
  return t, y, x
