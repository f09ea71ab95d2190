"""The error for a user's mistake: entry points print it as one line."""

import importlib.util


class UserError(ValueError):
  """An error that the user can fix; the message states how.

  The message names the file or field, what was expected and what to do, in
  one line. Entry points print it without a traceback and exit with 2.
  """


def missing_extra(purpose: str, extra: str) -> str:
  """Returns the message that a purpose needs an extra of this package."""
  return (
    f"{purpose} needs the extra '{extra}': pip install"
    f" 'dualformer_jax[{extra}]'"
  )


def require(purpose: str, extra: str, *modules: str) -> None:
  """Raises UserError unless modules of an extra are installed.

  They are not imported, which may take seconds.
  """
  if not all(map(importlib.util.find_spec, modules)):
    raise UserError(missing_extra(purpose, extra))


def error_reason(error: UserError) -> str:
  """Returns the message of an error without the path of a video."""
  return getattr(error, 'reason', str(error))
