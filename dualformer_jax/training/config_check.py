"""Checks a config of configs/common.py, before anything is read or compiled."""

from collections.abc import Callable
import math
import operator
import re
from typing import Any

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import rand_augment
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import trackers

# An ml_collections.ConfigDict, whose fields type checkers cannot know.
Config = Any
# What is expected, in words and as a function.
_Range = tuple[str, Callable[[Any], Any]]


def _at_least(low: int) -> _Range:
  return f'at least {low}', lambda value: value >= low


def _up_to(high: int) -> _Range:
  return f'0 to {high}', lambda value: 0 <= value <= high


def _one_of(*values: Any) -> _Range:
  return ' or '.join(map(repr, values)), lambda value: value in values


def _numbers(values: Any) -> bool:
  return len(values) in (0, 3) and all(
    isinstance(v, int | float) and math.isfinite(v) for v in values
  )


_POSITIVE: _Range = 'more than 0', lambda value: value > 0
_BELOW_1: _Range = 'at least 0 and less than 1', lambda value: 0 <= value < 1
_AXIS: _Range = 'at least 1, or -1', lambda value: value == -1 or value >= 1

_NAME: _Range = (
  'at most 128 characters, and none of / \\ # ? % :',
  lambda value: re.fullmatch(r'[^/\\#?%:\n]{0,128}', value),
)

# The fields of `model` that are not here are checked by DualFormer.
_RANGES: dict[str, _Range] = {
  'model.num_classes': _at_least(0),
  'model.drop_path_rate': _BELOW_1,
  'model.head_dropout': _BELOW_1,
  'dataset.sampling': _one_of('dense', 'uniform'),
  'dataset.frame_interval': _at_least(1),
  'dataset.train_short_side': _at_least(1),
  'dataset.cache_gigabytes': _at_least(0),
  'dataset.start_multiple': _at_least(1),
  'dataset.repeats': _at_least(1),
  'dataset.pixel_mean': ('3 numbers', _numbers),
  'dataset.pixel_std': (
    '3 numbers that are more than 0',
    lambda values: _numbers(values) and all(v > 0 for v in values),
  ),
  'dataset.num_threads': _at_least(1),
  'dataset.reader_processes': _at_least(-1),
  'dataset.prefetch': _at_least(1),
  'augment.color_jitter': _up_to(1),
  'augment.rand_augment_ops': _up_to(100),
  'augment.rand_augment_magnitude': _up_to(rand_augment.MAX_MAGNITUDE),
  'augment.random_erasing': _up_to(1),
  'augment.mixup': _up_to(100),
  'augment.cutmix': _up_to(100),
  'token_labels.top': _at_least(0),
  'token_labels.weight': _up_to(1),
  'mesh.data': _AXIS,
  'mesh.fsdp': _AXIS,
  'mesh.tensor': _AXIS,
  'batch_size': ('1 to 2**20', lambda value: 1 <= value <= 2**20),
  'accumulation_steps': _at_least(1),
  'num_epochs': _at_least(1),
  'seed': _up_to(2**32 - 1),
  'label_smoothing': _BELOW_1,
  'ema_decay': _BELOW_1,
  'overfit_steps': _at_least(0),
  'optimizer.learning_rate': _POSITIVE,
  'optimizer.weight_decay': _at_least(0),
  'optimizer.warmup_epochs': _at_least(0),
  'optimizer.b1': _BELOW_1,
  'optimizer.b2': _BELOW_1,
  'optimizer.eps': _POSITIVE,
  'optimizer.layer_decay': (
    'more than 0 and at most 1',
    lambda value: 0 < value <= 1,
  ),
  'optimizer.max_grad_norm': _at_least(0),
  'validation.every_epochs': _at_least(1),
  'validation.num_clips': _at_least(1),
  'validation.num_crops': _one_of(1, 3),
  'validation.resize_ratio': _at_least(1),
  'validation.patience': _at_least(0),
  'test.num_clips': _at_least(1),
  'test.num_crops': _one_of(1, 3),
  'test.checkpoint': _one_of('best', 'latest'),
  'checkpoint.every_steps': _at_least(1),
  'checkpoint.keep': _at_least(1),
  'log_every_steps': _at_least(1),
  'trackers': (
    f'names of {", ".join(trackers.NAMES)}, separated by commas',
    lambda value: set(trackers.split(value)) <= set(trackers.NAMES),
  ),
  'tracker_project': _NAME,
  'tracker_run': _NAME,
}


def check(config: Config) -> None:
  """Raises one UserError that lists every field with an invalid value."""
  faults = []

  def add(name: str, expected: str) -> None:
    value = operator.attrgetter(name)(config)
    faults.append(f'config.{name} is {value!r}, expected {expected}')

  for name, (expected, is_valid) in _RANGES.items():
    try:
      value = operator.attrgetter(name)(config)
    except AttributeError as error:
      raise UserError(
        f'config.{name} is missing; add it as in configs/common.py'
      ) from error
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if not is_finite or not is_valid(value):
      add(name, expected)
  try:
    DualFormer(**config.model.to_dict())
  except UserError as error:
    faults.append(f'config.{error}')
  try:
    re.compile(config.optimizer.frozen)
  except re.error as error:
    add('optimizer.frozen', f'a regular expression ({error})')
  short_side = config.dataset.train_short_side
  if config.model.image_size > short_side:
    add('model.image_size', f'at most {short_side} (dataset.train_short_side)')
  if config.dataset.yuv420 and config.model.image_size % 2:
    add('model.image_size', 'an even number with dataset.yuv420')
  if list(config.mesh.values()).count(-1) > 1:
    faults.append('config.mesh has more than one -1')
  if config.dataset.sampling == 'uniform':
    for group in ('validation', 'test'):
      if config[group].num_clips > 1:
        add(f'{group}.num_clips', "1 with dataset.sampling='uniform'")
  size, steps = config.batch_size, config.accumulation_steps
  if min(size, steps) >= 1:
    if size % steps:
      add('batch_size', f'a multiple of {steps} (accumulation_steps)')
    elif size == steps and (config.augment.mixup or config.augment.cutmix):
      add('batch_size', 'at least 2 * accumulation_steps, to mix clips')
  if faults:
    raise UserError('; '.join(faults))
