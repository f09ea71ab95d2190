"""Kernels of devices that have some of the clips agree with one device."""

import json

import jax
import pytest

from tests import eight_devices


@pytest.mark.slow
def test_several_devices_agree_with_one():
  errors = json.loads(eight_devices.run('sharded_kernels'))
  kernels = {'MLP', 'projections', 'window branch'}
  if jax.__version_info__ >= (0, 11):  # has an interpreter of GPU kernels
    kernels.add('AdamW')
  assert set(errors) == kernels
  assert all(error < 1e-5 for error in errors.values())
