"""Text of untrusted files, made short and printable for one-line messages."""

from collections.abc import Iterable


def listed(items: Iterable[str], limit: int = 10, separator: str = ', ') -> str:
  """Joins up to `limit` items and counts the others."""
  items = list(items)
  more = len(items) - limit
  text = separator.join(items[:limit])
  return f'{text} and {more} more' if more > 0 else text


def quote(text: object) -> str:
  """Returns a short, printable form of text."""
  return repr(shorten(text))


def shorten(value: object) -> str:
  """Returns at most 100 characters of a value."""
  text = str(value)
  return text if len(text) <= 100 else f'{text[:100]}...'
