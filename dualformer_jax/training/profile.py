"""Profiling: is the input or the training step the bottleneck?"""

from collections.abc import Callable
import json
import logging
import os
import pathlib
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.files import check_writable, output_file
from dualformer_jax.input_pipeline import transforms, video_reader
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.training import config_check, setup

_SECONDS, _MIN_CALLS = 3.0, 3  # of each measurement
_NUM_CLIPS = 16  # to time the stages of the input with
_STAGES = ('read', 'decode', 'resize')
_LOG = logging.getLogger(__name__)


def profile(
  config: setup.Config, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Measures input and training step, and writes WORKDIR/profile.json.

  Returns:
    Content of profile.json: `clips_per_second` of `input`, `step` and `both`;
    `milliseconds_per_clip` of `read`, `decode` and `resize` on one core, `copy`
    and `step`; `cores` and `num_threads`; and a `verdict` in words.
  """
  config_check.check(config)
  path = pathlib.Path(workdir).expanduser() / 'profile.json'
  check_writable(path)
  data = setup.open_split(config, config.dataset.train_split)
  teacher = setup.make_teacher(config, data)
  training = setup.make_training(
    config,
    num_classes=len(data.class_names),
    # As in training, which then finds the compiled step in the cache.
    steps_per_epoch=setup.count_steps(config, data),
    teacher=teacher,
  )
  mesh = training.mesh
  jax.set_mesh(mesh)
  batches = setup.make_train_loader(training, data)
  teacher_variables = teacher.variables_on(mesh) if teacher else None
  state = training.init_state()

  _LOG.info('measuring the input ...')
  host_batch = next(batches)  # starts the threads
  for _ in range(config.dataset.prefetch + 1):
    next(batches)  # prefetched before the measurement
  seconds = {'input': _time(lambda: next(batches))}

  _LOG.info('compiling and measuring the step ...')

  def put(batch: dict[str, Any]) -> dict[str, jax.Array]:
    arrays = {name: x for name, x in batch.items() if name != 'video_ids'}
    return sharding.put_batch(arrays, mesh)

  def step(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    nonlocal state
    state, metrics = training.train_step(state, batch, teacher_variables)
    return metrics

  batch = put(host_batch)
  copy_seconds = _time(lambda: jax.block_until_ready(put(host_batch)))
  metrics = jax.block_until_ready(step(batch))
  seconds['step'] = _time(lambda: jax.block_until_ready(step(batch)))

  _LOG.info('measuring both ...')

  def both() -> None:
    nonlocal metrics
    next_batch = put(next(batches))
    jax.block_until_ready(metrics)  # of the step before
    metrics = step(next_batch)

  seconds['both'] = _time(both)
  batches.close()

  clips, on_host = config.batch_size, jax.process_count()
  rates = {name: clips / on_host / s for name, s in seconds.items()}
  milliseconds = _time_stages(data, config)
  milliseconds['copy'] = 1e3 * copy_seconds / clips
  milliseconds['step'] = 1e3 * seconds['step'] / clips
  result: dict[str, Any] = {
    'clips_per_second': rates,
    'milliseconds_per_clip': milliseconds,
    'cores': len(os.sched_getaffinity(0)),
    'num_threads': config.dataset.num_threads,
  }
  is_verbatim = data.read_report('stored_as', {}).get('form') == 'verbatim'
  result['verdict'] = verdict(result, is_verbatim)
  _LOG.info(
    'clips/s per host: %s\nms per clip (input stages on one core): %s\n%s',
    *(
      ', '.join(f'{name} {value:.3g}' for name, value in values.items())
      for values in (rates, milliseconds)
    ),
    result['verdict'],
  )
  if jax.process_index() == 0:
    with output_file(path) as file:
      file.write(json.dumps(result, indent=2).encode())
  return result


def verdict(result: dict[str, Any], is_verbatim: bool) -> str:
  """Returns a sentence on the bottleneck, and what to change.

  `result` is as `profile` returns it; `is_verbatim` is whether videos are
  stored as published.
  """
  rates, cores = result['clips_per_second'], result['cores']
  ratio = rates['input'] / rates['step']
  if ratio >= 1.1:
    remedy = 'The input needs no change.'
    if rates['both'] < 0.9 * rates['step']:
      remedy = (
        'Together they are slower than the step alone: they share the cores, '
        'or copying is slow; try fewer --config.dataset.num_threads.'
      )
    return (
      'The step is the bottleneck: the input could feed '
      f'{ratio:.1f} times as many clips. {remedy}'
    )
  stages = {name: result['milliseconds_per_clip'][name] for name in _STAGES}
  slowest = max(stages, key=lambda name: stages[name])
  if result['num_threads'] < cores:
    remedy = f'Set --config.dataset.num_threads={cores}, one per core.'
  elif slowest == 'read':
    remedy = (
      'Move the dataset to a faster or local disk, or use more threads: '
      f'--config.dataset.num_threads={4 * cores}.'
    )
  elif slowest == 'decode' and is_verbatim:
    remedy = (
      'The videos are stored as published: prepare them re-encoded (tfds build '
      'without --config=verbatim), which decodes about 5 times as fast.'
    )
  else:
    remedy = (
      f'About {cores / ratio:.0f} cores would be enough, this host has {cores};'
      ' or set --config.dataset.yuv420=True, store the videos with a higher crf'
      ' (smaller files decode faster), or set --config.dataset.repeats=2 to use'
      ' 2 clips of each video, unless that is done already.'
    )
  return (
    f'The input is the bottleneck: it yields {rates["input"]:.1f} clips/s, the '
    f'step could take {rates["step"]:.1f}; {slowest} is '
    f'{stages[slowest] / sum(stages.values()):.0%} of the time of a core. '
    f'{remedy}'
  )


def _time(function: Callable[[], object]) -> float:
  """Returns the mean duration of a call, measured for some seconds."""

  def run(num_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(num_calls):
      function()
    return time.perf_counter() - start

  spent = run(_MIN_CALLS)
  more = max(0, int((_SECONDS / max(spent, 1e-9) - 1) * _MIN_CALLS))
  if jax.process_count() > 1:  # all hosts must do the same number of steps
    more = int(multihost_utils.broadcast_one_to_all(np.int32(more)))
  return (spent + run(more)) / (_MIN_CALLS + more)


def _time_stages(
  data: PreparedDataset, config: setup.Config
) -> dict[str, float]:
  """Returns the milliseconds per clip of each stage of the input, on a core."""
  p, dataset = setup.make_preprocessing(config), config.dataset
  durations: list[Any] = []
  for number in range(4 * _NUM_CLIPS):
    rng = np.random.default_rng(number)
    times = [time.perf_counter()]
    try:
      video = data[(number * 7919) % len(data)].video  # from all shards
      times.append(time.perf_counter())
      with video_reader.VideoReader(video) as reader:
        multiple = dataset.start_multiple
        indices = transforms.train_frame_indices(p, len(reader), rng, multiple)
        size = reader.frame_size
        as_stored = size and min(size) == dataset.train_short_side
        in_yuv = dataset.yuv420 and as_stored
        decode = reader.iter_planes if in_yuv else reader.iter_frames
        for _ in decode(indices):
          pass
      times.append(time.perf_counter())
      transforms.train_clips(  # decodes the same frames once more
        video,
        p,
        [np.random.default_rng(number)],
        short_side=dataset.train_short_side,
        random_crop=dataset.random_crop,
        start_multiple=multiple,
        yuv420=dataset.yuv420,
      )
      times.append(time.perf_counter())
    except UserError:  # unreadable; training skips it as well
      continue
    read, decode, clip = np.diff(times)
    durations.append((read, decode, max(0.0, clip - decode)))
    if len(durations) == _NUM_CLIPS:
      break
  means = 1e3 * np.mean(durations or [np.zeros(3)], axis=0)
  return dict(zip(_STAGES, means.tolist(), strict=True))
