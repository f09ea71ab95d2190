"""The error for a user's mistake: entry points print it as one line."""


class UserError(ValueError):
  """An error that the user can fix; the message says what and how.

  The message names the file or field, what was expected and what to do, in
  one line. Entry points print it without a traceback and exit with 2.
  """


def error_reason(error: UserError) -> str:
  """Returns the message of an error without the path of a video."""
  return getattr(error, 'reason', str(error))
