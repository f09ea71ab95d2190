"""A crash of a process affects only the item that caused it."""

import multiprocessing
import os
import time

import pytest

from dualformer_jax.input_pipeline.preparing import process_map


def square_unless_three(number: int) -> int:
  if number == 3:
    os.abort()
  return number**2


@pytest.mark.slow
def test_crash_affects_one_item():
  results = process_map.map_in_processes(square_unless_three, range(8), 2)
  expected = [None if i == 3 else i**2 for i in range(8)]
  assert list(results) == expected


def test_closing_ends_processes_at_once():
  results = process_map.map_in_processes(time.sleep, [0, *[60] * 8], 2)
  assert next(results) is None
  start = time.monotonic()
  results.close()
  assert time.monotonic() - start < 10
  assert multiprocessing.active_children() == []


def test_items_are_read_a_few_ahead():
  read = []

  def items():
    for number in range(1000):
      read.append(number)
      yield number + 4

  results = process_map.map_in_processes(square_unless_three, items(), 1)
  assert next(results) == 16
  results.close()
  assert len(read) < 10
