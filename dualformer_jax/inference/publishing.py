"""Uploads a checkpoint, with its model card, to the Hugging Face Hub."""

from collections.abc import Sequence
import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import jax

from dualformer_jax.checkpoints import (
  checkpoint,
  hub,
  hub_upload,
  portable,
)
from dualformer_jax.checkpoints.messages import listed, quote
from dualformer_jax.errors import UserError
from dualformer_jax.inference import model_card

_DESCRIPTIONS = {
  hub.CONFIG: 'model, preprocessing, class names and training config',
  hub.WEIGHTS: 'weights',
}
_LOG = logging.getLogger(__name__)


def push(
  target: hub_upload.Target,
  path: str | os.PathLike[str],
  extra_files: Sequence[pathlib.Path] = (),
  *,
  private: bool = False,
  license_name: str = 'unknown',
) -> str:
  """Uploads a checkpoint and other files, and returns a summary.

  Args:
    target: where to.
    path: the checkpoint, as for `checkpoint.find`.
    extra_files: exported files of the same model.
    private: whether a new repository is private.
    license_name: identifier of a license on the Hub.

  Raises:
    UserError: there is no checkpoint, or it cannot be uploaded.
  """
  folder = checkpoint.find(path)
  variables, metadata = checkpoint.load_model(folder)
  metadata = portable.public_metadata(metadata)
  files: dict[str, bytes | pathlib.Path] = {}
  files |= portable.encode(variables, metadata)
  descriptions = dict(_DESCRIPTIONS)
  for file in extra_files:
    files[file.name] = file
    descriptions[file.name] = 'written by `dualformer_jax.export`'
  address = target.address
  count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  report = find_report(folder)
  card = model_card.render(
    address, metadata, count, descriptions, license_name, report
  )
  files['README.md'] = card.encode('utf-8', 'replace')
  commit = hub_upload.upload(
    target, files, 'Upload a model with dualformer_jax', private
  )
  if kept := sorted(target.names - files.keys()):
    _LOG.warning(
      '%s still has %s; delete those that belong to other weights',
      address,
      listed(map(quote, kept)),
    )
  pinned = dataclasses.replace(address, revision=commit)
  return (
    f'{address}: commit {commit}, {", ".join(files)}; '
    + ('with the scores' if report else 'without scores')
    + f" in the model card\nUsage in Python:  dualformer_jax.load('{pinned}')"
  )


def find_report(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns report.json if it is of a checkpoint in a workdir, and exists.

  Raises:
    UserError: the file is damaged.
  """
  kinds = (checkpoint.LATEST, checkpoint.BEST)
  if folder.parent.name not in kinds:
    return None
  path = folder.parents[1] / 'report.json'
  try:
    report = json.loads(path.read_text('utf-8'))
    # The workdir may have been moved; the best checkpoint may be the latest.
    kind, step = pathlib.PurePath(report['checkpoint']).parts[-2:]
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{path}: cannot be read ({type(error).__name__}: {error}); run the test '
      'again with --mode=test, or remove it to push without scores'
    ) from error
  if kind not in kinds or step != folder.name:
    _LOG.warning(
      '%s is the test of %s/%s, not of %s/%s, so the model card has no scores; '
      'push the tested checkpoint with --checkpoint=%s, or test this one',
      path,
      kind,
      step,
      *folder.parts[-2:],
      folder.parents[1] / kind / step,
    )
    return None
  return report
