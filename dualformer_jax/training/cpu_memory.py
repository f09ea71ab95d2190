"""Keeps the memory of a training step for the next one, on CPUs."""

import ctypes
import glob
import importlib.metadata
import importlib.util

import jax


def keep_memory() -> None:
  """Makes glibc keep freed memory, if JAX computes on the CPU.

  XLA allocates gigabytes of temporaries in every step. By default glibc returns
  them to the system, and mapping them again takes a fifth of a training step.
  glibc keeps memory in the main thread only, so computations have to run in the
  thread that starts them. The settings are of the process: only commands that
  train call this, before JAX computes anything.
  """
  if not _uses_cpu():
    return
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
    return
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks on the heap as well
  mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def _uses_cpu() -> bool:
  """Returns whether JAX will use the CPU, without initializing JAX."""
  if platforms := jax.config.jax_platforms:
    return platforms.split(',')[0] == 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  if not plugins and not importlib.util.find_spec('libtpu'):
    return True
  # Device files of TPUs, NVIDIA and AMD GPUs.
  files = ('accel*', 'vfio/[0-9]*', 'nvidia[0-9]*', 'kfd')
  return not any(glob.glob(f'/dev/{name}') for name in files)
