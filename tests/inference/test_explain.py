"""Grad-CAM agrees with the original, attention with the layer's own."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from dualformer_jax.checkpoints import checkpoint, pytorch_names
from dualformer_jax.errors import UserError
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from tests import reference_arrays
from tests.inference import token_model


@pytest.fixture(scope='module', name='variables')
def _variables() -> dict[str, Any]:
  return token_model.make_variables()


@pytest.fixture(scope='module', name='model')
def _model(variables) -> Recognizer:
  return token_model.make_recognizer(variables)


@pytest.fixture(scope='module', name='clips')
def _clips() -> np.ndarray:
  return reference_arrays.clips(2, 8, 68, seed=3)


# --- Grad-CAM


@pytest.mark.slow
def test_gradcam_agrees_with_the_published_implementation():
  fields = reference_arrays.MODELS['micro']
  variables, _ = pytorch_names.from_pytorch(
    reference_arrays.state_dict('micro', 1),
    checkpoint.variable_shapes(DualFormer(**fields), 'micro'),
    source='micro',
  )
  names = tuple(f'class {i}' for i in range(10))
  metadata = checkpoint.CheckpointMetadata(
    fields, Preprocessing(32, 2, 224), names
  )
  micro = Recognizer(variables, metadata, pathlib.Path(), 'float32')
  clips = reference_arrays.clips(4, 32, 224, seed=1)[:1]
  figures = reference_arrays.load('gradcam_micro_seed1.npz')
  for layer in ('backbone.blocks.3.1', 'backbone.blocks.2.0'):
    for name, label in (('top', None), ('label2', 'class 2')):
      maps = micro.gradcam(clips, layer, label)
      assert maps.shape == (1, 32, 224, 224)
      assert maps.dtype == np.float32
      np.testing.assert_array_equal(maps.min((1, 2, 3)), 0)
      np.testing.assert_allclose(maps.max((1, 2, 3)), 1, atol=1e-6)
      expected = figures[f'{layer}.{name}'][:1]
      np.testing.assert_allclose(
        maps[:, ::4, ::8, ::8], expected, atol=1e-3, err_msg=f'{layer} {name}'
      )


@pytest.mark.slow
def test_gradcam_does_not_depend_on_remat(variables, clips, model):
  expected = model.gradcam(clips, 'blocks.0.0', 1)
  assert expected.std() > 0.05
  assert model.model.remat == 'elementwise'
  other = token_model.make_recognizer(variables, remat='block')
  maps = other.gradcam(clips, 'blocks.0.0', 1)
  np.testing.assert_allclose(maps, expected, atol=1e-3)


def with_head(variables: Any, kernel: np.ndarray) -> dict[str, Any]:
  head = variables['params']['cls_head']
  fc_cls = head['fc_cls'] | {'kernel': kernel.astype(np.float32)}
  params = variables['params'] | {'cls_head': head | {'fc_cls': fc_cls}}
  return variables | {'params': params}


def test_gradcam_of_a_certain_model_does_not_underflow(
  model, variables, clips, monkeypatch
):
  # With two classes, scaling the logits only scales the gradient.
  expected = [model.gradcam(clips, 'blocks.0.0', label) for label in (0, 1)]
  assert np.abs(expected[0] - expected[1]).max() > 0.5
  kernel = variables['params']['cls_head']['fc_cls']['kernel']
  monkeypatch.setattr(model, 'variables', with_head(variables, 1e4 * kernel))
  logits = model.logits(clips)
  assert (np.ptp(logits, axis=1) > 200).all()
  for label in (0, 1):
    maps = model.gradcam(clips, 'blocks.0.0', label)
    np.testing.assert_allclose(maps, expected[label], atol=1e-3)


@pytest.mark.slow
def test_gradcam_of_a_multi_label_model_ignores_other_classes(
  model, variables, clips, monkeypatch
):
  others = token_model.make_recognizer(variables, multi_label=True)
  actual = others.gradcam(clips, 'blocks.0.0', 'serve')
  # The other class has constant logits.
  kernel = variables['params']['cls_head']['fc_cls']['kernel'].copy()
  kernel[:, 0] = 0
  monkeypatch.setattr(model, 'variables', with_head(variables, kernel))
  expected = model.gradcam(clips, 'blocks.0.0', 'serve')
  np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_layers_and_classes_may_be_named_in_several_ways(model, clips):
  expected = model.gradcam(clips, 'blocks.0.0', 'serve')
  for layer, label in (
    ('backbone/blocks/0/0', 1),
    ('backbone.blocks.0.0', '1'),
    ('blocks_0_0', 'serve'),
  ):
    np.testing.assert_array_equal(model.gradcam(clips, layer, label), expected)


@pytest.mark.parametrize(
  'layer, label, message',
  [
    ('blocks.0.2', None, 'expected one of blocks.0.0, blocks.0.1'),
    ('patch_embeds.0', None, 'expected one of blocks.0.0, blocks.0.1'),
    ('blocks.0.0', 'swerve', "such as 'serve', or a number below 2"),
    ('blocks.0.0', 'xyz', "such as 'café spike', 'serve', or a number below 2"),
    ('blocks.0.0', 2, 'a number below 2'),
    ('blocks.0.0', -1, 'a number below 2'),
  ],
)
def test_unknown_layer_or_class_raises(model, clips, layer, label, message):
  with pytest.raises(UserError, match=message):
    model.gradcam(clips, layer, label)


# --- Attention


def blocks(grid: Any, kernel: Any):
  """Yields the slices that a convolution with stride = kernel reads."""
  counts = [g // k for g, k in zip(grid, kernel, strict=True)]
  for place in itertools.product(*map(range, counts)):
    yield tuple(
      slice(i * k, (i + 1) * k) for i, k in zip(place, kernel, strict=True)
    )


@pytest.mark.slow
def test_attention_agrees_with_computation_from_parameters(
  model, variables, clips
):
  def apply(variables: Any, clips: Any) -> Any:
    return model.model.apply(
      variables,
      clips,
      capture_intermediates=lambda module, _: module.name == 'norm1',
      mutable=['intermediates'],
    )

  state = jax.jit(apply)(variables, clips)[1]
  [x] = state['intermediates']['backbone']['blocks_0_1']['norm1']['__call__']
  x = np.asarray(x[1], np.float64)
  p, statistics = (
    jax.tree.map(np.float64, variables[name]['backbone']['blocks_0_1']['attn'])
    for name in ('params', 'batch_stats')
  )

  def pool(x, layer, kernel):
    weights, bias = p[layer]['kernel'], p[layer]['bias']
    assert weights.shape[:3] == kernel
    return np.array(
      [
        (x[b] * weights).sum((0, 1, 2)) + bias
        for b in blocks(x.shape[:3], kernel)
      ]
    )

  y = pool(x, 'lr_0', (1, 4, 4)).reshape(4, 4, 4, -1)
  y = (y - statistics['lr_1']['mean']) / np.sqrt(
    statistics['lr_1']['var'] + 1e-5
  )
  y = np.maximum(y * p['lr_1']['scale'] + p['lr_1']['bias'], 0)
  keys = np.concatenate([pool(x, 'sr', (1, 4, 4)), pool(y, 'lr_3', (2, 1, 1))])
  keys -= keys.mean(-1, keepdims=True)
  keys /= np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-5)
  keys = keys * p['norm']['scale'] + p['norm']['bias']
  k = np.einsum('mc,cne->nme', keys, p['kv']['kernel'][:, 0])
  k += p['kv']['bias'][0][:, None]
  token = (3, 6, 2)
  q = np.einsum('c,cne->ne', x[token], p['q']['kernel']) + p['q']['bias']
  weights = np.exp(np.einsum('ne,nme->nm', q, k) / np.sqrt(8))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.zeros((4, 17, 17))
  seen = [
    *blocks(expected.shape, (1, 4, 4)),
    *blocks(expected.shape, (2, 4, 4)),
  ]
  for place, weight in zip(seen, weights.mean(0), strict=True):
    expected[place] += weight / expected[place].size
  assert expected.max() > 1.5 * expected.mean()

  actual = model.attention(clips, 'blocks.0.1', token)[1]
  np.testing.assert_allclose(actual, expected, atol=1e-3 * expected.max())
  assert actual.sum() == pytest.approx(1, abs=1e-4)


def test_attention_of_unknown_token_or_window_block_raises(model, clips):
  with pytest.raises(UserError, match='within windows; .* such as blocks.0.1'):
    model.attention(clips, 'blocks.0.0', (0, 0, 0))
  with pytest.raises(UserError, match=r'below \(4, 17, 17\)'):
    model.attention(clips, 'blocks.0.1', (4, 0, 0))
