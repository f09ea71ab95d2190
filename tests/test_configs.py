"""Configs load as flags, with the known fields and the recipes' values."""

import ast
import contextlib
import dataclasses
import functools
import pathlib
import re
import shlex
import sys
import tempfile
from typing import Any
from unittest import mock

from absl import flags
from ml_collections import config_flags
import pytest

from dualformer_jax.models import dualformer

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))

# The published recipes, all on 8 GPUs: variant, frames x interval, classes,
# epochs, warm-up epochs, base learning rate, weight decay, drop path, clips per
# device, accumulation, test views (clips x crops), pixel mean and deviation.
RECIPES = """
k400_tiny             | tiny  | 32x2 | 400 | 30 | 3   | 1e-3 | 0.02 | 0.1 | 8  | 1 | 4x1 | ImageNet
k400_small            | small | 32x2 | 400 | 30 | 2.5 | 1e-3 | 0.02 | 0.2 | 8  | 2 | 4x1 | ImageNet
k400_base             | base  | 32x2 | 400 | 30 | 2.5 | 1e-3 | 0.05 | 0.3 | 8  | 2 | 4x1 | ImageNet
k600_base             | base  | 32x2 | 600 | 30 | 2.5 | 5e-4 | 0.05 | 0.3 | 8  | 2 | 4x1 | ImageNet
diving48_small        | small | 32x4 | 48  | 30 | 1   | 1e-3 | 0.02 | 0.2 | 8  | 1 | 4x3 | 104 117 128 / 1
hmdb51_small          | small | 32x4 | 51  | 16 | 1   | 1e-3 | 0.1  | 0.3 | 16 | 4 | 4x3 | 104 117 128 / 1
ucf101_small          | small | 32x4 | 101 | 16 | 1   | 1e-3 | 0.1  | 0.3 | 16 | 4 | 4x3 | 104 117 128 / 1
ucf101_tiny           | tiny  | 16x4 | 101 | 16 | 1   | 1e-3 | 0.05 | 0.2 | 16 | 4 | 4x3 | 104 117 128 / 1
k400_tiny_tokenlabel  | tiny  | 32x2 | 400 | 30 | 3   | 1e-3 | 0.02 | 0.1 | 16 | 2 | 4x1 | ImageNet
k400_small_tokenlabel | small | 32x2 | 400 | 30 | 2.5 | 1e-3 | 0.02 | 0.2 | 8  | 2 | 4x1 | ImageNet
"""  # noqa: E501
ROWS = [
  [cell.strip() for cell in line.split('|')]
  for line in RECIPES.strip().splitlines()
]
VARIANTS = {
  'tiny': ((2, 2, 10, 4), (64, 128, 256, 512), (2, 4, 8, 16)),
  'small': ((2, 2, 18, 2), (96, 192, 384, 768), (3, 6, 12, 24)),
  'base': ((2, 2, 18, 2), (128, 256, 512, 1024), (4, 8, 16, 32)),
}
PIXELS = {
  'ImageNet': ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
  '104 117 128 / 1': ((104, 117, 128), (1, 1, 1)),
}
DATASETS = {
  'k400': 'kinetics400',
  'k600': 'kinetics600',
  'diving48': 'diving48',
  'hmdb51': 'hmdb51/split1',
  'ucf101': 'ucf101/split1',
}


