"""Objects built from a config, and errors of configs that do not fit."""

import json
import os
import pathlib
import runpy
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.training import guards, loop, setup, testing
from tests import small_checkpoint

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def make_config(data_dir: pathlib.Path | str, name: str = 'motion') -> Any:
  config = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']()
  config.model.update(
    depths=(1,),
    embed_dims=(8,),
    num_heads=(1,),
    window=(8, 4, 4),
    fine_sizes=((8, 4, 4),),
    coarse_sizes=(None,),
  )
  config.batch_size = 4
  config.dataset.data_dir = str(data_dir)
  return config


@pytest.mark.slow
@pytest.mark.parametrize('yuv420', [False, True])
def test_training_runs_a_step_of_its_own_batch(yuv420):
  config = make_config('')
  config.ema_decay = 0.9
  config.dataset.yuv420 = yuv420
  before = config.to_dict()
  training = setup.make_training(config)
  rng = np.random.default_rng(0)
  batch = {
    name: rng.integers(0, 2, x.shape).astype(x.dtype)
    for name, x in training.abstract_batch().items()
  }
  with jax.set_mesh(training.mesh):
    state = training.init_state()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    assert shapes == jax.tree.map(
      lambda x: (x.shape, x.dtype, x.sharding), training.abstract_state
    )
    state, metrics = training.train_step(state, batch, None)
  assert int(state.step) == 1
  assert set(metrics) == {'loss', 'gradient_norm', 'top1'}
  assert config.to_dict() == before


@pytest.mark.parametrize(('yuv420', 'num_ops'), [(0, 2), (1, 2), (1, 0)])
def test_batches_of_the_loader_are_like_the_abstract_batch(
  motion_dataset, yuv420, num_ops
):
  config = make_config(motion_dataset)
  config.augment.rand_augment_ops = num_ops
  config.dataset.yuv420 = bool(yuv420)
  data = setup.open_split(config, 'train')
  training = setup.make_training(config)
  batches = setup.make_train_loader(training, data)
  batch = next(batches)
  batches.close()
  batch.pop('video_ids')
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
    name: (x.shape, x.dtype) for name, x in training.abstract_batch().items()
  }


@pytest.mark.parametrize(
  ('reader_processes', 'num_threads', 'platform', 'expected'),
  [
    (3, 8, 'cpu', 3),
    (0, 8, 'gpu', 0),
    (-1, 8, 'cpu', 0),
    (-1, 1, 'gpu', 1),
    (-1, 10_000, 'tpu', len(os.sched_getaffinity(0))),
  ],
)
def test_number_of_reader_processes(
  reader_processes, num_threads, platform, expected
):
  dataset = types.SimpleNamespace(
    reader_processes=reader_processes, num_threads=num_threads
  )
  assert setup._reader_processes(dataset, platform) == expected


def test_normalization_is_resolved_in_a_copy():
  config = make_config('', 'video_folder')
  source = Preprocessing(
    8, 1, 32, pixel_mean=(9.0, 8.0, 7.0), pixel_std=(5.0, 1.0, 2.0)
  )
  resolved = setup.resolve_normalization(config, source)
  assert resolved.dataset.pixel_mean == (9.0, 8.0, 7.0)
  assert setup.make_preprocessing(resolved).pixel_std == (5.0, 1.0, 2.0)
  assert config.dataset.pixel_mean == ()
  # A config with values of its own keeps them.
  config = make_config('')
  resolved = setup.resolve_normalization(config, source)
  assert resolved.dataset.pixel_mean == config.dataset.pixel_mean


def test_missing_dataset_raises_how_to_prepare_it(tmp_path):
  config = make_config(tmp_path / 'data', 'k400_tiny')
  with pytest.raises(UserError, match='kinetics400: no such dataset') as error:
    loop.train_and_test(config, tmp_path / 'workdir')
  command = 'tfds build data/kinetics400 --manual_dir=VIDEOS'
  assert f'{command} --data_dir={tmp_path}/data' in str(error.value)
  assert not (tmp_path / 'workdir').exists()


