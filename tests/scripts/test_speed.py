"""Models of the speed benchmark: single stages, and full attention."""

import pathlib
import runpy

import pytest

from dualformer_jax.models import flops
from dualformer_jax.models.dualformer import DualFormer

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts' / 'benchmarks'
worker = runpy.run_path(str(SCRIPTS / 'speed_worker.py'))


def model(variant: str, stage: int, peer: str = 'jax') -> DualFormer:
  case = {'variant': variant, 'stage': stage, 'peer': peer}
  case |= {'num_frames': 32, 'image_size': 224}
  return DualFormer(**worker['model_fields'](case))


def costs(model: DualFormer, stage: int) -> list[tuple[str, int, int]]:
  """Returns the costs of each layer of a stage, except its embedding."""
  return [
    (row.part, row.parameters, row.multiply_adds)
    for row in flops.count(model)
    if row.stage == stage and row.part != 'patch embedding'
  ]


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['tiny', 'small', 'base'])
def test_single_stage_costs_the_same_as_in_the_model(variant):
  whole = model(variant, stage=0)
  for stage in range(4):
    single = costs(model(variant, stage=stage + 1), 0)
    assert len(single) > 10
    assert single == costs(whole, stage)


def test_full_attention_covers_all_pairs_of_tokens():
  rows = flops.count(model('tiny', stage=0, peer='jax-full'))
  for stage, size in enumerate((56, 28, 14, 7)):
    tokens, channels = 16 * size**2, 64 * 2**stage
    for block in range(2):
      name = f'backbone/blocks_{stage}_{block}/attn'
      (row,) = [row for row in rows if row.module == name]
      assert row.multiply_adds == 2 * tokens**2 * channels
