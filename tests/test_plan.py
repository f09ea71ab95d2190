"""The plan is of the real step, agrees with counts by hand, and says its flags.

Everything runs as a process, as the devices are settled when JAX starts.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import planning, program, sharding
from tests import training_command

ROOT = pathlib.Path(__file__).parents[1]
MODEL = (*training_command.TINY, '--config.model.num_classes=8')


def run(*flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [
      sys.executable,
      '-m',
      'dualformer_jax.plan',
      '--config=configs/motion.py',
      '--config.dataset.data_dir=/nowhere',
      *flags,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
  )


def report(*flags: str) -> dict[str, Any]:
  done = run(*MODEL, '--videos=100', '--json', *flags)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def moved(plan: dict[str, Any]) -> set[tuple[str, str]]:
  return {(c['purpose'], c['axes']) for c in plan['collectives']}


def test_gpus_are_planned_for_without_one():
  plan = report('--devices=4', '--memory=40', '--compiles=1')
  assert not plan['is_exact']
  assert (plan['chip'], plan['devices']) == ('NVIDIA A100', 4)
  assert plan['memory']['has'] == 40e9
  assert plan['memory']['fits']
  # The batch of 8 is small: nothing is worth spreading or making anew.
  assert plan['flags'] == (
    '--config.mesh.data=4 --config.mesh.fsdp=1 --config.mesh.tensor=1 '
    '--config.accumulation_steps=1 --config.model.remat=none'
  )
  assert plan['flops'] == pytest.approx(plan['analytic_flops'], rel=0.05)
  assert ('sums of gradients', 'data') in moved(plan)
  assert plan['unexpected'] == []
  assert plan['unknown_loops'] == 0
  # motion.py: 100 videos are 12 steps of 8 an epoch.
  assert plan['steps'] % 12 == 0
  slowest = max(plan['seconds'].values())
  assert plan['hours'] == pytest.approx(plan['steps'] * slowest / 3600)
  assert plan['seconds']['arithmetic'] == plan['flops'] / 312e12


def test_a_tpu_slice_is_planned_for_without_one():
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: NO PLAN FOR TPUS WAS TESTED')
  plan = report(
    '--topology=v5e:2x2',
    '--nosearch',
    '--config.mesh.fsdp=2',
    '--config.model.remat=block',
  )
  assert plan['is_exact']
  assert (plan['chip'], plan['devices']) == ('TPU v5e', 4)
  assert plan['flops'] == pytest.approx(plan['analytic_flops'], rel=0.01)
  assert ('gathers of parameters', 'fsdp') in moved(plan)
  assert {axes for p, axes in moved(plan) if p == 'sums of gradients'} >= {
    'data x fsdp'  # of what is too small to be spread
  }
  assert plan['unexpected'] == []
  assert plan['unknown_loops'] == 0
  assert plan['memory']['fits']
  assert '--config.mesh.fsdp=2 ' in plan['flags']


def test_axes_of_a_mesh_may_split_those_of_a_slice(monkeypatch):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: NO MESH OF TPUS WAS TESTED')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  for topology, data in (('v6e:4x4', 4), ('v4:2x2x4', 4), ('v5p:4x4x4', 16)):
    target = planning.tpu(topology)
    mesh = sharding.make_mesh(
      {'data': -1, 'fsdp': 2, 'tensor': 2}, 64, 1, target.devices
    )
    assert dict(mesh.shape) == {'data': data, 'fsdp': 2, 'tensor': 2}
    assert set(mesh.devices.flat) == set(target.devices)


@pytest.mark.parametrize('as_training_does', [False, True])
def test_weights_are_gathered_before_they_are_used(
  monkeypatch, as_training_does
):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: NO GATHER OF TPUS WAS TESTED')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  mesh = sharding.make_mesh(
    {'data': 1, 'fsdp': -1, 'tensor': 1},
    16,
    devices=planning.tpu('v5e:4x4').devices,
  )
  tokens, channels, hidden = 16 * 4096, 512, 2048
  spread = {'kernel': jax.NamedSharding(mesh, jax.P(None, 'fsdp'))}

  def loss(params, x):
    kernel = sharding.gather_for_use(mesh)(params)['kernel']
    return jnp.sum(jnp.square(x @ kernel.astype(x.dtype)), dtype=jnp.float32)

  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(
        jax.grad(loss),
        out_shardings=spread,
        compiler_options=(
          sharding.compiler_options(mesh) if as_training_does else {}
        ),
      )
      .lower(
        {
          'kernel': jax.ShapeDtypeStruct(
            (channels, hidden), jnp.float32, sharding=spread['kernel']
          )
        },
        jax.ShapeDtypeStruct(
          (tokens, channels),
          jnp.bfloat16,
          sharding=jax.NamedSharding(mesh, sharding.BATCH),
        ),
      )
      .compile()
    )
  work = program.read(compiled.as_text() or '', mesh)
  kinds = {collective.kind for collective in work.collectives}
  # Forward, and the gradient of the kernel alone.
  flops = 2 * 2 * tokens // 16 * channels * hidden
  if as_training_does:
    assert kinds == {'all-gather', 'all-reduce'}
    assert work.flops == flops
  else:  # what the compiler would do; if not any more, no option is needed
    assert 'collective-permute' in kinds
    assert work.flops > 1.2 * flops


@pytest.mark.parametrize(
  ('shape', 'dtype', 'row'),
  [
    ((8, 56, 56, 64), jnp.bfloat16, 128),
    ((8, 56, 56, 96), jnp.float32, 128),
    ((8, 56, 56, 192), jnp.bfloat16, 256),
  ],
)
def test_what_a_layout_adds_counts_as_memory(shape, dtype, row):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: NO LAYOUT OF TPUS WAS TESTED')
  devices = np.array(planning.tpu('v5e:2x2').devices[:1])
  mesh = jax.sharding.Mesh(devices, ('data',))
  x = jax.ShapeDtypeStruct(
    shape,
    dtype,
    sharding=jax.NamedSharding(mesh, jax.sharding.PartitionSpec()),
  )
  compiled = jax.jit(lambda x: x + 1).lower(x).compile()
  array = 8 * 56 * 56 * row * jnp.dtype(dtype).itemsize
  read = program.read(compiled.as_text() or '', mesh)
  assert read.bytes == 2 * array
  costs: Any = compiled.cost_analysis()
  assert costs['bytes accessed'] == 2 * array


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ((), '--topology'),
    (('--devices=2', '--topology=v5e:2x2'), '--topology'),
    (('--topology=v9:2x2', '--videos=9', *MODEL), 'expected v4, v5e'),
    (('--devices=2', *MODEL), '--videos'),
    (
      # A DualFormer-B has fewer tokens than a model of one stage.
      (
        *('--devices=1', '--nosearch', '--videos=9', *MODEL),
        '--config.model.token_label=True',
      ),
      'expected the same size and grid',
    ),
    (
      ('--devices=2', '--videos=9', '--config.model.num_classes=0'),
      '--config.model.num_classes',
    ),
    (('--devices=3', '--videos=9', *MODEL), 'make it a multiple'),
  ],
)
def test_what_cannot_be_planned_is_told_in_one_line(flags, expected):
  done = run(*flags)
  assert (done.returncode, done.stdout) == (2, '')
  [line] = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert expected in line


@pytest.mark.parametrize(
  ('remat', 'anew'), [('none', 0), ('elementwise', 0), ('block', 1)]
)
def test_products_of_training_are_counted_as_by_hand(remat, anew):
  """One stage, one block: 2 x 2 x 2 tokens of 6 channels in one window."""
  model = DualFormer(
    depths=(1,),
    embed_dims=(6,),
    num_heads=(2,),
    num_classes=5,
    num_frames=4,
    image_size=8,
    fine_sizes=((8, 7, 7),),
    coarse_sizes=(None,),
    remat=remat,
  )
  patches = 8 * (2 * 4 * 4 * 3) * 6  # no gradient of the pixels
  linear = 8 * 6 * (3 * 6 + 6 + 4 * 6)  # qkv, proj, fc1
  fc2 = 8 * 6 * 4 * 6  # what it puts out is never made anew
  attention = 2 * 8 * 8 * 6  # of which the scores, one half, are made anew
  head = 6 * 5
  assert planning.matrix_flops(model) == 2 * (
    2 * patches
    + (3 + anew) * linear
    + 3 * fc2
    + (3.5 + anew) * attention
    + 3 * head
  )


@pytest.mark.parametrize('stored', ['', '/stored'])
def test_token_labels_are_planned_for(stored):
  """By a device of the CPU, which compiles a teacher of published size soon."""
  done = run(
    '--devices=1',
    '--nosearch',
    '--videos=100',
    '--json',
    '--config.model.num_classes=8',
    '--config.model.token_label=True',
    # As many stages as its teacher, and so as many tokens.
    '--config.model.depths=(2, 1, 1, 1)',
    '--config.model.embed_dims=(16, 16, 16, 16)',
    '--config.model.num_heads=(2, 2, 2, 2)',
    '--config.model.fine_sizes=((8, 4, 4), (8, 4, 4), (8, 2, 2), (8, 1, 1))',
    '--config.model.coarse_sizes=((4, 2, 2), None, None, None)',
    '--config.batch_size=2',
    f'--config.token_labels.stored={stored}',
  )
  assert done.returncode == 0, done.stderr
  plan = json.loads(done.stdout)
  assert plan['flops'] == pytest.approx(plan['analytic_flops'], rel=0.05)
  assert plan['unexpected'] == []
  # A DualFormer-B has more to do than the tiny model, if it is asked.
  assert (plan['analytic_flops'] < 1e10) == bool(stored)


@pytest.mark.parametrize(
  ('kind', 'axes', 'elements', 'count', 'expected'),
  [
    ('all-reduce', ('data',), 64, 2, 'sums of gradients'),
    ('reduce-scatter', ('fsdp',), 64, 2, 'sums of gradients'),
    ('all-gather', ('fsdp',), 64, 1, 'gathers of parameters'),
    ('all-reduce', ('tensor',), 10**7, 1, 'sums over `tensor`'),
    ('all-reduce', ('data',), 49, 1, 'statistics'),
    ('all-gather', ('fsdp',), 49 * 2**18, 1, 'UNEXPECTED'),
    ('all-gather', ('data',), 49 * 2**10, 2**8, 'UNEXPECTED'),
    ('all-to-all', ('tensor',), 49 * 2**18, 1, 'UNEXPECTED'),
  ],
)
def test_activations_that_are_gathered_are_seen(
  kind, axes, elements, count, expected
):
  collective = program.Collective(
    kind, axes, 4, count, elements, 4 * elements, 'x'
  )
  assert planning._purpose(collective, {64, 128}) == expected
