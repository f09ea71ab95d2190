"""Profiling: rates, stages of the input, and the verdict."""

from __future__ import annotations

import json
import os

import pytest

from dualformer_jax.training import profile
from tests import training_command


@pytest.mark.slow
def test_profile_prints_rates_and_a_verdict(motion_dataset, tmp_path):
  done = training_command.run_here(
    *training_command.TINY,
    '--config.num_epochs=2',  # those of test_main.py, to compile once
    '--mode=profile',
    f'--config.dataset.data_dir={motion_dataset}',
    workdir=tmp_path / 'run',
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / 'run' / 'profile.json').read_text())
  rates = result['clips_per_second']
  parts = result['milliseconds_per_clip']
  assert rates.keys() == {'input', 'step', 'both'}
  assert parts.keys() == {'read', 'decode', 'resize', 'copy', 'step'}
  assert min(rates.values()) > 0
  assert min(parts.values()) > 0
  for name in rates:
    assert f'{name} {rates[name]:.3g}' in done.stderr
  assert result['verdict'] in done.stderr
  # Nothing else is written.
  assert os.listdir(tmp_path / 'run') == ['profile.json']


def figures(
  input_: float,
  step: float,
  both: float | None = None,
  threads: int = 16,
  **parts: float,
):
  return {
    'clips_per_second': {
      'input': input_,
      'step': step,
      'both': min(input_, step) if both is None else both,
    },
    'milliseconds_per_clip': {'read': 1.0, 'decode': 1.0, 'resize': 1.0}
    | {'copy': 0.1, 'step': 1e3 / step}
    | parts,
    'cores': 16,
    'num_threads': threads,
  }


@pytest.mark.parametrize(
  ('result', 'is_verbatim', 'words'),
  [
    (figures(300, 100), False, ['The step is the bottleneck', '3.0 times']),
    (figures(300, 100, both=60), False, ['share the cores']),
    (
      figures(50, 100, decode=18.0),
      True,
      ['The input is the bottleneck', 'decode is 90%', 're-encoded'],
    ),
    (figures(50, 100, threads=4), False, ['--config.dataset.num_threads=16']),
    (figures(50, 100, read=98.0), False, ['read is 98%', 'local disk']),
    # 16 cores give 50 clips/s; for 100 it takes 32.
    (figures(50, 100, decode=18.0), False, ['About 32 cores']),
  ],
)
def test_verdict_names_the_bottleneck_and_a_remedy(result, is_verbatim, words):
  text = profile.verdict(result, is_verbatim)
  for word in words:
    assert word in text
  assert '\n' not in text
