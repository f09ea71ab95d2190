"""The probe command, on a small model and small datasets."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest

import dualformer_jax
from dualformer_jax import probe as command
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.transforms import eval_views
from dualformer_jax.probing import features, heads, probe
from tests import in_process, small_checkpoint, training_command

VIDEOS = 48  # of each split of the dataset


@pytest.fixture(scope='module', name='model')
def _model(tmp_path_factory) -> pathlib.Path:
  return small_checkpoint.save(tmp_path_factory.mktemp('model') / 'model')


@pytest.fixture(name='run')
def _run(model, motion_dataset, monkeypatch):
  monkeypatch.setattr(heads, '_MIN_STEPS', 4)
  monkeypatch.setattr(heads, '_MIN_EPOCHS', 1)
  for grid in heads.GRIDS:
    monkeypatch.setitem(heads.GRIDS, grid, ((0.01, 0.0), (0.1, 0.0)))

  def run(workdir: pathlib.Path, *flags: str, source: Any = model):
    return in_process.run(
      command,
      f'--checkpoint={source}',
      f'--workdir={workdir}',
      f'--config={training_command.REPOSITORY}/configs/motion.py',
      f'--config.dataset.data_dir={motion_dataset}',
      *flags,
      with_log=True,
    )

  return run


def logits_of_loaded_model(
  workdir: pathlib.Path, data: PreparedDataset, count: int
) -> np.ndarray:
  recognizer = dualformer_jax.load(workdir)
  assert recognizer.class_names == data.class_names
  views = [
    eval_views(data[i].video, recognizer.preprocessing) for i in range(count)
  ]
  clips = recognizer.normalize(np.concatenate(views))
  return recognizer.logits(clips)


@pytest.mark.slow
def test_saved_models_give_the_reported_logits(run, motion_dataset, tmp_path):
  stored = f'--features={tmp_path}/features'
  done = run(tmp_path / 'attentive', stored, '--head=attentive')
  assert done.returncode == 0, done.stderr
  assert 'held out 8 of 48 training videos' in done.stderr
  before = {
    path: path.stat().st_mtime_ns
    for path in (tmp_path / 'features').rglob('*.np?')
  }
  assert len(before) == 4
  done = run(tmp_path / 'linear', stored, '--head=linear')
  assert done.returncode == 0, done.stderr
  assert all(path.stat().st_mtime_ns == time for path, time in before.items())

  data = PreparedDataset('motion', 'validation', str(motion_dataset))
  for kind, tolerance in (('linear', 1e-4), ('attentive', 3e-3)):
    workdir = tmp_path / kind
    with np.load(workdir / 'views.npz') as arrays:
      logits, labels = arrays['logits'], arrays['labels']
    assert logits.shape == (VIDEOS, 1, 8)
    found = logits_of_loaded_model(workdir, data, 10)
    # Stored tokens are float16.
    scale = np.abs(logits).max()
    np.testing.assert_allclose(found, logits[:10, 0], atol=tolerance * scale)
    report = json.loads((workdir / 'report.json').read_text())
    assert report['top1'] == np.mean(logits[:, 0].argmax(1) == labels)
    assert 0 <= report['expected_calibration_error'] <= 1
    names = [row['kind'] for row in report['probes']]
    assert names == ['nearest neighbors', kind]
    assert report['probes'][1]['test'] == report['top1']
    page = (workdir / 'report.html').read_text()
    assert 'nearest neighbors' in page
    recognizer = dualformer_jax.load(workdir)
    assert recognizer.model.head == kind
    clips = recognizer.normalize(recognizer.views('tests/cases/base.mp4'))
    heat = recognizer.gradcam(clips)
    assert np.isfinite(heat).all() and heat.max() > 0

  # Nothing is overwritten, unless that is wanted.
  done = run(tmp_path / 'linear', stored, '--head=linear')
  assert done.returncode == 2
  assert 'report.json already exists' in done.stderr
  done = run(tmp_path / 'linear', stored, '--head=linear', '--overwrite')
  assert done.returncode == 0, done.stderr
  folders = list((tmp_path / 'linear' / 'checkpoints').iterdir())
  assert [folder.name for folder in folders] == ['1']


@pytest.mark.slow
def test_a_separate_validation_split_and_random_clips(
  run, motion_dataset, tmp_path
):
  copy = tmp_path / 'data'
  shutil.copytree(motion_dataset, copy)
  [info] = copy.rglob('dataset_info.json')
  content = json.loads(info.read_text())
  [split] = (s for s in content['splits'] if s['name'] == 'validation')
  content['splits'].append(split | {'name': 'test'})
  info.write_text(json.dumps(content))
  for path in info.parent.glob('motion-validation.tfrecord*'):
    new = path.name.replace('validation', 'test')
    path.with_name(new).write_bytes(path.read_bytes())
  done = run(
    tmp_path / 'run',
    '--views=2',
    '--head=linear',
    f'--config.dataset.data_dir={copy}',
    '--config.dataset.test_split=test',
    '--config.dataset.flip=True',
  )
  assert done.returncode == 0, done.stderr
  assert 'held out' not in done.stderr
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  assert report['dataset']['split'] == 'test'
  for probe_ in report['probes']:  # the same videos
    assert probe_['choice'] == probe_['test']
  with np.load(tmp_path / 'run/features/train/00000.npz') as arrays:
    assert arrays['pooled'].shape == (VIDEOS, 2, 16)


def encode(
  folder: pathlib.Path,
  model: pathlib.Path,
  data: PreparedDataset,
  train: features.TrainViews | None = None,
) -> features.Features:
  """Computes the features of a split, in files of 20 videos."""
  variables, metadata = checkpoint.load_model(model)
  p = small_checkpoint.PREPROCESSING
  axes = {'data': 1, 'fsdp': 1, 'tensor': 1}
  return features.compute(
    folder,
    metadata.build_model(),
    variables,
    data,
    features.Views(p, p.image_size, train),
    sharding.make_mesh(axes, 1, devices=jax.devices()[:1]),
    with_tokens=True,
    clips_per_batch=36,  # six videos
    num_threads=2,
  )


def content(folder: pathlib.Path) -> dict[str, bytes]:
  arrays = {}
  for path in sorted(folder.glob('*.np?')):
    loaded = np.load(path)
    files = {'': loaded} if path.suffix == '.npy' else dict(loaded)
    arrays |= {f'{path.name} {n}': x.tobytes() for n, x in files.items()}
  return arrays


@pytest.mark.slow
def test_interrupted_features_are_completed_bit_by_bit(
  model, motion_dataset, tmp_path, monkeypatch
):
  monkeypatch.setattr(features, '_MAX_VIDEOS', 20)
  data = PreparedDataset('motion', 'train', str(motion_dataset))
  options = features.TrainViews(1, True, 1, True)
  whole = encode(tmp_path / 'whole', model, data, options)
  assert whole.pooled.shape == (VIDEOS, 6, 16)
  assert np.ptp(whole.pooled, axis=1).min() > 0  # clips differ
  write, numbers = features._write, []

  def write_one(path: pathlib.Path, *args: Any) -> None:
    if path.stem == '00001':
      raise KeyboardInterrupt
    write(path, *args)

  folder = tmp_path / 'interrupted'
  monkeypatch.setattr(features, '_write', write_one)
  with pytest.raises(KeyboardInterrupt):
    encode(folder, model, data, options)
  (folder / '.00001.npy.abc.partial').write_bytes(b'half')
  (folder / '00001.npy').write_bytes(b'complete, but not its .npz')

  def write_rest(path: pathlib.Path, *args: Any) -> None:
    numbers.append(path.stem)
    write(path, *args)

  monkeypatch.setattr(features, '_write', write_rest)
  resumed = encode(folder, model, data, options)
  assert numbers == ['00001', '00002']
  assert content(folder) == content(tmp_path / 'whole')
  assert not list(folder.glob('.*'))
  assert resumed.video_ids == [data[i].video_id for i in range(VIDEOS)]
  rows = np.array([47, 19, 20])
  np.testing.assert_allclose(
    resumed.tokens(rows, np.array([0, 5, 1])).mean(axis=1),
    resumed.pooled[rows, [0, 5, 1]],
    rtol=2e-3,
    atol=2e-3,
  )


def test_features_of_something_else_are_refused(
  model, motion_dataset, tmp_path
):
  folder = tmp_path / 'features'
  data = PreparedDataset('motion', 'validation', str(motion_dataset))
  first = encode(folder, model, data)
  again = encode(folder, model, data)
  np.testing.assert_array_equal(first.pooled, again.pooled)
  before = content(folder)

  variables, metadata = checkpoint.load_model(model)
  norm = variables['params']['backbone']['norm']
  norm['bias'] = np.array(norm['bias']) + 0.01
  checkpoint.save_model(tmp_path / 'other', variables, metadata)
  with pytest.raises(
    UserError, match='features of another checkpoint; nothing'
  ):
    encode(folder, tmp_path / 'other', data)
  train = PreparedDataset('motion', 'train', str(motion_dataset))
  with pytest.raises(UserError, match='features of another dataset; nothing'):
    encode(folder, model, train)
  options = features.TrainViews(1, True, 1, True)
  with pytest.raises(UserError, match='features of another views; nothing'):
    encode(folder, model, data, options)
  assert content(folder) == before

  path = folder / '00000.npz'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match=f'{path} is damaged'):
    encode(folder, model, data)


def test_room_is_checked_before(model, motion_dataset, tmp_path, monkeypatch):
  data = PreparedDataset('motion', 'validation', str(motion_dataset))
  usage = types.SimpleNamespace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(UserError, match=r'it needs 2\.4 MB, but 0\.0 MB'):
    encode(tmp_path / 'features', model, data)
  assert not (tmp_path / 'features').exists()


@pytest.mark.parametrize(
  ('classes', 'count', 'expected'),
  [(('run',), 9, 'has 1 class'), (tuple('abcd'), 3, '3 videos of 4 classes')],
)
def test_too_small_datasets_raise(classes, count, expected, monkeypatch):
  class Split(PreparedDataset):
    def __init__(self):
      self.folder, self.split = pathlib.Path('folder'), 'train'
      self.class_names = classes

    def __len__(self) -> int:
      return count

  monkeypatch.setattr(probe.setup, 'open_split', lambda *_: Split())
  dataset = types.SimpleNamespace(
    train_split='train', validation_split='test', test_split='test'
  )
  config: Any = types.SimpleNamespace(dataset=dataset)
  with pytest.raises(UserError, match=expected):
    probe._open(config)
  dataset.train_split = 'test'
  with pytest.raises(UserError, match="train_split is 'test', which is also"):
    probe._open(config)


def test_a_fifth_of_each_class_is_held_out():
  labels = np.repeat(np.arange(4), [1, 2, 10, 23])
  rows, held_out = probe._hold_out(labels, 0)
  assert sorted([*rows, *held_out]) == list(range(36))
  assert np.bincount(labels[held_out]).tolist() == [0, 1, 2, 5]
  _, others = probe._hold_out(labels, 1)
  assert not np.array_equal(held_out, others)
  _, none = probe._hold_out(np.arange(3), 0)
  assert len(none) == 0


def test_mistakes_are_one_line(run, tmp_path):
  done = run(tmp_path / 'a', source=tmp_path)
  assert (done.returncode, done.stdout) == (2, '')
  assert 'holds no checkpoint' in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert os.listdir(tmp_path) == []
