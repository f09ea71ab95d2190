"""Kernels for TPUs, interpreted on a CPU."""

from collections.abc import Iterator
import contextlib
from unittest import mock

import jax.numpy as jnp
import pytest

from dualformer_jax.kernels import (
  attention_branch_tpu,
  attention_tpu,
  dispatch,
  mlp_tpu,
  tiles_tpu,
)


@contextlib.contextmanager
def pretend() -> Iterator[None]:
  """Pretends that the devices of this machine are TPUs."""
  pallas_call, dot = mlp_tpu.pl.pallas_call, tiles_tpu.dot

  def interpreted(*arguments, **options):
    return pallas_call(*arguments, **{**options, 'interpret': True})

  def float32_dot(x, y, x_axis, y_axis):
    # XLA on a CPU does not multiply all bfloat16 matrices; the products of
    # their elements are exact in float32.
    return dot(x.astype(jnp.float32), y.astype(jnp.float32), x_axis, y_axis)

  with contextlib.ExitStack() as stack:
    for target, name, value in (
      (dispatch, 'platform', lambda: 'tpu'),
      (dispatch, 'device_kind', lambda: 'TPU v5 lite'),
      (mlp_tpu.pl, 'pallas_call', interpreted),
      (mlp_tpu, 'dot', float32_dot),
      (attention_branch_tpu, 'dot', float32_dot),
      (attention_tpu, 'dot', float32_dot),
    ):
      stack.enter_context(mock.patch.object(target, name, value))
    yield


@pytest.fixture(name='tpu')
def tpu_fixture() -> Iterator[None]:
  """Pretends that the devices of this machine are TPUs."""
  with pretend():
    yield
