"""Uploads files to a model repository of the Hugging Face Hub."""

from collections.abc import Mapping
import dataclasses
import pathlib

from dualformer_jax.checkpoints import hub
from dualformer_jax.checkpoints.messages import listed, quote
from dualformer_jax.errors import UserError

_CREATED_BY_HUB = '.gitattributes'


@dataclasses.dataclass(frozen=True)
class Target:
  """A branch of a repository that may be written.

  Attributes:
    address: the repository and the branch.
    exists: whether the repository exists.
    parent: the latest commit of the branch; None if there is no such branch.
    names: the files of the branch.
  """

  address: hub.Address
  exists: bool
  parent: str | None
  names: frozenset[str] = frozenset()


def find_target(text: str, overwrite: bool, private: bool) -> Target:
  """Returns where to upload to; changes nothing.

  Args:
    text: hf://OWNER/NAME[@BRANCH].
    overwrite: whether the branch may have files.
    private: whether the repository must not be public.

  Raises:
    UserError: the address is invalid, there is no token, or the repository has
      files or is public.
  """
  address = hub.Address.parse(text)
  if address.file or address.is_commit:
    raise UserError(f'--push={text}: expected hf://OWNER/NAME[@BRANCH]')
  client = hub.client(address)
  if client.get_token() is None:
    raise UserError(
      f'{address}: uploading needs a token that may write; log in with '
      '`hf auth login` or set HF_TOKEN'
    )
  try:
    with hub.client_errors(address):
      info = client.HfApi().model_info(
        address.repository, revision=address.revision
      )
  except UserError as error:
    if isinstance(error.__cause__, client.errors.GatedRepoError):
      raise
    if isinstance(error.__cause__, client.errors.RepositoryNotFoundError):
      return Target(address, False, None)
    if isinstance(error.__cause__, client.errors.RevisionNotFoundError):
      return Target(address, True, None)
    raise
  if private and not info.private:
    raise UserError(
      f'{address}: is public already; omit --private, or make it private in '
      'its settings'
    )
  names = frozenset(file.rfilename for file in info.siblings)
  names -= {_CREATED_BY_HUB}
  if names and not overwrite:
    raise UserError(
      f'{address}: has files already ({listed(map(quote, sorted(names)), 5)}); '
      'choose another name or branch, or add --overwrite'
    )
  return Target(address, True, info.sha, names)


def upload(
  target: Target,
  files: Mapping[str, bytes | pathlib.Path],
  message: str,
  private: bool = False,
) -> str:
  """Uploads files in one commit, and returns its hash.

  The repository and the branch are created if needed. A new repository is
  private if `private`, and otherwise as the Hub decides: public, unless the
  settings of an organization differ.

  Raises:
    UserError: the Hub refuses it, cannot be reached, or the branch has changed
      since `find_target`.
  """
  address = target.address
  client = hub.client(address)
  api = client.HfApi(library_name='dualformer_jax')
  with hub.client_errors(address), hub.client_progress('uploading'):
    if not target.exists:
      api.create_repo(address.repository, private=private or None)
    if target.parent is None and not address.is_default:
      api.create_branch(address.repository, branch=address.revision)
    commit = api.create_commit(
      address.repository,
      [
        client.CommitOperationAdd(
          name, content if isinstance(content, bytes) else str(content)
        )
        for name, content in files.items()
      ],
      commit_message=message,
      revision=address.revision,
      parent_commit=target.parent,
    )
  return commit.oid
