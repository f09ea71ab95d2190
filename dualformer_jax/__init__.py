"""DualFormer, a local-global stratified video transformer, in JAX."""

import os
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
