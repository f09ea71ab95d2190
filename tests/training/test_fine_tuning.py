"""Fine-tuning from the command line, with all options on."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import optax
import pytest

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training.state import init_state
from tests import training_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module', name='fine_tuned')
def _fine_tuned(motion_dataset, tmp_path_factory):
  """A fine-tuning run with all options on, and near-duplicates in its data."""
  folder = tmp_path_factory.mktemp('fine_tuned')
  data = folder / 'data'
  shutil.copytree(motion_dataset, data)
  (path,) = data.rglob('report.json')
  report = json.loads(path.read_text())
  report['near_copies'] = [
    {
      'splits': ['train', 'validation'],
      'videos': [['train/00003', 'validation/00004']],
    }
  ]
  path.write_text(json.dumps(report))
  fields: dict[str, Any] = dict(
    depths=(2,),
    embed_dims=(16,),
    num_heads=(2,),
    num_classes=3,
    num_frames=8,
    image_size=32,
    window=(4, 4, 4),
    fine_sizes=((2, 4, 4),),
    coarse_sizes=((2, 2, 2),),
    dtype='float32',
  )
  model = DualFormer(**fields)
  variables = init_state(model, optax.identity(), seed=0).variables()
  description = checkpoint.CheckpointMetadata(
    fields,
    Preprocessing(
      8, 1, 32, pixel_mean=(99.0, 98.0, 97.0), pixel_std=(50.0, 51.0, 52.0)
    ),
    ('a', 'b', 'c'),
  )
  checkpoint.save_model(folder / 'source', variables, description)
  done = training_command.run_here(
    *training_command.TINY,
    f'--config.init_from={folder}/source',
    f'--config.dataset.data_dir={data}',
    '--config.dataset.pixel_mean=()',
    '--config.dataset.pixel_std=()',
    '--config.dataset.class_balanced=True',
    '--config.ema_decay=0.9',
    '--config.label_smoothing=0.1',
    '--config.optimizer.layer_decay=0.75',
    '--config.optimizer.max_grad_norm=1.0',
    '--config.optimizer.frozen=backbone/patch_embeds.*',
    '--config.overfit_steps=3',
    '--config.num_epochs=6',
    '--config.validation.every_epochs=1',
    '--config.validation.patience=1',
    # Too small to learn anything: the first validation stays the best.
    '--config.optimizer.learning_rate=1e-9',
    workdir=folder / 'work',
  )
  assert done.returncode == 0, done.stderr
  return folder, done.stderr


def test_fine_tuning_logs_transfer_and_checks(fine_tuned):
  _, log = fine_tuned
  for words in (
    'loaded:',
    'resized to this pyramid:',
    'reinitialized:',
    'cls_head.fc_cls.weight',
    'one batch, step 3/3',
    'one batch is NOT overfit',
    'initial loss',
    'ln(8 classes) = 2.079',
    'near-duplicates of them: validation/00004 of train/00003;',
  ):
    assert words in log


def test_fine_tuning_keeps_normalization_and_frozen_parameters(fine_tuned):
  folder, _ = fine_tuned
  variables, description = checkpoint.load_model(folder / 'work')
  source, _ = checkpoint.load_model(folder / 'source')
  assert description.preprocessing.pixel_mean == (99.0, 98.0, 97.0)
  assert description.preprocessing.pixel_std == (50.0, 51.0, 52.0)
  jax.tree.map(
    np.testing.assert_array_equal,
    variables['params']['backbone']['patch_embeds_0'],
    source['params']['backbone']['patch_embeds_0'],
  )


def test_training_stops_early_without_improvement(fine_tuned):
  folder, log = fine_tuned
  assert 'no validation since step 6 was better' in log
  assert 'training ends at step 12 of 36' in log
  report = json.loads((folder / 'work' / 'report.json').read_text())
  # The motion recipe tests the best checkpoint, not the latest.
  assert pathlib.Path(report['checkpoint']).name == '6'


def test_non_finite_loss_names_videos_and_last_checkpoint(
  motion_dataset, tmp_path
):
  flags = (
    *training_command.ONE_BLOCK,
    f'--config.dataset.data_dir={motion_dataset}',
    '--config.checkpoint.every_steps=1',
    '--config.num_epochs=2',
    '--config.optimizer.warmup_epochs=0.0',
  )
  done = training_command.run_here(
    *flags,
    '--config.optimizer.learning_rate=1e30',
    workdir=tmp_path,
  )
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith('error: step ')
  assert 'loss nan' in last or 'loss inf' in last
  assert last.count('train/0') == 8  # the batch's videos
  kept = max(int(p.name) for p in (tmp_path / 'checkpoints').glob('[0-9]*'))
  assert f'{tmp_path}/checkpoints/{kept}' in last
  variables, _ = checkpoint.load_model(tmp_path)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
  assert 'Traceback' not in done.stderr
