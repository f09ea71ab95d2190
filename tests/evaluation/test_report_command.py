"""`python -m dualformer_jax.main` writes reports and compares two runs."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

import dualformer_jax
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.input_pipeline import dataset
from tests import training_command
from tests.evaluation import html_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module', name='trained')
def _trained(motion_dataset, tmp_path_factory):
  """The workdir of a short training, tested with two clips per video."""
  workdir = tmp_path_factory.mktemp('report') / 'workdir'
  done = training_command.run_here(
    *training_command.TINY,
    '--config.num_epochs=3',  # those of test_main.py, to compile once
    '--config.test.num_clips=2',
    f'--config.dataset.data_dir={motion_dataset}',
    workdir=workdir,
  )
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture(name='compare')
def _compare(trained, motion_dataset):
  """Tests the trained model again, compared with an earlier test."""

  def run(workdir, other):
    return training_command.run_here(
      '--mode=test',
      f'--compare={other}',
      f'--config.init_from={trained}',
      f'--config.dataset.data_dir={motion_dataset}',
      '--config.batch_size=8',
      '--config.test.num_clips=2',
      workdir=workdir,
    )

  return run


def read(workdir: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns report.json and the arrays of views.npz."""
  with np.load(workdir / 'views.npz', allow_pickle=False) as file:
    arrays = {name: file[name] for name in file}
  return json.loads((workdir / 'report.json').read_text()), arrays


def write_views(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  folder.mkdir()
  np.savez(folder / 'views.npz', allow_pickle=False, **arrays)


def mean_softmax(logits: np.ndarray) -> np.ndarray:
  exp = np.exp(logits.astype(np.float64))
  return np.mean(exp / exp.sum(axis=2, keepdims=True), axis=1)


def test_report_matches_recognizer(trained, motion_dataset):
  figures, arrays = read(trained)
  assert arrays['logits'].shape == (48, 2, 8)
  assert arrays['logits'].dtype == np.float32
  data = dataset.PreparedDataset('motion', 'validation', str(motion_dataset))
  recognizer = dualformer_jax.load(figures['checkpoint'])
  probabilities = mean_softmax(arrays['logits'])
  for index in (0, 31, 47):
    example = data[index]
    assert arrays['video_ids'][index] == example.video_id
    assert arrays['labels'][index] == example.label
    path = trained.parent / 'video.mp4'
    path.write_bytes(example.video)
    np.testing.assert_allclose(
      recognizer.probabilities(recognizer.views(path)),
      probabilities[index],
      atol=1e-6,
    )
  assert figures['recipe'] == 'motion'
  variables, _ = checkpoint.load_model(figures['checkpoint'])
  sha256 = checkpoint.variables_hash(variables)
  assert figures['checkpoint_sha256'] == sha256
  training = figures['training']
  assert 0 < training['hours'] < 1
  assert training['hardware'] == [figures['hardware']]
  assert training['config'] == figures['config']
  correct = probabilities.argmax(axis=1) == arrays['labels']
  assert figures['top1'] == correct.mean()
  assert figures['view_budget'][-1]['accuracy'] == correct.mean()
  for number, row in enumerate(figures['classes']):
    assert row['name'] == data.class_names[number]
    of_class = arrays['labels'] == number
    assert row['accuracy'] == pytest.approx(correct[of_class].mean())
  wrong = sum(pair['count'] for pair in figures['most_confused'])
  assert 0 < wrong <= np.sum(~correct)
  gap = np.abs(probabilities.max(axis=1).mean() - correct.mean())
  assert gap - 1e-9 <= figures['expected_calibration_error'] <= 1


def test_view_budget_counts_gflops(trained):
  figures, _ = read(trained)
  one_clip, two_clips = figures['view_budget']
  assert (one_clip['num_clips'], one_clip['num_crops']) == (1, 1)
  assert (two_clips['num_clips'], two_clips['num_crops']) == (2, 1)
  assert two_clips['gflops'] == pytest.approx(2 * one_clip['gflops'])
  # The two MLPs, of 8x8x8 tokens, 16 channels and 64 hidden channels, are a
  # large part of the model.
  mlps = 2 * 2 * 8**3 * 16 * 64 / 1e9
  assert mlps < one_clip['gflops'] < 5 * mlps


def test_page_shows_worst_mistakes(trained):
  figures, _ = read(trained)
  page = html_page.Page((trained / 'report.html').read_text('utf-8'))
  wrong = round(48 * (1 - figures['top1']))
  assert len(page.images()) == min(24, wrong)
  assert f'{100 * figures["top1"]:.1f}%' in page.text
  assert all(
    (image['src'] or '').startswith('data:image/jpeg')
    for image in page.images()
  )


def test_two_runs_are_compared(trained, compare, tmp_path):
  _, arrays = read(trained)
  labels = arrays['labels']
  # The other run has half of the videos and errs on the first two of them.
  half = np.arange(48) % 2 == 0
  logits = np.eye(8, dtype=np.float32)[labels] * 9
  logits[:4] = np.roll(logits[:4], 1, axis=1)
  write_views(
    tmp_path / 'other',
    {
      **arrays,
      'logits': logits[half][:, None],
      'labels': labels[half],
      'video_ids': arrays['video_ids'][half],
    },
  )
  workdir = tmp_path / 'workdir'
  done = compare(workdir, tmp_path / 'other' / 'report.json')
  assert done.returncode == 0, done.stderr
  figures, again = read(workdir)
  np.testing.assert_allclose(again['logits'], arrays['logits'], atol=1e-5)
  correct = mean_softmax(arrays['logits']).argmax(axis=1) == labels
  other_correct = np.arange(48) >= 4
  one = int(np.sum(correct & ~other_correct & half))
  two = int(np.sum(~correct & other_correct & half))
  tail = sum(math.comb(one + two, i) for i in range(min(one, two) + 1))
  p_value = min(1, 2 * tail / 2 ** (one + two))
  comparison = figures['comparison']
  assert comparison['only_this_right'] == one
  assert comparison['only_other_right'] == two
  assert comparison['p_value'] == pytest.approx(p_value)
  assert comparison['significant'] is (p_value < 0.05)
  assert comparison['num_videos'] == 24
  named = {row['video'] for row in comparison['differences']}
  only_other = half & ~correct & other_correct
  assert set(arrays['video_ids'][only_other].tolist()) <= named
  assert comparison['in_words'] in done.stderr
  page = html_page.Page((workdir / 'report.html').read_text('utf-8'))
  assert comparison['in_words'] in page.text


def test_comparison_with_other_videos_fails_after_writing_report(
  trained, compare, tmp_path
):
  _, arrays = read(trained)
  arrays['video_ids'] = np.char.add(arrays['video_ids'], ' of another split')
  write_views(tmp_path / 'other', arrays)
  done = compare(tmp_path / 'workdir', tmp_path / 'other')
  assert done.returncode == 2
  line = done.stderr.splitlines()[-1]
  assert line.startswith(f'error: --compare: {tmp_path / "other"} has none of')
  figures, _ = read(tmp_path / 'workdir')
  assert figures['num_videos'] == 48
  assert 'comparison' not in figures


def test_comparison_with_other_classes_fails_before_testing(
  trained, compare, tmp_path
):
  _, arrays = read(trained)
  arrays['class_names'] = arrays['class_names'][::-1]
  write_views(tmp_path / 'other', arrays)
  done = compare(tmp_path / 'workdir', tmp_path / 'other')
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith(f'error: --compare={tmp_path / "other"}: ')
  assert not (tmp_path / 'workdir' / 'report.json').exists()
