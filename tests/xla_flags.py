"""XLA flags that make the tests compile faster, where XLA knows them."""

import importlib.metadata


def fast_compilation(level: int) -> str:
  """Returns the value of XLA_FLAGS for an optimization level from 0 to 3.

  An unknown flag in XLA_FLAGS ends the process, so a flag that XLA has dropped
  is passed only to the versions that have it.
  """
  flags = [f'--xla_backend_optimization_level={level}']
  release = importlib.metadata.version('jaxlib').split('.')
  if tuple(map(int, release[:2])) < (0, 11):
    flags.append('--xla_cpu_use_fusion_emitters=false')
  return ' '.join(flags)
