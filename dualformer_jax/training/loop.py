"""The training loop: train_and_test, in the order of execution."""

import dataclasses
import logging
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualformer_jax import store_client
from dualformer_jax.checkpoints import checkpoint, transfer
from dualformer_jax.checkpoints import metadata as metadata_lib
from dualformer_jax.distributed import processes, sharding
from dualformer_jax.evaluation import metrics, scoring
from dualformer_jax.files import check_writable
from dualformer_jax.progress import format_duration
from dualformer_jax.stop_signals import stop_signals
from dualformer_jax.training import (
  config_check,
  guards,
  object_store_workdir,
  setup,
  testing,
  trackers,
)
from dualformer_jax.training.logging import (
  MetricWriter,
  StepTimer,
  compile_time,
  format_metrics,
  training_record,
)
from dualformer_jax.training.state import TrainState

_LOG = logging.getLogger(__name__)


def train_and_test(
  config: setup.Config,
  workdir: str | os.PathLike[str],
  recipe: str = '',
  mirror: object_store_workdir.Mirror | None = None,
) -> dict[str, Any]:
  """Trains a model, or resumes its training, and tests it.

  The workdir is the folder of checkpoints, TensorBoard files and the report,
  which states the recipe: the name of the config file. If it is the local copy
  of one in an object store, `mirror` uploads what is new.

  Returns:
    The report of the test, which is in WORKDIR/report.json as well.

  Raises:
    UserError: Config, dataset and workdir do not fit together.
    SystemExit: SIGINT or SIGTERM was received; the state is saved.
  """
  config_check.check(config)
  trackers.check_installed(config)
  start = time.monotonic()
  workdir = pathlib.Path(workdir).expanduser().absolute()
  stop = guards.StopRequest()

  # ---------------------------------------------------------------- start from
  # The first of these that there is:
  #   1. the latest checkpoint in the workdir (resume);
  #   2. the checkpoint or .pth file of config.init_from (fine-tune);
  #   3. random parameters.
  check_writable(workdir / 'report.json')
  if mirror is None:
    processes.check_shared_folder(workdir)
  latest = checkpoint.latest_of(workdir / checkpoint.LATEST)
  source, resumed, origin = None, None, None
  if latest is not None:
    origin = resumed = checkpoint.read_metadata(latest)
    guards.check_batch_size(config.batch_size, resumed)
  elif config.init_from:
    source = transfer.read(config.init_from, config.init_from_ema)
    transfer.check(source, setup.make_model(config, num_classes=1))
    origin = source.metadata
  config = setup.resolve_normalization(
    config, origin.preprocessing if origin else None
  )

  # ---------------------------------------------------------------------- data
  dataset = config.dataset
  train_data = setup.open_split(config, dataset.train_split)
  validation_data = setup.open_split(config, dataset.validation_split)
  clips_per_epoch = dataset.repeats * len(train_data)
  steps_per_epoch = setup.count_steps(config, train_data)
  if clips_per_epoch < config.batch_size:
    _LOG.warning(
      'batch_size is %d, but an epoch has %d clips (training videos times '
      'dataset.repeats): each step has several clips of some videos, and is an '
      'epoch',
      config.batch_size,
      clips_per_epoch,
    )
  total_steps = config.num_epochs * steps_per_epoch
  validation_steps = config.validation.every_epochs * steps_per_epoch

  # ---------------------------------------------------- mesh, model, optimizer
  teacher = setup.make_teacher(config, train_data)
  training = setup.make_training(
    config,
    num_classes=len(train_data.class_names),
    steps_per_epoch=steps_per_epoch,
    teacher=teacher,
  )
  mesh, model = training.mesh, training.model
  jax.set_mesh(mesh)
  batches = setup.make_train_loader(training, train_data)
  teacher_variables = teacher.variables_on(mesh) if teacher else None
  scorer = testing.make_scorer(config, model, mesh)

  # ----------------------------------------------------- restore or initialize
  arrays = jax.tree.leaves(training.abstract_state)
  num_bytes = sum(x.size * x.dtype.itemsize for x in arrays)
  check_writable(workdir / checkpoint.LATEST / 'new', num_bytes)
  if mirror is None:  # which else has it
    _lock = guards.WorkdirLock(workdir)  # until this function ends
  checkpoints, best_checkpoints = (
    checkpoint.Checkpoints(
      workdir / kind,
      keep,
      is_shared=mirror is None,
      on_saved=mirror.add if mirror else None,
    )
    for kind, keep in (
      (checkpoint.LATEST, config.checkpoint.keep),
      (checkpoint.BEST, 1),
    )
  )
  base_metadata = checkpoint.CheckpointMetadata(
    model={name: getattr(model, name) for name in config.model},
    preprocessing=setup.make_preprocessing(config, config.test),
    class_names=train_data.class_names,
    multi_label=dataset.multi_label,
    config=config.to_dict(),
  )
  if latest is not None and resumed is not None:
    metadata_lib.check_same_model(base_metadata, resumed, latest)
    abstract_state = training.abstract_state
    trees, saved = checkpoints.restore(abstract_state.trees())
    state = TrainState.from_trees(trees, saved.step, abstract_state.step)
    assert saved.data_position is not None
    batches.set_state(saved.data_position)
    _LOG.info('resumed %s', store_client.shown(latest))
  else:
    state = training.init_state()
    if source is not None:
      variables, transferred = transfer.initialize(
        source,
        {'params': state.params, 'batch_stats': state.batch_stats},
        base_metadata,
      )
      if state.ema_params is not None:
        variables['ema_params'] = jax.tree.map(jnp.copy, variables['params'])
      state = dataclasses.replace(state, **variables)
      _LOG.info(
        'started from %s\n%s', source.name, '\n'.join(transferred.table())
      )
  step = first_step = int(state.step)
  best_score, best_step = None, 0
  if best := best_checkpoints.latest():
    saved = checkpoint.read_metadata(best)
    best_score, best_step = saved.score, saved.step

  # -------------------------------------------------------------------- checks
  guards.warn_of_near_duplicates(train_data, validation_data, 'validation')
  test_data = setup.open_split(config, dataset.test_split)
  if dataset.test_split != dataset.validation_split:
    guards.warn_of_near_duplicates(train_data, test_data, 'test')
  if config.overfit_steps and latest is None:
    start_position = batches.get_state()
    batch = next(batches)
    batch.pop('video_ids')
    batch = sharding.put_batch(batch, mesh)
    guards.overfit_one_batch(training, state, batch, teacher_variables)
    batches.set_state(start_position)

  # ------------------------------------------------------ save, validate, stop
  writer = MetricWriter(workdir, step, config)
  if latest is None:
    writer.write_text(step, 'config', f'```\n{config}\n```')
  finite = guards.FiniteGuard(checkpoints)

  def metadata(score: float | None = None) -> checkpoint.CheckpointMetadata:
    return dataclasses.replace(
      base_metadata,
      step=step,
      data_position=batches.get_state(),
      score=score,
      training=training_record(resumed, time.monotonic() - start),
    )

  def save() -> None:
    """Starts to save the state, if it is finite."""
    finite.check()
    if mirror:
      mirror.check()
    # The best checkpoint must not be lost if training resumes from this one. It
    # was started at an earlier step, so that there is hardly ever a wait.
    best_checkpoints.wait()
    writer.flush()  # first, as metrics are uploaded before the checkpoint
    checkpoints.save(state.trees(), metadata())

  def finish_saved() -> None:
    """Finishes what was started before a signal ended the validation."""
    checkpoints.wait()
    writer.close_trackers(is_complete=False)
    if mirror:
      mirror.finish()

  def validate() -> None:
    """Scores the validation split, and saves the state if it is the best."""
    nonlocal best_score, best_step
    if jax.process_count() == 1:
      # The next run validates this step: once it is saved, nothing is lost if a
      # signal ends the process, also while this compiles.
      stop_signals.exit_message = guards.saved_step(step)
      stop_signals.allow_exit(finish=finish_saved)
    views = setup.make_preprocessing(config, config.validation)
    scale = config.validation.resize_ratio
    short_side = int(config.model.image_size * scale + 0.5)
    scores = scoring.score_split(
      scorer,
      state.variables(),
      validation_data,
      views,
      short_side=short_side,
      should_stop=stop.is_set,
    )
    stop_signals.wait_if_ending()
    if scores is None:  # stopped; the next run validates this step
      return
    probabilities = metrics.mean_probabilities(
      scores.logits, dataset.multi_label
    )
    summary = metrics.summary(probabilities, scores.labels, dataset.multi_label)
    score = next(iter(summary.values()))
    summary['loss'] = metrics.cross_entropy(probabilities, scores.labels)
    _LOG.info(
      'validation at step %d: %s  (%s)',
      step,
      format_metrics(summary),
      setup.describe_views(views, short_side),
    )
    writer.write(step, 'validation', summary)
    if mirror:
      writer.flush()
      mirror.sync()
    if best_score is None or score > best_score:
      best_score, best_step = score, step
      best_checkpoints.save(state.trees(), metadata(score))

  def is_stale() -> bool:
    """Returns whether `patience` validations have passed without a new best."""
    patience = config.validation.patience * validation_steps
    return 0 < patience <= step - best_step and best_score is not None

  # --------------------------------------------------------------------- steps
  if step >= total_steps:
    _LOG.info('training is already complete: %d steps', step)
  if step and (step % validation_steps == 0 or step >= total_steps):
    validate()  # the previous run may have ended during this validation
  timer = StepTimer(step)
  if step < total_steps and not is_stale():
    _LOG.info('compiling the training step: %s', compile_time(model))
  while step < total_steps and not is_stale() and not stop.is_set():
    batch = timer.wait_for(batches)
    video_ids = batch.pop('video_ids')
    batch = sharding.put_batch(batch, mesh)
    state, step_metrics = training.train_step(state, batch, teacher_variables)
    step += 1
    stop_signals.defer_exit()  # from here there is something to save
    checkpoints.check()
    best_checkpoints.check()
    finite.add(step, step_metrics, video_ids)

    if step == first_step + 1:
      finite.check()
      seconds, _ = timer.measure(step)
      _LOG.info('first step, including compilation: %.1f s', seconds)
      if latest is None and not dataset.multi_label:
        _LOG.info(
          'initial loss %.4g; uniform predictions have ln(%d classes) = %.4g',
          step_metrics.get('class_loss', step_metrics['loss']),
          model.num_classes,
          np.log(model.num_classes),
        )
    is_last = step == total_steps
    if step % config.log_every_steps == 0 or is_last:
      values = {'loss': float(step_metrics['loss'])}  # waits, and comes first
      values |= {n: float(v) for n, v in step_metrics.items()}
      left = ''
      if step > timer.step:  # not the first one, which includes compilation
        seconds, values['wait_for_data'] = timer.measure(step)
        values['clips_per_second'] = config.batch_size / seconds
        left = f'  {format_duration(seconds * (total_steps - step))} left'
      values['learning_rate'] = float(training.schedule(step - 1))
      _LOG.info(
        'step %d/%d (epoch %.1f/%d)  %s%s',
        step,
        total_steps,
        step / steps_per_epoch,
        config.num_epochs,
        format_metrics(values),
        left,
      )
      writer.write(step, 'train', values)

    validate_now = step % validation_steps == 0 or is_last
    if validate_now or step % config.checkpoint.every_steps == 0:
      save()
    if validate_now:
      validate()
      timer.restart(step)

  # ------------------------------------------------------------ save, and stop
  save()
  checkpoints.close()
  best_checkpoints.close()
  batches.close()
  if is_stale():
    _LOG.info(
      'no validation since step %d was better: training ends at step %d of %d',
      best_step,
      step,
      total_steps,
    )
  elif step < total_steps or stop.is_set():
    writer.close(is_complete=False)
    stop.raise_exit(step)
  stop_signals.allow_exit(finish=mirror.finish if mirror else None)

  # ---------------------------------------------------------------------- test
  del state, teacher_variables
  if mirror:
    mirror.share()
  folder = testing.find_checkpoint(config, workdir)
  report = testing.test(
    config, workdir, recipe=recipe, folder=folder, start=start, writer=writer
  )
  writer.close()
  return report
