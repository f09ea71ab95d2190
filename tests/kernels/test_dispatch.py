"""One rule selects the implementation of an operation."""

import jax
import numpy as np
import pytest

from dualformer_jax.kernels import dispatch


@pytest.mark.parametrize(
  ('platform', 'kernels', 'expected'),
  [
    ('cpu', 'auto', 'for CPUs'),
    ('gpu', 'auto', 'default'),
    ('cpu', 'reference', 'plain'),
    ('gpu', 'reference', 'plain'),
  ],
)
def test_choose(monkeypatch, platform, kernels, expected):
  monkeypatch.setattr(dispatch, 'platform', lambda: platform)
  compute = dispatch.Compute('float32', kernels)
  assert compute.choose('plain', default='default', cpu='for CPUs') == expected


def test_without_a_variant_the_reference_is_chosen(monkeypatch):
  monkeypatch.setattr(dispatch, 'platform', lambda: 'tpu')
  assert dispatch.Compute().choose('plain', cpu='for CPUs') == 'plain'


def test_platform_and_device_count_are_those_of_the_mesh():
  assert dispatch.platform() == jax.default_backend()
  assert dispatch.device_count() == 1
  devices = np.array(jax.devices('cpu')[:1]).reshape(1, 1)
  with jax.set_mesh(jax.sharding.Mesh(devices, ('data', 'tensor'))):
    assert dispatch.platform() == 'cpu'
    assert dispatch.device_count() == 1
