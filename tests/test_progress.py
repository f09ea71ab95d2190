"""Progress of work whose length is known or not."""

import logging
import sys
import time
import types
from typing import Any

import tqdm

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
  now = 100.0
  clock = types.SimpleNamespace(monotonic=lambda: now)
  monkeypatch.setattr(progress, 'time', clock)
  with (
    caplog.at_level(logging.INFO),
    progress.counting('Testing', 8, 'videos') as add,
  ):
    add(1)
    now += 10
    add(3)
    now += 10
  assert [record.getMessage() for record in caplog.records] == [
    'Testing: 4 of 8 videos, 0.40 videos/s, 0:10 left',
    'Testing: 4 of 8 videos, 0.20 videos/s, 0:20 left',
  ]


def test_bar_shows_whole_numbers(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  at_once: Any = {'delay': 0, 'mininterval': 0}
  bar = tqdm.tqdm
  monkeypatch.setattr(
    progress.tqdm, 'tqdm', lambda **options: bar(**options | at_once)
  )
  for total, expected in ((10.75, '| 4/11 ['), (None, 'Scoring: 4 [')):
    with progress.counting('Scoring', total, 's of video') as add:
      add(4.25)
    assert expected in capsys.readouterr().err
