"""Progress bars and progress logging."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import logging
import sys
import threading
import time
from typing import TypeVar

from tqdm import auto as tqdm

T = TypeVar('T')

_SECONDS_BETWEEN_LINES = 10.0
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def counting(
  description: str, total: float | None, unit: str
) -> Iterator[Callable[[float], object]]:
  """Shows how much is done, the rate, and the time left.

  In a terminal it is a bar on stderr, which appears after some seconds.
  Elsewhere it logs a line every ten seconds, and a last one if it has logged
  any.

  Args:
    description: what is being done, such as 'Testing'.
    total: how many units there are; None if that is not known.
    unit: name of a unit in the plural, such as 'videos'.

  Yields:
    A function that counts a number of units as done.
  """
  if sys.stderr.isatty():
    known = '' if total is None else '{percentage:3.0f}%|{bar}| '
    of_total = '' if total is None else '/{total:.0f}'
    with tqdm.tqdm(
      desc=description,
      total=total,
      unit=f' {unit}',
      delay=3,
      # Amounts need not be whole numbers.
      bar_format=f'{{desc}}: {known}{{n:.0f}}{of_total} '
      '[{elapsed}<{remaining}, {rate_fmt}]',
    ) as bar:
      yield bar.update
    return
  start = last_line = time.monotonic()
  done = 0.0

  def log() -> None:
    nonlocal last_line
    last_line = time.monotonic()
    rate = done / max(last_line - start, 1e-9)
    of_total, left = '', ''
    if total is not None:
      of_total = f' of {total:.0f}'
      seconds = max(total - done, 0) / max(rate, 1e-9)
      left = f', {format_duration(seconds)} left'
    amount = f'{done:.0f}{of_total} {unit}, {rate:.2f} {unit}/s{left}'
    _LOG.info('%s: %s', description, amount)

  def add(amount: float) -> None:
    nonlocal done
    done += amount
    if time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
      log()

  try:
    yield add
  finally:
    if last_line > start:
      log()


def track(
  items: Iterable[T], description: str, total: float | None, unit: str
) -> Iterator[T]:
  """Yields the items and shows progress; see `counting` for the arguments."""
  with counting(description, total, unit) as add:
    for item in items:
      yield item
      add(1)


@contextlib.contextmanager
def waiting(description: str) -> Iterator[None]:
  """Logs every ten seconds that a block of unknown length still runs.

  Args:
    description: what is being done, such as 'compiling'.
  """
  start, is_done = time.monotonic(), threading.Event()

  def report() -> None:
    while not is_done.wait(_SECONDS_BETWEEN_LINES):
      elapsed = format_duration(time.monotonic() - start)
      _LOG.info('%s: %s so far', description, elapsed)

  threading.Thread(target=report, daemon=True).start()
  try:
    yield
  finally:
    is_done.set()


def format_duration(seconds: float) -> str:
  """Returns a duration as M:SS or H:MM:SS."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02d}:{seconds:02d}'
  return f'{minutes}:{seconds:02d}'
