"""What is tried on 8 virtual devices: `python -m tests.eight_devices NAME`.

In a process of its own, as the number of devices is settled when JAX starts.
"""

import os
import pathlib
import subprocess
import sys
from typing import Any

if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import numpy as np
import optax

from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import checkpoint, sharding, step
from tests import test_checkpoint

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


def save_and_restore_elsewhere(folder: str) -> None:
  """Saves from one mesh and restores onto others, exactly."""
  model = DualFormer(**test_checkpoint.FIELDS)
  optimizer = optax.adam(1e-3)

  def init():
    return step.init_state(model, optimizer, seed=0)

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
  series.save(saved, test_checkpoint.description(step=3))
  series.wait()
  for axes in (
    {'data': 8, 'fsdp': 1, 'tensor': 1},
    {'data': 2, 'fsdp': 2, 'tensor': 2},
  ):
    there = shardings(**axes)
    restored, _ = series.restore(
      jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=where
        ),
        abstract,
        there,
      )
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
      saved,
      restored,
    )
    assert jax.tree.all(
      jax.tree.map(lambda x, where: x.sharding == where, restored, there)
    )
    kernel = restored.params['backbone']['blocks_3_0']['mlp']['fc1']['kernel']
    print(kernel.addressable_shards[0].data.shape)
  series.close()


if __name__ == '__main__':
  globals()[sys.argv[1]](*sys.argv[2:])
