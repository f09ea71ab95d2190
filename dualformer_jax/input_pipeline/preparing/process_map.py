"""Maps a function over items in processes, and survives their crashes."""

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dualformer_jax.input_pipeline.process_pool import ProcessPool

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
  pool = ProcessPool(num_processes)
  pending: collections.deque[tuple[Item, futures.Future[Result]]]
  pending = collections.deque()

  def next_result() -> Result | None:
    item, future = pending.popleft()
    try:
      return future.result()
    except BrokenProcessPool:
      pass
    alone = ProcessPool(1)
    try:
      return alone.submit(function, item).result()
    except BrokenProcessPool:
      return None
    finally:
      alone.kill()

  try:
    for item in items:
      try:
        future = pool.submit(function, item)
      except BrokenProcessPool:
        pool.kill()
        pool = ProcessPool(num_processes)
        future = pool.submit(function, item)
      pending.append((item, future))
      if len(pending) > 4 * num_processes:
        yield next_result()
    while pending:
      yield next_result()
  finally:
    pool.kill()  # It may be busy with a long video.