@functools.cache
def _load(name: str, *arguments: str) -> dict[str, Any]:
  """Returns a config as the flags of a command give it, read from elsewhere."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  argv = ['command', f'--config={CONFIGS / name}.py', *arguments]
  # ml_collections reads the overrides from sys.argv.
  with (
    contextlib.chdir(tempfile.gettempdir()),
    mock.patch.object(sys, 'argv', argv),
  ):
    values(argv)
  config: Any = values['config'].value
  return config.to_dict()


def _fields(node, prefix=''):
  """Returns name -> type of every field, nested ones too."""
  fields = {}
  for key, value in node.items():
    if isinstance(value, dict):
      fields |= _fields(value, f'{prefix}{key}.')
    else:
      fields[prefix + key] = type(value)
  return fields


def test_every_recipe_has_a_config():
  assert set(NAMES) == {row[0] for row in ROWS} | {
    'common',
    'motion',
    'video_folder',
  }


@pytest.mark.parametrize('name', NAMES)
def test_config_has_the_fields_of_common(name):
  expected = _fields(_load('common'))
  assert _fields(_load(name)) == expected


def test_model_fields_are_those_of_the_model():
  fields = {field.name for field in dataclasses.fields(dualformer.DualFormer)}
  assert set(_load('common')['model']) == fields - {'parent', 'name'}


@pytest.mark.parametrize('row', ROWS, ids=[row[0] for row in ROWS])
def test_recipe_has_the_published_values(row):
  name, variant, sampling, classes, *numbers, views, pixels = row
  epochs, warmup, rate, decay, drop_path, clips, accumulation = map(
    ast.literal_eval, numbers
  )
  config = _load(name)
  model, dataset = config['model'], config['dataset']
  assert (
    model['depths'],
    model['embed_dims'],
    model['num_heads'],
  ) == VARIANTS[variant]
  assert f'{model["num_frames"]}x{dataset["frame_interval"]}' == sampling
  assert model['num_classes'] == int(classes)
  assert model['drop_path_rate'] == drop_path
  assert model['image_size'] == 224
  assert model['window'] == (8, 7, 7)
  assert model['fine_sizes'] == (*[(8, 7, 7)] * 3, (16, 7, 7))
  assert model['coarse_sizes'] == (*[(4, 4, 4)] * 2, None, None)
  assert model['head_dropout'] == 0.5
  assert model['token_label'] == name.endswith('_tokenlabel')
  assert model['dtype'] == 'bfloat16'

  family = name.split('_')[0]
  assert dataset['name'] == DATASETS[family]
  others = 'validation' if family in ('k400', 'k600') else 'test'
  assert dataset['validation_split'] == dataset['test_split'] == others
  assert (dataset['pixel_mean'], dataset['pixel_std']) == PIXELS[pixels]
  assert dataset['train_short_side'] == 256
  assert dataset['sampling'] == 'dense'
  assert dataset['random_crop']
  assert dataset['flip']
  assert not dataset['multi_label']

  assert config['batch_size'] == 8 * clips
  assert config['accumulation_steps'] == accumulation
  assert config['num_epochs'] == epochs
  assert config['optimizer'] == {
    'learning_rate': rate,
    'weight_decay': decay,
    'warmup_epochs': warmup,
    'b1': 0.9,
    'b2': 0.999,
    'eps': 1e-8,
    'multipliers': (
      ('backbone/pos_block.*', 1.0, 0.0),
      ('backbone/.*', 0.1, 1.0),
      ('.*', 1.0, 1.0),
    ),
    # Options that the published recipes do not use, here and below.
    'layer_decay': 1.0,
    'max_grad_norm': 0.0,
    'frozen': '',
  }
  assert config['label_smoothing'] == config['ema_decay'] == 0
  assert not config['dataset']['class_balanced']
  assert not any(
    config['augment'][name]
    for name in (
      'color_jitter',
      'rand_augment_ops',
      'random_erasing',
      'mixup',
      'cutmix',
    )
  )

  kinetics = family in ('k400', 'k600')
  assert config['validation'] == {
    'every_epochs': 5 if kinetics else 2,
    'num_clips': 1 if kinetics else 4,
    'num_crops': 1,
    'resize_ratio': 256 / 224,
    'patience': 0,
  }
  test_clips, test_crops = map(int, views.split('x'))
  assert config['test'] == {
    'num_clips': test_clips,
    'num_crops': test_crops,
    'checkpoint': 'latest',
  }


def test_motion_is_not_flipped():
  dataset = _load('motion')['dataset']
  assert not dataset['flip']  # left would become right


def test_flags_change_fields_of_every_type():
  config = _load(
    'k400_tiny',
    '--config.model.depths=(2,2,2,2)',
    '--config.model.coarse_sizes=((4,4,4),None,None,None)',
    "--config.optimizer.multipliers=(('.*',1.0,0.5),)",
    '--config.optimizer.warmup_epochs=2',
    '--config.dataset.name=motion',
    '--config.dataset.flip=false',
    '--config.batch_size=4',
  )
  assert config['model']['depths'] == (2, 2, 2, 2)
  assert config['model']['coarse_sizes'] == ((4, 4, 4), None, None, None)
  assert config['optimizer']['multipliers'] == (('.*', 1.0, 0.5),)
  assert repr(config['optimizer']['warmup_epochs']) == '2.0'
  assert config['dataset']['name'] == 'motion'
  assert config['dataset']['flip'] is False
  assert config['batch_size'] == 4


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.model.dephts=(2,2)', 'Did you mean "depths"'),
    ('--config.batchsize=8', 'Did you mean "batch_size"'),
    ('--config.optimizer.learning_rte=1', 'Did you mean "learning_rate"'),
    ('--config.num_epochs=2.5', 'num_epochs=2.5: invalid literal for int'),
    ('--config.dataset.flip=maybe', 'flip=maybe'),
  ],
)
def test_invalid_flag_raises(flag, message):
  error = (AttributeError, KeyError, flags.IllegalFlagValueError, ValueError)
  with pytest.raises(error, match=re.escape(message)):
    _load('k400_tiny', flag)


@pytest.mark.parametrize('name', sorted(set(NAMES) - {'common'}))
def test_config_starts_with_its_command(name):
  docstring = ast.get_docstring(ast.parse((CONFIGS / f'{name}.py').read_text()))
  assert docstring is not None
  command, *_ = docstring.replace('\\\n', ' ').splitlines()
  assert shlex.split(command)[:4] == [
    *('python', '-m', 'dualformer_jax.main'),
    f'--config=configs/{name}.py',
  ]
  assert 'tfds build data/' in docstring


@pytest.mark.parametrize('name', ['motion', 'video_folder'])
def test_own_recipes_validate_and_test_with_the_same_views(name):
  config = _load(name)
  validation, test = config['validation'], config['test']
  assert validation['resize_ratio'] == 1
  assert validation['num_clips'] == test['num_clips']
  assert validation['num_crops'] == test['num_crops']
  assert test['checkpoint'] == 'best'
