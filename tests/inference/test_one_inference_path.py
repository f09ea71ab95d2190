"""All ways to use a checkpoint agree, and the notebook runs."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from types import ModuleType
from typing import Any
import zipfile

import jax
from jax import export as jax_export
import nbformat
import numpy as np
import pytest

import dualformer_jax
from dualformer_jax import convert, export, predict
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from tests import in_process, training_command
from tests.input_pipeline import videos

NOTEBOOK = training_command.REPOSITORY / 'scripts' / 'colab_eval.ipynb'
# The model of training_command.TINY.
FIELDS: dict[str, Any] = {
  'depths': (2,),
  'embed_dims': (16,),
  'num_heads': (2,),
  'num_classes': 8,
  'num_frames': 16,
  'image_size': 32,
  'window': (8, 4, 4),
  'fine_sizes': ((8, 4, 4),),
  'coarse_sizes': ((4, 2, 2),),
}
# Runs a notebook in a separate kernel, as Jupyter does, and writes it back.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300).execute(cwd=sys.argv[2])
nbformat.write(notebook, sys.argv[1])
"""


def run(module: ModuleType, *flags: object) -> str:
  done = in_process.run(module, *flags)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module', name='environment')
def _environment(compilation_cache) -> dict[str, str]:
  path = (
    f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
  )
  return {**training_command.environment(compilation_cache), 'PATH': path}


@pytest.fixture(scope='module', name='pth')
def _pth(tmp_path_factory) -> pathlib.Path:
  """A PyTorch file of a random model whose predictions vary."""
  rng = np.random.default_rng(3)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    if 'scale' in name or 'var' in name:
      return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
    return rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype)

  folder = tmp_path_factory.mktemp('one')
  shapes = checkpoint.variable_shapes(DualFormer(**FIELDS), 'FIELDS')
  checkpoint.save_model(
    folder / 'original',
    jax.tree_util.tree_map_with_path(draw, shapes),
    checkpoint.CheckpointMetadata(
      FIELDS, Preprocessing(16, 1, 32), tuple('abcdefgh')
    ),
  )
  run(convert, f'--src={folder}/original', f'--dst={folder}/model.pth')
  return folder / 'model.pth'


@pytest.fixture(scope='module', name='notebook')
def _notebook(pth, motion_dataset, environment) -> nbformat.NotebookNode:
  """The notebook after it has run from start to end."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  [settings] = [
    cell
    for cell in notebook.cells
    if 'parameters' in cell.metadata.get('tags', ())
  ]
  wanted = {
    'SOURCE': str(pth),
    'FLAGS': ' '.join(f"'{flag}'" for flag in training_command.TINY)
    + ' --config.model.dtype=float32 --config.test.num_clips=2',
    'DATA': str(motion_dataset),
    'OUT': str(pth.parent / 'out'),
  }
  for name, value in wanted.items():
    line = re.compile(rf'^{name} = .*$', re.MULTILINE)
    assert len(line.findall(settings.source)) == 1
    settings.source = line.sub(
      lambda _, x=(name, value): f'{x[0]} = {x[1]!r}', settings.source
    )
  path = pth.parent / 'run.ipynb'
  nbformat.write(notebook, path)
  done = subprocess.run(
    [sys.executable, '-c', EXECUTE, path, training_command.REPOSITORY],
    cwd=training_command.REPOSITORY,
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return nbformat.read(path, as_version=4)


def outputs(notebook: nbformat.NotebookNode, words: str) -> tuple[str, Any]:
  """Returns the printed text and the result of the cell with these words."""
  [cell] = [cell for cell in notebook.cells if words in cell.source]
  text = ''.join(o.text for o in cell.outputs if o.output_type == 'stream')
  text = text.replace('\r\n', '\n')  # commands write to a terminal
  values = [o.data for o in cell.outputs if o.output_type == 'execute_result']
  return text, values[-1] if values else None


def test_notebook_is_stored_without_outputs():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert cell.outputs == []
      assert cell.execution_count is None


@pytest.mark.slow
def test_notebook_runs_to_its_end(notebook):
  assert all(
    cell.execution_count for cell in notebook.cells if cell.cell_type == 'code'
  )
  text, _ = outputs(notebook, 'dualformer_jax.predict')
  assert re.search(
    r'0\.\d{4}  (left|right|up|down|\w*clockwise|grow|shrink)', text
  )
  _, picture = outputs(notebook, 'dualformer_jax.gradcam')
  film = videos.decode_all(base64.b64decode(picture['image/gif']))
  assert film.shape == (16, 256, 256, 3)
  text, _ = outputs(notebook, '--mode=test')
  assert re.search(
    r'^top-1 accuracy \d+\.\d% on 48 videos$', text, re.MULTILINE
  )


@pytest.mark.slow
def test_all_commands_give_the_same_probabilities(
  notebook, pth, motion_dataset
):
  out = pth.parent / 'out'
  folder, video = out / 'checkpoint', out / 'video.mp4'
  ways: dict[str, dict[str, float]] = {}

  _, value = outputs(notebook, 'recognizer.predict')
  ways['notebook'] = dict(ast.literal_eval(value['text/plain']))

  text, _ = outputs(notebook, 'dualformer_jax.gradcam')
  lines = re.findall(r'^ +(\d\.\d{6})  (\w+)$', text, re.MULTILINE)
  ways['gradcam'] = {name: float(number) for number, name in lines}

  data_dir = str(motion_dataset)
  example = PreparedDataset('motion', 'validation', data_dir)[0]
  assert video.read_bytes() == example.video
  names = dualformer_jax.load(folder).class_names
  with np.load(out / 'test' / 'views.npz') as arrays:
    [index] = np.flatnonzero(arrays['video_ids'] == example.video_id)
    logits = np.float64(arrays['logits'][index])
  scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
  probabilities = (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=0)
  ways['test'] = dict(zip(names, probabilities, strict=True))

  source = f'--checkpoint={folder}'
  text = run(predict, source, '--json', '--top_k=8', video)
  ways['predict'] = dict(json.loads(text)['predictions'])

  run(export, source, f'--out={out}/model.zip')
  with zipfile.ZipFile(out / 'model.zip') as file:
    program = jax_export.deserialize(bytearray(file.read('program.stablehlo')))
    weights: Any = dict(np.load(io.BytesIO(file.read('weights.npz'))))
  views = dualformer_jax.load(folder).views(str(video))
  [exported] = np.asarray(program.call(weights, views[None]))
  ways['export'] = dict(zip(names, exported.tolist(), strict=True))

  expected = ways.pop('test')
  assert np.ptp([*expected.values()]) > 0.01  # the classes differ
  for way, found in ways.items():
    assert len(found) >= 5, way
    assert found == pytest.approx(
      {name: expected[name] for name in found}, abs=1e-5
    ), way
