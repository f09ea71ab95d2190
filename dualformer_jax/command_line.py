"""How every command starts: flags in, and a user's mistake out as one line."""

from collections.abc import Callable
import functools
import logging
import re
import sys
from typing import NoReturn

from absl import app, flags
import absl.logging

from dualformer_jax.errors import UserError

# What ml_collections says of a field that a config does not have.
_NO_FIELD = re.compile(r"'(.+)'(\nDid you mean \"(.+?)\".*)?")
# And of a config that does not exist.
_NO_FILE = re.compile(r'config file .*\n.*\[Relative path\]:\s+(.+)')


def run(main: Callable[..., None], arguments: str = '') -> NoReturn:
  """Parses the flags, calls `main` and exits.

  What is wrong with the flags or with the config they name, and what `main`
  raises as a UserError, is printed as one line without a traceback; the exit
  status is then 2. Logs of this package are shown from INFO on, those of others
  from WARNING, unless --verbosity is given.

  Args:
    main: the command; its module's docstring and flags are the --help. A flag
      named `config` must be one of ml_collections.
    arguments: what may stand beside flags ('VIDEO'), then `main` is called with
      the list of them, one at least; '' for nothing.
  """
  module = sys.modules[main.__module__]
  if {'-h', '--help'} & set(sys.argv[1:]):
    print(f'{module.__doc__}\nFlags:\n{flags.FLAGS.module_help(module)}')
    sys.exit(0)

  def call(others: list[str]) -> None:
    try:
      main(*([others[1:]] if arguments else []))
    except UserError as error:
      _fail(str(error))

  app.run(call, flags_parser=functools.partial(_parse_flags, arguments))
  sys.exit(0)


def _parse_flags(wanted: str, arguments: list[str]) -> list[str]:
  """Returns what is left beside flags: the name and what is wanted."""
  try:
    name, *others = flags.FLAGS(arguments)
    # ml_collections tells of a missing file only where a field is asked for.
    _ = getattr(getattr(flags.FLAGS, 'config', None), 'is_locked', None)
  except flags.Error as error:
    message = str(error)
    # flag --src=None: Flag --src must have a value other than None.
    if missing := re.match(r'flag (--\S+)=None: ', message):
      message = f'{missing[1]} must be given'
    elif message.startswith("Unknown command line flag 'config."):
      message = '--config.FIELD=VALUE needs --config=FILE before it'
    _fail(f'{message}; --help tells the flags')
  except Exception as error:  # a config may raise anything
    message = error
    while isinstance(message, Exception):  # which may be about another
      message = message.args[0] if message.args else ''
    message = str(message)
    if field := isinstance(
      error, AttributeError | KeyError
    ) and _NO_FIELD.fullmatch(message):
      nearest = f'; did you mean {field[3]!r}?' if field[3] else ''
      _fail(f'the config has no field {field[1]!r}{nearest}')
    if missing := _NO_FILE.search(message):
      _fail(f'--config={missing[1]}: there is no such file')
    _fail(f'--config cannot be loaded: {type(error).__name__}: {error}')
  if flags.FLAGS['verbosity'].using_default_value:
    flags.FLAGS.verbosity = absl.logging.WARNING
    logging.getLogger('dualformer_jax').setLevel(logging.INFO)
  if others and not wanted:
    _fail(f'{others[0]!r} is no flag; expected --NAME=VALUE')
  if wanted and not others:
    _fail(f'{wanted} must be given; --help tells how')
  return [name, *others]


def _fail(message: str) -> NoReturn:
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(2)
