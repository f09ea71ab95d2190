"""Commands parse flags, report user errors in one line, and show their bugs."""

import errno
import hashlib
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from absl import flags
from ml_collections import config_flags
import pytest

from dualformer_jax import __main__ as package
from dualformer_jax import command_line, errors, files

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f'{ROOT}/configs/k400_tiny.py'
FLAGS = flags.FLAGS
_WAITING = (
  'ends',
  'defers',
  'defers and prints',
  'hangs',
  'finishes',
  'finishes elsewhere',
  'finishes never',
)


def define_flags():
  config_flags.DEFINE_config_file('config')
  flags.DEFINE_string('src', None, 'What to read.', required=True)
  flags.DEFINE_integer('top_k', None, 'Printed last.')


def main():
  logging.getLogger('dualformer_jax.main').info('ours: info')
  logging.getLogger('orbax').info('theirs: info')
  logging.getLogger('orbax').warning('theirs: warning')
  if FLAGS.src == 'mistake':
    raise errors.UserError('first line\nsecond line')
  if FLAGS.src == 'canceled':
    _fail_elsewhere()
  if FLAGS.src == 'bug':
    raise ZeroDivisionError('a bug')
  if FLAGS.src == 'full':
    raise OSError(errno.ENOSPC, 'No space left on device', '/out/file')
  if FLAGS.src in _WAITING:
    _wait_for_signals()
  numbers = FLAGS.config and FLAGS.config.model.num_classes, FLAGS.top_k
  print(FLAGS.src, *(n for n in numbers if n is not None))


class _Failing:
  """Fails where nobody can handle it."""

  def __init__(self, text: str):
    self._text = text

  def __del__(self):
    raise RuntimeError(self._text)


def _fail_elsewhere():
  """Fails as the threads of TensorStore, of Orbax, and others do."""
  for text in ('Event loop is closed', 'another error'):
    _Failing(text)  # is deleted at once
  for file in ('/site-packages/orbax/checkpoint/a.py', '/b.py'):
    try:
      exec(compile(f'raise OSError({file!r})', file, 'exec'))
    except OSError:
      logging.getLogger('asyncio').exception('never retrieved')


def _wait_for_signals():
  stop = command_line.stop_signals
  stop.exit_message = '; advice'
  if FLAGS.src != 'ends':
    stop.defer_exit()
  with files.atomic_write('written') as file:
    file.write(b'unfinished')
    file.flush()
    print('result')
    print('ready', file=sys.stderr)
    if FLAGS.src.startswith('defers'):
      while stop.received is None:
        time.sleep(0.01)
      if FLAGS.src == 'defers and prints':
        time.sleep(0.1)
        print('the last step', file=sys.stderr, flush=True)
      stop.allow_exit()
    if FLAGS.src == 'finishes':
      stop.allow_exit(
        finish=lambda: setattr(stop, 'exit_message', '; finished')
      )
    if FLAGS.src == 'finishes elsewhere':
      _finish_elsewhere()
    if FLAGS.src == 'finishes never':
      stop.allow_exit(finish=threading.Event().wait)
    # Computes for minutes without returning to Python.
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**30)


def _finish_elsewhere():
  """Trains on while another thread finishes a validation that was ended."""
  stop, begun = command_line.stop_signals, threading.Event()

  def finish():
    begun.set()
    time.sleep(0.5)
    stop.exit_message = '; finished'

  stop.allow_exit(finish)
  begun.wait()
  stop.defer_exit()
  print('another step')


def _run(
  *arguments: str, cwd: pathlib.Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, __file__, *arguments],
    env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.fixture(name='fail')
def _fail(monkeypatch, capsys):
  """Runs the command in this process; returns the error line."""
  before = set(FLAGS)

  def fail(*arguments: str) -> str:
    monkeypatch.setattr(sys, 'argv', ['command', *arguments])
    with pytest.raises(SystemExit) as exit_:
      command_line.run(main, define_flags)
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith('error: ')
    assert (exit_.value.code, output.out) == (2, '')
    return line

  yield fail
  for name in set(FLAGS) - before:
    delattr(FLAGS, name)
  FLAGS.unparse_flags()


def test_command_gets_flags_and_config():
  done = _run(
    '--src=file', f'--config={CONFIG}', '--config.model.num_classes=7'
  )
  assert (done.returncode, done.stdout) == (0, 'file 7\n')


@pytest.mark.parametrize('flag', ['--top-k=3', '--top_k=3', '-top-k=3'])
def test_hyphens_and_underscores_name_the_same_flag(flag):
  done = _run(flag, '--src=a-b', f'--config={CONFIG}', '--config.seed=-1')
  assert (done.returncode, done.stdout) == (0, 'a-b 400 3\n')


