"""Runs `python -m dualformer_jax.main` as a user does, on tiny models."""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from dualformer_jax import main
from tests import in_process, xla_flags

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# As scripts/test.sh has it, so that all share what is compiled.
UNOPTIMIZED = xla_flags.fast_compilation(0)
# configs/motion.py with little to compute: one stage with both kinds of
# attention, and a coarse level with its BatchNorm.
TINY = (
  '--config.model.depths=(2,)',
  '--config.model.embed_dims=(16,)',
  '--config.model.num_heads=(2,)',
  '--config.model.window=(8, 4, 4)',
  '--config.model.fine_sizes=((8, 4, 4),)',
  '--config.model.coarse_sizes=((4, 2, 2),)',
  '--config.batch_size=8',
)
# Stands in for CLU's writer of TensorBoard files, which needs TensorFlow and
# keeps half of the digits.
_WRITER = """
import json, os, pathlib

class SummaryWriter:
  def __init__(self, folder):
    self._path = pathlib.Path(folder) / 'scalars.jsonl'

  def write_scalars(self, step, scalars):
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._path.open('a') as file:
      file.write(json.dumps([os.getpid(), step, scalars]) + '\\n')

  def write_texts(self, step, texts):
    pass

  def flush(self):
    pass

  def close(self):
    pass
"""


def command(
  *flags: str, config: str = 'motion', workdir: str | os.PathLike[str]
) -> list[str]:
  """Trains configs/CONFIG.py, changed by the flags."""
  return [
    sys.executable,
    '-m',
    'dualformer_jax.main',
    f'--config={REPOSITORY}/configs/{config}.py',
    f'--workdir={workdir}',
    *flags,
  ]


def environment(
  cache: pathlib.Path,
  *,
  with_tensorflow: bool = False,
  with_scalars: bool = False,
) -> Mapping[str, str]:
  """Of a training process.

  Args:
    cache: where what is compiled is kept.
    with_tensorflow: whether TensorFlow can be imported. It is only needed for
      TensorBoard's files, and takes seconds.
    with_scalars: whether the process writes what `scalars` reads, instead of
      TensorBoard's files.
  """
  path = str(REPOSITORY)
  if not with_tensorflow:
    hidden = cache / 'without_tensorflow'
    hidden.mkdir(exist_ok=True)
    (hidden / 'tensorflow.py').write_text(
      "raise ModuleNotFoundError('TensorFlow is hidden')\n"
    )
    path = f'{hidden}{os.pathsep}{path}'
  if with_scalars:
    clu = cache / 'with_scalars' / 'clu'
    clu.mkdir(parents=True, exist_ok=True)
    (clu / '__init__.py').touch()
    (clu / 'metric_writers.py').write_text(_WRITER)
    path = f'{clu.parent}{os.pathsep}{path}'
  return os.environ | {
    # scripts/test.sh names a folder for all processes that run tests.
    'JAX_COMPILATION_CACHE_DIR': os.environ.get(
      'JAX_COMPILATION_CACHE_DIR', str(cache)
    ),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': path,
    # Tiny models take longer to compile than to run.
    'XLA_FLAGS': UNOPTIMIZED,
  }


def run(
  *flags: str,
  workdir: str | os.PathLike[str],
  cache: pathlib.Path,
  config: str = 'motion',
  with_tensorflow: bool = False,
) -> subprocess.CompletedProcess[str]:
  """Runs the command to its end; its output as text."""
  return subprocess.run(
    command(*flags, config=config, workdir=workdir),
    env=environment(cache, with_tensorflow=with_tensorflow),
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


def run_here(
  *flags: str, workdir: str | os.PathLike[str], config: str = 'motion'
) -> subprocess.CompletedProcess[str]:
  """Runs the command in this process, without TensorBoard's files."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, 'clu.metric_writers', None)
    if 'clu' in sys.modules:
      patch.delattr(sys.modules['clu'], 'metric_writers', raising=False)
    arguments = command(*flags, config=config, workdir=workdir)[3:]
    return in_process.run(main, *arguments, with_log=True)


def scalars(workdir: pathlib.Path) -> tuple[list[int], dict[Any, float]]:
  """What a run `with_scalars` has written.

  Returns:
    The ids of the processes that have written, in order; and the last value of
    each (name, step).
  """
  writers: dict[int, None] = {}
  values = {}
  for line in (workdir / 'scalars.jsonl').read_text().splitlines():
    process, step, named = json.loads(line)
    writers[process] = None
    for name, value in named.items():
      values[name, step] = value
  return list(writers), values
