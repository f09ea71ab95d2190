"""Runs `tfds build` as a user does, as a process of its own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def tfds_build(
  *arguments: str | os.PathLike[str],
  cwd: str | os.PathLike[str] = REPOSITORY,
) -> subprocess.CompletedProcess[str]:
  """`tfds build ARGUMENTS`; its output as text."""
  return subprocess.run(
    [pathlib.Path(sys.executable).with_name('tfds'), 'build', *arguments],
    cwd=cwd,
    # Whether or not the package is installed.
    env=os.environ | {'PYTHONPATH': str(REPOSITORY)},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
