"""A local server with the protocol of the Hugging Face Hub.

It answers what huggingface_hub asks to create repositories, branches and tags,
to upload files (in commits, and large ones with Git LFS) and to read them. As
on the Hub, large files are served from another host, after a redirection.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
import re
from typing import Any
import urllib.parse

import yaml

from tests.http_server import SilentHandler, serve

TOKEN = 'hf_of_the_owner'
_LFS_SUFFIXES = ('.safetensors', '.pth', '.zip')
_ID = r'(?P<id>[\w.-]+/[\w.-]+)'
_API = f'/api/(?P<kind>model|dataset)s/{_ID}'


def git_hash(content: bytes) -> str:
  """Returns the hash that git gives to a file."""
  return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
  return path.endswith(_LFS_SUFFIXES)


@dataclasses.dataclass
class Repository:
  """A repository: files of each commit, and the commit of each name.

  Attributes:
    private: whether it exists only for those with the token.
    gated: whether only its files are refused without the token.
    commits: path -> content, by commit.
    refs: commit of each branch and tag.
  """

  private: bool = False
  gated: bool = False
  commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
  refs: dict[str, str] = dataclasses.field(default_factory=dict)

  def commit(self, files: Mapping[str, bytes], branch: str = 'main') -> str:
    """Adds files to a branch; returns the commit."""
    files = {**self.commits.get(self.refs.get(branch, ''), {}), **files}
    hashes = {path: git_hash(content) for path, content in files.items()}
    text = json.dumps([len(self.commits), hashes])
    commit = hashlib.sha1(text.encode()).hexdigest()
    self.commits[commit] = files
    self.refs[branch] = commit
    return commit

  def find(self, revision: str) -> str | None:
    """Returns the commit of a branch, tag or commit, if there is one."""
    found = self.refs.get(revision, revision)
    return found if found in self.commits else None


@dataclasses.dataclass
class Hub:
  """The server.

  Attributes:
    url: its address, for HF_ENDPOINT.
    repositories: by kind ('model' or 'dataset') and OWNER/NAME.
    large: content of files in Git LFS by sha256.
    replaced: content that is served instead of that of a path.
    requests: method and path of each request.
  """

  url: str = ''
  repositories: dict[tuple[str, str], Repository] = dataclasses.field(
    default_factory=dict
  )
  large: dict[str, bytes] = dataclasses.field(default_factory=dict)
  replaced: dict[str, bytes] = dataclasses.field(default_factory=dict)
  requests: list[str] = dataclasses.field(default_factory=list)

  def add(
    self,
    name: str,
    files: Mapping[str, bytes],
    kind: str = 'model',
    private: bool = False,
    gated: bool = False,
  ) -> Repository:
    """Adds a repository with files."""
    repository = Repository(private, gated)
    repository.commit(files)
    self.repositories[kind, name] = repository
    return repository

  def model(self, name: str) -> Repository:
    return self.repositories['model', name]


@contextlib.contextmanager
def start() -> Iterator[Hub]:
  """Starts an empty server, and stops it."""
  hub = Hub()

  class Handler(_Handler):
    server_state = hub

  with serve(Handler) as hub.url:
    yield hub


_REVISION = '(?P<revision>[^/]+)'
_DATASET = '(?:(?P<kind>dataset)s/)?'
# Method, path, and the name of the method of the handler.
_ROUTES = [
  ('GET', f'{_API}(?:/revision/{_REVISION})?', 'info'),
  ('GET', f'{_API}/tree/{_REVISION}(?P<folder>/.*)?', 'tree'),
  ('POST', f'{_API}/paths-info/{_REVISION}', 'paths_info'),
  ('GET', f'/{_DATASET}{_ID}/resolve/{_REVISION}/(?P<path>.+)', 'resolve'),
  ('GET', '/storage/(?P<digest>[^/]+)/(?P<path>.+)', 'storage'),
  ('POST', '/api/repos/create', 'create'),
  ('POST', '/api/validate-yaml', 'validate_yaml'),
  ('POST', f'{_API}/preupload/{_REVISION}', 'preupload'),
  ('POST', f'/{_ID}\\.git/info/lfs/objects/batch', 'lfs_batch'),
  ('PUT', '/upload/(?P<digest>[^/]+)', 'upload'),
  ('POST', '/verify', 'verify'),
  ('POST', f'{_API}/commit/{_REVISION}', 'make_commit'),
  ('POST', f'{_API}/branch/(?P<branch>[^/]+)', 'make_branch'),
  ('POST', f'{_API}/tag/{_REVISION}', 'make_tag'),
]


class _Handler(SilentHandler):
  server_state: Hub

  def handle_request(self) -> None:
    hub = self.server_state
    url = urllib.parse.urlsplit(self.path)
    self.query = urllib.parse.parse_qs(url.query)
    self.body = self.read_body()
    hub.requests.append(f'{self.command} {urllib.parse.unquote(self.path)}')
    token = self.headers.get('Authorization', '').removeprefix('Bearer ')
    self.is_owner = token == TOKEN
    if token and not self.is_owner and not url.path.startswith('/storage/'):
      message = 'Invalid credentials in Authorization header'
      self.answer(401, X_Error_Message=message)
      return
    method = 'GET' if self.command == 'HEAD' else self.command
    for expected, pattern, answer in _ROUTES:
      found = re.fullmatch(pattern, url.path)
      if found and expected == method:
        parts = {
          name: urllib.parse.unquote(part or '')
          for name, part in found.groupdict().items()
        }
        if 'id' not in parts:
          getattr(self, answer)(**parts)
          return
        name, kind = parts.pop('id'), parts.pop('kind', 'model') or 'model'
        repository = hub.repositories.get((kind.rstrip('s'), name))
        if repository is None or (repository.private and not self.is_owner):
          status = 404 if self.is_owner else 401
          self.answer(status, X_Error_Code='RepoNotFound')
        elif method in ('POST', 'PUT') and not (
          self.is_owner or 'paths-info' in url.path
        ):
          self.answer(401)
        else:
          self.name, self.repository = name, repository
          revision = parts.pop('revision', None)
          if revision is not None:
            self.commit = repository.find(revision or 'main') or ''
            self.branch = revision
            if not self.commit:
              self.answer(404, X_Error_Code='RevisionNotFound')
              return
          getattr(self, answer)(**parts)
        return
    self.answer(404, f'no route for {self.path}'.encode())

  do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

  def read_body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    chunks = []
    while size := int(self.rfile.readline(), 16):
      chunks.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(chunks)

  def answer(
    self, status: int, content: bytes = b'', /, **headers: str
  ) -> None:
    self.send_response(status)
    self.send_header('Content-Length', str(len(content)))
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def answer_json(self, value: Any, status: int = 200) -> None:
    content = json.dumps(value).encode()
    self.answer(status, content, Content_Type='application/json')

  # ------------------------------------------------------------------- reading
  def info(self) -> None:
    files = self.repository.commits[self.commit]
    with_blobs = 'blobs' in self.query
    siblings = [
      {'rfilename': path}
      | (self.entry(path, content, 'blobId') if with_blobs else {})
      for path, content in files.items()
    ]
    self.answer_json(
      {
        'id': self.name,
        'sha': self.commit,
        'private': self.repository.private,
        'siblings': siblings,
      }
    )

  def entry(
    self, path: str, content: bytes, hash_name: str = 'oid'
  ) -> dict[str, Any]:
    size = len(content)
    entry = {'path': path, 'size': size, hash_name: git_hash(content)}
    if is_lfs(path):
      digest = hashlib.sha256(content).hexdigest()
      pointer = git_hash(f'oid sha256:{digest} size {size}'.encode())
      hash_in_lfs = 'sha256' if hash_name == 'blobId' else 'oid'
      entry[hash_name] = pointer
      entry['lfs'] = {hash_in_lfs: digest, 'size': size, 'pointerSize': 134}
    return {'type': 'file', **entry}

  def tree(self, folder: str = '') -> None:
    files = self.repository.commits[self.commit]
    folder = folder.strip('/')
    start = f'{folder}/' if folder else ''
    is_recursive = self.query.get('recursive', [''])[0].lower() == 'true'
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
      if not path.startswith(start):
        continue
      parts = path.removeprefix(start).split('/')
      for depth in range(1, len(parts)):
        parent = start + '/'.join(parts[:depth])
        if is_recursive or depth == 1:
          entries[parent] = self.folder(parent)
      if is_recursive or len(parts) == 1:
        entries[path] = self.entry(path, content)
    if not entries:
      self.answer(404, X_Error_Code='EntryNotFound')
    else:
      self.answer_json(list(entries.values()))

  def folder(self, path: str) -> dict[str, Any]:
    return {'type': 'directory', 'path': path, 'oid': '0' * 40, 'size': 0}

  def paths_info(self) -> None:
    if self.headers.get('Content-Type') == 'application/json':
      paths = json.loads(self.body)['paths']
    else:
      paths = urllib.parse.parse_qs(self.body.decode()).get('paths', [])
    files = self.repository.commits[self.commit]
    entries = []
    for path in paths:
      if path in files:
        entries.append(self.entry(path, files[path]))
      elif any(name.startswith(f'{path}/') for name in files):
        entries.append(self.folder(path))
    self.answer_json(entries)

  def resolve(self, path: str) -> None:
    files = self.repository.commits[self.commit]
    headers: Any = {'X_Repo_Commit': self.commit}
    if self.repository.gated and not self.is_owner:
      self.answer(401, X_Error_Code='GatedRepo', **headers)
    elif path not in files:
      self.answer(404, X_Error_Code='EntryNotFound', **headers)
    elif is_lfs(path):
      content = files[path]
      digest = hashlib.sha256(content).hexdigest()
      self.server_state.large[digest] = content
      # Another host for the client.
      storage = self.server_state.url.replace('127.0.0.1', 'localhost')
      self.answer(
        302,
        Location=f'{storage}/storage/{digest}/{path}',
        X_Linked_Etag=f'"{digest}"',
        X_Linked_Size=str(len(content)),
        **headers,
      )
    else:
      content = self.server_state.replaced.get(path, files[path])
      self.send_part(content, ETag=f'"{git_hash(files[path])}"', **headers)

  def storage(self, digest: str, path: str) -> None:
    content = self.server_state.large[digest]
    content = self.server_state.replaced.get(path, content)
    self.send_part(content, ETag='"of another server"')

  def send_part(self, content: bytes, **headers: str) -> None:
    if found := self.headers.get('Range'):
      first, last = found.removeprefix('bytes=').split('-')
      part = content[int(first) : int(last) + 1 if last else None]
      last_byte = int(first) + len(part) - 1
      total = f'bytes {first}-{last_byte}/{len(content)}'
      self.answer(206, part, Content_Range=total, **headers)
    else:
      self.answer(200, content, **headers)

  # ------------------------------------------------------------------- writing
  def create(self) -> None:
    wanted = json.loads(self.body)
    name = f'{wanted["organization"]}/{wanted["name"]}'
    key = (wanted.get('type') or 'model', name)
    url = f'{self.server_state.url}/{name}'
    if not self.is_owner:
      self.answer(401)
    elif wanted['organization'] != 'owner':
      message = f"You don't have the rights to create a model under {name}"
      self.answer(403, X_Error_Message=message)
    elif key in self.server_state.repositories:
      self.answer_json({'url': url, 'error': 'You already created it'}, 409)
    else:
      is_private = wanted.get('visibility') == 'private'
      repository = Repository(
        private=is_private or wanted.get('private', False)
      )
      repository.commit({'.gitattributes': b'*.safetensors filter=lfs\n'})
      self.server_state.repositories[key] = repository
      self.answer_json({'url': url, 'name': name})

  def validate_yaml(self) -> None:
    content = json.loads(self.body)['content']
    found = re.match(r'---\n(.*?)\n---\n', content, re.DOTALL)
    try:
      fields = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
      self.answer_json({'errors': [{'message': str(error)}]}, 400)
      return
    warnings = [] if fields else [{'message': 'empty metadata'}]
    self.answer_json({'errors': [], 'warnings': warnings})

  def preupload(self) -> None:
    files = self.repository.commits[self.commit]
    answers = []
    for file in json.loads(self.body)['files']:
      path = file['path']
      mode = 'lfs' if is_lfs(path) else 'regular'
      answer = {'path': path, 'uploadMode': mode, 'shouldIgnore': False}
      if path in files:
        answer['oid'] = self.entry(path, files[path])['oid']
      answers.append(answer)
    self.answer_json({'files': answers})

  def lfs_batch(self) -> None:
    objects = []
    for wanted in json.loads(self.body)['objects']:
      entry = {'oid': wanted['oid'], 'size': wanted['size']}
      if wanted['oid'] not in self.server_state.large:
        url = f'{self.server_state.url}/upload/{wanted["oid"]}'
        entry['actions'] = {
          'upload': {'href': url},
          'verify': {'href': f'{self.server_state.url}/verify'},
        }
      objects.append(entry)
    self.answer_json({'transfer': 'basic', 'objects': objects})

  def upload(self, digest: str) -> None:
    if hashlib.sha256(self.body).hexdigest() != digest:
      self.answer(400)
      return
    self.server_state.large[digest] = self.body
    self.answer(200)

  def verify(self) -> None:
    wanted = json.loads(self.body)
    content = self.server_state.large.get(wanted['oid'], b'')
    self.answer(200 if len(content) == wanted['size'] else 404)

  def make_commit(self) -> None:
    files = {}
    for line in self.body.splitlines():
      item = json.loads(line)
      value = item['value']
      if item['key'] == 'header':
        parent = value.get('parentCommit', self.commit)
        if parent != self.commit:
          self.answer_json({'error': 'A commit has happened since'}, 412)
          return
      elif item['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif item['key'] == 'lfsFile':
        files[value['path']] = self.server_state.large[value['oid']]
      else:
        raise ValueError(f'the server knows no {item["key"]}')
    commit = self.repository.commit(files, self.branch)
    url = f'{self.server_state.url}/{self.name}/commit/{commit}'
    answer = {'success': True, 'commitOid': commit, 'commitUrl': url}
    self.answer_json({**answer, 'hookOutput': '', 'pullRequestUrl': None})

  def make_branch(self, branch: str) -> None:
    if branch in self.repository.refs:
      self.answer(409)
      return
    point = json.loads(self.body).get('startingPoint', 'main')
    self.repository.refs[branch] = self.repository.refs[point]
    self.answer_json({})

  def make_tag(self) -> None:
    self.repository.refs[json.loads(self.body)['tag']] = self.commit
    self.answer_json({})
