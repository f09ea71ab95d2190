"""DualFormer, a local-global stratified video transformer, in JAX."""

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from dualformer_jax.inference.recognizer import Recognizer

__version__ = '0.1.0'


def load(
  path: str | os.PathLike[str], *, dtype: str | None = None
) -> 'Recognizer':
  """Loads a checkpoint, ready to use; see `Recognizer.load`."""
  # Imported late, so that models and steps need no data libraries.
  from dualformer_jax.inference.recognizer import Recognizer

  return Recognizer.load(path, dtype=dtype)


def _is_command() -> bool:
  """Returns whether this process is a command: --help lists them."""
  program = os.path.basename(sys.argv[0]) if sys.argv else ''
  if program == '-m':  # while Python looks for the module
    return any(name.startswith('dualformer_jax') for name in sys.orig_argv)
  return program.startswith('dualformer-')


# Until a command handles Ctrl-C (stop_signals.py), it ends without a traceback.
if _is_command() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.SIG_DFL)
