"""The forward pass of a DualFormer as an ONNX graph.

It mirrors dualformer_jax/models. Graphs are built directly, rather than
converted from JAX, so that they have the fused operators of ONNX, such as
LayerNormalization, Softmax and Gelu, and one dynamic axis. The export compares
the result with JAX.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import copy
import math
from typing import Any

from einops import rearrange
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dualformer_jax.inference.stored_weights import SCALE, Weights
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.kernels.layer_norm import EPSILON
from dualformer_jax.models.attention import pyramid_kernels
from dualformer_jax.models.dualformer import DualFormer

# 20 is the first with Gelu, and 9 is its version of the file format.
OPSET, _IR_VERSION = 20, 9


def build(
  model: DualFormer,
  weights: Weights,
  preprocessing: Preprocessing,
  multi_label: bool,
) -> onnx.ModelProto:
  """Returns uint8 views [views, t, h, w, 3] -> probabilities [views, k].

  Int8 weights stay int8, and are dequantized when the graph is run.
  """
  p = preprocessing
  g = _Graph(weights, '')
  x = g.add('Cast', 'views', to=TensorProto.FLOAT)
  mean, std = (np.array(v, np.float32) for v in (p.pixel_mean, p.pixel_std))
  x = g.add('Div', g.add('Sub', x, mean), std)
  x = _backbone(g.scope('backbone'), x, model)
  head = g.scope('cls_head')
  if model.head == 'attentive':
    x = _attentive_pool(head, x, model)
  else:
    x = g.add('ReduceMean', x, np.array([1, 2, 3]), keepdims=0)
  x = _linear(head.scope('fc_cls'), x, model.num_classes)
  if multi_label:
    g.add('Sigmoid', x, output='probabilities')
  else:
    g.add('Softmax', x, output='probabilities', axis=-1)

  def value(name: str, dtype: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)

  _, *sizes = model.input_shape()
  graph = helper.make_graph(
    g.nodes,
    'dualformer',
    [value('views', TensorProto.UINT8, 'views', *sizes)],
    [value('probabilities', TensorProto.FLOAT, 'views', model.num_classes)],
    g.constants,
  )
  return helper.make_model(
    graph,
    opset_imports=[helper.make_opsetid('', OPSET)],
    ir_version=_IR_VERSION,
    producer_name='dualformer_jax',
  )


class _Graph:
  """Nodes and constants of a graph, and the weights of one module."""

  def __init__(self, weights: Weights, module: str):
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []
    self._counts: collections.Counter[str] = collections.Counter()
    self._weights, self._module = weights, module

  def scope(self, name: str) -> _Graph:
    """Returns the same graph with the weights of a submodule."""
    inner = copy.copy(self)
    inner._module = f'{self._module}/{name}'.lstrip('/')
    return inner

  def weight(self, name: str, collection: str = 'params') -> np.ndarray:
    """Returns a weight of the module that is never int8."""
    return self._weights[f'{collection}/{self._module}/{name}']

  def kernel(self, outputs: int, index: int | None = None) -> str:
    """Adds the module's kernel as a matrix and returns its name.

    Args:
      outputs: number of columns of the matrix.
      index: selects the layer of a kernel [inputs, layers, ...].
    """
    key = f'params/{self._module}/kernel'

    def matrix(array: np.ndarray) -> np.ndarray:
      array = array if index is None else array[:, index]
      return np.ascontiguousarray(array.reshape(-1, outputs))

    kernel = self._constant(matrix(self._weights[key]), 'kernel')
    if key + SCALE not in self._weights:
      return kernel
    # Not DequantizeLinear: with it, onnxruntime rounds activations to int8.
    kernel = self.add('Cast', kernel, to=TensorProto.FLOAT)
    return self.add('Mul', kernel, matrix(self._weights[key + SCALE]))

  def add(
    self,
    operator: str,
    *inputs: str | np.ndarray,
    output: str = '',
    **attributes: Any,
  ) -> str:
    """Adds an operator and returns the name of its output."""
    names = [
      x if isinstance(x, str) else self._constant(x, f'{operator}_constant')
      for x in inputs
    ]
    output = output or self._unique(operator)
    node = helper.make_node(operator, names, [output], output, **attributes)
    self.nodes.append(node)
    return output

  def reshape(self, x: str, *shape: int) -> str:
    """Reshapes; the first axis has the views, so its size is inferred."""
    return self.add('Reshape', x, np.array([-1, *shape]))

  def slice(self, x: str, sizes: Sequence[int]) -> str:
    """Keeps the first elements along the axes after the first one."""
    axes = np.arange(1, 1 + len(sizes))
    return self.add('Slice', x, np.zeros_like(axes), np.array(sizes), axes)

  def _constant(self, array: np.ndarray, name: str) -> str:
    name = self._unique(name)
    self.constants.append(numpy_helper.from_array(array, name))
    return name

  def _unique(self, name: str) -> str:
    name = f'{self._module}/{name}'.lstrip('/')
    self._counts[name] += 1
    count = self._counts[name]
    return name if count == 1 else f'{name}_{count}'


def _backbone(g: _Graph, x: str, model: DualFormer) -> str:
  _, *size, channels = model.input_shape()
  for stage, depth in enumerate(model.depths):
    patch = (2, 4, 4) if stage == 0 else (1, 2, 2)
    scope = g.scope(f'patch_embeds_{stage}')
    x = _patches(scope.scope('proj'), x, (*size, channels), patch)
    size = [n // p for n, p in zip(size, patch, strict=True)]
    channels, heads = model.embed_dims[stage], model.num_heads[stage]
    x = _layer_norm(scope.scope('norm'), x)
    for index in range(depth):
      block = g.scope(f'blocks_{stage}_{index}')
      y = _layer_norm(block.scope('norm1'), x)
      if index % 2 == 0:
        y = _local(
          block.scope('attn'), y, (*size, channels), heads, model.window
        )
      else:
        kernels = pyramid_kernels(
          (size[0], size[1], size[2]),
          model.fine_sizes[stage],
          model.coarse_sizes[stage],
        )
        y = _global(
          block.scope('attn'), y, (*size, channels), heads, len(kernels)
        )
      x = g.add('Add', x, y)
      x = _mlp(block, x, channels)
      if index == 0:
        scope = g.scope(f'pos_block_{stage}/proj_0')
        x = g.add('Add', x, _depthwise(scope, x))
  return _layer_norm(g.scope('norm'), x)


def _attentive_pool(g: _Graph, x: str, model: DualFormer) -> str:
  length, channels = math.prod(model.token_grid()), model.embed_dims[-1]
  attention = g.scope('attn')
  ones = np.ones(channels, np.float32)
  x = g.reshape(x, length, channels)
  x = g.add('LayerNormalization', x, ones, 0 * ones, axis=-1, epsilon=EPSILON)
  query = g.add('Identity', attention.weight('query')[None, None])
  names = [('q', None), ('kv', 0), ('kv', 1)]
  x = _attention(
    attention, query, x, names, (1, length), channels, model.num_heads[-1]
  )
  x = _mlp(g, g.add('Add', x, query), channels)
  return g.add('Squeeze', x, np.array([1]))


def _mlp(g: _Graph, x: str, channels: int) -> str:
  y = _layer_norm(g.scope('norm2'), x)
  y = g.add('Gelu', _linear(g.scope('mlp/fc1'), y, 4 * channels))
  return g.add('Add', x, _linear(g.scope('mlp/fc2'), y, channels))


def _linear(g: _Graph, x: str, outputs: int, index: int | None = None) -> str:
  bias = g.weight('bias')
  bias = bias if index is None else bias[index]
  return g.add(
    'Add', g.add('MatMul', x, g.kernel(outputs, index)), bias.reshape(-1)
  )


def _layer_norm(g: _Graph, x: str) -> str:
  return g.add(
    'LayerNormalization',
    x,
    g.weight('scale'),
    g.weight('bias'),
    axis=-1,
    epsilon=EPSILON,
  )


def _blocks(
  g: _Graph, x: str, shape: Sequence[int], size: Sequence[int]
) -> tuple[str, list[int]]:
  """Splits [b, t, y, x, c] into blocks [b, d, i, h, j, w, k, c]."""
  *grid, channels = shape
  counts = [n // s for n, s in zip(grid, size, strict=True)]
  whole = [n * s for n, s in zip(counts, size, strict=True)]
  if whole != grid:
    x = g.slice(x, whole)
  (d, h, w), (i, j, k) = counts, size
  return g.reshape(x, d, i, h, j, w, k, channels), counts


def _patches(
  g: _Graph, x: str, shape: Sequence[int], patch: Sequence[int]
) -> str:
  x, counts = _blocks(g, x, shape, patch)
  x = g.add('Transpose', x, perm=[0, 1, 3, 5, 2, 4, 6, 7])
  x = g.reshape(x, *counts, math.prod(patch) * shape[-1])
  return _linear(g, x, g.weight('bias').size)


def _pool(
  g: _Graph, x: str, shape: Sequence[int]
) -> tuple[str, tuple[int, ...]]:
  """A depthwise convolution with stride = kernel size: a weighted block sum."""
  kernel = g.weight('kernel')
  i, j, k, channels = kernel.shape
  x, counts = _blocks(g, x, shape, (i, j, k))
  x = g.add('Mul', x, kernel.reshape(i, 1, j, 1, k, channels))
  x = g.add('ReduceSum', x, np.array([2, 4, 6]), keepdims=0)
  return g.add('Add', x, g.weight('bias')), (*counts, channels)


def _depthwise(g: _Graph, x: str) -> str:
  """A depthwise 3x3x3 convolution; ONNX has channels first."""
  kernel = g.weight('kernel')
  kernel = np.ascontiguousarray(np.moveaxis(kernel, -1, 0)[:, None])
  x = g.add('Transpose', x, perm=[0, 4, 1, 2, 3])
  x = g.add(
    'Conv', x, kernel, g.weight('bias'), group=len(kernel), pads=[1] * 6
  )
  return g.add('Transpose', x, perm=[0, 2, 3, 4, 1])


def _attention(
  g: _Graph,
  queries: str,
  keys: str,
  names: Sequence[tuple[str, int | None]],
  lengths: tuple[int, int],
  channels: int,
  heads: int,
  is_key: np.ndarray | None = None,
) -> str:
  """Attends from tokens [b, l, c] to [b, m, c]; `names` are q, k and v."""

  def project(x: str, which: int, length: int, perm: Sequence[int]) -> str:
    name, index = names[which]
    x = _linear(g.scope(name), x, channels, index)
    x = g.reshape(x, length, heads, channels // heads)
    return g.add('Transpose', x, perm=perm)

  q = project(queries, 0, lengths[0], [0, 2, 1, 3])
  k = project(keys, 1, lengths[1], [0, 2, 3, 1])
  v = project(keys, 2, lengths[1], [0, 2, 1, 3])
  q = g.add('Mul', q, np.array((channels // heads) ** -0.5, np.float32))
  scores = g.add('MatMul', q, k)
  if is_key is not None:  # [windows, m]
    windows, length = is_key.shape
    scores = g.reshape(scores, windows, heads, lengths[0], length)
    lowest = np.array(np.finfo(np.float32).min)
    scores = g.add('Where', is_key[:, None, None], scores, lowest)
    scores = g.reshape(scores, heads, lengths[0], length)
  x = g.add('MatMul', g.add('Softmax', scores, axis=-1), v)
  x = g.add('Transpose', x, perm=[0, 2, 1, 3])
  x = g.reshape(x, lengths[0], channels)
  return _linear(g.scope('proj'), x, channels)


def _local(
  g: _Graph, x: str, shape: Sequence[int], heads: int, window: Sequence[int]
) -> str:
  *grid, channels = shape
  window = [min(w, n) for w, n in zip(window, grid, strict=True)]
  counts = [math.ceil(n / w) for n, w in zip(grid, window, strict=True)]
  padded = [n * w for n, w in zip(counts, window, strict=True)]
  is_key = None
  if padded != grid:
    after = [n - m for n, m in zip(padded, grid, strict=True)]
    x = g.add('Pad', x, np.array([0] * 6 + after + [0]))
    is_key = rearrange(
      np.pad(np.ones(grid, bool), [(0, n) for n in after]),
      '(i wd) (j wh) (k ww) -> (i j k) (wd wh ww)',
      **dict(zip(('wd', 'wh', 'ww'), window, strict=True)),
    )
  x, _ = _blocks(g, x, (*padded, channels), window)
  x = g.add('Transpose', x, perm=[0, 1, 3, 5, 2, 4, 6, 7])
  length = math.prod(window)
  x = g.reshape(x, length, channels)
  names = [('qkv', index) for index in range(3)]
  x = _attention(g, x, x, names, (length, length), channels, heads, is_key)
  x = g.reshape(x, *counts, *window, channels)
  x = g.add('Transpose', x, perm=[0, 1, 4, 2, 5, 3, 6, 7])
  x = g.reshape(x, *padded, channels)
  return x if padded == grid else g.slice(x, grid)


def _global(
  g: _Graph, x: str, shape: Sequence[int], heads: int, num_levels: int
) -> str:
  *grid, channels = shape
  length = num_keys = math.prod(grid)
  queries = keys = g.reshape(x, length, channels)
  levels = []
  if num_levels > 0:
    levels.append(_pool(g.scope('sr'), x, shape))
  if num_levels > 1:
    y, size = _pool(g.scope('lr_0'), x, shape)
    y = g.add('Relu', _batch_norm(g.scope('lr_1'), y))
    levels.append(_pool(g.scope('lr_3'), y, size))
  if levels:
    tokens = [g.reshape(y, math.prod(s[:-1]), channels) for y, s in levels]
    num_keys = sum(math.prod(s[:-1]) for _, s in levels)
    keys = g.add('Concat', *tokens, axis=1)
    keys = _layer_norm(g.scope('norm'), keys)
  names = [('q', None), ('kv', 0), ('kv', 1)]
  x = _attention(g, queries, keys, names, (length, num_keys), channels, heads)
  return g.reshape(x, *grid, channels)


def _batch_norm(g: _Graph, x: str) -> str:
  mean, var = (g.weight(name, 'batch_stats') for name in ('mean', 'var'))
  scale = g.weight('scale') / np.sqrt(var + np.float32(EPSILON))
  x = g.add('Mul', g.add('Sub', x, mean), scale)
  return g.add('Add', x, g.weight('bias'))
