"""What is tried on 8 virtual devices: `python -m tests.eight_devices NAME`.

In a process of its own, as the number of devices is settled when JAX starts.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any
from unittest import mock

from tests import xla_flags

if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 ' + xla_flags.fast_compilation(0)
  )

import jax
import numpy as np
import optax

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.distributed import sharding
from dualformer_jax.kernels import dispatch, mlp
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import augment, step
from dualformer_jax.training import optimizer as optimizers
from dualformer_jax.training.state import TrainState, init_state
from tests.checkpoints import test_checkpoint
from tests.kernels import (
  interpreted_gpu,
  interpreted_tpu,
  test_branches_tpu,
  test_mlp,
  test_projections,
  test_window_branch,
)
from tests.training import test_augment, test_optimizer

ROOT = pathlib.Path(__file__).parents[1]


def run(name: str, *arguments: object) -> str:
  """Returns what function `name` of this file prints on 8 devices."""
  done = subprocess.run(
    [sys.executable, '-m', 'tests.eight_devices', name, *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def sharded_kernels() -> None:
  """Prints the largest errors of fused operations whose clips are sharded.

  All start from one process, which takes seconds.
  """
  axes = {'data': 4, 'fsdp': 2, 'tensor': 1}
  mesh = sharding.make_mesh(axes, 8)
  window = 8, 2, 4
  expected = test_projections.run_block(window)

  def block(name, find):
    with (
      jax.set_mesh(mesh),
      mock.patch.object(test_projections.attention, name, find),
    ):
      return largest_error(test_projections.run_block(window), expected)

  errors = {
    'MLP': mlp_branch(mesh),
    'projections': block('find_projections', test_projections.find_plain),
    'window branch': block('find_branch', test_window_branch.find_plain),
  }
  branches_of_tpus()
  if jax.__version_info__ >= (0, 11):
    errors['AdamW'] = adamw_of_gpus()
  print(json.dumps(errors))


def largest_error(actual: list[Any], expected: list[Any]) -> float:
  """Returns the largest difference, relative to the arrays' largest values."""
  errors = [
    abs(a - e).max() / abs(e).max()
    for a, e in zip(
      map(np.asarray, actual), map(np.asarray, expected), strict=True
    )
  ]
  return float(np.max(errors))


def mlp_branch(mesh: jax.sharding.Mesh) -> float:
  """Returns the largest error of a fused MLP branch."""
  arguments, dout = test_mlp.draw(8, 30, 16, 'float32')
  expected = test_mlp.run(test_mlp.formula, arguments, dout)
  module = types.SimpleNamespace(
    fits=lambda *sizes: sizes == (1, 30, 16, 64),
    mlp=test_mlp.formula,
  )

  def fused(*arguments):
    return mlp._fused(module, *arguments)

  with jax.set_mesh(mesh), mock.patch.object(mlp, 'composed', fused):
    actual = test_mlp.run(test_mlp.branch(dispatch.Compute()), arguments, dout)
  return largest_error(actual, expected)


def adamw_of_gpus() -> float:
  """Returns the largest error of AdamW by kernels on all devices."""
  params, gradients, *_ = test_optimizer.kernel_arrays()
  adamw = optimizers.make_optimizer(
    params, 0.1, 0.3, test_optimizer.RECIPE, max_grad_norm=40.0
  )
  state = adamw.transformation.init(params)
  arguments = gradients, state, params
  expected = optimizers.apply_gradients(adamw.transformation, *arguments)
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1}, 8)
  with jax.set_mesh(mesh), interpreted_gpu.interpreted('adam_gpu') as module:
    actual = jax.jit(functools.partial(adamw._apply_fused, module))(*arguments)
  return largest_error(jax.tree.leaves(actual), jax.tree.leaves(expected))


