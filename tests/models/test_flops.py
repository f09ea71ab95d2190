"""Parameters and multiply-adds agree with the model and published figures."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dualformer_jax import complexity
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.models import flops, variants
from dualformer_jax.models.dualformer import DualFormer
from tests import in_process

ROOT = pathlib.Path(__file__).parents[2]
# Backbones of the published implementation, counted by fvcore: parameters, and
# 10^9 multiply-adds for a view of 32 x 224 x 224 pixels.
PUBLISHED = {
  'tiny': (21_767_360, '60.088'),
  'small': (48_908_064, '158.687'),
  'base': (86_837_632, '267.965'),
}
# Windows and pyramids that do not divide the grid, a fine level equal to the
# grid, and a coarse level in one stage only.
ODD: dict[str, Any] = dict(
  depths=(2, 3, 2),
  embed_dims=(16, 24, 32),
  num_heads=(2, 3, 4),
  num_classes=5,
  num_frames=10,
  image_size=76,
  window=(4, 7, 7),
  fine_sizes=((2, 4, 4), (2, 4, 4), (5, 4, 4)),
  coarse_sizes=((2, 3, 3), None, None),
  token_label=True,
  remat='none',
)


@pytest.mark.parametrize('name', PUBLISHED)
def test_totals_equal_published_figures(name):
  model = DualFormer(**getattr(variants, name.upper()), num_classes=400)
  rows = [r for r in flops.count(model) if r.module.startswith('backbone')]
  parameters, billions = PUBLISHED[name]
  assert sum(row.parameters for row in rows) == parameters
  assert f'{sum(row.multiply_adds for row in rows) / 1e9:.3f}' == billions


def test_parameters_of_each_layer_equal_those_of_the_model():
  model = DualFormer(**ODD)
  params = checkpoint.variable_shapes(model, 'ODD')['params']
  expected: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    module = jax.tree_util.keystr(path[:-1], simple=True, separator='/')
    expected[module] = expected.get(module, 0) + math.prod(leaf.shape)
  rows = flops.count(model)
  assert len({row.module for row in rows}) == len(rows)
  found = {row.module: row.parameters for row in rows if row.parameters}
  assert found == expected


def products(jaxpr: Any) -> int:
  """Returns the multiply-adds of all matrix products of a program."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval.shape
      inner = math.prod(left[axis] for axis in contracted)
      total += inner * math.prod(equation.outvars[0].aval.shape)
    times = equation.params.get('length', 1)  # of a scan
    for inside in jax.tree.leaves(
      equation.params,
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inside = getattr(inside, 'jaxpr', inside)
      if hasattr(inside, 'eqns'):
        total += times * products(inside)
  return total


def test_multiply_adds_equal_the_products_of_the_program():
  model = DualFormer(**ODD)
  shapes = checkpoint.variable_shapes(model, 'ODD')
  clips = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  program = jax.make_jaxpr(model.apply)(shapes, clips)
  # Pooling and the positional convolution are not matrix products.
  others = ('norm', 'norm1', 'norm2', 'sr', 'lr_0', 'lr_1', 'lr_3', 'proj_0')
  rows = flops.count(model)
  expected = sum(
    row.multiply_adds
    for row in rows
    if row.module.split('/')[-1] not in (*others, 'cls_head')
  )
  assert products(program.jaxpr) == expected


def test_convolutions_norms_and_the_mean_equal_hand_counts():
  """Stage 0 has 5 x 19 x 19 tokens, its coarse level 5 x 3 x 3, then 2 x 3 x 3.

  Its fine level has kernels of 2 x 4 x 4, so 2 x 4 x 4 tokens.
  """
  rows = {row.module: row for row in flops.count(DualFormer(**ODD))}
  tokens = 5 * 19 * 19
  name = 'backbone/blocks_0_1/attn'
  expected = {
    'backbone/patch_embeds_0/norm': 5 * tokens * 16,
    'backbone/blocks_0_0/norm1': 5 * tokens * 16,
    'backbone/pos_block_0/proj_0': 27 * tokens * 16,
    f'{name}/sr': (2 * 4 * 4) * (2 * 4 * 4) * 16,
    f'{name}/lr_0': (5 * 3 * 3) * (6 * 6) * 16,
    f'{name}/lr_1': 2 * (5 * 3 * 3) * 16,
    f'{name}/lr_3': (2 * 3 * 3) * 2 * 16,
    f'{name}/norm': 5 * (2 * 4 * 4 + 2 * 3 * 3) * 16,
    'backbone/norm': 5 * (5 * 4 * 4) * 32,
    'cls_head': 5 * 4 * 4 * 32,
  }
  assert {name: rows[name].multiply_adds for name in expected} == expected


# --- The command


def run(*flags: str) -> subprocess.CompletedProcess[str]:
  return in_process.run(complexity, *flags)


@pytest.mark.slow
def test_command_prints_published_totals():
  done = run(f'--config={ROOT}/configs/k400_tiny_tokenlabel.py')
  assert (done.returncode, done.stderr) == (0, '')
  lines = [line.rsplit(None, 3) for line in done.stdout.splitlines()]
  table = {
    line[0].strip(): [float(cell.replace(',', '')) for cell in line[1:]]
    for line in lines[2:]
    if line
  }
  assert table['backbone'] == [21_767_360, 60.088, 240.353]
  stages = [table[f'stage {i}'] for i in range(4)]
  assert sum(stage[0] for stage in stages) + 2 * 512 == 21_767_360
  assert table['head'][0] == 400 * (512 + 1)
  assert table['with the head'][0] == 21_767_360 + 400 * (512 + 1)
  hidden = 1024 * (512 + 1) + 2048 * (1024 + 1) + 400 * (2048 + 1)
  assert table['token-label head'][0] == hidden
  assert '32 x 224 x 224 pixels, 400 classes' in done.stdout
  assert '4 views' in done.stdout


def test_json_lists_every_layer_of_an_overridden_config():
  done = run(
    f'--config={ROOT}/configs/motion.py',
    '--json',
    '--config.model.image_size=64',
    '--config.test.num_crops=3',
  )
  assert (done.returncode, done.stderr) == (0, '')
  result = json.loads(done.stdout)
  assert result['views'] == 3
  layers = {layer['module']: layer for layer in result['layers']}
  tokens = 8 * 16 * 16
  fc1 = layers['backbone/blocks_0_1/mlp/fc1']
  assert fc1 == {
    'module': 'backbone/blocks_0_1/mlp/fc1',
    'stage': 0,
    'part': 'MLPs',
    'parameters': 128 * 33,
    'multiply_adds': tokens * 32 * 128,
  }
  for name in ('parameters', 'multiply_adds'):
    total = sum(layer[name] for layer in result['layers'])
    assert result['view']['with the head'][name] == total


def test_invalid_model_fails_with_one_line():
  done = run(
    f'--config={ROOT}/configs/k400_tiny.py',
    '--config.model.num_heads=(2, 4, 8, 5)',
  )
  assert done.returncode == 2
  assert done.stdout == ''
  [line] = done.stderr.splitlines()
  assert line.startswith('error: model.embed_dims is ')


@pytest.mark.slow
def test_classes_of_the_dataset_must_be_given():
  done = run(f'--config={ROOT}/configs/video_folder.py')
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: config.model.num_classes is 0, expected')
  flag = '--config.model.num_classes=3'
  done = run(f'--config={ROOT}/configs/video_folder.py', flag)
  assert (done.returncode, done.stderr) == (0, '')
