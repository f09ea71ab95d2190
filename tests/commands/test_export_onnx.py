"""ONNX files agree with JAX, in onnxruntime; int8 weights."""

from __future__ import annotations

import functools
import io
import json
import math
import pathlib
import sys
from typing import Any
import zipfile

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

from dualformer_jax import export
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.inference import onnx_export, stored_weights
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from tests.inference import token_model


def random_views(recognizer: Recognizer, count: int) -> np.ndarray:
  p = recognizer.preprocessing
  shape = (count, p.num_frames, p.image_size, p.image_size, 3)
  return np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)


def run_graph(path: pathlib.Path, views: np.ndarray) -> np.ndarray:
  session = onnxruntime.InferenceSession(path)
  [found] = session.run(['probabilities'], {'views': views})
  assert isinstance(found, np.ndarray)
  return found


def expected_probabilities(
  recognizer: Recognizer, variables: Any, views: np.ndarray
) -> np.ndarray:
  """Computed with the plain implementations of all operations."""
  model = recognizer.model.clone(kernels='reference')
  output: Any = jax.jit(model.apply)(variables, recognizer.normalize(views))
  return np.asarray(recognizer.activation(output.logits))


@pytest.fixture(scope='module', name='recognizer')
def _recognizer() -> Recognizer:
  return token_model.make_recognizer(token_model.make_variables())


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('onnx') / 'model'
  checkpoint.save_model(
    folder, token_model.make_variables(), token_model.make_metadata()
  )
  return folder


@pytest.fixture(scope='module', name='path')
def _path(recognizer, tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('graph') / 'model.onnx'
  weights = stored_weights.flatten(recognizer.variables)
  line = onnx_export.export_onnx(recognizer, weights, path)
  assert 'agrees with JAX' in line
  return path


@pytest.fixture(name='run')
def _run(run_command):
  return functools.partial(run_command, export)


@pytest.mark.slow
def test_graph_agrees_with_jax_for_any_number_of_views(recognizer, path):
  views = random_views(recognizer, 3)
  expected = expected_probabilities(recognizer, recognizer.variables, views)
  for count in (1, 3):
    found = run_graph(path, views[:count])
    np.testing.assert_allclose(found, expected[:count], atol=1e-5)
  assert np.ptp(expected, axis=0).min() > 1e-3  # the views differ


@pytest.mark.slow
@pytest.mark.parametrize('head', ['linear', 'attentive'])
def test_unusual_models_agree_with_jax(tmp_path, head):
  fields: dict[str, Any] = {
    'head': head,
    'depths': (2, 2),
    'embed_dims': (16, 24),
    'num_heads': (2, 3),
    'num_classes': 5,
    'num_frames': 9,  # sizes that are no multiples of patches
    'image_size': 45,
    'window': (3, 4, 4),
    'fine_sizes': ((2, 4, 4), (8, 8, 8)),  # the second does not pool
    'coarse_sizes': (None, None),
    'dtype': 'float32',
  }
  shapes = checkpoint.variable_shapes(DualFormer(**fields), 'fields')
  rng = np.random.default_rng(4)
  variables: Any = jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes
  )
  recognizer = Recognizer(
    variables,
    checkpoint.CheckpointMetadata(
      fields, Preprocessing(9, 1, 45), tuple('abcde'), multi_label=True
    ),
    pathlib.Path('folder'),
  )
  path = tmp_path / 'model.onnx'
  weights = stored_weights.flatten(variables)
  onnx_export.export_onnx(recognizer, weights, path)
  views = random_views(recognizer, 2)
  expected = expected_probabilities(recognizer, variables, views)
  np.testing.assert_allclose(run_graph(path, views), expected, atol=1e-5)
  assert expected.sum(axis=1).max() > 1.1  # sigmoid


def test_file_is_valid_and_describes_itself(path):
  model = onnx.load(path)
  onnx.checker.check_model(model, full_check=True)
  [opset] = model.opset_import
  assert (opset.domain, opset.version) == ('', 20)
  session = onnxruntime.InferenceSession(path)
  [view], [output] = session.get_inputs(), session.get_outputs()
  assert (view.name, view.type) == ('views', 'tensor(uint8)')
  assert view.shape == ['views', 8, 68, 68, 3]
  assert (output.name, output.shape) == ('probabilities', ['views', 2])
  metadata = session.get_modelmeta().custom_metadata_map
  assert tuple(json.loads(metadata['class_names'])) == token_model.NAMES
  preprocessing = json.loads(metadata['preprocessing'])
  assert preprocessing['num_clips'] == 2
  assert json.loads(metadata['multi_label']) is False


