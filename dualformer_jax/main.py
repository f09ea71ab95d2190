r"""Trains a DualFormer, then tests it.

python -m dualformer_jax.main --config=configs/k400_tiny.py --workdir=DIR \
    [--mode=test|profile] [--compare=OTHER] [--config.FIELD=VALUE ...]
"""

import os

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line
from dualformer_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe, a file such as configs/k400_tiny.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where checkpoints, TensorBoard files and the report go; if it holds '
  'checkpoints, training goes on from the newest.',
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'test', 'profile'],
  'train: train, then test. test: only test config.init_from, or the newest '
  'checkpoint in the workdir. profile: train nothing; say how fast input and '
  'step are, and which of them holds up the other.',
)
_COMPARE = flags.DEFINE_string(
  'compare',
  '',
  'With --mode=test: the workdir of another test, or its report.json; the '
  'report then says on which videos the two differ, and whether significantly.',
)
# Several processes: on TPU pods, under SLURM and Open MPI all three are found.
_ADDRESS = flags.DEFINE_string(
  'coordinator_address', None, 'Of several processes, HOST:PORT of the first.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes make the run.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this one is, from 0.', lower_bound=0
)


def main() -> None:
  """Trains and tests, tests, or profiles, as the flags say."""
  import jax

  # What was compiled once is not compiled again.
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.path.expanduser('~/.cache/dualformer_jax')
    jax.config.update('jax_compilation_cache_dir', cache)

  from dualformer_jax import processes
  from dualformer_jax.training import loop, profile, sharding

  workdir = _WORKDIR.value
  assert workdir is not None  # cli requires it
  if _COMPARE.value and _MODE.value != 'test':
    raise UserError(
      f'--compare={_COMPARE.value} is for --mode=test, but --mode is '
      f'{_MODE.value}; add --mode=test, or leave --compare out'
    )

  with processes.joined(
    _ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  ):
    sharding.keep_memory()
    if _MODE.value == 'train':
      loop.train_and_test(_CONFIG.value, workdir)
    elif _MODE.value == 'test':
      loop.test(_CONFIG.value, workdir, _COMPARE.value)
    else:
      profile.profile(_CONFIG.value, workdir)


def cli() -> None:
  """Runs the command."""
  flags.mark_flags_as_required(['config', 'workdir'])
  command_line.run(main)


if __name__ == '__main__':
  cli()
