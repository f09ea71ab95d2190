"""The error for a user's mistake: entry points print it as one line."""


class UserError(ValueError):
  """A mistake that its maker can mend; the message says where and how.

  The message names the file or field, what was expected and what to do, in
  one line. Entry points print it without a traceback and exit with 2.
  """
