"""The training command on small datasets."""

from __future__ import annotations

import json
import pathlib
import re
import struct
from typing import Any

import jax
import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2

import dualformer_jax
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.inference import recognizer as recognizers
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from tests import training_command
from tests.input_pipeline import object_stores
from tests.input_pipeline.test_object_store import uploaded

NUM_STEPS = 12  # 2 epochs of 48 videos, 8 at a time.
FLAGS = (
  '--config.num_epochs=2',
  '--config.validation.every_epochs=1',
  '--config.checkpoint.every_steps=4',
  '--config.log_every_steps=2',
)
pytestmark = pytest.mark.slow
EVENT: Any = vars(event_pb2)['Event']  # Unknown to type checkers.
REPORT = ['report.html', 'report.json', 'views.npz']
METRICS = ('top1', 'top5', 'mean_class_accuracy')


def read_report(workdir: pathlib.Path) -> dict[str, Any]:
  return json.loads((workdir / 'report.json').read_text())


def files(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
  return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def score(
  workdir: pathlib.Path, dataset: PreparedDataset, indices: list[int]
) -> tuple[np.ndarray, list[Any]]:
  """Returns probabilities of some videos, read from files, and their labels."""
  recognizer = dualformer_jax.load(read_report(workdir)['checkpoint'])
  probabilities, labels = [], []
  for index in indices:
    example = dataset[index]
    path = workdir.parent / 'video.mp4'
    path.write_bytes(example.video)
    predicted = dict(recognizer.predict(path, top_k=100))
    probabilities.append([predicted[n] for n in dataset.class_names])
    labels.append(example.label)
  return np.array(probabilities), labels


@pytest.fixture(scope='module', name='trained')
def _trained(motion_dataset, compilation_cache, tmp_path_factory):
  """A workdir, and the log of the training."""
  workdir = tmp_path_factory.mktemp('trained') / 'workdir'
  done = training_command.run(
    *training_command.TINY,
    *FLAGS,
    f'--config.dataset.data_dir={motion_dataset}',
    workdir=workdir,
    cache=compilation_cache,
    with_tensorflow=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == ''
  return workdir, done.stderr


@pytest.fixture(name='train')
def _train(tmp_path):
  """Trains in this process, in a new workdir unless one is given."""

  def train(
    *flags: str,
    model: tuple[str, ...] = training_command.TINY,
    workdir: pathlib.Path | None = None,
  ):
    return training_command.run_here(
      *model, *flags, workdir=workdir or tmp_path / 'workdir'
    )

  return train


def test_progress_is_logged(trained):
  _, log = trained
  lines = re.findall(
    r'step (\d+)/12 \(epoch ([\d.]+)/2\) (.*) ([\d:]+) left', log
  )
  steps = [int(step) for step, *_ in lines]
  assert steps == list(range(2, NUM_STEPS + 1, 2))
  for step, epoch, values, _ in lines:
    assert float(epoch) == pytest.approx(int(step) / 6, abs=0.051)
    names = values.split()[::2]
    assert {'loss', 'learning_rate', 'clips_per_second'} <= set(names)
    found = dict(zip(names, map(float, values.split()[1::2]), strict=True))
    assert 0.0 < found['loss'] < 5.0
    assert found['clips_per_second'] > 0.0
    assert 0.0 <= found['wait_for_data'] <= 1.0
    assert 0.0 < found['learning_rate'] <= 2e-3
  assert re.findall(r'validation at step (\d+): top1 0', log) == ['6', '12']
  assert 'compiling the training step: about 20 s' in log
  assert log.count('compiling the evaluation') == 1
  # The loss comes first, and no line has the number of a thread.
  assert all(values.split()[0] == 'loss' for _, _, values, _ in lines)
  assert re.search(r'^I\d{4} \d\d:\d\d:\d\d loop.py:\d+\] step 2/', log, re.M)
  assert 'first step, including compilation' in log
  assert 'Traceback' not in log


def test_training_from_a_failing_object_store_changes_nothing(
  trained, train, motion_dataset, monkeypatch, tmp_path
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  faults = object_stores.Faults(latency=0.01, share=0.05)
  with uploaded(monkeypatch, 's3', motion_dataset, faults) as url:
    done = train(
      *FLAGS,
      f'--config.dataset.data_dir={url}',
      '--config.dataset.reader_processes=2',
    )
  assert done.returncode == 0, done.stderr
  assert faults.failed >= 5  # of several hundred requests
  expected, found = (
    checkpoint.load_model(folder)[0]
    for folder in (trained[0], tmp_path / 'workdir')
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  scores = [
    read_report(w)['view_budget'] for w in (trained[0], tmp_path / 'workdir')
  ]
  assert scores[0] == scores[1]


def test_latest_and_best_checkpoints_are_kept(trained):
  workdir, log = trained
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['12']
  scores = {
    int(step): float(value)
    for step, value in re.findall(
      r'validation at step (\d+): top1 ([\d.]+)', log
    )
  }
  best = max(scores, key=lambda step: (scores[step], -step))
  assert [p.name for p in (workdir / 'best').iterdir()] == [str(best)]
  recognizer = dualformer_jax.load(workdir / 'best')
  assert recognizer.folder == workdir / 'best' / str(best)


def read_events(path: pathlib.Path) -> dict[tuple[str, int], Any]:
  """Returns what a TensorBoard file has, which consists of TFRecords."""
  content, place, scalars = path.read_bytes(), 0, {}
  while place < len(content):
    (length,) = struct.unpack_from('<Q', content, place)
    event = EVENT.FromString(content[place + 12 :][:length])
    place += 12 + length + 4
    for value in event.summary.value:
      if value.tag == 'config':
        scalars['config', event.step] = value.tensor.string_val[0].decode()
        continue
      (number,) = struct.unpack('<f', value.tensor.tensor_content)
      scalars[value.tag, event.step] = number
  return scalars


def test_tensorboard_has_the_metrics_of_the_log(trained):
  workdir, log = trained
  (path,) = workdir.glob('events.out.tfevents.*')
  scalars = read_events(path)
  for name in ('loss', 'learning_rate', 'clips_per_second', 'gradient_norm'):
    for step, value in re.findall(rf'step (\d+)/.* {name} (\S+)', log):
      found = scalars[f'train/{name}', int(step)]
      assert found == pytest.approx(float(value), rel=1e-3)
    assert sum(tag == f'train/{name}' for tag, _ in scalars) == NUM_STEPS // 2
  for name in METRICS:
    for step, value in re.findall(rf'at step (\d+):.* ?{name} (\S+)', log):
      found = scalars[f'validation/{name}', int(step)]
      assert found == pytest.approx(float(value), rel=1e-3)
    assert sum(tag == f'validation/{name}' for tag, _ in scalars) == 2
  report = read_report(workdir)
  for name in METRICS:
    ((_, step),) = [key for key in scalars if key[0] == f'test/{name}']
    assert str(step) == pathlib.Path(report['checkpoint']).name
    assert scalars[f'test/{name}', step] == pytest.approx(report[name])
  assert sum(tag == 'validation/loss' for tag, _ in scalars) == 2
  assert sum(tag == 'train/top1' for tag, _ in scalars) == NUM_STEPS // 2
  assert 'embed_dims' in scalars['config', 0]
  # The same numbers are kept without TensorFlow.
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  kept = {
    (name, metrics['step']): value
    for metrics in map(json.loads, lines)
    for name, value in metrics.items()
    if name != 'step'
  }
  del scalars['config', 0]
  assert kept == pytest.approx(scalars, rel=1e-5)


def test_report_has_the_accuracy_of_the_checkpoint(trained, motion_dataset):
  workdir, log = trained
  report = read_report(workdir)
  dataset = PreparedDataset('motion', 'validation', str(motion_dataset))
  probabilities, labels = score(workdir, dataset, list(range(len(dataset))))
  np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
  ranks = [
    sum(row > row[label])
    for row, label in zip(probabilities, labels, strict=True)
  ]
  assert report['top1'] == pytest.approx(np.mean(np.array(ranks) < 1))
  assert report['top5'] == pytest.approx(np.mean(np.array(ranks) < 5))
  recalls = [
    np.mean(
      [rank == 0 for rank, of in zip(ranks, labels, strict=True) if of == k]
    )
    for k in set(labels)
  ]
  assert len(recalls) == 8
  assert report['mean_class_accuracy'] == pytest.approx(np.mean(recalls))
  assert report['num_videos'] == 48
  assert report['failed_videos'] == []
  assert report['views'] == {'num_clips': 1, 'num_crops': 1}
  # configs/motion.py tests the best checkpoint.
  (best,) = (workdir / 'best').iterdir()
  assert report['checkpoint'] == str(best)
  assert report['checkpoint_kind'] == 'best'
  assert f'test of the best checkpoint: top1 {report["top1"]:.4g} ' in log
  # Validation and test had the same views, so they have the same score.
  validated = rf'validation at step {best.name}: top1 ([\d.]+) .*  \((.*)\)\n'
  ((score_, views),) = re.findall(validated, log)
  assert float(score_) == pytest.approx(report['top1'], abs=1e-4)
  assert views == (
    '1 clip of 16 frames, center crop of 32 from a short side of 32 pixels'
  )
  assert f'({views}) on 48 videos' in log
  assert report['config']['num_epochs'] == 2
  assert report['config']['model']['depths'] == [2]
  assert report['time']['seconds'] > 0
  assert f'report: {workdir}/report.json' in log


def test_recognizer_methods_agree(trained, motion_dataset):
  workdir, _ = trained
  recognizer = dualformer_jax.load(workdir)
  assert isinstance(recognizer, recognizers.Recognizer)
  assert recognizer.class_names[:2] == ('left', 'right')
  rng = np.random.default_rng(0)
  # Twice as wide as high, and twice as long as a clip.
  video = rng.integers(0, 256, (32, 40, 80, 3), np.uint8)
  views = recognizer.views(video)
  assert views.shape == (1, 16, 32, 32, 3)
  assert views.dtype == np.uint8
  p = recognizer.preprocessing
  clips = (views.astype(np.float64) - p.pixel_mean) / np.array(p.pixel_std)
  clips = clips.astype(np.float32)
  np.testing.assert_allclose(recognizer.normalize(views), clips, atol=1e-5)
  # More than one view, to be averaged.
  several = np.concatenate([views, 255 - views, views[:, ::-1]])
  logits = recognizer.logits(recognizer.normalize(several))
  assert logits.shape == (3, 8)
  np.testing.assert_allclose(logits[:1], recognizer.logits(clips), atol=1e-4)
  softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(
    recognizer.probabilities(several), softmax.mean(axis=0), atol=1e-6
  )
  predicted = recognizer.predict(video, top_k=3)
  order = np.argsort(-softmax[0])[:3]
  assert [n for n, _ in predicted] == [recognizer.class_names[i] for i in order]
  np.testing.assert_allclose(
    [value for _, value in predicted], softmax[0][order], atol=1e-6
  )
  # The classifier is linear in the features.
  features = recognizer.features(recognizer.normalize(several))
  assert features.shape == (3, 16)
  linear = recognizer.variables['params']['cls_head']['fc_cls']
  np.testing.assert_allclose(
    features @ np.asarray(linear['kernel']) + np.asarray(linear['bias']),
    logits,
    atol=1e-5,
  )
  with pytest.raises(ValueError, match='no token-label head'):
    recognizer.token_logits(clips)


def test_same_command_only_tests_again(trained, train, motion_dataset):
  workdir, _ = trained
  report = read_report(workdir)
  kept = files(workdir / 'checkpoints') | files(workdir / 'best')
  done = train(
    *FLAGS, f'--config.dataset.data_dir={motion_dataset}', workdir=workdir
  )
  assert done.returncode == 0, done.stderr
  assert 'training is already complete: 12 steps' in done.stderr
  assert ' left\n' not in re.sub(r'.*evaluate.*', '', done.stderr)
  assert files(workdir / 'checkpoints') | files(workdir / 'best') == kept
  again = read_report(workdir)
  assert again.pop('time') != report.pop('time')
  assert again == report


def test_mode_test_gives_the_same_report(trained, motion_dataset, tmp_path):
  workdir, _ = trained
  # The checkpoint says what the model is.
  done = training_command.run_here(
    '--mode=test',
    f'--config.init_from={workdir}',
    f'--config.dataset.data_dir={motion_dataset}',
    workdir=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert sorted(p.name for p in tmp_path.iterdir()) == REPORT
  report, expected = read_report(tmp_path), read_report(workdir)
  for name in (*METRICS, 'num_videos', 'checkpoint', 'views', 'dataset'):
    assert report[name] == expected[name]
  assert report['config']['model'] == expected['config']['model']
  # The same videos, wherever they are: what was reported when they were made.
  made = json.loads(
    (motion_dataset / 'motion' / '1.0.0' / 'report.json').read_text()
  )
  assert report['dataset']['fingerprint'] == made['fingerprint']


def levels_flags(folder: pathlib.Path, name: str) -> list[str]:
  return [
    f'--config.dataset.data_dir={folder / "tfrecord"}',
    f'--config.dataset.name={name}',
    '--config.model.num_classes=0',
    '--config.batch_size=4',
    '--config.num_epochs=2',
    '--config.log_every_steps=1',
  ]


def test_broken_videos_are_reported_and_not_replaced(
  train, prepared_datasets, tmp_path
):
  done = train(
    *levels_flags(prepared_datasets, 'flawed'), '--config.accumulation_steps=2'
  )
  assert done.returncode == 0, done.stderr
  (line,) = [s for s in done.stderr.splitlines() if 'TensorBoard' in s]
  assert "pip install 'dualformer_jax[prepare]'" in line
  workdir = tmp_path / 'workdir'
  assert sorted(p.name for p in workdir.iterdir()) == [
    'best',
    'checkpoints',
    'metrics.jsonl',
    *REPORT,
  ]
  report = read_report(workdir)
  failed = report['failed_videos']
  assert [f['video'] for f in failed] == ['validation/0', 'validation/2']
  assert all(f['reason'] for f in failed)
  assert report['num_videos'] == 3
  dataset = PreparedDataset(
    'flawed', 'validation', str(prepared_datasets / 'tfrecord')
  )
  good = [
    i
    for i in range(len(dataset))
    if dataset[i].video_id not in ('validation/0', 'validation/2')
  ]
  probabilities, labels = score(workdir, dataset, good)
  assert report['top1'] == np.mean(probabilities.argmax(axis=1) == labels)
  # Training videos are logged as well.
  assert 'train/3 cannot be read' in done.stderr


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
  ranked = positive[np.argsort(-scores)]
  return float(
    np.mean([ranked[: i + 1].mean() for i in np.flatnonzero(ranked)])
  )


def test_multi_label_dataset_has_map(train, prepared_datasets, tmp_path):
  done = train(
    *levels_flags(prepared_datasets, 'levels_multi'),
    '--config.dataset.multi_label=True',
    model=training_command.ONE_BLOCK,
  )
  assert done.returncode == 0, done.stderr
  workdir = tmp_path / 'workdir'
  report = read_report(workdir)
  assert not set(METRICS) & set(report)
  dataset = PreparedDataset(
    'levels_multi', 'validation', str(prepared_datasets / 'tfrecord')
  )
  probabilities, labels = score(workdir, dataset, list(range(5)))
  assert np.ptp(probabilities.sum(axis=1)) > 1e-6  # They do not add to 1.
  hot = np.array([[k in these for k in range(3)] for these in labels])
  assert report['mAP'] == pytest.approx(
    np.mean(
      [average_precision(probabilities[:, k], hot[:, k]) for k in range(3)]
    )
  )
  assert report['mmit_mAP'] == pytest.approx(
    np.mean(
      [
        average_precision(row, of)
        for row, of in zip(probabilities, hot, strict=True)
        if of.any()
      ]
    )
  )


def assert_one_line(done, *expected: str) -> None:
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  for text in expected:
    assert text in line
  assert (done.returncode, done.stdout) == (2, '')


def test_batch_larger_than_the_dataset_is_logged(motion_dataset, tmp_path):
  done = training_command.run_here(
    f'--config.dataset.data_dir={motion_dataset}',
    '--config.batch_size=96',
    '--config.dataset.repeats=1',
    '--config.mesh.tensor=1000',  # ends the run before anything is compiled
    workdir=tmp_path,
  )
  assert 'batch_size is 96, but an epoch has 48 clips' in done.stderr
  assert done.returncode == 2


def test_unknown_field_is_one_line(train, tmp_path):
  done = train('--config.optimizer.learning_rte=1')
  assert_one_line(done, "'learning_rte'", "did you mean 'learning_rate'?")
  assert not (tmp_path / 'workdir').exists()


def test_workdir_of_another_model_is_unchanged(trained, train, motion_dataset):
  workdir, _ = trained
  before = files(workdir)
  done = train(
    '--config.model.image_size=64',
    '--config.dataset.train_short_side=64',
    f'--config.dataset.data_dir={motion_dataset}',
    workdir=workdir,
  )
  assert_one_line(
    done,
    f'{workdir}/checkpoints/12 holds another model',
    'model.image_size is 64, in the checkpoint 32',
  )
  assert files(workdir) == before


def test_resuming_with_another_batch_size_raises(
  trained, train, motion_dataset
):
  workdir, _ = trained
  before = files(workdir)
  done = train(
    '--config.batch_size=4',
    '--config.num_epochs=9',
    f'--config.dataset.data_dir={motion_dataset}',
    workdir=workdir,
  )
  assert_one_line(done, 'config.batch_size is 4', 'began with 8')
  assert files(workdir) == before
