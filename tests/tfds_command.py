"""Runs `tfds build` as a user does, as a process of its own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# Datasets do not need Keras. With this, TensorFlow looks for tf_keras, which is
# not installed, and takes half of the time to import.
WITHOUT_KERAS = {'TF_USE_LEGACY_KERAS': '1'}
COMMAND = (pathlib.Path(sys.executable).with_name('tfds'), 'build')
# Whether or not the package is installed.
ENVIRONMENT = os.environ | WITHOUT_KERAS | {'PYTHONPATH': str(REPOSITORY)}


def tfds_build(
  *arguments: str | os.PathLike[str],
  cwd: str | os.PathLike[str] = REPOSITORY,
) -> subprocess.CompletedProcess[str]:
  """`tfds build ARGUMENTS`; its output as text."""
  return subprocess.run(
    [*COMMAND, *arguments],
    cwd=cwd,
    env=ENVIRONMENT,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
