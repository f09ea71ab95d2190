"""The documentation site: links of its pages lead somewhere on the site."""

from __future__ import annotations

import functools
import html.parser
import json
import os
import pathlib
import subprocess
import sys
from urllib import parse

import pytest

from scripts import site_pages

ROOT = pathlib.Path(__file__).parents[2]
RECOGNIZER = 'dualformer_jax.inference.recognizer.Recognizer'
ATTRIBUTES = {'a': 'href', 'link': 'href', 'img': 'src', 'script': 'src'}


class Page(html.parser.HTMLParser):
  """The anchors of a page, and its links with the tag that has them."""

  def __init__(self, path: pathlib.Path):
    super().__init__()
    self.anchors: set[str] = set()
    self.links: list[tuple[str, str]] = []
    self.feed(path.read_text('utf-8'))

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    self.anchors.update(v for v in (values.get('id'), values.get('name')) if v)
    if link := values.get(ATTRIBUTES.get(tag, '')):
      self.links.append((tag, link))


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict']
  done = subprocess.run(
    [*command, '--site-dir', str(folder)],
    cwd=ROOT,
    env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.slow
def test_links_of_the_site_lead_to_pages_and_anchors(site):
  read = functools.cache(Page)
  pages = sorted(site.rglob('*.html'))
  count = 0
  for path in pages:
    for tag, link in read(path).links:
      url = parse.urlsplit(link)
      if url.scheme or url.netloc:
        # Nothing is loaded from other servers.
        assert tag == 'a' and url.scheme in ('http', 'https'), link
        assert '.' in url.netloc, link
        continue
      # The page for addresses that do not exist has links from the root.
      base = site if url.path.startswith('/') else path.parent
      target = (base / parse.unquote(url.path).lstrip('/')).resolve()
      target = path if not url.path else target
      target = target / 'index.html' if target.is_dir() else target
      assert target.is_file(), f'{path}: {link}'
      if url.fragment and url.fragment != '__skip':
        assert parse.unquote(url.fragment) in read(target).anchors, (
          f'{path}: {link}'
        )
      count += 1
  assert len(pages) > 40 and count > 2000


@pytest.mark.slow
def test_the_search_finds_sections_of_all_sources(site):
  index = json.loads((site / 'search/search_index.json').read_text('utf-8'))
  found = {(entry['title'], entry['location']) for entry in index['docs']}
  expected = {
    ('Plan a run', 'many_devices/#plan-a-run'),
    ('Test and report', 'training/#test-and-report'),
    ('Failures and preemption', 'many_hosts/#failures-and-preemption'),
    ('UCF101', 'datasets/ucf101/'),
    ('predict', 'reference/commands/#predict'),
    ('Unreleased', 'changelog/#unreleased'),
    ('gradcam', f'reference/inference/#{RECOGNIZER}.gradcam'),
  }
  assert expected <= found


@pytest.mark.slow
def test_the_page_of_commands_has_their_flags(site):
  page = (site / 'reference/commands/index.html').read_text('utf-8')
  for text in (
    '<h2 id="predict">predict',
    '<td><code>--mode</code></td>\n<td><code>train</code></td>\n'
    '<td>&lt;train|test|profile&gt;: train: train or resume',
    '<td>Also write <code>tokens</code>, [videos, d, h, w, channels], of the',
  ):
    assert text in page


@pytest.fixture
def repository(tmp_path, monkeypatch) -> pathlib.Path:
  """A repository whose README.md has two pages, and a page in docs/."""
  starts = {'Contents': ('index.md', ''), 'Use': ('use.md', 'Use it')}
  monkeypatch.setattr(site_pages, 'STARTS', starts)
  (tmp_path / 'docs').mkdir()
  (tmp_path / 'code').mkdir()
  (tmp_path / 'code' / 'a.py').write_text('')
  (tmp_path / 'README.md').write_text(
    '# Name\n\n## Contents\n\n[new](#new-one)\n\n## Use\n\n```\n## Contents\n'
    '```\n\n## New one\n\n[top](#contents) [page](docs/a.md#b) [x](https://y.z)\n'
    '[file](code/a.py) [code](code)\n'
  )
  (tmp_path / 'docs' / 'a.md').write_text(
    '# A\n\n[new](../README.md#new-one)\n'
  )
  return tmp_path


def test_new_sections_continue_a_page_and_links_follow(repository):
  pages = site_pages.Pages(repository)
  assert set(pages.texts) == {'index.md', 'use.md', 'a.md'}
  assert '[new](use.md#new-one)' in pages.markdown('index.md')
  assert '[new](use.md#new-one)' in pages.markdown('a.md')
  use = pages.markdown('use.md')
  assert use.startswith('# Use it\n\n## Use\n\n```\n## Contents\n```\n')
  assert '[top](index.md#contents) [page](a.md#b) [x](https://y.z)' in use
  assert '[file](files/code/a.py) code' in use
  assert pages.linked == {'code/a.py'}


def test_renamed_section_and_missing_file_are_errors(repository):
  readme = repository / 'README.md'
  text = readme.read_text()
  readme.write_text(text.replace('code/a.py', 'code/b.py'))
  with pytest.raises(
    site_pages.PluginError, match=r'links to code/b\.py, which does not'
  ):
    site_pages.Pages(repository).markdown('use.md')
  readme.write_text(text.replace('## Use', '## Usage'))
  with pytest.raises(
    site_pages.PluginError, match="has no section 'Use'.* STARTS in"
  ):
    site_pages.Pages(repository)