@pytest.mark.parametrize(
  'flags_', [('--config=k400_tiny',), ('--config', 'k400_tiny')]
)
def test_recipe_is_found_by_name(tmp_path, flags_):
  done = _run('--src=file', *flags_, '--config.model.num_classes=7')
  assert (done.returncode, done.stdout) == (0, 'file 7\n')
  # One of the working directory comes first.
  (tmp_path / 'configs').mkdir()
  own = tmp_path / 'configs' / 'k400_tiny.py'
  own.write_text(
    'from ml_collections import config_dict\n'
    'def get_config():\n'
    "  return config_dict.ConfigDict({'model': {'num_classes': 9}})\n"
  )
  done = _run('--src=file', *flags_, cwd=tmp_path)
  assert (done.returncode, done.stdout) == (0, 'file 9\n')


def test_info_is_logged_by_this_package_alone_unless_verbosity_is_given():
  log = _run('--src=file').stderr
  assert 'ours: info' in log
  assert 'theirs: warning' in log
  assert 'theirs: info' not in log
  assert 'theirs: info' in _run('--src=file', '--verbosity=0').stderr


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([], '--src must be given'),
    (['--src'], 'Missing value for flag --src'),
    (['--scr=a', '--src=a'], "Unknown command line flag 'scr'"),
    (['--src=a', 'b'], "unexpected argument 'b'"),
    # After `--`, nothing is a flag.
    (['--src=a', '--', '--top-k=3'], "unexpected argument '--top-k=3'"),
    (['--src=a', '--config=none.py'], '--config=none.py: no such file'),
    (
      ['--src=a', '--config=none.py', '--config.seed=1'],
      '--config=none.py: no such file',
    ),
    (
      ['--src=a', '--config=k400_tinny'],
      "no such file; did you mean 'k400_tiny'",
    ),
    (['--src=a', '--config.seed=1'], 'needs --config=FILE before it'),
    (
      ['--src=a', f'--config={CONFIG}', '--config.model.num_clases=1'],
      "no field 'num_clases'; did you mean 'num_classes'?",
    ),
    (
      ['--src=a', f'--config={CONFIG}', '--config.modle.num_classes=1'],
      "no field 'modle'; did you mean 'model'?",
    ),
    (['--src=a', f'--config={CONFIG}', '--config.x=1'], "no field 'x'"),
    (
      ['--src=a', f'--config={CONFIG}', '--config.seed=one'],
      'flag --config.seed=one',
    ),
    (
      ['--src=a', f'--config={CONFIG}', '--config.seed.x=1'],
      'seed.x',
    ),
  ],
)
def test_invalid_flag_is_reported_in_one_line(fail, arguments, expected):
  assert expected in fail(*arguments)


@pytest.mark.parametrize(
  ('content', 'expected'), [('x = (', 'SyntaxError'), ('1 / 0', 'division')]
)
def test_invalid_config_is_reported_in_one_line(
  fail, tmp_path, content, expected
):
  config = tmp_path / 'broken.py'
  config.write_text(content)
  line = fail('--src=a', f'--config={config}')
  assert '--config cannot be loaded: ' in line
  assert expected in line


def test_user_error_is_reported_in_one_line():
  done = _run('--src=mistake')
  assert done.stderr.splitlines()[-1] == 'error: first line second line'
  assert (done.returncode, done.stdout) == (2, '')


def test_full_disk_is_reported_in_one_line():
  done = _run('--src=full')
  assert done.stderr.splitlines()[-1] == (
    'error: /out/file cannot be written: No space left on device'
  )
  assert (done.returncode, done.stdout) == (2, '')
  assert 'Traceback' not in done.stderr


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has it')
@pytest.mark.parametrize(
  ('argument', 'unbuffered'), [('--src=file', '1'), ('--help', '')]
)
def test_full_disk_of_stdout_is_reported_in_one_line(argument, unbuffered):
  environment = {'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': unbuffered}
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
      [sys.executable, __file__, argument],
      env={**os.environ, **environment},
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
    )
  assert done.stderr.splitlines()[-1] == (
    'error: stdout cannot be written: No space left on device'
  )
  assert done.returncode == 2
  assert 'Traceback' not in done.stderr


def test_characters_that_the_terminal_has_not_are_escaped():
  done = _run('--src=café', PYTHONIOENCODING='ascii')
  assert (done.stdout, done.returncode) == ('caf\\xe9\n', 0)


def test_closed_output_is_no_error():
  command = f'{sys.executable} {__file__} --src=file >&- 2>&-'
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(['bash', '-c', command], env=environment, timeout=120)
  assert done.returncode == 0


@pytest.mark.parametrize('home', ['/proc/none', None])
def test_nothing_is_cached_without_a_home(monkeypatch, tmp_path, home):
  # A file cannot contain a folder, whoever asks.
  import jax  # here, as many tests run this file as a command

  monkeypatch.setenv('HOME', home or str(tmp_path / 'file'))
  (tmp_path / 'file').touch()
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  monkeypatch.setattr(jax.config, 'update', None)  # is not called
  command_line.enable_compilation_cache()


