"""Runs a command: flags, user errors in one line, Ctrl-C and SIGTERM."""

from collections.abc import Callable, Iterator
import contextlib
import difflib
import functools
import io
import logging
import os
import pathlib
import re
import signal
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags
import absl.logging

from dualformer_jax.errors import UserError
from dualformer_jax.files import DISK_ERRORS
from dualformer_jax.stop_signals import stop_signals

# The format of absl, without the number of the thread.
LOG_FORMAT = '{levelname[0]}{asctime} {filename}:{lineno}] {message}'
TIME_FORMAT = '%m%d %H:%M:%S'
CHECKPOINT_HELP = (
  'A checkpoint folder or the workdir of a training run, also at gs:// or '
  's3://, or a model on the Hugging Face Hub: hf://OWNER/NAME[@REVISION].'
)

# Messages of ml_collections: an unknown field, and a missing config file.
_UNKNOWN_FIELD = re.compile(r"'(.+)'(\nDid you mean \"(.+?)\".*)?")
_MISSING_FILE = re.compile(r'config file .*\n.*\[Relative path\]:\s+(.+)')


def run(
  main: Callable[..., None],
  define_flags: Callable[[], Any] | None = None,
  arguments: str = '',
) -> NoReturn:
  """Parses the flags, calls `main` and exits.

  Prints an error in the flags, in the config they name, or a UserError raised
  by `main` as one line without a traceback, and exits with status 2. Logs this
  package from level INFO and others from WARNING, unless --verbosity is given.
  SIGINT and SIGTERM end the process as `stop_signals` describes.

  Args:
    main: the command. --help prints the docstring of its module and its flags.
    define_flags: defines the flags; None if they are defined already.
    arguments: the name of the positional arguments, such as 'VIDEO'. `main` is
      then called with a list of at least one. '' if there are none.
  """
  for name in ('stdout', 'stderr'):  # None if it is closed, as by >&-
    if getattr(sys, name) is None:
      setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), 'w'))
  # The terminal may be unable to print characters of files and class names.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')
  stop_signals.install()
  if define_flags is not None:
    define_flags()
  module = sys.modules[main.__module__]
  if {'-h', '--help'} & set(sys.argv[1:]):
    with _ended_by_failed_writes():
      print(f'{module.__doc__}\nFlags:\n{flags.FLAGS.module_help(module)}')
    sys.exit(0)

  def call(argv: list[str]) -> None:
    try:
      with _ended_by_failed_writes():
        main(*([argv[1:]] if arguments else []))
    except UserError as error:
      _exit_with_error(str(error))
    except KeyboardInterrupt:
      sys.exit(130)

  app.run(call, flags_parser=functools.partial(_parse_flags, arguments))
  sys.exit(0)


@contextlib.contextmanager
def _ended_by_failed_writes() -> Iterator[None]:
  """Ends the process if a disk is full or the like, without a traceback.

  It ends silently if the reader of its output has: `... | head`.
  """
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    _discard_stdout()
    sys.exit(128 + signal.SIGPIPE)
  except OSError as error:
    if error.errno not in DISK_ERRORS:
      raise
    path = error.filename or ('a file' if _is_stdout_writable() else 'stdout')
    _exit_with_error(f'{path} cannot be written: {error.strerror}')


def _is_stdout_writable() -> bool:
  """Returns whether a line can be printed; if not, discards the output."""
  try:
    print(flush=True)
  except OSError:
    _discard_stdout()
    return False
  return True


def _discard_stdout() -> None:
  # Python flushes once more at exit.
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def enable_compilation_cache() -> None:
  """Caches compiled programs in JAX_COMPILATION_CACHE_DIR or ~/.cache."""
  # Imported late: --help and errors in flags do not wait for JAX.
  import jax

  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  folder = os.path.expanduser('~/.cache/dualformer_jax')
  with contextlib.suppress(OSError):  # without a home, nothing is cached
    os.makedirs(folder, exist_ok=True)
    if os.access(folder, os.W_OK):
      jax.config.update('jax_compilation_cache_dir', folder)


