"""Progress of work whose length is known or not."""

import logging
import time

from dualformer_jax import progress


def test_waiting_logs_until_the_block_ends(monkeypatch, caplog):
  monkeypatch.setattr(progress, '_SECONDS_BETWEEN_LINES', 0.05)
  with caplog.at_level(logging.INFO), progress.waiting('compiling'):
    time.sleep(0.5)
  lines = [record.getMessage() for record in caplog.records]
  assert 2 <= len(lines) <= 10
  assert set(lines) <= {'compiling: 0:00 so far', 'compiling: 0:01 so far'}
  caplog.clear()
  time.sleep(0.2)
  assert not caplog.records


def test_short_wait_logs_nothing(caplog):
  with caplog.at_level(logging.INFO), progress.waiting('compiling'):
    pass
  assert not caplog.records
