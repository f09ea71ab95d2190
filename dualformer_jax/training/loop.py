"""Training from start to end, in one function to be read from top to bottom."""

from collections.abc import Callable, Sequence
import dataclasses
import datetime
import functools
import logging
import os
import pathlib
import signal
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import loader, records, stored_labels
from dualformer_jax.input_pipeline.views import Preprocessing
from dualformer_jax.models import complexity, explain
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import (
  augment,
  checkpoint,
  evaluate,
  initialize,
  metrics,
  sharding,
  token_labels,
)
from dualformer_jax.training import (
  optimizer as optimizers,
)
from dualformer_jax.training import (
  report as reports,
)
from dualformer_jax.training import (
  step as steps,
)

# An ml_collections.ConfigDict; type checkers cannot know its fields.
Config = Any
# What a shell reports of a process that SIGTERM ended.
_EXIT_STOPPED = 128 + signal.SIGTERM
_LOG = logging.getLogger(__name__)


def train_and_test(
  config: Config, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Trains, or goes on training, and tests; returns the report.

  Args:
    config: as configs/common.py has it.
    workdir: where checkpoints, TensorBoard files and report.json go. If it
      holds checkpoints, training goes on from the newest.

  Raises:
    UserError: config, dataset and workdir do not fit.
    SystemExit: SIGTERM came; the state was saved.
  """
  started = time.monotonic()
  workdir = pathlib.Path(workdir).expanduser().absolute()
  is_first_host = jax.process_index() == 0
  stop = _StopSignal()

  # ------------------------------------------------------ what to start from
  # In this order: the newest checkpoint in the workdir; what init_from names;
  # the initial distributions.
  checkpoint.check_shared(workdir)
  newest = checkpoint.newest_of(workdir / checkpoint.NEWEST)
  source = None
  if newest is not None:
    settle_pixels(config, checkpoint.read_description(newest).preprocessing)
  elif config.init_from:
    source = initialize.read(config.init_from)
    settle_pixels(config, source.preprocessing)

  # ---------------------------------------------------------------- data
  dataset = config.dataset
  train_data = open_split(config, dataset.train_split)
  validation_data = open_split(config, dataset.validation_split)
  preprocessing = make_preprocessing(config)
  teacher = make_teacher(config, train_data)
  clips_per_epoch = dataset.repeats * len(train_data)
  steps_per_epoch = max(1, clips_per_epoch // config.batch_size)
  total_steps = config.num_epochs * steps_per_epoch
  validation_steps = config.validation.every_epochs * steps_per_epoch

  # ---------------------------------------------- mesh, model, optimiser
  mesh = sharding.make_mesh(
    config.mesh, config.batch_size, config.accumulation_steps
  )
  jax.set_mesh(mesh)
  clips = make_train_loader(config, train_data, mesh, teacher)
  model = make_model(config, train_data)
  optimizer, schedule = make_optimizer(config, model, steps_per_epoch)
  init = functools.partial(
    steps.init_state, model, optimizer, config.seed, config.ema_decay > 0
  )
  abstract_state = jax.eval_shape(init)
  state_shardings = sharding.tree_shardings(abstract_state, mesh)
  train_step = make_train_step(
    config, model, optimizer, state_shardings, mesh, teacher
  )
  teacher_variables = teacher.on_mesh(mesh) if teacher else None
  eval_step = make_eval_step(model, preprocessing, mesh)

  # -------------------------------------------------- restore or initialise
  checkpoints = checkpoint.Checkpoints(
    workdir / checkpoint.NEWEST, config.checkpoint.keep
  )
  best_checkpoints = checkpoint.Checkpoints(workdir / checkpoint.BEST)
  description = checkpoint.Description(
    model={name: getattr(model, name) for name in config.model},
    preprocessing=make_preprocessing(config, config.test),
    class_names=train_data.class_names,
    multi_label=dataset.multi_label,
    config=config.to_dict(),
  )
  if newest is not None:
    check_same_model(checkpoint.read_description(newest), description, newest)
    state, saved = checkpoints.restore(
      jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=where
        ),
        abstract_state,
        state_shardings,
      )
    )
    assert saved.data_position is not None
    clips.set_state(saved.data_position)
    _LOG.info('resumed %s', newest)
  else:
    state = jax.jit(
      init,
      out_shardings=state_shardings,
      compiler_options=sharding.compiler_options(mesh),
    )()
    if source is not None:
      state, transferred = initialize.start_from(state, source, description)
      _LOG.info(
        'started from %s\n%s', source.name, '\n'.join(transferred.table())
      )
  best = best_checkpoints.newest()
  best_score, best_step = None, 0
  if best:
    saved = checkpoint.read_description(best)
    best_score, best_step = saved.score, saved.step

  def describe(step: int, score: float | None = None):
    return dataclasses.replace(
      description, step=step, data_position=clips.get_state(), score=score
    )

  # ------------------------------------------------------------- validation
  writer = make_writer(workdir) if is_first_host else None

  def validate(step: int) -> None:
    """Scores the validation split; keeps the state if it is the best yet."""
    nonlocal best_score, best_step
    scores = evaluate_split(
      eval_step,
      state.variables(),
      validation_data,
      make_preprocessing(config, config.validation),
      mesh,
      config.batch_size,
      # The short side is to the crop as 256 is to 224.
      short_side=int(config.model.image_size * 256 / 224 + 0.5),
      num_threads=dataset.num_threads,
      should_stop=stop.requested,
    )
    if scores is None:
      return
    probabilities = metrics.mean_probabilities(
      scores.logits, dataset.multi_label
    )
    summary = metrics.summary(probabilities, scores.labels, dataset.multi_label)
    _LOG.info('validation at step %d: %s', step, _as_text(summary))
    if writer:
      writer.write_scalars(
        step, {f'validation/{name}': value for name, value in summary.items()}
      )
    score = next(iter(summary.values()))
    if best_score is None or score > best_score:
      best_score, best_step = score, step
      best_checkpoints.save(state, describe(step, score))
      # Before a later state is saved, from which this is not done again.
      best_checkpoints.wait()

  def is_stale() -> bool:
    """Whether the last validations brought nothing better."""
    patience = config.validation.patience * validation_steps
    return 0 < patience <= step - best_step and best_score is not None

  # ------------------------------------------------- checks before the steps
  step = int(state.step)
  for name, data in (
    ('validation', validation_data),
    ('test', open_split(config, dataset.test_split)),
  ):
    if name == 'test' and dataset.test_split == dataset.validation_split:
      continue
    if copies := records.near_copies(train_data, data):
      _LOG.warning(
        '%d videos of %s are in training as well, or near copies: %s%s; what '
        'is measured on them tells too much',
        len(copies),
        name,
        ', '.join(f'{b} of {a}' for a, b in copies[:3]),
        ', ...' if len(copies) > 3 else '',
      )
  if config.overfit_steps and newest is None:
    start = clips.get_state()
    batch = next(clips)
    batch.pop('video_ids')
    overfit_one_batch(
      train_step,
      state,
      sharding.put_batch(batch, mesh),
      teacher_variables,
      config.overfit_steps,
    )
    clips.set_state(start)

  # ------------------------------------------------------------------ steps
  if step >= total_steps:
    _LOG.info('training was done before: %d steps', step)
  if step and (step % validation_steps == 0 or step >= total_steps):
    validate(step)  # the process may have ended before it was done
  first_step_began = last_line = time.monotonic()
  last_step = step
  waited = 0.0  # for data, since the last line; in seconds
  videos = unchecked = None  # of the last step, and what it gave
  while step < total_steps and not is_stale() and not stop.requested():
    waited -= time.monotonic()
    batch = next(clips)
    waited += time.monotonic()
    previous, videos = videos, batch.pop('video_ids')
    batch = sharding.put_batch(batch, mesh)
    state, step_metrics = train_step(state, batch, teacher_variables)
    if unchecked is not None:
      # One step late, while this one runs: the devices never wait.
      check_finite(unchecked, step, previous, checkpoints)
    unchecked = step_metrics
    step += 1

    if first_step_began is not None:
      check_finite(step_metrics, step, videos, checkpoints)
      seconds = time.monotonic() - first_step_began
      _LOG.info('first step, compilation included: %.1f s', seconds)
      if newest is None and not dataset.multi_label:
        _LOG.info(
          'loss of the first batch, before any step: %.4g; one that knows '
          'nothing has ln(%d classes) = %.4g',
          step_metrics.get('class_loss', step_metrics['loss']),
          model.num_classes,
          np.log(model.num_classes),
        )
      last_line, last_step, first_step_began = time.monotonic(), step, None
      waited = 0.0
    line_is_due = step % config.log_every_steps == 0 or step == total_steps
    if line_is_due and step > last_step:
      values = {
        name: float(value) for name, value in step_metrics.items()
      }  # waits for the step
      now = time.monotonic()
      seconds = (now - last_line) / (step - last_step)
      values['learning_rate'] = float(schedule(step - 1))
      values['clips_per_second'] = config.batch_size / seconds
      values['wait_for_data'] = waited / (now - last_line)  # share of the time
      last_line, last_step, waited = now, step, 0.0
      _LOG.info(
        'step %d/%d (epoch %.1f/%d)  %s  %s left',
        step,
        total_steps,
        step / steps_per_epoch,
        config.num_epochs,
        _as_text(values),
        _as_time(seconds * (total_steps - step)),
      )
      if writer:
        writer.write_scalars(
          step, {f'train/{name}': value for name, value in values.items()}
        )

    validation_is_due = step % validation_steps == 0 or step == total_steps
    if validation_is_due or step % config.checkpoint.every_steps == 0:
      check_finite(step_metrics, step, videos, checkpoints)
      checkpoints.save(state, describe(step))
    if validation_is_due:
      validate(step)
      last_line, last_step, waited = time.monotonic(), step, 0.0

  # ------------------------------------------------------------------- save
  if unchecked is not None:
    check_finite(unchecked, step, videos, checkpoints)
  checkpoints.save(state, describe(step))
  checkpoints.close()
  best_checkpoints.close()
  if writer:
    writer.close()
  clips.close()
  if is_stale():
    _LOG.info(
      'no validation since step %d was better: training ends at step %d of %d',
      best_step,
      step,
      total_steps,
    )
  elif step < total_steps or stop.requested():
    _LOG.info(
      'stopped by SIGTERM; saved step %d: the same command goes on from it',
      step,
    )
    raise SystemExit(_EXIT_STOPPED)
  stop.close()

  # ------------------------------------------------------------------- test
  return _test(
    config,
    workdir,
    str(checkpoints.newest()),
    eval_step,
    state.variables(),
    mesh,
    started,
  )


def test(
  config: Config, workdir: str | os.PathLike[str], compare: str = ''
) -> dict[str, Any]:
  """Tests config.init_from, or the workdir's newest checkpoint, on all views.

  The checkpoint says what the model is; the config, which videos and views.
  Writes WORKDIR/report.json (which it returns), report.html and views.npz.

  Args:
    config: as configs/common.py has it.
    workdir: where the report goes.
    compare: another workdir, or its report.json, to compare with.

  Raises:
    UserError: there is no checkpoint, or its classes are not the dataset's; or
      what to compare with is not there or does not fit.
  """
  started = time.monotonic()
  workdir = pathlib.Path(workdir).expanduser().absolute()
  folder = checkpoint.find(config.init_from or workdir)
  variables, description = checkpoint.load_model(folder)
  data = open_split(config, config.dataset.test_split)
  if description.class_names != data.class_names:
    raise UserError(
      f'{folder} knows {len(description.class_names)} classes '
      f'({_start(description.class_names)}), but the dataset {data.folder} has '
      f'{len(data.class_names)} ({_start(data.class_names)}); test it on a '
      'dataset with the same class names in the same order'
    )
  # Before the videos are scored, which may take hours.
  other = reports.read(compare, data.class_names) if compare else None
  with config.unlocked():
    config.model.update(description.model)
  p = description.preprocessing
  config.dataset.update(
    frame_interval=p.frame_interval,
    sampling=p.sampling,
    pixel_mean=p.pixel_mean,
    pixel_std=p.pixel_std,
  )
  mesh = sharding.make_mesh(config.mesh, config.batch_size)
  jax.set_mesh(mesh)
  eval_step = make_eval_step(
    description.build_model(dtype=config.model.dtype), p, mesh
  )
  variables = sharding.put_tree(
    variables, sharding.tree_shardings(variables, mesh)
  )
  return _test(
    config, workdir, str(folder), eval_step, variables, mesh, started, other
  )


def _test(
  config: Config,
  workdir: pathlib.Path,
  folder: str,
  eval_step: Callable[..., jax.Array],
  variables: Any,
  mesh: jax.sharding.Mesh,
  started: float,
  other: reports.Result | None = None,
) -> dict[str, Any]:
  """Scores the test split with all views and writes the report."""
  data = open_split(config, config.dataset.test_split)
  preprocessing = make_preprocessing(config, config.test)
  _LOG.info(
    'testing on %d videos, %d clips x %d crops each',
    len(data),
    preprocessing.num_clips,
    preprocessing.num_crops,
  )
  scores = evaluate_split(
    eval_step,
    variables,
    data,
    preprocessing,
    mesh,
    config.batch_size,
    num_threads=config.dataset.num_threads,
  )
  assert scores is not None
  result = reports.Result(
    scores.logits,
    scores.labels,
    scores.video_ids,
    data.class_names,
    preprocessing.num_clips,
    str(workdir),
  )
  report = {
    **metrics.summary(
      result.probabilities(), scores.labels, config.dataset.multi_label
    ),
    'num_videos': len(scores.labels),
    'failed_videos': [
      {'video': video, 'reason': reason} for video, reason in scores.failed
    ],
    'views': {
      'num_clips': preprocessing.num_clips,
      'num_crops': preprocessing.num_crops,
    },
    **reports.details(result, _gflops(make_model(config, data))),
    'checkpoint': folder,
    'dataset': {
      'folder': str(data.folder),
      'split': data.split,
      'fingerprint': data.content_fingerprint() or data.fingerprint,
    },
    'config': config.to_dict(),
    'time': {
      'finished': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
      'seconds': round(time.monotonic() - started, 1),
    },
  }
  misfit = None
  if other is not None:
    try:
      report['comparison'] = reports.compare(result, other)
      _LOG.info('%s', report['comparison']['in_words'])
    except UserError as error:
      misfit = error  # The report comes first.
  if jax.process_index() == 0:
    reports.write(workdir, report, result, data, scores.places)
    _LOG.info(
      '%s on %d videos, %d failed; report: %s',
      _as_text({name: v for name, v in report.items() if isinstance(v, float)}),
      report['num_videos'],
      len(scores.failed),
      workdir / 'report.json',
    )
  if misfit is not None:
    raise misfit
  return report


def evaluate_split(
  eval_step: Callable[..., jax.Array],
  variables: Any,
  data: records.PreparedDataset,
  preprocessing: Preprocessing,
  mesh: jax.sharding.Mesh,
  clips_per_batch: int,
  *,
  num_threads: int,
  short_side: int | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> evaluate.Scores | None:
  """Returns the scores of a split; None if `should_stop` said so first.

  Raises:
    UserError: not one video could be read.
  """
  # As many videos as make a training batch of views, split evenly.
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  views = preprocessing.num_clips * preprocessing.num_crops
  batch_size = shards * max(1, clips_per_batch // (views * shards))
  batches = loader.test_loader(
    data,
    preprocessing,
    batch_size=batch_size,
    rows=sharding.host_rows(mesh, batch_size),
    num_threads=num_threads,
    short_side=short_side,
  )
  scores = evaluate.score_videos(
    batches, len(batches), eval_step, variables, mesh, should_stop=should_stop
  )
  if scores is not None and not len(scores.labels):
    raise UserError(
      f'{data.folder}: none of the {len(scores.failed)} videos of split '
      f'{data.split!r} could be read; the first: '
      f'{": ".join(scores.failed[0])}'
    )
  return scores


def open_split(config: Config, split: str) -> records.PreparedDataset:
  """Opens a split and checks it against the config.

  Raises:
    UserError: the dataset is absent or damaged, or has other classes.
  """
  dataset = config.dataset
  data = records.PreparedDataset(dataset.name, split, dataset.data_dir)
  if config.model.num_classes not in (0, len(data.class_names)):
    raise UserError(
      f'config.model.num_classes is {config.model.num_classes}, but '
      f'{data.folder} has {len(data.class_names)} classes; set it to that, or '
      'to 0 to take what the dataset has'
    )
  if data.multi_label != dataset.multi_label:
    labels = 'several labels' if data.multi_label else 'one label'
    raise UserError(
      f'config.dataset.multi_label is {dataset.multi_label}, but the videos '
      f'of {data.folder} have {labels} each; set it to {data.multi_label}'
    )
  return data


def make_model(config: Config, data: records.PreparedDataset) -> DualFormer:
  """Returns the model, with as many classes as the dataset if it says 0."""
  fields = config.model.to_dict()
  fields['num_classes'] = fields['num_classes'] or len(data.class_names)
  return DualFormer(**fields)


def make_preprocessing(
  config: Config,
  views: Config | None = None,
) -> Preprocessing:
  """Returns the preprocessing of training, or of some test `views`."""
  return Preprocessing(
    num_frames=config.model.num_frames,
    frame_interval=config.dataset.frame_interval,
    image_size=config.model.image_size,
    sampling=config.dataset.sampling,
    pixel_mean=_as_rgb(config.dataset.pixel_mean or Preprocessing.pixel_mean),
    pixel_std=_as_rgb(config.dataset.pixel_std or Preprocessing.pixel_std),
    num_clips=views.num_clips if views else 1,
    num_crops=views.num_crops if views else 1,
  )


def make_teacher(
  config: Config, data: records.PreparedDataset
) -> token_labels.Teacher | None:
  """Returns what labels tokens; None where the config has none.

  Raises:
    UserError: the teacher, or what was stored of one, does not fit.
  """
  options = config.token_labels
  if options.teacher and options.stored:
    raise UserError(
      'config.token_labels.teacher and stored are both given; expected one'
    )
  if bool(options.teacher or options.stored) != config.model.token_label:
    raise UserError(
      f'config.model.token_label is {config.model.token_label}, so '
      + (
        'what its head says of tokens is to be trained: set config.token_labels'
        '.teacher to a checkpoint folder, or stored to what '
        'dualformer_jax.token_labels wrote'
        if config.model.token_label
        else 'it has no use for config.token_labels: set it to True'
      )
    )
  if not config.model.token_label:
    return None
  model = make_model(config, data)
  if options.stored:
    switches = config.augment
    if switches.rand_augment_ops or switches.mixup or switches.cutmix:
      raise UserError(
        'config.augment.rand_augment_ops, mixup and cutmix change clips in ways'
        ' that stored token labels cannot follow; set them to 0, or '
        'config.token_labels.teacher instead of stored'
      )
    stored = stored_labels.StoredLabels(options.stored, data)
    return teacher_as_stored(config, model, stored)

  variables, description = checkpoint.load_model(options.teacher)
  teacher = description.build_model(dtype=options.dtype)
  if description.class_names != data.class_names:
    raise UserError(
      f'config.token_labels.teacher={options.teacher} knows '
      f'{len(description.class_names)} classes '
      f'({_start(description.class_names)}), {data.folder} has '
      f'{len(data.class_names)} ({_start(data.class_names)}); expected the '
      'same in the same order'
    )
  own = make_preprocessing(config)
  p = description.preprocessing
  rescale = (
    np.divide(own.pixel_std, p.pixel_std).tolist(),
    (np.subtract(own.pixel_mean, p.pixel_mean) / p.pixel_std).tolist(),
  )
  return teacher_to_ask(config, model, teacher, variables, rescale)


def num_token_scores(config: Config, model: DualFormer) -> int:
  """Returns how many scores of a token are kept."""
  top = config.token_labels.top
  return top if top > 0 else model.num_classes


def teacher_as_stored(
  config: Config,
  model: DualFormer,
  stored: stored_labels.StoredLabels | None = None,
) -> token_labels.Teacher:
  """Returns what labels tokens as was stored of a teacher.

  Args:
    config: of the run.
    model: the student.
    stored: the labels; None to compile for such, without any at hand.
  """
  _, *grid = explain.token_grid(model, len(model.depths) - 1)
  targets = functools.partial(
    token_labels.stored_labels,
    grid=(grid[0], grid[1]),
    num_classes=model.num_classes,
    top=num_token_scores(config, model),
    flip=config.dataset.flip,
  )
  return token_labels.Teacher(targets, model.num_frames, stored=stored)


def teacher_to_ask(
  config: Config,
  model: DualFormer,
  teacher: DualFormer,
  variables: Any,
  rescale: tuple[Sequence[float], Sequence[float]],
) -> token_labels.Teacher:
  """Returns what labels tokens by a model that is asked in each step.

  Args:
    config: of the run.
    model: the student.
    teacher: the model that is asked.
    variables: its parameters and statistics, or their shapes.
    rescale: as of token_labels.ask_teacher.

  Raises:
    UserError: the teacher's tokens are not where the model's are.
  """
  frames, *grid = explain.token_grid(model, len(model.depths) - 1)
  _, *teacher_grid = explain.token_grid(teacher, len(teacher.depths) - 1)
  most = max(teacher.num_frames, model.num_frames)
  span = config.dataset.frame_interval * model.num_frames
  if (
    most % teacher.num_frames
    or most % model.num_frames
    or teacher.image_size != model.image_size
    or teacher_grid != grid
    or (config.dataset.sampling == 'dense' and span % most)
  ):
    raise UserError(
      f'config.token_labels.teacher={config.token_labels.teacher} takes clips '
      f'of {teacher.num_frames} frames of {teacher.image_size} pixels and has '
      f'{teacher_grid} tokens a frame, the model {model.num_frames} of '
      f'{model.image_size}, every {config.dataset.frame_interval} frames, and '
      f'{grid}; expected the same size and grid, and frames of which the one '
      'number divides the other'
    )
  targets = functools.partial(
    token_labels.ask_teacher,
    model=teacher,
    frames=frames,
    top=num_token_scores(config, model),
    rescale=rescale,
  )
  return token_labels.Teacher(targets, most, variables)


def make_train_loader(
  config: Config,
  data: records.PreparedDataset,
  mesh: jax.sharding.Mesh,
  teacher: token_labels.Teacher | None = None,
) -> loader.TrainIterator:
  """Returns this host's batches of training clips."""
  dataset = config.dataset
  preprocessing = make_preprocessing(config)
  if teacher is not None:
    # As long as the model's, but with as many frames as the teacher wants.
    times = teacher.clip_frames // preprocessing.num_frames
    preprocessing = dataclasses.replace(
      preprocessing,
      num_frames=teacher.clip_frames,
      frame_interval=preprocessing.frame_interval // times,
    )
  return loader.train_loader(
    data,
    preprocessing,
    batch_size=config.batch_size,
    seed=config.seed,
    rows=sharding.host_rows(mesh, config.batch_size),
    num_threads=dataset.num_threads,
    prefetch=dataset.prefetch,
    short_side=dataset.train_short_side,
    random_crop=dataset.random_crop,
    repeats=dataset.repeats,
    rand_augment_ops=config.augment.rand_augment_ops,
    rand_augment_magnitude=config.augment.rand_augment_magnitude,
    class_balanced=dataset.class_balanced,
    token_labels=teacher.stored if teacher else None,
  )


def make_optimizer(
  config: Config, model: DualFormer, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, Callable[[int], Any]]:
  """Returns the optimiser and the learning rate of each step."""
  options = config.optimizer.to_dict()
  schedule = optimizers.learning_rate_schedule(
    options.pop('learning_rate'),
    config.num_epochs,
    options.pop('warmup_epochs'),
    steps_per_epoch,
  )
  variables = jax.eval_shape(model.init, jax.random.key(0), _blank(model))
  optimizer = optimizers.make_optimizer(
    variables['params'], schedule, **options
  )
  return optimizer, schedule


def make_train_step(
  config: Config,
  model: DualFormer,
  optimizer: optax.GradientTransformation,
  state_shardings: Any,
  mesh: jax.sharding.Mesh,
  teacher: token_labels.Teacher | None = None,
) -> Callable[..., tuple[steps.TrainState, dict[str, jax.Array]]]:
  """Returns (state, batch, teacher's variables) -> (state, metrics).

  The old state is used up.
  """
  dataset, switches = config.dataset, config.augment
  pixels = make_preprocessing(config)
  augment.check(switches, config.batch_size // config.accumulation_steps)
  return jax.jit(
    functools.partial(
      steps.train_step,
      model=model,
      optimizer=optimizer,
      augment=functools.partial(
        augment.augment,
        pixel_mean=pixels.pixel_mean,
        pixel_std=pixels.pixel_std,
        flip=dataset.flip,
        color_jitter=switches.color_jitter,
        random_erasing=switches.random_erasing,
      ),
      mix=functools.partial(
        augment.mix,
        num_classes=model.num_classes,
        mixup=switches.mixup,
        cutmix=switches.cutmix,
      ),
      gather=sharding.gather_for_use(mesh),
      token_targets=teacher.targets if teacher else None,
      token_weight=config.token_labels.weight,
      multi_label=dataset.multi_label,
      label_smoothing=config.label_smoothing,
      ema_decay=config.ema_decay,
      frozen=config.optimizer.frozen,
      seed=config.seed,
      accumulation_steps=config.accumulation_steps,
    ),
    donate_argnums=0,
    compiler_options=sharding.compiler_options(mesh),
    out_shardings=(
      state_shardings,
      jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    ),
  )


def make_eval_step(
  model: DualFormer,
  preprocessing: Preprocessing,
  mesh: jax.sharding.Mesh,
) -> Callable[..., jax.Array]:
  """Returns (variables, views) -> logits of each view, on all devices."""
  return jax.jit(
    functools.partial(
      steps.view_logits,
      model=model,
      normalize=functools.partial(
        augment.normalize,
        pixel_mean=preprocessing.pixel_mean,
        pixel_std=preprocessing.pixel_std,
      ),
      gather=sharding.gather_for_use(mesh),
    ),
    compiler_options=sharding.compiler_options(mesh),
    out_shardings=jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec()
    ),
  )


def check_same_model(
  saved: checkpoint.Description,
  wanted: checkpoint.Description,
  folder: str | os.PathLike[str],
) -> None:
  """Raises UserError where a checkpoint is of another model or other classes.

  What does not change the parameters (dtype, remat, dropout) may differ.
  """
  free = initialize.FREE_FIELDS
  differences = [
    f'model.{name} is {wanted.model[name]}, there {saved.model.get(name)}'
    for name in wanted.model
    if name not in free and wanted.model[name] != saved.model.get(name)
  ]
  if not differences and saved.class_names != wanted.class_names:
    differences = [
      f'the classes are {_start(wanted.class_names)}, there '
      f'{_start(saved.class_names)}'
    ]
  if differences:
    raise UserError(
      f'{folder} is of another model: {"; ".join(differences)}. Nothing was '
      'changed: use the config it was made with, or another --workdir'
    )


def settle_pixels(config: Config, preprocessing: Preprocessing | None) -> None:
  """Sets the normalisation that the config leaves to what it starts from."""
  dataset = config.dataset
  for name in ('pixel_mean', 'pixel_std'):
    if not dataset[name] and preprocessing is not None:
      dataset[name] = getattr(preprocessing, name)


def overfit_one_batch(
  train_step: Callable[..., tuple[steps.TrainState, dict[str, jax.Array]]],
  state: steps.TrainState,
  batch: dict[str, Any],
  teacher: Any,
  count: int,
) -> None:
  """Logs how the loss of one batch falls in `count` steps from a copy of state.

  A model that cannot learn a single batch by heart will learn nothing: then
  something is wrong with the labels, the learning rate or what it starts from.
  """
  state = jax.tree.map(jnp.copy, state)  # as the step uses it up
  curve = []
  for step in range(count):
    state, values = train_step(state, batch, teacher)
    curve.append(float(values['loss']))
    if step % max(1, count // 10) == 0 or step + 1 == count:
      _LOG.info('one batch, step %d/%d: loss %.4g', step + 1, count, curve[-1])
  if curve[-1] < curve[0] / 2:
    _LOG.info('one batch is learnt: loss %.4g -> %.4g', curve[0], curve[-1])
  else:
    _LOG.warning(
      'one batch is NOT learnt in %d steps: loss %.4g -> %.4g, not even half. '
      'Try more steps, a higher rate or no warm-up; else look at the labels',
      count,
      curve[0],
      curve[-1],
    )


def check_finite(
  values: dict[str, jax.Array],
  step: int,
  videos: list[str] | None,
  checkpoints: checkpoint.Checkpoints,
) -> None:
  """Raises UserError if what a step gave is not finite; waits for the step.

  Args:
    values: of the step.
    step: its number, from 1.
    videos: of its batch, on this host.
    checkpoints: of the run; what they hold was checked before it was saved.
  """
  bad = {
    name: float(value)
    for name, value in values.items()
    if not np.isfinite(value)
  }
  if bad:
    checkpoints.wait()
    raise UserError(
      f'step {step}: {_as_text(bad)}, after a batch of these videos: '
      f'{", ".join(videos or ())}. The last good checkpoint is '
      f'{checkpoints.newest() or "none yet"}; nothing was saved after it. Look '
      'at the videos, lower optimizer.learning_rate, or clip gradients '
      '(--config.optimizer.max_grad_norm=1)'
    )


def make_writer(workdir: pathlib.Path) -> Any:
  """Returns a writer of TensorBoard files; None where TensorFlow is missing."""
  try:
    from clu import metric_writers
  except ImportError as error:
    _LOG.warning(
      'no TensorBoard files will be written, metrics go to this log alone '
      '(%s); for them, pip install "dualformer_jax[prepare]"',
      error,
    )
    return None
  return metric_writers.SummaryWriter(str(workdir))


class _StopSignal:
  """Whether SIGTERM came, to any host."""

  def __init__(self):
    self._came = False
    self._times_asked = 0
    # With several hosts JAX has SIGTERM, and all agree on when to stop.
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._on_signal)

  def _on_signal(self, signum, frame) -> None:
    del signum, frame
    self._came = True

  def requested(self) -> bool:
    """Whether to stop now: all hosts, asking equally often, hear the same."""
    if jax.process_count() > 1 and not self._came:
      self._times_asked += 1
      self._came = multihost_utils.reached_preemption_sync_point(
        self._times_asked
      )
    return self._came

  def close(self) -> None:
    """Lets SIGTERM end the process at once, as nothing is left to save."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if self._came:
      raise SystemExit(_EXIT_STOPPED)


def _gflops(model: DualFormer) -> float:
  """Returns the billions of multiply-adds that scoring one view takes."""
  rows = complexity.count(model)
  used = (r.multiply_adds for r in rows if r.part != complexity.TOKEN_HEAD)
  return sum(used) / 1e9


def _blank(model: DualFormer) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(model.input_shape(), np.float32)


def _as_rgb(values: Any) -> tuple[float, float, float]:
  try:
    red, green, blue = map(float, values)
  except (TypeError, ValueError) as error:
    raise UserError(
      'config.dataset.pixel_mean and pixel_std are 3 numbers each, got '
      f'{values}'
    ) from error
  return red, green, blue


def _as_text(values: dict[str, float]) -> str:
  return '  '.join(f'{name} {value:.4g}' for name, value in values.items())


def _as_time(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds)))


def _start(names: tuple[str, ...]) -> str:
  return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
