"""SHA256SUMS of a checkpoint folder, as sha256sum writes and verifies it."""

from __future__ import annotations

from collections.abc import Collection
import hashlib
import pathlib

from dualformer_jax.files import atomic_write

FILE = 'SHA256SUMS'


def write(folder: pathlib.Path) -> None:
  """Writes the checksums of a complete folder."""
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  lines = [f'{_digest(path)}  {path.relative_to(folder)}\n' for path in files]
  with atomic_write(folder / FILE) as file:
    file.write(''.join(lines).encode())


def verify(folder: pathlib.Path, wanted: Collection[str] | None = None) -> None:
  """Raises ValueError if a file of the wanted trees, or any, has changed.

  A folder without checksums is accepted.
  """
  checksums = folder / FILE
  for line in checksums.read_text().splitlines() if checksums.exists() else ():
    digest, _, name = line.partition('  ')
    path = folder / name
    if (wanted is None or name.partition('/')[0] in wanted) and (
      not path.is_file() or _digest(path) != digest
    ):
      raise ValueError(f'{name} has changed since it was written')


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
