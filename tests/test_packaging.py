"""Packaging: declared requirements, imports, commands, and scripts."""

import ast
import configparser
import functools
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
  if path.stem != '__main__'
  and "if __name__ == '__main__':" in path.read_text()
]
# Packages of the extras, and PyTorch.
OPTIONAL = (
  'apache_beam',
  'fastapi',
  'gradio',
  'huggingface_hub',
  'importlib_resources',
  'mlcroissant',
  'mlflow',
  'onnx',
  'onnxruntime',
  'qwix',
  'tensorboard',
  'tensorflow',
  'torch',
  'trackio',
  'uvicorn',
  'wandb',
)
# Packages that models and training steps do not need either.
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
STEP_MODULES = (
  'distributed.sharding',
  'training.losses',
  'training.optimizer',
  'training.state',
  'training.step',
)


def _run(*command):
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def _import_without(absent, modules):
  """Imports modules in a process where others cannot be imported."""
  # Not None in sys.modules: TFDS looks there to see if TensorFlow is loaded.
  code = f"""
import importlib, importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name in {absent!r}:
      raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
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


@functools.cache
def _distributions():
  """Returns the distributions of each package; reads all that are installed."""
  return importlib.metadata.packages_distributions()


def _imports(path):
  """Yields the top-level names of the packages that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name.split('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
      assert node.module is not None
      yield node.module.split('.')[0]


@pytest.mark.parametrize(
  ('folder', 'extras'),
  [
    (
      'dualformer_jax',
      ('demo', 'hub', 'int8', 'mlflow', 'onnx', 'prepare', 'trackio', 'wandb'),
    ),
    ('configs', ()),
    ('data', ('prepare',)),
    ('tests', ('prepare', 'test')),
  ],
)
def test_imported_packages_are_declared(folder, extras):
  distributions = _distributions()
  ours = {'configs', 'data', 'dualformer_jax', 'scripts', 'tests'}
  declared: set[str] = {*_requirements(*extras)}
  if folder == 'tests':
    declared.add('torch')  # skipped without
  for path in (ROOT / folder).rglob('*.py'):
    for name in {*_imports(path)} - sys.stdlib_module_names - ours:
      providers = {*map(canonicalize_name, distributions.get(name, [name]))}
      assert providers & declared, f'{path} imports {name}'


@pytest.mark.parametrize('python', ['3.11', '3.12', '3.13'])
def test_each_requirement_has_one_tested_version(python):
  pins = {}
  for line in (ROOT / 'constraints.txt').read_text().splitlines():
    if not line or line.startswith('#'):
      continue
    pin = Requirement(line)
    if pin.marker is None or pin.marker.evaluate({'python_version': python}):
      [specifier] = pin.specifier
      assert specifier.operator == '=='
      assert canonicalize_name(pin.name) not in pins, line
      pins[canonicalize_name(pin.name)] = specifier.version
  for name, requirement in _requirements(
    'prepare', 'demo', 'test', 'plan'
  ).items():
    assert requirement.specifier.contains(pins[name]), name
  assert 'torch' not in pins


@pytest.mark.slow
def test_the_package_imports_without_the_extras():
  """All modules, in one process: no command defines flags on import."""
  modules = [_module_name(path) for path in PACKAGE.rglob('*.py')]
  modules.remove('dualformer_jax.__main__')
  modules.remove('dualformer_jax.inference.demo_page')  # is of the extra `demo`
  modules.remove('dualformer_jax.inference.onnx_graph')  # of the extra `onnx`
  _import_without(OPTIONAL, sorted(modules))


def test_models_and_steps_import_without_the_data_libraries():
  paths = [*PACKAGE.glob('models/*.py'), *PACKAGE.glob('kernels/*.py')]
  modules = [_module_name(path) for path in paths]
  modules += [f'dualformer_jax.{name}' for name in STEP_MODULES]
  _import_without(OPTIONAL + DATA_LIBRARIES, modules)


def test_each_command_has_a_console_script():
  commands = _setup()['options.entry_points']['console_scripts'].split('\n')
  targets = [command.split(' = ')[1] for command in commands if command]
  assert {f'dualformer_jax.{name}:cli' for name in ENTRY_POINTS} == {*targets}


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_help_lists_flags(name):
  process = _run(sys.executable, '-m', f'dualformer_jax.{name}', '--help')
  assert process.returncode == 0, process.stderr
  assert '--' in process.stdout


def test_console_scripts_call_cli():
  code = (
    "import sys; sys.argv = ['command', '--help']\n"
    'from dualformer_jax.predict import cli; cli()'
  )
  process = _run(sys.executable, '-c', code)
  assert process.returncode == 0, process.stderr
  assert '--checkpoint' in process.stdout


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(path):
  process = _run('bash', '-n', path)
  assert process.returncode == 0, process.stderr


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable(path):
  is_sourced = path.name == 'environment.sh'
  assert bool(path.stat().st_mode & 0o111) == (not is_sourced)


def test_no_file_contains_an_absolute_path_of_its_author():
  process = _run('git', 'ls-files', '-z')
  if process.returncode:
    pytest.skip('not a git repository')
  absolute = re.compile(r'(?<![\w.~])/(home|opt|root|srv|Users|work)/')
  for name in filter(None, process.stdout.split('\0')):
    try:
      text = (ROOT / name).read_text()
    except (UnicodeDecodeError, FileNotFoundError):  # binary, or just deleted
      continue
    assert not absolute.search(text), name


def _fake_python(folder, version, source):
  """Writes an executable that claims to be an interpreter."""
  path = folder / f'python{version}'
  path.write_text(f'#!/bin/sh\n{source}\n')
  path.chmod(0o755)


def _find_python(path, *arguments):
  """Runs find_python of scripts/environment.sh with another PATH."""
  text = (ROOT / 'scripts' / 'environment.sh').read_text()
  functions = re.findall(
    r'^(?:is_usable|find_python)\(\) {.*?^}', text, re.M | re.S
  )
  assert len(functions) == 2
  environment = {
    'PATH': f'{path}:/usr/bin:/bin',
    'PYENV_ROOT': str(path / 'pyenv'),
  }
  return subprocess.run(
    [
      '/bin/bash',
      '-c',
      '\n'.join([*functions, 'find_python "$@"']),
      'bash',
      *arguments,
    ],
    capture_output=True,
    text=True,
    env=environment,
  )


def test_an_interpreter_that_only_prints_an_error_is_passed_over(tmp_path):
  """As pyenv's shims of versions that are not active do."""
  version = f'{sys.version_info[0]}.{sys.version_info[1]}'
  newer = [v for v in ('3.13', '3.12', '3.11') if v > version]
  for name in newer:
    _fake_python(
      tmp_path, name, f'echo "pyenv: python{name}: not found" >&2; exit 127'
    )
  _fake_python(tmp_path, version, f'exec {sys.executable} "$@"')
  found = _find_python(tmp_path)
  assert found.stdout == f'python{version}\n'


def test_installed_pyenv_versions_are_found(tmp_path):
  version = f'{sys.version_info[0]}.{sys.version_info[1]}'
  _fake_python(tmp_path, version, 'exit 127')
  _fake_python(tmp_path, '3', 'exit 127')
  folder = tmp_path / 'pyenv' / 'versions' / f'{version}.1' / 'bin'
  folder.mkdir(parents=True)
  _fake_python(folder, '', f'exec {sys.executable} "$@"')
  assert _find_python(tmp_path, version).stdout == f'{folder}/python\n'


def test_no_usable_interpreter_is_an_error(tmp_path):
  _fake_python(tmp_path, '3.9', 'exit 127')
  found = _find_python(tmp_path, '3.9')
  assert found.returncode == 1
  assert 'PYTHON=/path/to/python' in found.stderr


def test_dockerfile_copies_and_installs_what_is_there():
  text = (ROOT / 'Dockerfile').read_text().replace('\\\n', ' ')
  commands = [
    line.split() for line in text.splitlines() if line[:1] not in ('#', ' ')
  ]
  sources = [
    name
    for command in commands
    if command[:1] == ['COPY']
    for name in command[1:-1]
  ]
  assert {'setup.cfg', 'constraints.txt', 'dualformer_jax'} <= {*sources}
  for name in sources:
    assert (ROOT / name).exists(), name
  extras = {
    extra
    for found in re.findall(r'EXTRAS=([\w,]+)', text)
    for extra in found.split(',')
  }
  assert {'prepare', 'cuda', 'tpu'} <= extras
  assert extras <= {*_setup()['options.extras_require']}
  users = [command[1] for command in commands if command[:1] == ['USER']]
  assert users == ['dualformer']  # not root
