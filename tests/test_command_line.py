"""Mistakes on the command line are told in one line; bugs are not hidden."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = 'configs/k400_tiny.py'
COMMAND = '''
"""What the command does."""
import logging
from absl import flags
from ml_collections import config_flags
from dualformer_jax import command_line, errors

CONFIG = config_flags.DEFINE_config_file('config')
SRC = flags.DEFINE_string('src', None, 'What to read.', required=True)

def main():
  logging.getLogger('dualformer_jax.main').info('about ours')
  logging.getLogger('orbax').info('about theirs')
  logging.getLogger('orbax').warning('a warning')
  if SRC.value == 'mistake':
    raise errors.UserError('first line\\nsecond line')
  if SRC.value == 'bug':
    raise ZeroDivisionError('a bug')
  print(SRC.value, CONFIG.value and CONFIG.value.model.num_classes)

if __name__ == '__main__':
  command_line.run(main)
'''


@pytest.fixture(name='run')
def _run(tmp_path):
  command = tmp_path / 'command.py'
  command.write_text(COMMAND)

  def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
      [sys.executable, command, *arguments],
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      timeout=120,
    )

  return run


def test_a_command_gets_its_flags_and_config(run):
  done = run('--src=file', f'--config={CONFIG}', '--config.model.num_classes=7')
  assert (done.returncode, done.stdout) == (0, 'file 7\n')


def test_logs_are_of_this_package_and_warnings_of_others(run):
  log = run('--src=file').stderr
  assert 'about ours' in log
  assert 'a warning' in log
  assert 'about theirs' not in log
  assert 'about theirs' in run('--src=file', '--verbosity=0').stderr


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--src=mistake'], 'first line second line'),
    ([], '--src must be given'),
    (['--src'], 'Missing value for flag --src'),
    (['--scr=a', '--src=a'], "Unknown command line flag 'scr'"),
    (['--src=a', 'b'], "'b' is no flag"),
    (['--src=a', '--config=none.py'], '--config=none.py: there is no such'),
    (
      ['--src=a', '--config=none.py', '--config.seed=1'],
      '--config=none.py: there is no such',
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
def test_a_mistake_is_told_in_one_line(run, arguments, expected):
  done = run(*arguments)
  *log, line = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert expected in line
  assert len(log) == (2 if '--src=mistake' in arguments else 0), log
  assert (done.returncode, done.stdout) == (2, '')


@pytest.mark.parametrize(
  ('content', 'expected'),
  [('x = (', 'SyntaxError'), ('x = 1', 'get_config'), ('1 / 0', 'division')],
)
def test_a_config_that_cannot_be_loaded_is_told(
  run, tmp_path, content, expected
):
  config = tmp_path / 'broken.py'
  config.write_text(content)
  done = run('--src=a', f'--config={config}')
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: --config cannot be loaded: ')
  assert expected in line
  assert done.returncode == 2


def test_a_bug_keeps_its_traceback(run):
  done = run('--src=bug')
  assert done.returncode == 1
  assert 'Traceback' in done.stderr
  assert 'ZeroDivisionError: a bug' in done.stderr


def test_help_tells_what_the_command_does_and_its_flags(run):
  done = run('--help')
  assert done.returncode == 0
  assert 'What the command does.' in done.stdout
  assert '--src: What to read.' in done.stdout
  assert '--config' in done.stdout
