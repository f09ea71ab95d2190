"""Sharding changes what each device holds, never what a step computes."""

import json
import re

import jax
import numpy as np
import pytest

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.models.dualformer import DualFormer
from tests import eight_devices, reference_arrays

P = jax.P


def _mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
  """Returns a mesh of repeated devices, to test the rules."""
  device = jax.devices('cpu')[0]
  devices = np.full((data, fsdp, tensor), device)
  return jax.sharding.Mesh(devices, sharding.AXES)


# --- On 8 virtual devices


@pytest.fixture(scope='module', name='runs')
def _runs() -> list[dict]:
  lines = eight_devices.run('five_steps').splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(runs):
  alone, *others = runs
  assert [list(run['axes'].values()) for run in others] == [
    [4, 2, 1],
    [2, 2, 2],
  ]
  assert len(set(alone['losses'])) == 5
  for run in others:
    np.testing.assert_allclose(
      run['losses'], alone['losses'], rtol=1e-5, err_msg=str(run['axes'])
    )


@pytest.mark.slow
def test_fsdp_shards_parameters_and_optimizer_state(runs):
  for run in runs[1:]:
    shares = run['axes']['fsdp'] * run['axes']['tensor']
    # Params, optimizer state: bytes that each of the 8 devices holds.
    for held, total in zip(run['held'], run['total'], strict=True):
      assert min(held) >= total / shares
      # More than an equal share: arrays of less than 1,024 numbers are
      # replicated, and `tensor` only shards attention and MLP.
      assert max(held) <= 1.35 * total / shares
    assert run['largest_copied'] < 1024


@pytest.mark.slow
def test_initial_state_does_not_depend_on_the_mesh():
  assert eight_devices.run('initial_state') == 'the same\n'


# --- Rules


@pytest.mark.parametrize(
  ('name', 'shape', 'axes', 'expected'),
  [
    # Heads and hidden channels along `tensor`.
    ('attn/qkv/kernel', (64, 3, 4, 16), (1, 1, 2), P(None, None, 'tensor')),
    ('attn/qkv/bias', (3, 4, 16), (1, 1, 2), P(None, 'tensor')),
    ('attn/q/kernel', (64, 4, 16), (1, 1, 4), P(None, 'tensor')),
    ('attn/kv/kernel', (64, 2, 4, 16), (1, 1, 2), P(None, None, 'tensor')),
    ('attn/proj/kernel', (4, 16, 64), (1, 1, 2), P('tensor')),
    ('attn/proj/bias', (64,), (1, 1, 2), P()),
    ('mlp/fc1/kernel', (64, 256), (1, 1, 2), P(None, 'tensor')),
    ('mlp/fc1/bias', (256,), (1, 1, 2), P('tensor')),
    ('mlp/fc2/kernel', (256, 64), (1, 1, 2), P('tensor')),
    ('mlp/fc2/bias', (64,), (1, 1, 2), P()),
    ('cls_head/fc_cls/kernel', (64, 256), (1, 1, 2), P()),
    # As many heads as cannot be split: not at all.
    ('attn/qkv/kernel', (64, 3, 3, 32), (1, 1, 2), P()),
    # The largest dimension that is free and divisible along `fsdp`.
    ('mlp/fc1/kernel', (64, 256), (1, 4, 1), P(None, 'fsdp')),
    ('mlp/fc1/kernel', (64, 256), (1, 4, 2), P('fsdp', 'tensor')),
    ('mlp/fc2/kernel', (256, 64), (1, 4, 2), P('tensor', 'fsdp')),
    ('attn/qkv/kernel', (64, 3, 4, 16), (1, 2, 2), P('fsdp', None, 'tensor')),
    (
      'pos_block_0/proj_0/kernel',
      (3, 3, 3, 64),
      (1, 4, 1),
      P(*3 * [None], 'fsdp'),
    ),
    ('attn/sr/kernel', (5, 35, 7, 9), (1, 5, 1), P(None, 'fsdp')),
    ('attn/sr/kernel', (5, 35, 7, 9), (1, 2, 1), P()),
    # Too small to shard.
    ('norm/scale', (1023,), (1, 3, 1), P()),
    ('norm/scale', (1024,), (1, 2, 1), P('fsdp')),
    ('count', (), (2, 2, 2), P()),
  ],
)
def test_rules_shard_arrays(name, shape, axes, expected):
  for path in (name, f'backbone/blocks_0_0/{name}', f'0/mu/backbone/{name}'):
    spec = sharding.partition_spec(path, shape, _mesh(*axes))
    assert spec == P(*expected, *[None] * (len(shape) - len(expected))), path


