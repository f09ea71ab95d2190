"""Maps a function over items in processes, and survives their crashes."""

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
import multiprocessing
import os
import signal
import sys
import threading
from typing import TypeVar

Item = TypeVar('Item')
Result = TypeVar('Result')


def map_in_processes(
  function: Callable[[Item], Result], items: Iterable[Item], num_processes: int
) -> Generator[Result | None, None, None]:
  """Yields `function(item)` in order; None if the item crashes its process.

  Items are read only a few ahead of the results. The function must be picklable
  and idempotent: after a crash the items in flight are processed again, one
  process each, to find the culprit.
  """
  others = multiprocessing.active_children()
  pool = _start_pool(num_processes)
  pending: collections.deque[tuple[Item, futures.Future[Result]]]
  pending = collections.deque()

  def next_result() -> Result | None:
    item, future = pending.popleft()
    try:
      return future.result()
    except BrokenProcessPool:
      pass
    with _start_pool(1) as alone:
      try:
        return _submit(alone, function, item).result()
      except BrokenProcessPool:
        return None

  try:
    for item in items:
      try:
        future = _submit(pool, function, item)
      except BrokenProcessPool:
        pool.shutdown()
        pool = _start_pool(num_processes)
        future = _submit(pool, function, item)
      pending.append((item, future))
      if len(pending) > 4 * num_processes:
        yield next_result()
    while pending:
      yield next_result()
  finally:
    for process in multiprocessing.active_children():
      if process not in others:
        process.terminate()  # It may be busy with a long video.
    pool.shutdown(cancel_futures=True)


def _start_pool(num_processes: int) -> futures.ProcessPoolExecutor:
  # A forked process could inherit locks held by TensorFlow's threads.
  context = multiprocessing.get_context('spawn')
  # If a signal ends this process, another one frees its semaphores. Options of
  # warnings are passed on to that process, which would print a warning.
  sys.warnoptions.append('ignore:resource_tracker')
  try:
    return futures.ProcessPoolExecutor(
      num_processes, context, initializer=_exit_with_parent
    )
  finally:
    sys.warnoptions.pop()


def _submit(
  pool: futures.ProcessPoolExecutor,
  function: Callable[[Item], Result],
  item: Item,
) -> futures.Future[Result]:
  """Submits a call, which may start a process.

  A new process does not import the main module. That is the `tfds` command with
  all of TFDS and Beam, whose import takes seconds, and no worker uses it. Nor
  does it get SIGINT, which the parent handles.
  """
  main = sys.modules['__main__'].__dict__
  hidden = {n: main.pop(n) for n in ('__file__', '__spec__') if n in main}
  main['__spec__'] = None
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
  try:
    return pool.submit(function, item)
  finally:
    main.update(hidden)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _exit_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None

  def wait() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
