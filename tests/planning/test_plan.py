"""The plan command: its report, and its errors."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from configs import motion
from dualformer_jax import plan
from dualformer_jax.errors import UserError
from dualformer_jax.training import setup
from tests import training_command

ROOT = pathlib.Path(__file__).parents[2]
MODEL = (*training_command.TINY, '--config.model.num_classes=8')


def run(*flags: str) -> subprocess.CompletedProcess[str]:
  """Runs the command in a process, as it sets the number of devices."""
  return subprocess.run(
    [
      sys.executable,
      '-m',
      'dualformer_jax.plan',
      '--config=configs/motion.py',
      '--config.dataset.data_dir=/nowhere',
      *flags,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
  )


def report(*flags: str) -> dict[str, Any]:
  done = run(*MODEL, '--videos=100', '--json', *flags)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def exchanges(plan: dict[str, Any]) -> set[tuple[str, str]]:
  return {(c['purpose'], c['axes']) for c in plan['collectives']}


def check_breakdown(plan: dict[str, Any]) -> None:
  rows = plan['breakdown']
  sizes = [row['bytes'] for row in rows]
  assert sum(sizes) == plan['bytes']
  assert sizes == sorted(sizes, reverse=True)
  assert {'forward', 'backward'} == {r['operation'].split()[0] for r in rows}
  mlp = re.compile(r'blocks_0\S*/mlp/fc1/dot_general$')
  assert {'forward', 'backward'} == {
    r['operation'].split()[0] for r in rows if mlp.search(r['operation'])
  }


@pytest.mark.slow
def test_plan_for_gpus():
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  if not any('cuda' in plugin.name for plugin in plugins):
    pytest.skip('the extra cuda is not installed: NO PLAN FOR GPUS WAS TESTED')
  plan = report(
    '--topology=h100:16', '--memory=40', '--nosearch', '--config.batch_size=16'
  )
  assert (plan['chip'], plan['devices']) == ('NVIDIA H100', 16)
  assert plan['memory']['has'] == 40e9
  assert plan['memory']['fits']
  assert plan['flops'] == pytest.approx(plan['analytic_flops'], rel=0.05)
  assert ('sums of gradients', 'data') in exchanges(plan)
  assert plan['unexpected'] == []
  assert plan['unknown_loops'] == 0
  # 100 videos in batches of 16 are 6 steps per epoch.
  assert plan['steps'] % 6 == 0
  slowest = max(plan['seconds'].values())
  assert plan['hours'] == pytest.approx(plan['steps'] * slowest / 3600)
  assert plan['seconds']['arithmetic'] == plan['flops'] / 989e12
  # Between machines of 8 GPUs, InfiniBand limits the exchange.
  sent = sum(c['sent'] for c in plan['collectives'])
  assert plan['seconds']['links'] == sent / 5e10
  check_breakdown(plan)


@pytest.mark.slow
@pytest.mark.usefixtures('tpu_target')
def test_plan_for_tpu_slice():
  plan = report(
    '--topology=v5e:2x2',
    '--nosearch',
    '--config.mesh.fsdp=2',
    '--config.model.remat=block',
  )
  assert (plan['chip'], plan['devices']) == ('TPU v5e', 4)
  assert plan['flops'] == pytest.approx(plan['analytic_flops'], rel=0.01)
  assert ('gathers of parameters', 'fsdp') in exchanges(plan)
  assert {axes for p, axes in exchanges(plan) if p == 'sums of gradients'} >= {
    'data x fsdp'  # parameters too small to be sharded
  }
  assert plan['unexpected'] == []
  assert plan['unknown_loops'] == 0
  assert plan['memory']['fits']
  assert '--config.mesh.fsdp=2 ' in plan['flags']
  check_breakdown(plan)


def test_missing_topology_exits_with_one_line():
  done = run()
  assert (done.returncode, done.stdout) == (2, '')
  [line] = done.stderr.splitlines()
  assert line.startswith('error: --topology must be given')


def test_unknown_dataset_needs_videos_and_classes():
  config: Any = motion.get_config()
  config.dataset.data_dir = '/nowhere'
  with pytest.raises(UserError, match='set --videos'):
    plan.read_dataset(config, None)
  assert plan.read_dataset(config, 9)[1:] == (9, '--videos')
  config.dataset.name = 'kinetics400'
  assert plan.read_dataset(config, None)[1:] == (246_534, 'as published')
  config.model.num_classes = 0
  with pytest.raises(UserError, match=r'--config\.model\.num_classes'):
    plan.read_dataset(config, 9)


def test_dataset_sets_classes_of_a_copy(monkeypatch):
  class Data:
    class_names = ('a', 'b', 'c')
    folder = pathlib.Path('/data')

    def __len__(self):
      return 11

  monkeypatch.setattr(setup, 'open_split', lambda *_: Data())
  config: Any = motion.get_config()
  config.model.num_classes = 0
  planned, num_videos, source = plan.read_dataset(config, None)
  assert planned.model.num_classes == 3
  assert (num_videos, source) == (11, '/data')
  assert config.model.num_classes == 0
