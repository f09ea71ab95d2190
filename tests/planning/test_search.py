"""The search compiles the fastest settings that fit, and few others."""

import logging
from typing import Any

import pytest

from configs import motion
from dualformer_jax.errors import UserError
from dualformer_jax.planning import chips, program, search
from dualformer_jax.planning.compile import Plan, Settings


def settings(index: int) -> Settings:
  return Settings(1, 1, 1, index, 'none')


@pytest.fixture
def target(one_device) -> chips.Target:
  """A device with 10 bytes of memory."""
  chip = chips.Chip('chip', 1.0, 10.0, 1.0, 1.0)
  return chips.Target(chip, one_device.devices)


@pytest.fixture
def compiled(monkeypatch) -> list[int]:
  """Settings compiled. They need 12 - 2i bytes, and are estimated at half."""
  indices = []

  def compile_step(config, settings, target, effort):
    del config, target, effort
    index = settings.accumulation_steps
    indices.append(index)
    work = program.Program(0, 0, (), 0, {})
    return Plan(settings, 12 - 2 * index, 0, 0.0, 0.0, work)

  monkeypatch.setattr(search, 'compile_step', compile_step)
  monkeypatch.setattr(
    search,
    '_estimate_all',
    lambda *_: [search.Estimate(settings(i), i, 6 - i) for i in range(6)],
  )
  return indices


def test_search_returns_fastest_settings_that_fit(target, compiled):
  plan = search.search(motion.get_config(), target, max_compiles=4)
  # The estimate of settings 0 is too low; corrected, settings 1 are the next.
  assert compiled == [0, 1]
  assert plan.settings == settings(1)


def test_search_compiles_smallest_settings_if_none_fit(
  target, compiled, monkeypatch
):
  monkeypatch.setattr(
    search,
    '_estimate_all',
    lambda *_: [search.Estimate(settings(i), i, 60 - i) for i in range(6)],
  )
  plan = search.search(motion.get_config(), target, max_compiles=1)
  assert compiled == [5]
  assert plan.settings == settings(5)


def test_search_raises_if_nothing_fits(target, compiled):
  with pytest.raises(UserError, match='use more devices'):
    search.search(motion.get_config(), target, max_compiles=1)
  assert compiled == [0]


def test_batch_that_no_mesh_can_split_raises(one_device):
  config: Any = motion.get_config()
  config.batch_size = 8
  target = chips.Target(one_device.chip, list(one_device.devices) * 3)
  with pytest.raises(UserError, match='make it a multiple'):
    search.search(config, target, max_compiles=1)


def test_first_estimate_is_pure_data_parallelism(one_device):
  target = chips.Target(one_device.chip, list(one_device.devices) * 4)
  config: Any = motion.get_config()
  config.model.update(
    depths=(2,),
    embed_dims=(16,),
    num_heads=(1,),
    fine_sizes=((8, 4, 4),),
    coarse_sizes=(None,),
  )
  candidates = list(search._candidates(config, 4))
  # tensor 1, as there is one head; fsdp 1, 2, 4; 8 clips per device in 1, 2, 4
  # or 8 micro-batches; three values of remat.
  assert len(candidates) == 3 * 4 * 3
  estimates = search._estimate_all(config, target, candidates)
  best = min(estimates, key=search._order)
  assert best.settings == Settings(4, 1, 1, 1, 'none')
  sharded = Settings(1, 4, 1, 1, 'none')
  [other] = [e for e in estimates if e.settings == sharded]
  assert other.memory < best.memory


def test_search_logs_what_each_compilation_found(target, compiled, caplog):
  with caplog.at_level(logging.INFO):
    search.search(motion.get_config(), target, max_compiles=4)
  lines = [record.getMessage() for record in caplog.records]
  found = [line for line in lines if 'fit' in line]
  assert [line.split(':')[0] for line in found] == ['does not fit', 'fits']
  assert found[0].endswith('5 settings remain')
  assert found[1].endswith('0 settings remain')  # none is faster


def test_finding_names_memory_and_the_slowest_part():
  chip = chips.Chip('chip', 1e12, 10e9, 1e12, 1.0)
  target = chips.Target(chip, [])
  work = program.Program(2 * 10**12, 10**12, (), 0, {})
  plan = Plan(settings(1), 3.04e9, 0, 0.0, 0.0, work)
  assert search._finding(plan, target) == (
    'fits: 3.0 of 10.0 GB per device, a step takes at least 2000.0 ms by '
    'arithmetic'
  )
  large = Plan(settings(1), 12.5e9, 0, 0.0, 0.0)
  assert search._finding(large, target) == (
    'does not fit: 12.5 of 10.0 GB per device'
  )
