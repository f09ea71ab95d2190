"""Keeps the revisions of hf:// addresses in a config the same during a run.

A branch on the Hugging Face Hub may move while a run trains, between its hosts
or before it resumes. WORKDIR/hub_revisions.json has the commit of each address.
"""

import copy
import json
import logging
import os
import pathlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from dualformer_jax.checkpoints import hub
from dualformer_jax.errors import UserError
from dualformer_jax.files import output_file
from dualformer_jax.training.setup import Config

FILE = 'hub_revisions.json'
_LONGEST = 1000  # bytes of an address
_LOG = logging.getLogger(__name__)


def pinned(
  config: Config, workdir: str | os.PathLike[str], record: bool = False
) -> Config:
  """Returns a copy of a config whose addresses name commits.

  All processes must call this.

  Args:
    config: the config of a run.
    workdir: its workdir, which may have recorded commits.
    record: whether to record commits that are not yet.

  Raises:
    UserError: an address has no such model or revision, or the Hub cannot be
      reached.
  """
  config = copy.deepcopy(config)
  fields = [(config, 'init_from'), (config.token_labels, 'teacher')]
  addresses = [group[name] for group, name in fields]
  if not any(map(hub.is_address, addresses)):
    return config
  commits, error = {}, None
  if jax.process_index() == 0:
    path = pathlib.Path(workdir).expanduser() / FILE
    try:
      commits = _read_and_resolve(path, addresses, record)
    except UserError as problem:
      error = problem
  for group, name in fields:
    if hub.is_address(group[name]):
      group[name] = _of_first_process(commits.get(group[name], ''), error)
  return config


def _read_and_resolve(
  path: pathlib.Path, addresses: list[str], record: bool
) -> dict[str, str]:
  """Returns the pinned form of each address, and updates the file."""
  recorded: dict[str, str] = {}
  if path.exists():
    try:
      recorded = dict(json.loads(path.read_text('utf-8')))
    except (OSError, ValueError) as error:
      raise UserError(
        f'{path}: cannot be read ({error}); remove it to use the latest commits'
      ) from error
  result = dict(recorded)
  for address in filter(hub.is_address, addresses):
    if address in recorded:
      _LOG.info('%s is %s, recorded in %s', address, recorded[address], path)
    result[address] = recorded.get(address) or hub.pinned(address)
  if record and result != recorded:
    with output_file(path) as file:
      file.write(f'{json.dumps(result, indent=2)}\n'.encode())
  return result


def _of_first_process(address: str, error: UserError | None) -> str:
  """Returns the address of process 0; raises an error if that failed."""
  if jax.process_count() > 1:
    padded = address.encode().ljust(_LONGEST, b'\0')
    array = np.frombuffer(padded, np.uint8)
    array = multihost_utils.broadcast_one_to_all(array)
    address = np.asarray(array).tobytes().rstrip(b'\0').decode()
  if error is not None:
    raise error
  if not address:
    raise UserError(
      'process 0 cannot resolve an hf:// address of the config; see its log'
    )
  return address
