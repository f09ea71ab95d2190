"""The attentive head agrees with a NumPy computation of V-JEPA's probe."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from scipy import special

from dualformer_jax.checkpoints import pytorch_names
from dualformer_jax.errors import UserError
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.models import flops, heads
from dualformer_jax.models.dualformer import DualFormer
from tests import small_checkpoint

FIELDS: dict[str, Any] = small_checkpoint.FIELDS | {'head': 'attentive'}
HEADS, CHANNELS, CLASSES = 2, 16, 5


def draw_params(tree: Any) -> Any:
  rng = np.random.default_rng(3)
  return jax.tree.map(
    lambda leaf: jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape), np.float32),
    tree,
  )


def layer_norm(x: np.ndarray) -> np.ndarray:
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-5)


def scores(weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
  """CrossAttentionBlock and linear layer of V-JEPA, by PyTorch names."""

  def linear(name: str, x: np.ndarray) -> np.ndarray:
    prefix = f'cls_head.{name}'
    return x @ weights[f'{prefix}.weight'].T + weights[f'{prefix}.bias']

  query = weights['cls_head.attn.query']
  q = linear('attn.q', query).reshape(HEADS, -1)
  kv = linear('attn.kv', layer_norm(tokens))  # of every token
  b, length, _ = tokens.shape
  k, v = np.moveaxis(kv.reshape(b, length, 2, HEADS, -1), 2, 0)
  logits = np.einsum('ne,blne->bnl', q, k) / np.sqrt(CHANNELS / HEADS)
  attended = np.einsum('bnl,blne->bne', special.softmax(logits, -1), v)
  x = query + linear('attn.proj', attended.reshape(b, -1))
  norm = layer_norm(x) * weights['cls_head.norm2.weight']
  hidden = linear('mlp.fc1', norm + weights['cls_head.norm2.bias'])
  x = x + linear('mlp.fc2', hidden * special.ndtr(hidden))  # GELU
  return linear('fc_cls', x)


def test_attentive_head_agrees_with_numpy():
  head = heads.AttentiveHead(CLASSES, CHANNELS, HEADS, 0.5, Compute())
  tokens = np.random.default_rng(0).normal(1, 2, (3, 20, CHANNELS))
  tokens = jax.numpy.asarray(tokens, np.float32)
  variables = draw_params(jax.eval_shape(head.init, jax.random.key(0), tokens))
  params = {'params': {'cls_head': variables['params']}}
  weights = pytorch_names.to_pytorch(params)
  found: Any = jax.jit(head.apply)(variables, tokens)
  expected = scores(weights, np.asarray(tokens, np.float64))
  assert np.ptp(expected, axis=0).min() > 0.1  # depends on the tokens
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

  alone: Any = jax.jit(head.apply, static_argnames='method')(
    variables, tokens.reshape(3, 5, 2, 2, CHANNELS), method='token_logits'
  )
  each = tokens.reshape(-1, 1, CHANNELS)
  np.testing.assert_allclose(
    np.reshape(alone, (-1, CLASSES)),
    scores(weights, np.asarray(each, np.float64)),
    rtol=1e-4,
    atol=1e-4,
  )


@pytest.mark.slow
def test_model_applies_the_head_to_the_tokens_of_its_backbone():
  model: Any = DualFormer(**FIELDS)
  clips = np.random.default_rng(1).normal(size=(2, 8, 32, 32, 3))
  clips = jax.numpy.asarray(clips, np.float32)
  variables = draw_params(jax.eval_shape(model.init, jax.random.key(0), clips))
  output: Any = jax.jit(model.apply)(variables, clips)
  backbone = {'params': variables['params']['backbone']}
  apply = jax.jit(model.make_backbone().apply, static_argnums=2)
  tokens: Any = apply(backbone, clips, False)
  np.testing.assert_allclose(output.features, tokens.mean((1, 2, 3)), 1e-5)
  expected = scores(
    pytorch_names.to_pytorch({'params': variables['params']}),
    np.asarray(tokens, np.float64).reshape(2, -1, CHANNELS),
  )
  np.testing.assert_allclose(output.logits, expected, rtol=1e-3, atol=1e-3)


def test_names_of_pytorch_and_back_are_lossless():
  model: Any = DualFormer(**FIELDS)
  clips = jax.ShapeDtypeStruct(model.input_shape(), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), clips)
  variables = draw_params(shapes)
  weights = pytorch_names.to_pytorch(variables)
  assert pytorch_names.head_fields(weights)['head'] == 'attentive'
  found, notes = pytorch_names.from_pytorch(weights, shapes)
  assert notes == []
  jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_multiply_adds_equal_a_hand_count():
  rows = {
    row.module: row.multiply_adds
    for row in flops.count(DualFormer(**FIELDS))
    if row.part == 'head'
  }
  tokens, c = 4 * 8 * 8, CHANNELS
  assert rows == {
    'cls_head/attn': 2 * HEADS * tokens * c,  # scores and means
    'cls_head/attn/q': c * c,
    'cls_head/attn/kv': 2 * c * c,
    'cls_head/attn/proj': c * c,
    'cls_head/norm2': 5 * c,
    'cls_head/mlp/fc1': 4 * c * c,
    'cls_head/mlp/fc2': 4 * c * c,
    'cls_head/fc_cls': CLASSES * c,
  }


def test_attentive_head_with_token_labels_raises():
  with pytest.raises(UserError, match="head is 'attentive'; expected 'linear'"):
    DualFormer(**FIELDS, token_label=True)
