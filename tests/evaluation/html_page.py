"""Parses a report page and checks that it is well-formed and self-contained."""

from __future__ import annotations

import html.parser


class Page(html.parser.HTMLParser):
  """The tags and texts of a page whose tags are closed in order.

  Attributes:
    tags: name and attributes of each opening tag.
    text: the texts between tags.
  """

  _VOID = ('meta', 'img')
  _LOADING = {'script', 'link', 'iframe', 'object', 'embed', 'form', 'base'}

  def __init__(self, page: str):
    super().__init__()
    self._open: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.text: list[str] = []
    self.feed(page)
    self.close()
    assert self._open == []
    assert 'url(' not in page
    assert '@import' not in page
    for tag, attributes in self.tags:
      assert tag not in self._LOADING
      assert not {'href', 'srcset', 'onclick', 'onerror'} & set(attributes)
      if tag == 'img':
        assert (attributes['src'] or '').startswith('data:image/')
        assert attributes['alt']

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    assert len(dict(attrs)) == len(attrs)
    if tag not in self._VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text.append(data.strip())

  def images(self) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in self.tags if tag == 'img']
