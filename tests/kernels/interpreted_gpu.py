"""Kernels for Hopper GPUs on a CPU, in JAX's interpreter.

`python -m tests.kernels.interpreted_gpu mlp CHANNELS ...` checks the MLP
branch, and `windows CHANNELS ...` the attention branch of windows. Kernels of
several warpgroups need their own process: the interpreter blocks a thread of
XLA for each, and XLA starts one for each core unless NPROC is set.
"""

from collections.abc import Iterator
import contextlib
import importlib
import os
import pathlib
import subprocess
import sys
import types
from types import ModuleType
from unittest import mock

if __name__ == '__main__':
  os.environ.update(JAX_PLATFORMS='cpu', NPROC='8')

import jax
import jax.numpy as jnp
import pytest

from dualformer_jax.kernels import dispatch

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
  """Yields a module of kernels; all kernels are interpreted."""
  plgpu = importlib.import_module('jax.experimental.pallas.mosaic_gpu')
  hopper = importlib.import_module('dualformer_jax.kernels.hopper')

  def add_product(total, a, b):
    return total + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

  # The interpreter cannot add to products, nor multiply operands in registers.
  with (
    mock.patch.object(hopper, 'add_product', add_product),
    plgpu.force_gpu_interpret_mode(),
  ):
    yield importlib.import_module(f'dualformer_jax.kernels.{name}')


def pretend(monkeypatch: pytest.MonkeyPatch, device_kind: str) -> None:
  """Pretends that the devices of this machine are GPUs of some kind."""
  devices = [types.SimpleNamespace(device_kind=device_kind)]
  monkeypatch.setattr(dispatch, 'platform', lambda: 'gpu')
  monkeypatch.setattr(jax, 'devices', lambda: devices)


@contextlib.contextmanager
def names_of_kernels() -> Iterator[set[str]]:
  """Yields a set that gets the names of the kernels that are traced."""
  hopper = importlib.import_module('dualformer_jax.kernels.hopper')
  kernel, names = hopper.kernel, set()

  def traced(body, name, *arguments, **options):
    names.add(name)
    return kernel(body, name, *arguments, **options)

  with mock.patch.object(hopper, 'kernel', traced):
    yield names


def run(name: str, *channels: int) -> None:
  """Calls a function of this file for some channels in another process."""
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'tests.kernels.interpreted_gpu',
      name,
      *map(str, channels),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr


def mlp(channels: int) -> None:
  """Asserts that the MLP branch and its gradients agree with float64."""
  from tests.kernels import test_mlp

  with interpreted('mlp_gpu') as module:
    assert module.fits(2, 64, channels, 256)
    arguments, dout = test_mlp.draw(2, 64, channels, 'bfloat16', hidden=256)
    test_mlp.assert_agrees(module.mlp, arguments, dout, 2**-7)


def windows(channels: int) -> None:
  """Asserts that the attention branch of windows agrees with float64."""
  from tests.kernels import test_window_branch

  # Three tiles for one warpgroup, two for the other, of which one has padding.
  test_window_branch.check(1, (8, 5, 7), channels, (8, 5, 7))


if __name__ == '__main__':
  function = globals()[sys.argv[1]]
  for argument in sys.argv[2:]:
    function(int(argument))
