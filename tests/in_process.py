"""Runs commands in the process of the tests, which has imported JAX already."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import subprocess
import sys
from types import ModuleType

from absl import flags
import jax
import pytest

from dualformer_jax import command_line
from dualformer_jax.training import cpu_memory


def run(
  module: ModuleType, *arguments: object, with_log: bool = False
) -> subprocess.CompletedProcess[str]:
  """Runs `cli` of a module with arguments; returns status and output.

  Logs are part of stderr if `with_log`. The process keeps its settings.
  """
  argv = [module.__name__, *map(str, arguments)]
  out, err = io.StringIO(), io.StringIO()
  with contextlib.ExitStack() as stack:
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(sys, 'argv', argv)
    patch.setattr(sys, 'excepthook', sys.excepthook)
    patch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    patch.setattr(command_line.stop_signals, 'install', lambda: None)
    patch.setattr(cpu_memory, 'keep_memory', lambda: None)
    stack.callback(
      signal.signal, signal.SIGPIPE, signal.getsignal(signal.SIGPIPE)
    )
    stack.enter_context(contextlib.redirect_stdout(out))
    stack.enter_context(contextlib.redirect_stderr(err))
    stack.callback(_forget_flags, module)
    # Commands set a mesh for the rest of the process.
    stack.enter_context(jax.set_mesh(jax.sharding.get_mesh()))
    if with_log:
      stack.enter_context(_logging_to(err))
    exit_ = stack.enter_context(pytest.raises(SystemExit))
    module.cli()
  status = exit_.value.code or 0
  assert isinstance(status, int)
  return subprocess.CompletedProcess(
    argv, status, out.getvalue(), err.getvalue()
  )


def _forget_flags(module: ModuleType) -> None:
  defined = flags.FLAGS.flags_by_module_dict().get(module.__name__, [])
  for flag in list(defined):
    delattr(flags.FLAGS, flag.name)
  for name in set(flags.FLAGS):
    if name.startswith('config.'):
      delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


class _LogWriter(logging.Handler):
  """Not a StreamHandler of sys.stderr, as absl removes those."""

  def __init__(self, stream: io.StringIO):
    super().__init__()
    self._stream = stream

  def emit(self, record: logging.LogRecord) -> None:
    self._stream.write(f'{self.format(record)}\n')


@contextlib.contextmanager
def _logging_to(stream: io.StringIO):
  """Logs as commands do: this package from INFO, others from WARNING."""
  handler = _LogWriter(stream)
  handler.setFormatter(
    logging.Formatter(command_line.LOG_FORMAT, command_line.TIME_FORMAT, '{')
  )
  handler.addFilter(
    lambda record: (
      record.levelno >= logging.WARNING
      or record.name.startswith('dualformer_jax')
    )
  )
  root, ours = logging.getLogger(), logging.getLogger('dualformer_jax')
  level = ours.level
  ours.setLevel(logging.INFO)
  root.addHandler(handler)
  try:
    yield
  finally:
    root.removeHandler(handler)
    ours.setLevel(level)
