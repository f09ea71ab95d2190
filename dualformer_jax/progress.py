"""Progress bars and progress logging."""

from collections.abc import Iterable, Iterator
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


class Progress:
  """Shows how much is done, the rate, and the time left.

  In a terminal it is a bar on stderr, which appears after some seconds.
  Elsewhere it logs a line every ten seconds.
  """

  def __init__(self, description: str, total: float | None, unit: str):
    """Starts the clock.

    Args:
      description: what is being done, such as 'Testing'.
      total: how many units there are; None if that is not known.
      unit: name of a unit in the plural, such as 'videos'.
    """
    self._description, self._total, self._unit = description, total, unit
    self._start = self._last_line = time.monotonic()
    self._done = 0.0
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        desc=description, total=total, unit=f' {unit}', delay=3
      )

  def add(self, amount: float = 1) -> None:
    """Counts `amount` more units as done."""
    self._done += amount
    if self._bar is not None:
      self._bar.update(amount)
    elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
      self._log()

  def close(self) -> None:
    """Ends the bar, or logs a last line if it has logged any."""
    if self._bar is not None:
      self._bar.close()
    elif self._last_line > self._start:
      self._log()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _log(self) -> None:
    self._last_line = time.monotonic()
    rate = self._done / max(self._last_line - self._start, 1e-9)
    of_total, left = '', ''
    if self._total is not None:
      of_total = f' of {self._total:.0f}'
      seconds = max(self._total - self._done, 0) / max(rate, 1e-9)
      left = f', {format_duration(seconds)} left'
    _LOG.info(
      '%s: %.0f%s %s, %.2f %s/s%s',
      self._description,
      self._done,
      of_total,
      self._unit,
      rate,
      self._unit,
      left,
    )


def track(
  items: Iterable[T], description: str, total: float | None, unit: str
) -> Iterator[T]:
  """Yields the items and shows progress; see Progress for the arguments."""
  with Progress(description, total, unit) as progress:
    for item in items:
      yield item
      progress.add()


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
