"""Invalid values of a config are reported together, before anything is read."""

from __future__ import annotations

import math
import pathlib
import runpy
from typing import Any

import pytest

from dualformer_jax.errors import UserError
from dualformer_jax.training import (
  config_check,
  loop,
  profile,
  store_token_labels,
  testing,
)

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))


def make_config(name: str = 'motion', **fields: Any) -> Any:
  config = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']()
  config.update_from_flattened_dict(fields)
  return config


@pytest.mark.parametrize('name', NAMES)
def test_recipes_are_valid(name):
  config_check.check(make_config(name))


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('batch_size', 0, '1 to 2**20'),
    ('batch_size', -8, '1 to 2**20'),
    ('batch_size', 10**11, '1 to 2**20'),
    ('accumulation_steps', 0, 'at least 1'),
    ('accumulation_steps', 5, None),
    ('num_epochs', -1, 'at least 1'),
    ('num_epochs', 0, 'at least 1'),
    ('log_every_steps', 0, 'at least 1'),
    ('trackers', 'wandb,mlfow', 'names of wandb, mlflow, trackio, separated'),
    ('tracker_project', 'team/project', 'at most 128 characters, and none of'),
    ('seed', -1, '0 to 4294967295'),
    ('label_smoothing', 1.0, 'at least 0 and less than 1'),
    ('ema_decay', -0.5, 'at least 0 and less than 1'),
    ('overfit_steps', -1, 'at least 0'),
    ('checkpoint.every_steps', 0, 'at least 1'),
    ('checkpoint.keep', 0, 'at least 1'),
    ('validation.every_epochs', 0, 'at least 1'),
    ('validation.num_crops', 2, '1 or 3'),
    ('validation.patience', -1, 'at least 0'),
    ('test.num_clips', 0, 'at least 1'),
    ('model.image_size', 7, 'at least 8'),
    ('model.image_size', 64, 'at most 32 (dataset.train_short_side)'),
    ('model.num_frames', 1, 'at least 2'),
    ('dataset.start_multiple', 0, 'at least 1'),
    ('model.num_classes', -1, 'at least 0'),
    ('model.head_dropout', 1.5, 'at least 0 and less than 1'),
    ('model.drop_path_rate', math.nan, 'at least 0 and less than 1'),
    ('model.dtype', 'float16', "one of ('float32', 'bfloat16')"),
    ('dataset.frame_interval', 0, 'at least 1'),
    ('dataset.train_short_side', 0, 'at least 1'),
    ('dataset.repeats', 0, 'at least 1'),
    ('dataset.num_threads', 0, 'at least 1'),
    ('dataset.prefetch', 0, 'at least 1'),
    ('dataset.sampling', 'sparse', "'dense' or 'uniform'"),
    ('dataset.pixel_std', (1.0, 0.0, 1.0), '3 numbers that are more than 0'),
    ('dataset.pixel_mean', (1.0, 2.0), '3 numbers'),
    ('dataset.pixel_mean', ('a', 'b', 'c'), '3 numbers'),
    ('augment.color_jitter', 1.5, '0 to 1'),
    ('augment.rand_augment_ops', -1, '0 to 100'),
    ('augment.rand_augment_magnitude', 11, '0 to 10'),
    ('augment.random_erasing', math.nan, '0 to 1'),
    ('augment.cutmix', math.inf, '0 to 100'),
    ('token_labels.top', -1, 'at least 0'),
    ('token_labels.weight', 1.5, '0 to 1'),
    ('mesh.fsdp', 0, 'at least 1, or -1'),
    ('mesh.data', -2, 'at least 1, or -1'),
    ('optimizer.learning_rate', 0.0, 'more than 0'),
    ('optimizer.learning_rate', math.inf, 'more than 0'),
    ('optimizer.weight_decay', -0.1, 'at least 0'),
    ('optimizer.b1', 1.0, 'at least 0 and less than 1'),
    ('optimizer.eps', 0.0, 'more than 0'),
    ('optimizer.layer_decay', 0.0, 'more than 0 and at most 1'),
    ('optimizer.max_grad_norm', -1.0, 'at least 0'),
    ('optimizer.frozen', '(', 'a regular expression (missing ), unterminated'),
  ],
)
def test_value_out_of_range_raises(field, value, expected):
  config = make_config(**{field: value})
  if expected is None:
    field, value, expected = 'batch_size', 32, 'a multiple of 5'
  with pytest.raises(UserError) as error:
    config_check.check(config)
  assert (
    str(error.value).startswith(
      f'config.{field} is {value!r}, expected {expected}'
    )
    or str(error.value) == f'config.{field} is {value!r}; expected {expected}'
  )


def test_all_faults_are_reported_at_once():
  config = make_config(
    **{
      'batch_size': 0,
      'checkpoint.keep': 0,
      'model.image_size': 1,
      'mesh.fsdp': -1,
      'dataset.sampling': 'uniform',
      'test.num_clips': 2,
    }
  )
  with pytest.raises(UserError) as error:
    config_check.check(config)
  for text in (
    'config.batch_size is 0, expected 1 to 2**20; ',
    'config.checkpoint.keep is 0, expected at least 1; ',
    'config.model.image_size is 1; expected at least 8; ',
    'config.mesh has more than one -1; ',
    "config.test.num_clips is 2, expected 1 with dataset.sampling='uniform'",
  ):
    assert text in str(error.value)
  assert '\n' not in str(error.value)


def test_config_of_an_older_version_names_the_missing_field():
  config = make_config()
  with config.unlocked():
    del config.validation.resize_ratio
  with pytest.raises(UserError, match=r'resize_ratio is missing'):
    config_check.check(config)


@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_mixing_micro_batches_of_one_clip_raises(name):
  fields = {f'augment.{name}': 1.0, 'batch_size': 8}
  config_check.check(make_config(accumulation_steps=4, **fields))
  config = make_config(accumulation_steps=8, **fields)
  with pytest.raises(UserError, match='batch_size is 8, expected at least 2'):
    config_check.check(config)


def test_every_numeric_field_is_checked():
  def numeric(fields: dict[str, Any], prefix: str = ''):
    for name, value in fields.items():
      if isinstance(value, dict):
        yield from numeric(value, f'{name}.')
      elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix + name

  for field in numeric(make_config().to_dict()):
    config = make_config()
    group, _, name = field.rpartition('.')
    owner = config[group] if group else config
    owner[name] = type(owner[name])(-(10**6))
    with pytest.raises(UserError, match=f'config.{field} is -1000000'):
      config_check.check(config)


@pytest.mark.parametrize(
  'function',
  [
    lambda config, folder: loop.train_and_test(config, folder),
    lambda config, folder: testing.test(config, folder),
    lambda config, folder: profile.profile(config, folder),
    lambda config, folder: store_token_labels.store_labels(config, str(folder)),
  ],
)
def test_config_is_checked_before_the_dataset_is_opened(tmp_path, function):
  config = make_config(
    **{'log_every_steps': 0, 'dataset.data_dir': str(tmp_path / 'absent')}
  )
  with pytest.raises(UserError, match='config.log_every_steps is 0'):
    function(config, tmp_path / 'workdir')
  assert not list(tmp_path.iterdir())


def test_yuv_needs_an_even_image_size():
  fields = {'dataset.yuv420': True, 'model.image_size': 31}
  with pytest.raises(UserError, match='is 31, expected an even number with'):
    config_check.check(make_config(**fields))
