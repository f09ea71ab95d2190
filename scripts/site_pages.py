"""Makes the pages of the documentation site: a hook of MkDocs (mkdocs.yml).

Markdown files stay where they are in the repository, with links that work on
GitHub. Each becomes a page, README.md several pages, and links are rewritten.
"""

from collections.abc import Iterator
import html
import importlib
import os
import pathlib
import re
import textwrap

from absl import flags
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pymdownx import slugs

from dualformer_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The sections of README.md that begin a page: the page, and its title if it is
# not that of the section. Other sections continue the page of the section
# before them, so a new section needs no entry.
STARTS = {
  'Quickstart': ('quickstart.md', ''),
  'Contents': ('index.md', ''),
  'Install': ('install.md', ''),
  'Convert a PyTorch checkpoint': ('use_a_model.md', 'Use a model'),
  'Fine-tune on your own videos': ('fine_tuning.md', ''),
  'Train the published recipes': ('recipes.md', ''),
  'Prepare a dataset': ('prepare_a_dataset.md', ''),
  'Check that the input is fast enough': ('input.md', ''),
  'Train on many devices': ('many_devices.md', ''),
  'Speed and memory': ('speed_and_memory.md', ''),
  'Code layout': ('about.md', 'About the code'),
}
_LINK = re.compile(r'(!?)\[([^]]*)\]\(([^)\s]+)\)')


class Pages:
  """The pages of the site, and where links between files lead there.

  Attributes:
    texts: Markdown file of the repository and its text, by page.
    pages: page by Markdown file or, of README.md, by 'README.md#anchor'.
    linked: other files of the repository to which pages link.
  """

  def __init__(self, root: pathlib.Path):
    self.root = root
    self.texts = {'index.md': ('README.md', '')}
    self.pages = {'README.md': 'index.md'}
    self.linked: set[str] = set()
    self._add_readme()
    for path in sorted(root.glob('*.md')):
      if path.name != 'README.md':
        self._add(path, path.name.lower())
    for path in sorted(root.glob('docs/**/*.md')):
      self._add(path, path.relative_to(root / 'docs').as_posix())
    for path in sorted(root.glob('data/*.md')):
      self._add(path, 'datasets/index.md')
    for path in sorted(root.glob('data/*/README.md')):
      self._add(path, f'datasets/{path.parent.name}.md')

  def _add(self, path: pathlib.Path, page: str) -> None:
    source = path.relative_to(self.root).as_posix()
    self.texts[page] = source, path.read_text('utf-8')
    self.pages[source] = page

  def _add_readme(self) -> None:
    page, starts, raised = 'index.md', dict(STARTS), 0
    readme = (self.root / 'README.md').read_text('utf-8')
    for level, heading, text in sections(readme):
      if level == 2:
        raised = 0
        if heading in starts:
          page, title = starts.pop(heading)
          raised = int(not title and page != 'index.md')
          text = f'# {title}\n\n{text}' if title else text
      text = text[raised:]  # the section's heading is the title of the page
      before = self.texts.get(page, ('', ''))[1]
      self.texts[page] = 'README.md', before + text
      anchor = slugs.slugify(case='lower')(heading, '-')
      self.pages[f'README.md#{anchor}'] = page
    if starts:
      raise PluginError(
        f'README.md has no section {next(iter(starts))!r}, which begins a page '
        'of the site; change STARTS in scripts/site_pages.py'
      )

  def markdown(self, page: str) -> str:
    """Returns the Markdown of a page, with links to pages and files."""
    source, text = self.texts[page]

    def rewrite(link: re.Match[str]) -> str:
      image, label, target = link.groups()
      if re.match(r'[a-z]+:', target):
        return link[0]
      path, mark, anchor = target.partition('#')
      place = self._place(source, path, anchor)
      if place is None:
        return label
      place = os.path.relpath(place, os.path.dirname(page))
      return f'{image}[{label}]({place}{mark}{anchor})'

    return _LINK.sub(rewrite, text)

  def _place(self, source: str, path: str, anchor: str) -> str | None:
    """Returns where a link leads on the site; None: to a folder of code."""
    if path:
      path = os.path.normpath(f'{os.path.dirname(source)}/{path}'.lstrip('/'))
    else:
      path = source
    for known in (f'{path}#{anchor}', path, f'{path}/README.md'):
      if known in self.pages:
        return self.pages[known]
    if path.startswith('dualformer_jax/'):
      for name in reversed(pathlib.PurePath(path).with_suffix('').parts):
        if f'reference/{name}.md' in self.texts:
          return f'reference/{name}.md'
    if path.startswith('docs/'):
      return path.removeprefix('docs/')
    if (self.root / path).is_dir():
      return None
    if not (self.root / path).is_file():
      raise PluginError(f'{source} links to {path}, which does not exist')
    self.linked.add(path)
    return f'files/{path}'


def sections(markdown: str) -> Iterator[tuple[int, str, str]]:
  """Yields the level, the heading and the text of each section."""
  level, heading, lines, in_code = 0, '', [], False
  for line in markdown.splitlines(keepends=True):
    in_code ^= line.lstrip().startswith('```')
    if not in_code and (start := re.match(r'(#+) (.*)', line)):
      yield level, heading, ''.join(lines)
      level, heading, lines = len(start[1]), start[2], []
    lines.append(line)
  yield level, heading, ''.join(lines)


def commands() -> str:
  """Returns the page of all commands: what they do, and their flags."""
  text = '# Commands\n'
  for name in COMMANDS:
    module = importlib.import_module(f'dualformer_jax.{name}')
    text += f'\n## {name}\n\n'
    for part in (module.__doc__ or '').split('\n\n'):
      is_code = part.lstrip().startswith('python -m')
      code = f'```bash\n{textwrap.dedent(part).strip()}\n```'
      text += f'{code if is_code else part}\n\n'
    text += '| flag | default | |\n|---|---|---|\n'
    before = set(flags.FLAGS)
    module.define_flags()
    for flag in [flags.FLAGS[n] for n in flags.FLAGS if n not in before]:
      default = '' if flag.default in (None, '', []) else f'`{flag.default}`'
      effect = html.escape(' '.join((flag.help or '').split()), quote=False)
      effect = re.sub(r'([\[|*])', r'\\\1', effect)
      text += f'| `--{flag.name}` | {default} | {effect} |\n'
      delattr(flags.FLAGS, flag.name)  # commands share names of flags
  return text


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
  """Adds the pages and their navigation; called by MkDocs."""
  pages = Pages(ROOT)
  made = {page: pages.markdown(page) for page in pages.texts}
  made['reference/commands.md'] = commands()
  for page, markdown in made.items():
    if old := files.get_file_from_path(page):
      files.remove(old)
    files.append(File.generated(config, page, content=markdown))
  for path in pages.linked:
    content = (ROOT / path).read_bytes()
    files.append(File.generated(config, f'files/{path}', content=content))
  for entry in config.nav or []:
    if 'Datasets' in entry:
      entry['Datasets'] += [
        p for p in made if re.match('datasets/(?!index)', p)
      ]
  return files
