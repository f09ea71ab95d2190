"""Runs commands in the process of the tests, which is fast."""

from __future__ import annotations

from collections.abc import Callable
import functools
import subprocess

import pytest

from dualformer_jax.inference.recognizer import Recognizer
from tests import in_process

RunCommand = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(name='run_command')
def _run_command(monkeypatch) -> RunCommand:
  """Runs `cli` of a module with arguments; returns status and output.

  Logs are not part of stderr.
  """
  monkeypatch.setattr(Recognizer, 'load', staticmethod(_load))
  # The compilation cache of the user is not used.
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')

  return in_process.run


_original_load = Recognizer.load


@functools.cache
def _load(path: str, dtype: str | None = None) -> Recognizer:
  """Loads each checkpoint once, so that each model is compiled once."""
  return _original_load(path, dtype=dtype)