@pytest.mark.slow
def test_command_exports_and_checks(run, folder, tmp_path):
  path = tmp_path / 'model.onnx'
  done = run(f'--checkpoint={folder}', f'--out={path}')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'onnxruntime agrees with JAX' in done.stdout
  done = run(f'--check={path}')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'agrees with its expected output' in done.stdout


def test_check_of_other_files_fails_in_one_line(run, path, tmp_path):
  changed = onnx.load(path)
  for prop in changed.metadata_props:
    if prop.key == 'golden_probabilities':
      prop.value = json.dumps([row[::-1] for row in json.loads(prop.value)])
  plain = onnx.load(path)
  del plain.metadata_props[:]
  content = path.read_bytes()
  for other, message in (
    (changed.SerializeToString(), 'do not use the file'),
    (plain.SerializeToString(), 'is damaged, or was not'),
    (content[: len(content) // 2], 'is damaged, or was not'),
    (b'', 'is damaged, or was not'),
  ):
    file = tmp_path / 'other.onnx'
    file.write_bytes(other)
    done = run(f'--check={file}')
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert message in line
  assert 'no such file' in run(f'--check={tmp_path}/absent.onnx').stderr


@pytest.mark.slow
def test_int8_weights_are_within_half_a_step(recognizer):
  weights = stored_weights.flatten(recognizer.variables)
  quantized = stored_weights.quantize(weights)
  restored = stored_weights.flatten(stored_weights.restore(quantized))
  assert restored.keys() == weights.keys()
  num_int8 = 0
  for name, array in weights.items():
    if quantized[name].dtype != np.int8:
      np.testing.assert_array_equal(restored[name], array)
      continue
    num_int8 += array.size
    # Each output channel, whose axes are those of the bias, has its own step.
    outputs = weights[name.replace('kernel', 'bias')].ndim
    inputs = tuple(range(array.ndim - outputs))
    step = np.abs(array).max(axis=inputs, keepdims=True) / 127
    assert np.all(np.abs(restored[name] - array) <= 0.501 * step), name
  assert num_int8 > 0.8 * sum(array.size for array in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['zip', 'onnx'])
def test_command_exports_int8_weights(
  run, recognizer, folder, tmp_path, suffix
):
  path = tmp_path / f'int8.{suffix}'
  done = run(f'--checkpoint={folder}', f'--out={path}', '--weights_dtype=int8')
  assert (done.returncode, done.stderr) == (0, '')
  first = done.stdout.splitlines()[0]
  change = float(first.removeprefix('int8 weights change').split()[-1])
  assert 0 < change < 0.1
  done = run(f'--check={path}')
  assert (done.returncode, done.stderr) == (0, '')
  quantized = stored_weights.quantize(
    stored_weights.flatten(recognizer.variables)
  )
  sizes = {name: x.size for name, x in quantized.items() if x.dtype == np.int8}
  if suffix == 'zip':
    done = run(f'--renew={path}', '--overwrite')
    assert (done.returncode, done.stderr) == (0, '')
    with zipfile.ZipFile(path) as file:
      arrays = np.load(io.BytesIO(file.read('weights.npz')))
    num_int8 = sum(x.size for x in arrays.values() if x.dtype == np.int8)
    assert num_int8 == sum(sizes.values())
    return
  num_int8 = sum(
    math.prod(x.dims)
    for x in onnx.load(path).graph.initializer
    if x.data_type == onnx.TensorProto.INT8
  )
  assert num_int8 == sum(
    size for name, size in sizes.items() if 'token_linear' not in name
  )
  views = random_views(recognizer, 2)
  variables = stored_weights.restore(quantized)
  expected = expected_probabilities(recognizer, variables, views)
  np.testing.assert_allclose(run_graph(path, views), expected, atol=1e-5)


@pytest.mark.parametrize(
  ('library', 'flags', 'extra'),
  [
    ('onnxruntime', ('--out=m.onnx',), 'onnx'),
    ('onnx', ('--out=m.onnx',), 'onnx'),
    ('qwix', ('--out=m.zip', '--weights_dtype=int8'), 'int8'),
  ],
)
def test_missing_extra_is_named(
  run, folder, tmp_path, monkeypatch, library, flags, extra
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, library, None)
  done = run(f'--checkpoint={folder}', *flags)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert f"pip install 'dualformer_jax[{extra}]'" in line