def test_tiny_is_sharded_evenly_along_fsdp():
  """Each of 8 devices along fsdp holds about an eighth."""
  model = DualFormer(**reference_arrays.MODELS['tiny'])
  shapes = checkpoint.variable_shapes(model, 'tiny')
  held = total = 0
  for leaf, where in zip(
    jax.tree.leaves(shapes),
    jax.tree.leaves(sharding.tree_shardings(shapes, _mesh(fsdp=8))),
    strict=True,
  ):
    held += np.prod(where.shard_shape(leaf.shape), dtype=int)
    total += leaf.size
  assert held / total < 1.05 / 8


def test_batch_is_sharded_over_data_and_fsdp():
  batch = sharding.put_batch(
    {'clips': np.arange(12).reshape(4, 3), 'labels': np.arange(4)}, _mesh()
  )
  np.testing.assert_array_equal(batch['clips'], np.arange(12).reshape(4, 3))
  for array in batch.values():
    assert array.sharding.spec == P(('data', 'fsdp'))


def test_local_batch_indices_are_those_of_local_devices(monkeypatch):
  assert sharding.local_batch_indices(_mesh(), 8) == list(range(8))
  # Of a host with three devices, two of which share rows along `tensor`.
  held = {'a': (slice(4, 6),), 'b': (slice(0, 2),), 'c': (slice(4, 6),)}
  monkeypatch.setattr(
    jax.NamedSharding, 'addressable_devices_indices_map', lambda *_: held
  )
  assert sharding.local_batch_indices(_mesh(), 8) == [0, 1, 4, 5]


def test_put_tree_shards_host_arrays(monkeypatch):
  mesh = _mesh()
  where = jax.NamedSharding(mesh, P('fsdp'))
  values = np.arange(6.0)
  (put,) = sharding.put_tree([values], [where])
  np.testing.assert_array_equal(put, values)
  assert put.sharding == where
  # What lies there is not read, as a host may have only a part of it.
  monkeypatch.setattr(np, 'asarray', None)
  assert sharding.put_tree(put, where) is put


# --- Meshes


def test_minus_one_takes_all_remaining_devices():
  devices = jax.device_count()
  for name in sharding.AXES:
    axes = {'data': 1, 'fsdp': 1, 'tensor': 1, name: -1}
    mesh = sharding.make_mesh(axes, batch_size=4 * devices)
    assert mesh.axis_names == ('data', 'fsdp', 'tensor')
    assert mesh.shape[name] == devices == mesh.size


@pytest.mark.parametrize(
  ('sizes', 'expected'),
  [
    ((1, 1, 4096), 'does not multiply to'),
    ((-1, 1, 4096), 'does not multiply to'),
  ],
)
def test_mesh_of_wrong_size_raises(sizes, expected):
  axes = dict(zip(sharding.AXES, sizes, strict=True))
  with pytest.raises(UserError, match=re.escape(expected)):
    sharding.make_mesh(axes, batch_size=4096)


@pytest.mark.parametrize(('batch_size', 'num_microbatches'), [(8, 3), (7, 2)])
def test_indivisible_batch_raises(batch_size, num_microbatches):
  axes = {'data': -1, 'fsdp': 1, 'tensor': 1}
  devices = jax.device_count()
  with pytest.raises(
    UserError, match=f'use a multiple of {num_microbatches * devices}'
  ):
    sharding.make_mesh(axes, batch_size, num_microbatches)
  sharding.make_mesh(axes, 2 * num_microbatches * devices, num_microbatches)
