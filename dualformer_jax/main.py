r"""Trains a DualFormer, then tests it.

python -m dualformer_jax.main --config=configs/k400_tiny.py --workdir=DIR \
    [--mode=test|profile] [--config.FIELD=VALUE ...]
"""

import os

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe, a file such as configs/k400_tiny.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where checkpoints, TensorBoard files and report.json go; if it holds '
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


def main() -> None:
  """Trains and tests, tests, or profiles, as the flags say."""
  import jax

  # What was compiled once is not compiled again.
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.path.expanduser('~/.cache/dualformer_jax')
    jax.config.update('jax_compilation_cache_dir', cache)

  from dualformer_jax.training import loop, profile

  workdir = _WORKDIR.value
  assert workdir is not None  # cli requires it

  if _MODE.value == 'train':
    loop.train_and_test(_CONFIG.value, workdir)
  elif _MODE.value == 'test':
    loop.test(_CONFIG.value, workdir)
  else:
    profile.profile(_CONFIG.value, workdir)


def cli() -> None:
  """Runs the command."""
  flags.mark_flags_as_required(['config', 'workdir'])
  command_line.run(main)


if __name__ == '__main__':
  cli()