def test_errors_in_threads_of_libraries_are_not_logged_twice():
  done = _run('--src=canceled')
  assert (done.returncode, done.stdout) == (0, 'canceled\n')
  assert 'Event loop is closed' not in done.stderr
  assert 'RuntimeError: another error' in done.stderr
  assert 'orbax' not in done.stderr
  assert 'OSError: /b.py' in done.stderr


def test_bug_keeps_its_traceback():
  done = _run('--src=bug')
  assert done.returncode == 1
  assert 'Traceback' in done.stderr
  assert 'ZeroDivisionError: a bug' in done.stderr


def _send(process: subprocess.Popen, sent: signal.Signals, count: int) -> None:
  for index in range(count):
    if index:
      time.sleep(0.5)  # until the one before has been handled
    process.send_signal(sent)


@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
  ('src', 'num_signals'),
  [
    ('ends', 1),
    ('defers', 1),
    ('hangs', 2),
    ('finishes', 1),
    ('finishes elsewhere', 1),
    ('finishes never', 2),
  ],
)
def test_signal_ends_a_command_in_one_line(tmp_path, sent, src, num_signals):
  process = subprocess.Popen(
    [sys.executable, __file__, f'--src={src}'],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=tmp_path,
  )
  assert process.stderr is not None
  assert any(line == 'ready\n' for line in process.stderr)  # reads until then
  _send(process, sent, num_signals)
  output, log = process.communicate(timeout=20)
  assert process.returncode == 128 + sent
  assert output == 'result\n'
  *before, last = log.splitlines()
  is_finished = src in ('finishes', 'finishes elsewhere')
  advice = 'finished' if is_finished else 'advice'
  assert last == f'stopped by {sent.name}; {advice}'
  assert len(before) == (src != 'ends')
  assert os.listdir(tmp_path) == []


def test_help_prints_docstring_and_flags():
  done = _run('--help')
  assert done.returncode == 0
  assert 'Commands parse flags' in done.stdout
  assert '--src: What to read.' in done.stdout
  assert '--config' in done.stdout


def test_all_commands_import_into_one_process_without_jax():
  code = (
    'import importlib, sys\n'
    'from absl import flags\n'
    f'for name in {package.COMMANDS}:\n'
    "  command = importlib.import_module(f'dualformer_jax.{name}')\n"
    '  assert callable(command.define_flags)\n'
    "assert not {'checkpoint', 'config', 'out'} & set(flags.FLAGS)\n"
    # --help answers at once because a command imports JAX in `main`.
    "assert not {'jax', 'orbax', 'grain', 'av', 'cv2'} & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_package_lists_every_command_with_a_summary(capsys):
  package.main()
  lines = capsys.readouterr().out.splitlines()
  listed = {line.split()[0]: line for line in lines if line.startswith('  ')}
  scripts = (ROOT / 'setup.cfg').read_text().count(':cli')
  assert len(listed) == len(package.COMMANDS) == scripts
  assert 'PyTorch' in listed['convert']


@pytest.mark.parametrize(
  'src', ['ends', 'defers', 'defers and prints', 'hangs', 'finishes']
)
def test_signal_ends_a_command_whose_log_nobody_reads(tmp_path, src):
  """As with `... 2>&1 | tee log`, where Ctrl-C ends tee as well."""
  reader, writer = os.pipe()
  process = subprocess.Popen(
    [sys.executable, __file__, f'--src={src}'],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=writer,
    stderr=writer,
    cwd=tmp_path,
  )
  os.close(writer)
  with os.fdopen(reader) as log:
    assert 'ready\n' in log  # reads until then
  _send(process, signal.SIGINT, 2 if src == 'hangs' else 1)
  assert process.wait(20) == 128 + signal.SIGINT


@pytest.mark.parametrize('library', ['absl.flags', 'ml_collections'])
def test_signal_while_libraries_are_imported_leaves_no_traceback(library):
  process = subprocess.Popen(
    # Prints the name of each module when it has been imported.
    [sys.executable, '-X', 'importtime', '-m', 'dualformer_jax.main', '--help'],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr is not None
  while process.stderr.readline().split('|')[-1].strip() != library:
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, log = process.communicate(timeout=20)
  assert 'Traceback' not in log
  assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


@pytest.mark.parametrize('arguments', [[], ['--help']])
def test_closed_pipe_ends_a_command_without_a_traceback(arguments):
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    [sys.executable, '-m', 'dualformer_jax', *arguments],
    cwd=ROOT,
    stdout=writer,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(writer)
  assert done.stderr == ''
  assert done.returncode == 128 + signal.SIGPIPE


if __name__ == '__main__':
  command_line.run(main, define_flags)