def branches_of_tpus() -> None:
  """Asserts that kernels for TPUs on all devices agree with one."""
  with interpreted_tpu.pretend():
    x, dy, scale = test_branches_tpu.draw_branches()
    expected = test_branches_tpu.run_branches(x, dy, scale)
    axes = {'data': 4, 'fsdp': 2, 'tensor': 1}
    with jax.set_mesh(sharding.make_mesh(axes, batch_size=len(x))):
      actual = test_branches_tpu.run_branches(x, dy, scale)

  def compare(actual, expected):
    actual, expected = np.float32(actual), np.float32(expected)
    # Sums are in another order; the largest difference is one of bfloat16.
    tolerance = 2**-7 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)

  jax.tree.map(compare, actual, expected)


def save_and_restore_elsewhere(folder: str) -> None:
  """Saves from one mesh and restores onto others, exactly."""
  # Orbax compiles a program for nearly each parameter.
  one_stage: Any = {
    'depths': (2,),
    'embed_dims': (16,),
    'num_heads': (2,),
    'fine_sizes': ((1, 2, 2),),
    'coarse_sizes': ((1, 1, 1),),
  }
  model = DualFormer(**(test_checkpoint.FIELDS | one_stage))
  optimizer = optax.adam(1e-3)

  def init():
    return init_state(model, optimizer, seed=0)

  abstract = jax.eval_shape(init)

  def shardings(**axes: int) -> Any:
    mesh = sharding.make_mesh(axes, batch_size=8)
    return sharding.tree_shardings(abstract, mesh)

  saved = jax.tree.map(
    lambda leaf, where: jax.device_put(
      np.arange(1, leaf.size + 1, dtype=leaf.dtype).reshape(leaf.shape), where
    ),
    abstract,
    shardings(data=1, fsdp=8, tensor=1),
  )
  saved = saved.replace(step=saved.step + 2)
  series = checkpoint.Checkpoints(folder)
  series.save(saved.trees(), test_checkpoint.make_metadata(step=3))
  series.wait()
  for axes in (
    {'data': 8, 'fsdp': 1, 'tensor': 1},
    {'data': 2, 'fsdp': 2, 'tensor': 2},
  ):
    there = shardings(**axes)
    on_mesh = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=where
      ),
      abstract,
      there,
    )
    trees, metadata = series.restore(on_mesh.trees())
    restored = TrainState.from_trees(trees, metadata.step, on_mesh.step)
    # On the host: JAX would compile a comparison for each shape and mesh.
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
      *jax.device_get((saved, restored)),
    )
    assert jax.tree.all(
      jax.tree.map(lambda x, where: x.sharding == where, restored, there)
    )
    kernel = restored.params['backbone']['blocks_0_0']['mlp']['fc1']['kernel']
    print(kernel.addressable_shards[0].data.shape)
  series.close()


