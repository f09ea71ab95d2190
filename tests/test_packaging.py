"""What is installed is declared, imports alone, and its scripts are sound."""

import ast
import configparser
import importlib.metadata
import pathlib
import re
import subprocess
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'dualformer_jax'
SCRIPTS = [*sorted((ROOT / 'scripts').glob('*.sh')), ROOT / '.ci' / 'run']
ENTRY_POINTS = [
  path.stem
  for path in sorted(PACKAGE.glob('*.py'))
  if "if __name__ == '__main__':" in path.read_text()
]
# Installed by the extras only, or not at all.
OPTIONAL = (
  'apache_beam',
  'fastapi',
  'gradio',
  'importlib_resources',
  'mlcroissant',
  'tensorboard',
  'tensorflow',
  'torch',
  'uvicorn',
)
# What models and training steps must do without, beside these.
DATA_LIBRARIES = (
  'array_record',
  'av',
  'clu',
  'cv2',
  'dm_pix',
  'grain',
  'ml_collections',
  'tensorflow_datasets',
)
STEP_MODULES = ('losses', 'optimizer', 'sharding', 'step')


def _run(*command):
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def _import_without(absent, modules):
  """Imports modules in a process where others cannot be imported."""
  code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({absent!r}))
for name in {modules!r}:
  importlib.import_module(name)
"""
  process = _run(sys.executable, '-c', code)
  assert process.returncode == 0, process.stderr


def _module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _setup():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  return setup


def _requirements(*extras):
  """Returns distribution -> requirement of the package and these extras."""
  setup = _setup()
  lines = setup['options']['install_requires'].splitlines()
  for extra in extras:
    lines += setup['options.extras_require'][extra].splitlines()
  requirements = map(Requirement, filter(None, lines))
  return {
    canonicalize_name(requirement.name): requirement
    for requirement in requirements
    if requirement.marker is None or requirement.marker.evaluate()
  }


def _imports(path):
  """Yields the top-level names of the packages that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name.split('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
      assert node.module is not None
      yield node.module.split('.')[0]


# What is declared.


@pytest.mark.parametrize(
  ('folder', 'extras'),
  [
    ('dualformer_jax', ('demo',)),
    ('configs', ()),
    ('data', ('prepare',)),
    ('tests', ('prepare', 'test')),
  ],
)
def test_what_is_imported_is_declared(folder, extras):
  distributions = importlib.metadata.packages_distributions()
  ours = {'configs', 'data', 'dualformer_jax', 'tests'}
  ours |= {path.stem for path in (ROOT / 'data').iterdir()}
  declared: set[str] = {*_requirements(*extras)}
  if folder == 'tests':
    declared.add('torch')  # skipped without
  for path in (ROOT / folder).rglob('*.py'):
    for name in {*_imports(path)} - sys.stdlib_module_names - ours:
      providers = {*map(canonicalize_name, distributions.get(name, [name]))}
      assert providers & declared, f'{path} imports {name}'


def test_every_requirement_has_one_tested_version_in_its_range():
  lines = (ROOT / 'constraints.txt').read_text().splitlines()
  pins = {}
  for line in lines:
    if line and not line.startswith('#'):
      pin = Requirement(line)
      [specifier] = pin.specifier
      assert specifier.operator == '=='
      assert canonicalize_name(pin.name) not in pins
      pins[canonicalize_name(pin.name)] = specifier.version
  for name, requirement in _requirements(
    'prepare', 'demo', 'test', 'plan'
  ).items():
    assert requirement.specifier.contains(pins[name]), name
  assert 'torch' not in pins


# What can be imported.


def test_all_of_the_package_imports_without_the_extras():
  modules = {_module_name(path) for path in PACKAGE.rglob('*.py')}
  commands = {f'dualformer_jax.{name}' for name in ENTRY_POINTS}
  _import_without(OPTIONAL, sorted(modules - commands))
  for name in commands:  # each has flags of its own
    _import_without(OPTIONAL, [name])


def test_models_and_steps_import_without_the_data_libraries():
  modules = [_module_name(path) for path in PACKAGE.glob('models/*.py')]
  modules += [
    f'dualformer_jax.training.{name}'
    for name in STEP_MODULES
    if (PACKAGE / 'training' / f'{name}.py').exists()
  ]
  _import_without(OPTIONAL + DATA_LIBRARIES, modules)


# What can be run.


def test_every_entry_point_is_a_command():
  commands = _setup()['options.entry_points']['console_scripts'].split('\n')
  targets = [command.split(' = ')[1] for command in commands if command]
  assert {f'dualformer_jax.{name}:cli' for name in ENTRY_POINTS} == {*targets}


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_help_prints(name):
  process = _run(sys.executable, '-m', f'dualformer_jax.{name}', '--help')
  assert process.returncode == 0, process.stderr
  assert '--' in process.stdout


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_command_prints_its_help(name):
  """The console script calls `cli`, from wherever it is started."""
  code = (
    f"import sys; sys.argv = ['command', '--help']\n"
    f'from dualformer_jax.{name} import cli; cli()'
  )
  process = _run(sys.executable, '-c', code)
  assert process.returncode == 0, process.stderr
  assert '--' in process.stdout


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(path):
  process = _run('bash', '-n', path)
  assert process.returncode == 0, process.stderr


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_script_can_be_run(path):
  is_sourced = path.name == 'environment.sh'
  assert bool(path.stat().st_mode & 0o111) == (not is_sourced)


def test_no_file_names_a_machine_of_its_author():
  process = _run('git', 'ls-files', '-z')
  if process.returncode:
    pytest.skip('this is no git repository: no list of its files')
  absolute = re.compile(r'(?<![\w.~])/(home|opt|root|srv|Users|work)/')
  for name in filter(None, process.stdout.split('\0')):
    try:
      text = (ROOT / name).read_text()
    except (UnicodeDecodeError, FileNotFoundError):  # binary, or just deleted
      continue
    assert not absolute.search(text), name
