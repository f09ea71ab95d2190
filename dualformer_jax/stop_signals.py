"""Ctrl-C and SIGTERM end a process without a traceback."""

from collections.abc import Callable
import contextlib
import os
import select
import signal
import sys
import threading
import time
from typing import NoReturn

from dualformer_jax import files


class StopSignals:
  """SIGINT (Ctrl-C) and SIGTERM: the process ends, without a traceback.

  It ends at once, unless `defer_exit` was called: then the first signal only
  sets `received`, so that work can be finished and saved, and a second one ends
  the process. A thread waits for signals, because Python runs handlers in the
  main thread, and only when a compilation or another call of a library has
  returned.
  """

  def __init__(self):
    self.received: signal.Signals | None = None
    self.exit_message = ''  # printed when the process ends
    self._is_exit_deferred = False
    self._finish: Callable[[], object] | None = None
    self._is_ending = False  # `_finish` runs in another thread
    self._lock = threading.Lock()

  def install(self) -> None:
    """Starts to handle signals; called once, in the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
      # A shell makes its background processes ignore SIGINT.
      if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

  def defer_exit(self) -> None:
    """Lets the first signal set `received`; see `wait_if_ending`."""
    with self._lock:
      self._is_exit_deferred = True
    self.wait_if_ending()

  def wait_if_ending(self) -> None:
    """Returns only if no signal has made another thread end the process.

    What the main thread did meanwhile would be lost, or half recorded.
    """
    with self._lock:
      is_ending = self._is_ending
    if is_ending:
      threading.Event().wait()

  def allow_exit(self, finish: Callable[[], object] | None = None) -> None:
    """Ends `defer_exit`; ends the process if a signal was received.

    Before the process ends, `finish` is called, perhaps in another thread.
    """
    with self._lock:
      self._is_exit_deferred = False
      self._finish = finish if self.received is None else None
    if self.received is not None:
      self._finish_and_end(finish, self.received)

  def _watch(self, reader: int) -> None:
    while number := os.read(reader, 1):
      if number[0] not in (signal.SIGINT, signal.SIGTERM):
        continue
      received = signal.Signals(number[0])
      with self._lock:
        finish, self._finish = self._finish, None
        if self._is_exit_deferred and self.received is None:
          self._print_work(received, 'finishing and saving')
          self.received = received
          threading.Thread(target=_replace_closed_pipes, daemon=True).start()
        elif not self._is_exit_deferred and finish is not None:
          self._print_work(received, 'saving')
          self._is_ending = True
          thread = threading.Thread(
            target=self._finish_and_end, args=(finish, received), daemon=True
          )
          thread.start()
        else:
          self._end_process(received)

  def _print_work(self, received: signal.Signals, work: str) -> None:
    self._print(f'{received.name}: {work}; send it again to end at once')

  def _finish_and_end(
    self, finish: Callable[[], object] | None, number: signal.Signals
  ) -> NoReturn:
    try:
      if finish is not None:
        finish()
    except Exception as error:  # the main thread may wait for the end
      self.exit_message = f'\nerror: {error}'
    self._end_process(number)

  def _end_process(self, number: signal.Signals) -> NoReturn:
    """Exits immediately, without running exit handlers."""
    # The main thread may hold the lock of stdout for ever, in a full pipe.
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1)
    files.remove_unfinished()
    self._print(f'stopped by {number.name}{self.exit_message}')
    os._exit(128 + number)

  def _print(self, line: str) -> None:
    # A terminal shows ^C or a progress bar before it.
    start = '\n' if os.isatty(2) else ''
    with contextlib.suppress(OSError):
      os.write(2, f'{start}{line}\n'.encode())


def _replace_closed_pipes() -> None:
  """Discards output that has lost its reader in the last moments.

  Ctrl-C goes to all programs of `... 2>&1 | tee log`, and writing to a pipe
  without a reader is an error, which would end what is being finished.
  """
  for _ in range(100):
    for output in (1, 2):
      poll = select.poll()
      poll.register(output, 0)  # only errors
      if any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    time.sleep(0.002)


stop_signals = StopSignals()