def five_steps() -> None:
  """Prints what five steps give on one device and on meshes of eight."""
  model = DualFormer(
    depths=(2,),
    embed_dims=(64,),
    num_heads=(4,),
    num_classes=10,
    num_frames=8,
    image_size=32,
    fine_sizes=((4, 4, 4),),
    coarse_sizes=((2, 2, 2),),
    drop_path_rate=0.3,
    head_dropout=0.5,
    dtype='float32',
  )
  rng = np.random.default_rng(1)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      (path[-1].key == 'scale') + 0.1 * rng.standard_normal(leaf.shape)
    ).astype(leaf.dtype),
    checkpoint.variable_shapes(model, 'it'),
  )
  optimizer = optimizers.make_optimizer(
    params['params'],
    3e-3,
    0.05,
    (('.*pos_block.*', 1.0, 0.0), ('.*', 0.5, 1.0)),
  )
  # NumPy arrays: steps are given a state that they may use up.
  state = jax.tree.map(
    np.asarray,
    TrainState(
      step=np.zeros((), np.int32),
      params=params['params'],
      batch_stats=jax.tree.map(np.abs, params['batch_stats']),
      opt_state=optimizer.transformation.init(params['params']),
    ),
  )
  batches = [
    {
      'clips': rng.integers(0, 256, (8, 8, 32, 32, 3), np.uint8),
      'labels': rng.integers(0, 10, 8).astype(np.int32),
    }
    for _ in range(5)
  ]
  train_step = functools.partial(
    step.train_step,
    model=model,
    apply_gradients=optimizer.apply_gradients,
    options=step.StepOptions(seed=7),
    augment=functools.partial(
      augment.augment_batch,
      options=augment.AugmentOptions(
        (120.0,) * 3, (60.0,) * 3, num_classes=10, flip=True
      ),
    ),
  )

  losses = []
  on_one, one_step = (
    jax.device_put(state, jax.devices()[0]),
    jax.jit(train_step),
  )
  for batch in batches:
    on_one, metrics = one_step(on_one, batch)
    losses.append(float(metrics['loss']))
  print(json.dumps({'axes': None, 'losses': losses}))

  for sizes in ((4, 2, 1), (2, 2, 2)):
    axes = dict(zip(sharding.AXES, sizes, strict=True))
    mesh = sharding.make_mesh(axes, batch_size=8)
    shardings = sharding.tree_shardings(state, mesh)
    replicated = jax.NamedSharding(mesh, jax.P())
    on_mesh = jax.device_put(state, shardings)
    mesh_step = jax.jit(
      train_step, donate_argnums=0, out_shardings=(shardings, replicated)
    )
    losses = []
    with jax.set_mesh(mesh):
      for batch in batches:
        on_mesh, metrics = mesh_step(on_mesh, sharding.put_batch(batch, mesh))
        losses.append(float(metrics['loss']))
    held = [
      [
        sum(
          shard.data.nbytes
          for array in jax.tree.leaves(part)
          for shard in array.addressable_shards
          if shard.device == device
        )
        for device in jax.devices()
      ]
      for part in (on_mesh.params, on_mesh.opt_state)
    ]
    total = [
      sum(array.nbytes for array in jax.tree.leaves(part))
      for part in (on_mesh.params, on_mesh.opt_state)
    ]
    largest_copied = max(
      array.size
      for array in jax.tree.leaves(on_mesh)
      if array.addressable_shards[0].data.size == array.size
    )
    print(
      json.dumps(
        {
          'axes': axes,
          'losses': losses,
          'held': held,
          'total': total,
          'largest_copied': largest_copied,
        }
      )
    )


def augmented_batch() -> None:
  """Prints how all augmentations differ on one and on eight devices."""
  batch = test_augment.batch_of(test_augment.random_clips(16, 2, 12, 14))
  augmented = test_augment.everything()
  mesh = sharding.make_mesh({'data': 4, 'fsdp': 2, 'tensor': 1}, batch_size=16)
  results = [
    augmented(jax.random.key(0), where)
    for where in (batch, sharding.put_batch(batch, mesh))
  ]
  (alone, labels), (spread, spread_labels) = results
  print(
    json.dumps(
      {
        'devices': [len(clips.sharding.device_set) for clips, _ in results],
        'share_of_pixels_that_differ': float(
          np.mean(np.abs(np.asarray(alone) - np.asarray(spread)) > 1e-4)
        ),
        'largest_difference_of_labels': float(
          np.abs(np.asarray(labels) - np.asarray(spread_labels)).max()
        ),
      }
    )
  )


def initial_state() -> None:
  """Prints whether the first state is the same on one and on eight devices."""
  model = DualFormer(
    depths=(1,),
    embed_dims=(32,),
    num_heads=(2,),
    num_classes=10,
    num_frames=2,
    image_size=16,
    fine_sizes=((8, 7, 7),),
    coarse_sizes=((4, 4, 4),),
    dtype='float32',
  )

  def init():
    return init_state(model, optax.adam(1e-3), seed=3)

  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}, batch_size=8)
  where = sharding.tree_shardings(jax.eval_shape(init), mesh)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.jit(init)(),
    jax.jit(init, out_shardings=where)(),
  )
  print('the same')


if __name__ == '__main__':
  globals()[sys.argv[1]](*sys.argv[2:])