def _parse_flags(arguments: str, argv: list[str]) -> list[str]:
  """Parses argv; returns the program name and the positional arguments."""
  try:
    argv = list(_with_config_paths(list(_with_underscores(argv))))
    name, *positional = flags.FLAGS(argv)
    # ml_collections reports a missing file at the first access to a field.
    _ = getattr(getattr(flags.FLAGS, 'config', None), 'is_locked', None)
  except flags.Error as error:
    message = str(error)
    # The message of absl: flag --src=None: Flag --src must have a value ...
    if missing := re.match(r'flag (--\S+)=None: ', message):
      message = f'{missing[1]} must be given'
    elif message.startswith("Unknown command line flag 'config."):
      message = '--config.FIELD=VALUE needs --config=FILE before it'
    _exit_with_error(f'{message}; see --help')
  except Exception as error:  # a config file is code and may raise anything
    _exit_with_error(_config_error(error))
  if flags.FLAGS['verbosity'].using_default_value:
    flags.FLAGS.verbosity = absl.logging.WARNING
    logging.getLogger('dualformer_jax').setLevel(logging.INFO)
    handler = absl.logging.get_absl_handler()
    handler.setFormatter(logging.Formatter(LOG_FORMAT, TIME_FORMAT, '{'))
    # An error in a thread of Orbax is raised later, and reported then; before,
    # Orbax or asyncio logs its traceback, and TensorStore prints those of what
    # it cancels. gcsfs logs that of each failed request.
    handler.addFilter(
      lambda record: not _is_of_orbax(record) and record.name != 'gcsfs'
    )
    sys.excepthook = _print_unless_canceled
    sys.unraisablehook = _print_unraisable_unless_canceled
  if positional and not arguments:
    _exit_with_error(
      f'unexpected argument {positional[0]!r}; expected --NAME=VALUE. Commands '
      'are modules, such as python -m dualformer_jax.predict'
    )
  if arguments and not positional:
    _exit_with_error(f'{arguments} must be given; see --help')
  return [name, *positional]


def _with_underscores(argv: list[str]) -> Iterator[str]:
  """Yields arguments, with --top-k spelled --top_k as the flag is."""
  is_flag = True
  for argument in argv:
    is_flag = is_flag and argument != '--'  # names of files follow it
    if is_flag and (name := re.match(r'--?[a-z][\w-]*', argument)):
      start = name[0][:2] + name[0][2:].replace('-', '_')
      argument = start + argument[name.end() :]
    yield argument


def _config_files() -> dict[str, pathlib.Path]:
  """Returns the recipes here and in the repository, by name."""
  repository = pathlib.Path(__file__).parents[1]
  folders = (repository / 'configs', pathlib.Path('configs'))
  return {f.stem: f for folder in folders for f in sorted(folder.glob('*.py'))}


def _with_config_paths(argv: list[str]) -> Iterator[str]:
  """Yields arguments, with the path of a recipe in place of its name."""
  previous = ''
  for argument in argv:
    flag, equals, name = argument.rpartition('=')
    is_name = (flag or previous) in ('-config', '--config') and (
      not pathlib.Path(name).is_file()
    )
    previous = argument
    if is_name and (path := _config_files().get(name.removesuffix('.py'))):
      argument = f'{flag}{equals}{path}'
    yield argument


def _is_of_orbax(record: logging.LogRecord) -> bool:
  """Returns whether Orbax logged the error, or raised it in a thread."""
  if not record.exc_info:
    return False
  frames = traceback.extract_tb(record.exc_info[2])
  return '/orbax/' in record.pathname or any(
    '/orbax/' in frame.filename for frame in frames
  )


def _is_canceled(error: object) -> bool:
  return str(error) == 'Event loop is closed'


def _print_unless_canceled(kind: Any, error: Any, trace: Any) -> None:
  if not _is_canceled(error):
    sys.__excepthook__(kind, error, trace)


def _print_unraisable_unless_canceled(unraisable: Any) -> None:
  if not _is_canceled(unraisable.exc_value):
    sys.__unraisablehook__(unraisable)


def _config_error(error: Exception) -> str:
  """Returns the message for an error raised while loading a config."""
  cause: Any = error
  while isinstance(cause, Exception):  # ml_collections wraps errors in errors
    cause = cause.args[0] if cause.args else ''
  message = str(cause)
  field = _UNKNOWN_FIELD.fullmatch(message)
  if field and isinstance(error, AttributeError | KeyError):
    nearest = f'; did you mean {field[3]!r}?' if field[3] else ''
    return f'the config has no field {field[1]!r}{nearest}'
  if missing := _MISSING_FILE.search(message):
    name = missing[1].strip()
    found = difflib.get_close_matches(pathlib.Path(name).stem, _config_files())
    nearest = f'; did you mean {found[0]!r}?' if found else ''
    return f'--config={name}: no such file{nearest}'
  return f'--config cannot be loaded: {type(error).__name__}: {error}'


def _exit_with_error(message: str) -> NoReturn:
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(2)
