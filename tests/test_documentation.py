"""The Markdown files: code compiles, links lead somewhere, flags exist."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from configs import common

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  page.relative_to(ROOT).as_posix()
  for pattern in ('*.md', 'docs/*.md', 'data/*.md', 'data/*/*.md')
  for page in ROOT.glob(pattern)
)
FENCE = re.compile(r'^ *```', re.MULTILINE)
PYTHON = re.compile(r'^( *)```python\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(([^)\s]+)\)')
COMMAND = re.compile(r'python3? -m dualformer_jax\.(\w+)((?:\\\n|[^\n`#])*)')
DEFINED_FLAGS = """
import importlib, sys
from absl import flags
importlib.import_module(f'dualformer_jax.{sys.argv[1]}').define_flags()
print(*flags.FLAGS)
"""


@functools.cache
def defined_flags(command: str) -> set[str]:
  done = subprocess.run(
    [sys.executable, '-c', DEFINED_FLAGS, command],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  return set(done.stdout.split())


def anchors(page: pathlib.Path) -> set[str]:
  """Returns the names that GitHub gives to the headings of a page."""
  headings = re.findall(r'^#+ (.*)$', page.read_text('utf-8'), re.MULTILINE)
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    for heading in headings
  }


@pytest.mark.parametrize('name', PAGES)
def test_code_blocks_are_closed_and_python_compiles(name):
  page = (ROOT / name).read_text('utf-8')
  assert len(FENCE.findall(page)) % 2 == 0
  assert len(PYTHON.findall(page)) == page.count('```python')
  for _, code in PYTHON.findall(page):
    ast.parse(textwrap.dedent(code))


def test_readme_begins_with_a_picture_the_commands_and_the_first_prediction():
  readme = (ROOT / 'README.md').read_text('utf-8')
  places = [
    readme.index(text)
    for text in (
      '![',
      'scripts/quickstart.sh',
      'scripts/test.sh',
      'dualformer_jax.predict --checkpoint=.quickstart/motion VIDEO',
      '## Contents',
      'dualformer_jax.convert --config',  # needs what one does not have yet
    )
  ]
  assert places == sorted(places)


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_to_files_and_headings(name):
  page = ROOT / name
  for link in LINK.findall(page.read_text('utf-8')):
    if link.startswith(('http://', 'https://')):
      continue
    path, _, anchor = link.partition('#')
    target = page.parent / path if path else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize('name', PAGES)
def test_commands_have_flags_that_exist(name):
  page = (ROOT / name).read_text('utf-8')
  config = common.get_config()
  for command, rest in COMMAND.findall(page):
    for argument in shlex.split(rest.replace('\\\n', ' ')):
      if not argument.startswith('--'):
        continue
      flag = argument.removeprefix('--').partition('=')[0]
      if flag.startswith('config.'):
        value: Any = config
        for field in flag.split('.')[1:]:
          assert field in value, argument
          value = value[field]
      else:
        defined = defined_flags(command)
        # Boolean flags have a negation.
        assert {flag, flag.removeprefix('no')} & defined, argument
