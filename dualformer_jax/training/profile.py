"""The input alone, the step alone, and both: which one holds up the other."""

from collections.abc import Callable
import functools
import itertools
import json
import logging
import os
import pathlib
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding, records, views
from dualformer_jax.training import loop, sharding, step

# How long each of the three is run.
_SECONDS = 3.0
_MIN_BATCHES = 3
# Clips that are taken apart, on one thread.
_CLIPS = 16
_LOG = logging.getLogger(__name__)


def profile(
  config: loop.Config, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Measures, logs and writes WORKDIR/profile.json; trains nothing.

  Returns:
    `clips_per_second` of `input`, `step` and `both`; `milliseconds_per_clip` of
    `read`, `decode`, `resize` (on one core), `copy` and `step`; and the
    `verdict`, a sentence that says what to change.

  Raises:
    UserError: config and dataset do not fit.
  """
  dataset = config.dataset
  data = loop.open_split(config, dataset.train_split)
  teacher = loop.make_teacher(config, data)
  mesh = sharding.make_mesh(
    config.mesh, config.batch_size, config.accumulation_steps
  )
  jax.set_mesh(mesh)
  clips = loop.make_train_loader(config, data, mesh, teacher)
  model = loop.make_model(config, data)
  optimizer, _ = loop.make_optimizer(config, model, steps_per_epoch=1000)
  init = functools.partial(
    step.init_state, model, optimizer, config.seed, config.ema_decay > 0
  )
  shardings = sharding.tree_shardings(jax.eval_shape(init), mesh)
  train_step = loop.make_train_step(
    config, model, optimizer, shardings, mesh, teacher
  )
  asked = teacher.on_mesh(mesh) if teacher else None
  state = jax.jit(init, out_shardings=shardings)()

  _LOG.info('input alone ...')
  batch = next(clips)  # starts the threads
  for _ in range(dataset.prefetch + 1):
    next(clips)  # what they read ahead before the clock runs
  input_seconds = _time(lambda: next(clips))

  _LOG.info('step alone; it is compiled first ...')

  def put(batch: dict[str, Any]) -> dict[str, jax.Array]:
    arrays = {k: v for k, v in batch.items() if k != 'video_ids'}
    return sharding.put_batch(arrays, mesh)

  held = put(batch)
  copy_seconds = _time(lambda: jax.block_until_ready(put(batch)), seconds=1.0)
  state, metrics = train_step(state, held, asked)
  jax.block_until_ready(metrics)

  def step_alone() -> None:
    nonlocal state
    state, metrics = train_step(state, held, asked)
    jax.block_until_ready(metrics)

  step_seconds = _time(step_alone)

  _LOG.info('both ...')

  def both() -> None:
    nonlocal state, metrics
    batch = put(next(clips))
    jax.block_until_ready(metrics)  # of the step before
    state, metrics = train_step(state, batch, asked)

  both_seconds = _time(both)
  clips.close()

  _LOG.info('a clip taken apart ...')
  parts = _take_apart(data, config)
  size = config.batch_size
  parts['copy'] = copy_seconds / size
  parts['step'] = step_seconds / size
  result = {
    'clips_per_second': {
      'input': size / jax.process_count() / input_seconds,
      'step': size / jax.process_count() / step_seconds,
      'both': size / jax.process_count() / both_seconds,
    },
    'milliseconds_per_clip': {
      name: 1e3 * seconds for name, seconds in parts.items()
    },
    'cores': len(os.sched_getaffinity(0)),
    'num_threads': dataset.num_threads,
  }
  result['verdict'] = verdict(result, stored_as(data))
  rates = result['clips_per_second']
  _LOG.info(
    'clips/s a host: input alone %.1f, step alone %.1f, both %.1f',
    rates['input'],
    rates['step'],
    rates['both'],
  )
  _LOG.info(
    'ms a clip: %s; read, decode and resize on one core of %d',
    ', '.join(
      f'{name} {value:.3g}'
      for name, value in result['milliseconds_per_clip'].items()
    ),
    result['cores'],
  )
  _LOG.info('%s', result['verdict'])
  if jax.process_index() == 0:
    path = pathlib.Path(workdir).expanduser() / 'profile.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + '\n')
  return result


def verdict(result: dict[str, Any], stored: str) -> str:
  """Says which side is the bottleneck, and what to change.

  Args:
    result: the figures, as `profile` returns them.
    stored: the form of the dataset: 'reencoded', 'verbatim', 'jpeg' or ''.
  """
  rates = result['clips_per_second']
  parts = result['milliseconds_per_clip']
  cores, threads = result['cores'], result['num_threads']
  if rates['input'] >= 1.1 * rates['step']:
    text = (
      f'The step is the bottleneck: the input could feed'
      f' {rates["input"] / rates["step"]:.1f} times as many clips.'
    )
    if rates['both'] < 0.9 * rates['step']:
      return text + (
        ' Together they are slower than the step alone: they share the cores,'
        ' or copying takes long; try fewer --config.dataset.num_threads.'
      )
    return text + ' Nothing in the input needs to change.'
  share = {
    name: parts[name] / sum(parts[n] for n in ('read', 'decode', 'resize'))
    for name in ('read', 'decode', 'resize')
  }
  worst = max(share, key=lambda name: share[name])
  text = (
    f'The input is the bottleneck: it gives {rates["input"]:.1f} clips/s, and'
    f' the step could take {rates["step"]:.1f}; {worst} is {share[worst]:.0%}'
    ' of what a core does.'
  )
  if threads < cores:
    return text + f' Set --config.dataset.num_threads={cores}, one for a core.'
  if worst == 'read':
    return text + (
      ' Put the dataset on a faster or local disk, or let more threads wait'
      f' for it: --config.dataset.num_threads={4 * cores}.'
    )
  if worst == 'decode' and stored == 'verbatim':
    return text + (
      ' The videos are stored as they were published: prepare them re-encoded'
      ' (tfds build without --config=verbatim), which decodes about 4 times as'
      ' fast.'
    )
  needed = cores * rates['step'] / max(rates['input'], 1e-9)
  return text + (
    f' About {needed:.0f} cores would keep up, this host has {cores}; or store'
    ' the videos with a higher crf (smaller files decode faster), or take'
    ' --config.dataset.repeats=2 clips of each video that is read.'
  )


def stored_as(data: records.PreparedDataset) -> str:
  """The form that the videos were stored in; '' where no report says."""
  try:
    report = json.loads((data.folder / 'report.json').read_text('utf-8'))
    return str(report['stored_as']['form'])
  except (OSError, ValueError, KeyError, TypeError):
    return ''


def _time(function: Callable[[], object], seconds: float = _SECONDS) -> float:
  """Mean duration of a call, over some seconds of calls."""

  def run(calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
      function()
    return time.perf_counter() - start

  spent = run(_MIN_BATCHES)
  more = max(0, int((seconds / max(spent, 1e-9) - 1) * _MIN_BATCHES))
  if jax.process_count() > 1:  # all step together, and so equally often
    more = int(multihost_utils.broadcast_one_to_all(np.int32(more)))
  return (spent + run(more)) / (_MIN_BATCHES + more)


def _take_apart(
  data: records.PreparedDataset, config: loop.Config
) -> dict[str, float]:
  """Seconds per clip that one thread spends on each stage."""
  preprocessing = loop.make_preprocessing(config)
  dataset = config.dataset
  seconds = dict.fromkeys(('read', 'decode', 'resize'), 0.0)
  count = 0
  for number in range(4 * _CLIPS):
    index = (number * 7919) % len(data)  # from all over the files
    rng = np.random.default_rng(number)
    # What views.train_clip does, in three steps.
    pick = functools.partial(views.pick_train_frames, preprocessing, rng)
    ends = [time.perf_counter()]
    try:
      video = data[index].video
      ends.append(time.perf_counter())
      frames = decoding.decode_frames(video, pick)
      ends.append(time.perf_counter())
      frames = views.resize_short_side(frames, dataset.train_short_side)
      if dataset.random_crop:
        views.random_resized_crop(frames, preprocessing.image_size, rng)
      else:
        views.center_crop(frames, preprocessing.image_size)
      ends.append(time.perf_counter())
    except UserError:  # Cannot be read; training skips it, too.
      continue
    for name, (start, end) in zip(
      seconds, itertools.pairwise(ends), strict=True
    ):
      seconds[name] += end - start
    count += 1
    if count == _CLIPS:
      break
  return {name: total / max(count, 1) for name, total in seconds.items()}
