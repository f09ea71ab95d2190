"""Devices to compile for."""

from collections.abc import Callable
import importlib.util

import jax
import pytest

from dualformer_jax.planning import chips


@pytest.fixture
def tpu_target(monkeypatch) -> Callable[[str], chips.Target]:
  """chips.find_target for TPUs, where libtpu is installed."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: NO PLAN FOR TPUS WAS TESTED')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  return chips.find_target


@pytest.fixture
def one_device() -> chips.Target:
  """One CPU device, to compile quickly, with the figures of a GPU."""
  return chips.Target(chips.CHIPS['a100'], jax.devices('cpu')[:1])