def test_mistyped_dataset_names_the_nearest_one(motion_dataset):
  config = make_config(motion_dataset)
  config.dataset.name = 'moton'
  with pytest.raises(UserError, match="no such .*; did you mean 'motion'"):
    setup.open_split(config, 'train')
  config.dataset.name = 'kinetics40'
  with pytest.raises(UserError, match="did you mean 'kinetics400'"):
    setup.open_split(config, 'train')


def test_other_model_in_init_from_raises_before_the_dataset_is_opened(tmp_path):
  model = small_checkpoint.save(tmp_path / 'model')
  config = make_config(tmp_path / 'absent')
  config.init_from = str(model)
  config.model.embed_dims = (24,)
  with pytest.raises(UserError, match='holds another model: .*embed_dims'):
    loop.train_and_test(config, tmp_path / 'workdir')


def test_truncated_dataset_raises(motion_dataset, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(motion_dataset, data)
  shard = next(data.rglob('*train.tfrecord*'))
  shard.write_bytes(shard.read_bytes()[:-100])
  with pytest.raises(UserError, match='truncated') as error:
    setup.open_split(make_config(data), 'train')
  assert str(shard) in str(error.value)
  next(data.rglob('dataset_info.json')).unlink()
  with pytest.raises(UserError, match='dataset_info.json is missing'):
    setup.open_split(make_config(data), 'train')


@pytest.mark.parametrize(
  ('field', 'value'), [('model.num_classes', 7), ('dataset.multi_label', True)]
)
def test_dataset_with_other_labels_raises(motion_dataset, field, value):
  config = make_config(motion_dataset)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=f'config.{field} is {value}, but'):
    setup.open_split(config, 'train')


def test_one_process_at_a_time_trains_in_a_workdir(tmp_path):
  workdir = tmp_path / 'workdir'
  lock = guards.WorkdirLock(workdir)
  with pytest.raises(UserError, match=f'{workdir}: another process trains'):
    guards.WorkdirLock(workdir)
  del lock
  guards.WorkdirLock(workdir)


def test_workdir_without_checkpoint_cannot_be_tested(motion_dataset, tmp_path):
  with pytest.raises(
    UserError, match='no checkpoint to test; train there first'
  ):
    testing.test(make_config(motion_dataset), tmp_path / 'workdir')


@pytest.mark.parametrize('function', [loop.train_and_test, testing.test])
def test_missing_init_from_raises(motion_dataset, tmp_path, function):
  config = make_config(motion_dataset)
  config.init_from = str(tmp_path / 'absent')
  with pytest.raises(UserError, match='no checkpoint folder at .*absent'):
    function(config, tmp_path / 'workdir')


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'model.token_label': True}, "teacher is '' and stored is ''"),
    ({'token_labels.teacher': 'x'}, 'config.model.token_label is False'),
    (
      {'token_labels.teacher': 'x', 'token_labels.stored': 'y'},
      "teacher is 'x' and stored is 'y'",
    ),
  ],
)
def test_conflicting_token_labels_raise(motion_dataset, fields, message):
  config = make_config(motion_dataset)
  config.update_from_flattened_dict(fields)
  data = setup.open_split(config, 'train')
  with pytest.raises(UserError, match=message):
    setup.make_teacher(config, data)


def test_frames_stored_smaller_than_the_model_raise(motion_dataset, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(motion_dataset, data)
  report = next(data.rglob('report.json'))
  content = json.loads(report.read_text())
  config = make_config(data)
  for form, short_side, is_valid in (
    ('reencoded', 31, False),
    ('reencoded', 32, True),
    ('verbatim', 31, True),
  ):
    content['stored_as'] = {'form': form, 'short_side': short_side}
    report.write_text(json.dumps(content))
    if is_valid:
      setup.open_split(config, 'train')
    else:
      with pytest.raises(UserError, match='image_size is 32, .* side of 31;'):
        setup.open_split(config, 'train')
