"""Runs `python -m dualformer_jax.main` as a user does, on tiny models."""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dualformer_jax import main
from tests import in_process, xla_flags

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# As scripts/test.sh has it, so that all share what is compiled.
UNOPTIMIZED = xla_flags.fast_compilation(0)
_ONE_STAGE = (
  '--config.model.embed_dims=(16,)',
  '--config.model.num_heads=(2,)',
  '--config.model.window=(8, 4, 4)',
  '--config.model.fine_sizes=((8, 4, 4),)',
  '--config.batch_size=8',
)
# configs/motion.py with little to compute: one stage with both kinds of
# attention, and a coarse level with its BatchNorm.
TINY = (
  '--config.model.depths=(2,)',
  '--config.model.coarse_sizes=((4, 2, 2),)',
  *_ONE_STAGE,
)
# Half as much to compile: local attention alone.
ONE_BLOCK = (
  '--config.model.depths=(1,)',
  '--config.model.coarse_sizes=(None,)',
  *_ONE_STAGE,
)
# Stands in for CLU's writer of TensorBoard files, which needs TensorFlow.
_WRITER = """
import os, pathlib

class SummaryWriter:
  def __init__(self, folder):
    self._path = pathlib.Path(folder) / 'writers'

  def write_scalars(self, step, scalars):
    with self._path.open('a') as file:
      file.write(f'{os.getpid()}\\n')

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
  with_writers: bool = False,
) -> Mapping[str, str]:
  """Of a training process.

  Args:
    cache: where what is compiled is kept.
    with_tensorflow: whether TensorFlow can be imported. It is only needed for
      TensorBoard's files, and takes seconds.
    with_writers: whether the process writes what `writers` reads, instead of
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
  if with_writers:
    clu = cache / 'with_writers' / 'clu'
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


def scalars(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
  """Returns the metrics of a run by (name, step); none is there twice."""
  values = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    metrics = json.loads(line)
    step = metrics.pop('step')
    named = {(name, step): value for name, value in metrics.items()}
    assert not named.keys() & values.keys()
    values |= named
  return values


def writers(workdir: pathlib.Path) -> set[str]:
  """Returns the ids of the processes that wrote metrics, `with_writers`."""
  return set((workdir / 'writers').read_text().split())
