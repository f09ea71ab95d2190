"""New virtual environments, with packages from the package index."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

CONSTRAINTS = pathlib.Path(__file__).parents[1] / 'constraints.txt'


def install(folder: pathlib.Path, *requirements: str | pathlib.Path) -> None:
  """Creates an environment; skips the test if there is no package index."""
  uv = (sys.executable, '-m', 'uv', '--quiet')
  where = ('--python', folder / 'bin' / 'python', '--constraint', CONSTRAINTS)
  for command in (
    ('venv', '--seed', '--python', sys.executable, folder),  # with pip
    ('pip', 'install', *where, *requirements),
  ):
    done = subprocess.run([*uv, *command], capture_output=True, text=True)
    if done.returncode:
      pytest.skip(f'A NEW ENVIRONMENT WAS NOT TESTED: {done.stderr[-300:]}')
