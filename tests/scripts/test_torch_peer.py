"""The PyTorch peer of the benchmarks agrees with the published figures."""

import importlib.util
import json
import pathlib
import types

import numpy as np
import pytest

from tests import reference_arrays

torch = pytest.importorskip('torch')
PEER = (
  pathlib.Path(__file__).parents[2] / 'scripts' / 'benchmarks' / 'torch_peer.py'
)


@pytest.fixture(scope='module')
def torch_peer() -> types.ModuleType:
  """The script, as a module."""
  spec = importlib.util.spec_from_file_location('torch_peer', PEER)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def channels_first(clips: np.ndarray):
  return torch.from_numpy(np.ascontiguousarray(clips.transpose(0, 4, 1, 2, 3)))


@pytest.mark.parametrize('attention', ['materialized', 'sdpa'])
@pytest.mark.parametrize('name', ['micro', 'micro16', 'tiny'])
def test_forward_agrees_with_the_published_implementation(
  torch_peer, name, attention
):
  fields = reference_arrays.MODELS[name]
  figures = reference_arrays.load(f'forward_{name}_seed1.npz')
  model = torch_peer.DualFormer(**fields, attention=attention).eval()
  torch_peer.load(model, reference_arrays.state_dict(name, seed=1))
  batch = len(figures['logits'])
  clips = reference_arrays.clips(batch, fields['num_frames'], 224, seed=1)
  with torch.no_grad():
    tokens = model.backbone(channels_first(clips))
    actual = {'logits': model.cls_head(tokens), 'features': tokens.mean(1)}
  for key, value in actual.items():
    error = np.abs(value.numpy() - figures[key]).max()
    assert error <= 1e-4 * np.abs(figures[key]).max(), key


@pytest.mark.slow
def test_training_agrees_with_the_published_implementation(torch_peer):
  figures = json.loads(
    (reference_arrays.DIRECTORY / 'train_micro_seed1.json').read_text()
  )
  model = torch_peer.DualFormer(
    **reference_arrays.MODELS['micro'], head_dropout=0.0
  )
  torch_peer.load(model, reference_arrays.state_dict('micro', seed=1))
  optimizer = torch_peer.make_optimizer(
    model, figures['lr'], figures['weight_decay']
  )
  labels = torch.tensor(figures['labels'])
  for index, expected in enumerate(figures['steps']):
    clips = reference_arrays.clips(
      figures['batch'], 32, 224, expected['clips_seed']
    )
    logits = model(channels_first(clips))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert abs(loss.item() - expected['loss']) <= 1e-4 * expected['loss']
    optimizer.zero_grad()
    loss.backward()
    if index == 0:
      for name, parameter in model.named_parameters():
        norm = expected['grad_norm'][name]
        # The gradient of the bias before BatchNorm is rounding error.
        named = name.replace('bias', 'weight') if 'lr.0' in name else name
        error = abs(parameter.grad.norm().item() - norm)
        assert error <= 1e-3 * expected['grad_norm'][named], name
    optimizer.step()
