"""A pool of processes that start fast and end with this one."""

from collections.abc import Callable
from concurrent import futures
import multiprocessing
from multiprocessing.context import SpawnContext, SpawnProcess
import os
import signal
import sys
import threading
from typing import Any


class ProcessPool(futures.ProcessPoolExecutor):
  """Processes that ignore SIGINT and SIGTERM, and end when their parent does.

  They do not import the main module: with all that a command imports, this
  would take seconds.
  """

  def __init__(
    self,
    num_processes: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
  ):
    """Prepares a pool; `submit` starts the processes.

    Args:
      num_processes: number of processes.
      initializer: called in each of them.
      initargs: its arguments.
    """
    self._context = _Context()
    # If a signal ends this process, another one frees its semaphores. Options
    # of warnings are passed on to that process, which would print a warning.
    sys.warnoptions.append('ignore:resource_tracker')
    try:
      super().__init__(
        num_processes, self._context, _initialize, (initializer, initargs)
      )
    finally:
      sys.warnoptions.pop()

  def kill(self) -> None:
    """Ends the processes, whatever they do."""
    for child in self._context.children:
      child.kill()
    self.shutdown(cancel_futures=True)


class _Process(SpawnProcess):
  def start(self) -> None:
    main = sys.modules['__main__'].__dict__
    hidden = {n: main.pop(n) for n in ('__file__', '__spec__') if n in main}
    main['__spec__'] = None
    # A new process inherits the mask.
    signals = [signal.SIGINT, signal.SIGTERM]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
      super().start()
    finally:
      main.update(hidden)
      signal.pthread_sigmask(signal.SIG_SETMASK, mask)

  def terminate(self) -> None:
    self.kill()  # as it ignores SIGTERM


class _Context(SpawnContext):
  # A forked process could inherit locks held by other threads.

  def __init__(self):
    super().__init__()
    self.children: list[_Process] = []

  def Process(  # noqa: N802  # pyright: ignore[reportIncompatibleVariableOverride]
    self, *args: Any, **kwargs: Any
  ) -> _Process:
    child = _Process(*args, **kwargs)
    self.children.append(child)
    return child


def _initialize(
  initializer: Callable[..., None] | None, args: tuple[Any, ...]
) -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None

  def exit_with_parent() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=exit_with_parent, daemon=True).start()
  if initializer is not None:
    initializer(*args)
