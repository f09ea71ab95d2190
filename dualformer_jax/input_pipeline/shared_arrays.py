"""Arrays in memory that other processes of this machine can open."""

from __future__ import annotations

import functools
import mmap
import os
from typing import Any
import weakref

from jaxtyping import UInt8
import numpy as np


class SharedArrays:
  """Arrays of bytes of one shape, whose memory is used again.

  Memory that a process touches for the first time costs as much as copying a
  clip.

  Attributes:
    shape: the shape.
  """

  def __init__(self, shape: tuple[int, ...]):
    self.shape = shape
    self._free: list[_Memory] = []

  def take(self) -> tuple[UInt8[np.ndarray, 'n ...'], str]:
    """Returns an array, and what other processes pass to `open_array`.

    The content is undefined. When nothing refers to the array or to views of
    it, which includes arrays of JAX on CPUs, its memory is used again.
    """
    memory = self._free.pop() if self._free else _Memory(self.shape)
    array = np.frombuffer(memory.mapped, np.uint8)
    # Views refer to this array, and not only to the memory.
    end = weakref.finalize(array, self._free.append, memory)
    end.atexit = False
    return array.reshape(self.shape), memory.path


@functools.cache
def open_array(path: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, 'n ...']:
  """Opens an array of another process, as long as that has it."""
  with open(path, 'r+b') as file:
    mapped = mmap.mmap(file.fileno(), 0)
  return np.frombuffer(mapped, np.uint8).reshape(shape)


class _Memory:
  """Memory of its own file, which disappears with the last process that has it.

  Unlike /dev/shm, it is not limited to the 64 MB of most containers.
  """

  def __init__(self, shape: tuple[int, ...]):
    descriptor = os.memfd_create('clips')
    end: Any = weakref.finalize(self, os.close, descriptor)
    end.atexit = False
    size = int(np.prod(shape))
    os.ftruncate(descriptor, size)
    self.mapped = mmap.mmap(descriptor, size)
    self.path = f'/proc/{os.getpid()}/fd/{descriptor}'
