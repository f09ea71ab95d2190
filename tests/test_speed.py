"""The benchmark of speed runs what it says that it runs."""

import pathlib
import runpy

import pytest

from dualformer_jax.models import complexity
from dualformer_jax.models.dualformer import DualFormer

SCRIPTS = pathlib.Path(__file__).parents[1] / 'scripts' / 'benchmarks'
worker = runpy.run_path(str(SCRIPTS / 'speed_worker.py'))


def model(variant: str, stage: int, peer: str = 'jax') -> DualFormer:
  """Returns the model of a case of 32 frames of 224 pixels."""
  case = {'variant': variant, 'stage': stage, 'peer': peer}
  case |= {'num_frames': 32, 'image_size': 224}
  return DualFormer(**worker['model_fields'](case))


def costs(model: DualFormer, stage: int) -> list[tuple[str, int, int]]:
  """Returns what each layer of the stage costs, but for its embedding."""
  return [
    (row.part, row.parameters, row.multiply_adds)
    for row in complexity.count(model)
    if row.stage == stage and row.part != 'patch embedding'
  ]


@pytest.mark.parametrize('variant', ['tiny', 'small', 'base'])
def test_a_stage_alone_is_the_stage_of_the_whole_model(variant):
  whole = model(variant, stage=0)
  for stage in range(4):
    alone = costs(model(variant, stage=stage + 1), 0)
    assert len(alone) > 10
    assert alone == costs(whole, stage)


def test_in_full_attention_all_tokens_attend_to_all():
  rows = complexity.count(model('tiny', stage=0, peer='jax-full'))
  for stage, size in enumerate((56, 28, 14, 7)):
    tokens, channels = 16 * size**2, 64 * 2**stage
    for block in range(2):
      name = f'backbone/blocks_{stage}_{block}/attn'
      (row,) = [row for row in rows if row.module == name]
      assert row.multiply_adds == 2 * tokens**2 * channels
