"""DualFormer, a local-global stratified video transformer, in JAX."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dualformer_jax.recognizer import Recognizer

__version__ = '0.1.0'


def load(path: str | os.PathLike[str], **options: Any) -> 'Recognizer':
  """Returns the checkpoint at `path` ready to use; see Recognizer.load."""
  # Imported late: models and steps are usable without the data libraries.
  from dualformer_jax.recognizer import Recognizer

  return Recognizer.load(path, **options)
