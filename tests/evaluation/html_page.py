"""Parses a report page and checks that it is well-formed and self-contained."""

from __future__ import annotations

import html.parser


class Page(html.parser.HTMLParser):
  """The tags and texts of a page whose tags are closed in order.

  Attributes:
    tags: name and attributes of each opening tag.
    text: the texts between tags.
    fits: for each picture and table, whether it is in an element that scrolls
      or shrinks what is wider than the window.
  """

  _VOID = ('meta', 'img')
  _LOADING = {'script', 'link', 'iframe', 'object', 'embed', 'form', 'base'}

  def __init__(self, page: str):
    super().__init__()
    self._open: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.text: list[str] = []
    self.fits: list[bool] = []
    self._classes: list[str] = []
    self.feed(page)
    self.close()
    assert self._open == []
    assert 'url(' not in page
    assert '@import' not in page
    assert '.wide { overflow-x: auto; }' in page
    assert '.reliability svg { max-width: 100%;' in page
    assert '.mistakes img { max-width: 100%;' in page
    for tag, attributes in self.tags:
      assert tag not in self._LOADING
      assert not {'href', 'srcset', 'onclick', 'onerror'} & set(attributes)
      if tag == 'img':
        assert (attributes['src'] or '').startswith('data:image/')
        assert attributes['alt']

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    assert len(dict(attrs)) == len(attrs)
    if tag in ('img', 'svg', 'table'):
      classes = {name for names in self._classes for name in names.split()}
      self.fits.append(bool(classes & {'wide', 'reliability', 'mistakes'}))
    if tag not in self._VOID:
      self._open.append(tag)
      self._classes.append(dict(attrs).get('class') or '')

  def handle_endtag(self, tag):
    assert self._open.pop() == tag
    self._classes.pop()

  def handle_data(self, data):
    self.text.append(data.strip())

  def images(self) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in self.tags if tag == 'img']
