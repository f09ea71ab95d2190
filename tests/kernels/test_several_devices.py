"""Kernels of devices that have some of the clips agree with one device."""

import json

import pytest

from tests import eight_devices


@pytest.mark.slow
def test_several_devices_agree_with_one():
  errors = json.loads(eight_devices.run('sharded_kernels'))
  assert set(errors) == {'MLP', 'projections', 'window branch'}
  assert all(error < 1e-5 for error in errors.values())
