"""The notebook installs the project where it is not installed."""

from __future__ import annotations

import os
import pathlib
import subprocess

import nbformat
import pytest

from tests import new_environment

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / 'scripts' / 'colab_eval.ipynb'
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read('run.ipynb', as_version=4)
client = nbclient.NotebookClient(notebook, timeout=900, allow_errors=True)
client.execute()
nbformat.write(notebook, 'run.ipynb')
"""


def execute(
  folder: pathlib.Path, python: object, repository: str
) -> list[nbformat.NotebookNode]:
  """Returns the outputs of the last cell of the installation, and of an import.

  They run in an empty folder, by a kernel of an interpreter.
  """
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  [index] = [
    index
    for index, cell in enumerate(notebook.cells)
    if cell.cell_type == 'code' and '!git clone' in cell.source
  ]
  cells = notebook.cells[: index + 1]
  cells += [nbformat.v4.new_code_cell('import dualformer_jax.predict')]
  notebook.cells = cells
  [settings] = [c for c in cells if 'parameters' in c.metadata.get('tags', ())]
  assert settings.source.startswith("REPOSITORY = ''")
  settings.source = settings.source.replace("''", repr(repository), 1)
  folder.mkdir()
  nbformat.write(notebook, folder / 'run.ipynb')
  done = subprocess.run(
    [str(python), '-c', EXECUTE],
    cwd=folder,
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    capture_output=True,
    text=True,
    timeout=1000,
  )
  assert done.returncode == 0, done.stderr
  ran = nbformat.read(folder / 'run.ipynb', as_version=4).cells
  return [*ran[-2].outputs, *ran[-1].outputs]


@pytest.mark.slow
def test_notebook_installs_the_project_in_a_new_environment(tmp_path):
  folder = tmp_path / 'venv'
  python = folder / 'bin' / 'python'
  packages = ('ipykernel', 'nbclient', 'nbformat')
  # The notebook's pip then installs the project alone, which is fast.
  new_environment.install(folder, *packages, f'{REPOSITORY}[prepare]')
  uninstall = (python, '-m', 'pip', 'uninstall', '--quiet', '--yes')
  subprocess.run([*uninstall, 'dualformer_jax'], check=True)

  outputs = execute(tmp_path / 'wrong', python, 'file:///nowhere')
  [error, not_found] = [o for o in outputs if o.output_type == 'error']
  assert error.ename == 'SystemExit'
  assert "REPOSITORY is 'file:///nowhere'" in error.evalue
  assert not_found.ename == 'ModuleNotFoundError'

  outputs = execute(tmp_path / 'right', python, f'file://{REPOSITORY}')
  errors = [o for o in outputs if o.output_type == 'error']
  assert not errors, errors
  text = ''.join(o.text for o in outputs if o.output_type == 'stream')
  assert 'Installing the extras prepare' in text
  assert (tmp_path / 'right' / 'repository' / 'setup.cfg').is_file()
