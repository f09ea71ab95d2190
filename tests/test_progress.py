"""Progress of work whose length is known or not."""

import logging
import re
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


def test_counting_logs_amount_rate_and_time_left(monkeypatch, caplog):
  monkeypatch.setattr(progress, '_SECONDS_BETWEEN_LINES', 0.05)
  with (
    caplog.at_level(logging.INFO),
    progress.counting('Testing', 8, 'videos') as add,
  ):
    add(1)
    time.sleep(0.1)
    add(3)
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 2  # the last one at the end
  pattern = r'Testing: 4 of 8 videos, \d+\.\d\d videos/s, 0:00 left'
  assert all(re.fullmatch(pattern, line) for line in lines)
