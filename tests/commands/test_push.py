"""export --push: checkpoints and model cards on the Hugging Face Hub."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import huggingface_hub
import pytest
import yaml

from dualformer_jax import export
from dualformer_jax.checkpoints import checkpoint, hub
from tests import (
  hub_client,
  hub_server,
  small_checkpoint,
  training_command,
)

# huggingface_hub 2.4 passes files to its HTTP client in a deprecated way.
pytestmark = pytest.mark.filterwarnings(
  "ignore:Use 'content=:DeprecationWarning"
)

URL = 'hf://owner/small'
NAMES = {'.gitattributes', 'README.md', hub.CONFIG, hub.WEIGHTS}
# Prints how much the probabilities of two models differ, and those of classes.
_COMPARE = """
import sys
import numpy as np
import dualformer_jax
views = np.random.default_rng(0).integers(0, 256, (6, 8, 32, 32, 3), np.uint8)
first, second = (
  dualformer_jax.load(path).probabilities(views) for path in sys.argv[1:]
)
print(np.abs(first - second).max(), np.ptp(first))
"""


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory) -> pathlib.Path:
  return small_checkpoint.save(tmp_path_factory.mktemp('local') / 'small')


@pytest.fixture(name='cache')
def _cache(tmp_path) -> pathlib.Path:
  return tmp_path / 'home' / 'hub'


@pytest.fixture(name='server')
def _server(monkeypatch, cache):
  with hub_server.start() as server:
    hub_client.use(monkeypatch, server, cache)
    monkeypatch.setenv('HF_TOKEN', hub_server.TOKEN)
    yield server
  huggingface_hub.close_session()


@pytest.fixture(name='push')
def _push(run_command, folder):
  return functools.partial(run_command, export, f'--checkpoint={folder}')


def files_of(server: hub_server.Hub, branch: str = 'main') -> dict[str, bytes]:
  repository = server.model('owner/small')
  return repository.commits[repository.refs[branch]]


def assert_fails(done: subprocess.CompletedProcess[str], expected: str) -> None:
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert expected in done.stderr, done.stderr


def card_of(server: hub_server.Hub) -> tuple[dict[str, Any], str]:
  """Returns the fields of a model card and its text."""
  card = files_of(server)['README.md'].decode()
  found = re.fullmatch(r'---\n(.*?)\n---\n(.*)', card, re.DOTALL)
  assert found
  return yaml.safe_load(found[1]), found[2]


@pytest.mark.slow
def test_model_of_the_hub_predicts_the_same(
  push, server, cache, folder, tmp_path
):
  done = push(f'--push={URL}')
  assert done.returncode == 0, done.stderr
  commit = server.model('owner/small').refs['main']
  assert commit in done.stdout
  done = subprocess.run(
    [sys.executable, '-c', _COMPARE, folder, f'{URL}@{commit}'],
    env=os.environ
    | {'JAX_PLATFORMS': 'cpu'}
    | hub_client.environment(server, cache),
    cwd=training_command.REPOSITORY,
    check=True,
    capture_output=True,
    text=True,
    timeout=300,
  )
  difference, of_classes = map(float, done.stdout.split())
  assert difference == 0
  assert of_classes > 1e-3
  assert any('/resolve/' in request for request in server.requests)


def test_repository_has_the_files_and_a_card(push, server, folder):
  done = push(f'--push={URL}', '--license=cc-by-4.0')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'without scores in the model card' in done.stdout
  assert set(files_of(server)) == NAMES
  assert not server.model('owner/small').private
  fields, text = card_of(server)
  assert fields['license'] == 'cc-by-4.0'
  assert fields['library_name'] == 'dualformer_jax'
  assert fields['pipeline_tag'] == 'video-classification'
  assert 'jax' in fields['tags']
  assert 'model-index' not in fields
  assert 'This checkpoint was not evaluated.' in text
  assert f"recognizer = dualformer_jax.load('{URL}')" in text
  assert '`größer werden`' in text
  # Each line of the example is valid, and leads to this model.
  [code] = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  scope: dict[str, Any] = {}
  exec(code.partition('print(')[0], scope)
  assert scope['recognizer'].class_names == small_checkpoint.CLASS_NAMES


def test_exported_file_is_uploaded(push, server, tmp_path, folder):
  out = tmp_path / 'small.zip'
  done = push(f'--push={URL}', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert set(files_of(server)) == {*NAMES, 'small.zip'}
  assert files_of(server)['small.zip'] == out.read_bytes()
  assert '`dualformer_jax.export`' in card_of(server)[1]


def test_existing_files_need_overwrite(push, server):
  server.add('owner/small', {'.gitattributes': b''})
  done = push(f'--push={URL}')
  assert done.returncode == 0, done.stderr
  first = server.model('owner/small').refs['main']
  assert_fails(push(f'--push={URL}'), 'or add --overwrite')
  server.add('owner/bert', {'pytorch_model.bin': b'x'})
  assert_fails(
    push('--push=hf://owner/bert'),
    "has files already ('pytorch_model.bin'); choose another name or branch",
  )
  assert server.model('owner/small').refs['main'] == first
  server.model('owner/small').commit({'old.zip': b'x'})
  flags = (f'--push={URL}', '--overwrite', '--license=mit')
  done = push(*flags, with_log=True)
  assert done.returncode == 0, done.stderr
  assert f"{URL} still has 'old.zip'; delete those" in done.stderr
  assert server.model('owner/small').refs['main'] != first
  assert card_of(server)[0]['license'] == 'mit'


def test_push_to_a_branch(push, server):
  assert push(f'--push={URL}').returncode == 0
  main = server.model('owner/small').refs['main']
  done = push(f'--push={URL}@v2', '--license=mit')
  assert done.returncode == 0, done.stderr
  assert f'{URL}@v2' in files_of(server, 'v2')['README.md'].decode()
  assert server.model('owner/small').refs['main'] == main


def test_private_repositories(push, server):
  assert push(f'--push={URL}', '--private').returncode == 0
  assert server.model('owner/small').private
  server.add('owner/public', {})
  assert_fails(
    push('--push=hf://owner/public', '--private'), 'is public already'
  )


def test_push_that_cannot_be_fails_in_one_line(push, server, monkeypatch):
  for address in ('hf://small', f'{URL}@{"0" * 40}', f'{URL}/a.zip', '/tmp/a'):
    assert_fails(push(f'--push={address}'), 'expected hf://OWNER/NAME')
  assert_fails(push('--push=hf://other/small'), 'may write to other')
  monkeypatch.setenv('HF_TOKEN', 'hf_revoked')
  assert_fails(push(f'--push={URL}'), 'refuses the token')
  monkeypatch.delenv('HF_TOKEN')
  before = len(server.requests)
  assert_fails(push(f'--push={URL}'), '`hf auth login` or set HF_TOKEN')
  assert len(server.requests) == before
  monkeypatch.setenv('HF_TOKEN', hub_server.TOKEN)
  hub_client.go_offline(monkeypatch)
  assert_fails(push(f'--push={URL}'), 'HF_HUB_OFFLINE is set')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  assert_fails(push(f'--push={URL}'), "pip install 'dualformer_jax[hub]'")
  assert not server.repositories


def test_push_does_not_undo_a_change_of_others(push, server, monkeypatch):
  assert push(f'--push={URL}').returncode == 0
  find = checkpoint.find

  def change_and_find(path: Any) -> pathlib.Path:
    server.model('owner/small').commit({'theirs': b'x'})
    return find(path)

  monkeypatch.setattr(checkpoint, 'find', change_and_find)
  assert_fails(push(f'--push={URL}', '--overwrite'), 'nothing was changed')
  assert 'theirs' in files_of(server)


@pytest.mark.slow
def test_training_from_the_hub_and_back(
  push, run_command, server, motion_dataset, tmp_path
):
  """A run starts from a model of the Hub, and is pushed with its report."""
  assert push(f'--push={URL}').returncode == 0
  commit = server.model('owner/small').refs['main']
  data, workdir = tmp_path / 'secret' / 'data', tmp_path / 'secret' / 'run'
  shutil.copytree(motion_dataset, data)
  fields = {**small_checkpoint.FIELDS, 'num_classes': 8}
  flags = [
    *(f'--config.model.{name}={value}' for name, value in fields.items()),
    f'--config.init_from={URL}',
    f'--config.dataset.data_dir={data}',
    '--config.num_epochs=1',
    '--config.batch_size=16',
    '--config.test.num_crops=3',
  ]
  done = training_command.run_here(*flags, workdir=workdir)
  assert done.returncode == 0, done.stderr
  assert f'{URL} is at commit {commit}' in done.stderr
  assert f'snapshots/{commit}\nloaded:' in done.stderr
  record = json.loads((workdir / 'hub_revisions.json').read_text())
  assert record == {URL: f'{URL}@{commit}'}
  _, metadata = checkpoint.load_model(workdir)
  assert metadata.config is not None
  assert metadata.config['init_from'] == f'{URL}@{commit}'

  report = json.loads((workdir / 'report.json').read_text())
  own = 'hf://owner/trained'
  done = run_command(export, f'--checkpoint={workdir}', f'--push={own}')
  assert done.returncode == 0, done.stderr
  assert 'with the scores in the model card' in done.stdout
  repository = server.model('owner/trained')
  files = repository.commits[repository.refs['main']]
  for name, content in files.items():
    assert b'secret' not in content, name
  found = re.fullmatch(
    r'---\n(.*?)\n---\n(.*)', files['README.md'].decode(), re.DOTALL
  )
  assert found
  fields, text = yaml.safe_load(found[1]), found[2]
  assert fields['base_model'] == 'owner/small'
  [result] = fields['model-index'][0]['results']
  assert result['dataset']['name'] == 'motion'
  assert result['metrics'][0]['value'] == round(report['top1'], 4)
  low, high = report['view_budget'][-1]['interval']
  assert (
    f'| top-1 accuracy | {report["top1"]:.1%} (95% interval {low:.1%} to '
    f'{high:.1%}) |'
  ) in text
  assert f'`{report["dataset"]["fingerprint"]}`' in text
  assert '| clips x crops of a video | 1 x 3 |' in text
  assert f'| initialized from | `{URL}@{commit}` |' in text
  assert '| dataset | `motion`, split `validation` |' in text
  assert f'| hardware | {report["hardware"]} |' in text
  assert '| steps | 3 of 16 clips |' in text

  # Scores of another checkpoint are not those of this one.
  report['checkpoint'] = str(workdir / 'best' / '2')
  (workdir / 'report.json').write_text(json.dumps(report))
  flags = (f'--checkpoint={workdir}', f'--push={own}', '--overwrite')
  done = run_command(export, *flags, with_log=True)
  assert done.returncode == 0, done.stderr
  assert 'is the test of best/2, not of checkpoints/3' in done.stderr
  assert 'without scores in the model card' in done.stdout
  (workdir / 'report.json').write_text('{')
  assert_fails(run_command(export, *flags), 'run the test again with --mode=te')
