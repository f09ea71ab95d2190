"""Probes a frozen model: features, heads, choice, report and checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import logging
import os
import pathlib
import shutil
import time
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Float, Int, Num
import numpy as np

from dualformer_jax import files
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import metrics, scoring
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.probing import features as features_lib
from dualformer_jax.probing import heads, neighbors
from dualformer_jax.probing.features import Features
from dualformer_jax.training import config_check, guards, setup, testing

KINDS = ('linear', 'attentive')
_HELD_OUT = 0.2  # of the training videos, if there is no validation split
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
  """Features to train on, to choose by, and to test on, with their videos.

  If the videos to choose by were held out from the training videos, the chosen
  probe is trained again on both, `all_rows`.
  """

  train: Features
  train_rows: Int[np.ndarray, ' n']
  choice: Features
  choice_rows: Int[np.ndarray, ' m']
  all_rows: Int[np.ndarray, ' a']
  test: Features
  class_names: tuple[str, ...]
  multi_label: bool


@dataclasses.dataclass(frozen=True)
class Probe:
  """The best of the probes of one kind.

  Attributes:
    kind: one of KINDS, or 'nearest neighbors'.
    setting: learning rate and weight decay, or the number of neighbors.
    choice: accuracy on the videos to choose by; mAP with several labels.
    test: the same on the test videos.
    loss: cross-entropy on the videos to choose by; the lowest is chosen.
    logits: logits of all test views.
    params: parameters of the head.
  """

  kind: str
  setting: dict[str, float]
  choice: float
  test: float
  loss: float = 0.0
  logits: Float[np.ndarray, 'n v k'] | None = None
  params: Any = None

  def figures(self) -> dict[str, Any]:
    """Returns the fields of report.json."""
    names = ('kind', 'setting', 'choice', 'test')
    return {name: getattr(self, name) for name in names}


def probe(
  config: setup.Config,
  source: str | os.PathLike[str],
  workdir: str | os.PathLike[str],
  *,
  features: str = '',
  kinds: Sequence[str] = KINDS,
  views: int = 0,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Trains heads on the features of a frozen model, and tests them.

  The report and the checkpoint of the best head are written to the workdir.

  Args:
    config: Config of the dataset and the views.
    source: Checkpoint of the model, as for checkpoint.find.
    workdir: Folder of the report and of WORKDIR/checkpoints.
    features: Folder of the features; by default WORKDIR/features.
    kinds: Kinds of heads, of KINDS.
    views: Random training clips per video; 0 for the center clip.
    overwrite: Whether to replace the report and the checkpoint of the workdir.

  Returns:
    The report, which is in WORKDIR/report.json as well.

  Raises:
    UserError: Config, dataset, model and workdir do not fit together.
  """
  start = time.monotonic()
  workdir = pathlib.Path(workdir).expanduser().absolute()
  files.check_target(workdir / 'report.json', overwrite)
  previous = checkpoint.latest_of(workdir / checkpoint.LATEST)
  if previous and not overwrite:
    raise UserError(
      f'{workdir} already has a checkpoint; choose another --workdir, or add '
      '--overwrite'
    )
  variables, metadata = checkpoint.load_model(source)
  config = testing.adapt_config(config, metadata)
  config.model.num_classes = 0  # those of the dataset
  config_check.check(config)
  on_cpu = jax.default_backend() == 'cpu'  # few CPUs compute in bfloat16
  dtype = 'float32' if on_cpu else config.model.dtype
  model = metadata.build_model(dtype=dtype)
  folder = pathlib.Path(features or workdir / 'features').expanduser()
  data, test_data = _load(
    config, model, variables, folder, views, 'attentive' in kinds
  )
  fields = {**metadata.model, 'num_classes': len(data.class_names)}
  fields['token_label'] = False
  probes = [_probe_neighbors(data)]
  for kind in kinds:
    head_model = DualFormer(**{**fields, 'head': kind, 'dtype': dtype})
    probes.append(_probe_head(head_model, data, config.seed))
  best = min(probes[1:], key=lambda probe: probe.loss)
  print(_table(probes, best))

  fields['head'] = best.kind
  variables['params']['cls_head'] = best.params
  p = setup.make_preprocessing(config, config.test)
  number = int(previous.name) + 1 if previous else 0
  target = workdir / checkpoint.LATEST / str(number)
  saved = checkpoint.CheckpointMetadata(
    fields, p, data.class_names, data.multi_label
  )
  checkpoint.save_model(target, variables, saved)
  if previous:
    shutil.rmtree(previous)
  assert best.logits is not None
  test = data.test
  return testing.write_report(
    testing.Tested(
      testing.adapt_config(config, saved),
      saved.build_model(),
      p,
      test_data,
      target,
      'chosen',
      checkpoint.variables_hash(variables),
    ),
    scoring.Scores(
      best.logits, test.labels, test.video_ids, test.indices, test.failed
    ),
    workdir,
    start,
    probes=[probe.figures() for probe in probes],
  )


def _open(config: setup.Config) -> dict[str, PreparedDataset]:
  """Opens and checks the splits.

  There is no 'validation' if that is also what is tested on.
  """
  dataset = config.dataset
  names = {
    'train': dataset.train_split,
    'validation': dataset.validation_split,
    'test': dataset.test_split,
  }
  if names['validation'] == names['test']:
    del names['validation']
  if len(set(names.values())) < len(names):
    raise UserError(
      f'config.dataset.train_split is {dataset.train_split!r}, which is also '
      'validated or tested on; expected another split'
    )
  splits = {n: setup.open_split(config, split) for n, split in names.items()}
  train = splits['train']
  classes, count = train.class_names, len(train)
  if len(classes) < 2:
    raise UserError(
      f'{train.folder} has {len(classes)} class; expected at least two'
    )
  if count < len(classes):
    raise UserError(
      f'{train.folder}: split {train.split!r} has {count} videos of '
      f'{len(classes)} classes; expected at least one of each'
    )
  return splits


def _load(
  config: setup.Config,
  model: DualFormer,
  variables: Any,
  folder: pathlib.Path,
  views: int,
  with_tokens: bool,
) -> tuple[Data, PreparedDataset]:
  """Returns the features of all splits, and the videos of the test."""
  dataset = config.dataset
  splits = _open(config)
  train = splits['train']
  for name in ('validation', 'test'):
    if name in splits:
      guards.warn_of_near_duplicates(train, splits[name], name)
  mesh = sharding.make_mesh(config.mesh.to_dict(), config.batch_size)
  scale = config.validation.resize_ratio
  center = setup.make_preprocessing(config)
  size = center.image_size
  cuts = {
    'train': features_lib.Views(center, size),
    'validation': features_lib.Views(
      setup.make_preprocessing(config, config.validation),
      int(size * scale + 0.5),
    ),
    'test': features_lib.Views(
      setup.make_preprocessing(config, config.test), size
    ),
  }
  if views:
    cuts['train'] = features_lib.Views(
      dataclasses.replace(center, num_clips=views),
      dataset.train_short_side,
      features_lib.TrainViews(
        config.seed, dataset.random_crop, dataset.start_multiple, dataset.flip
      ),
    )
  found = {
    name: features_lib.compute(
      folder / name,
      model,
      variables,
      split,
      cuts[name],
      mesh,
      with_tokens=with_tokens,
      clips_per_batch=config.batch_size,
      num_threads=dataset.num_threads,
    )
    for name, split in splits.items()
  }
  rows = all_rows = np.arange(len(found['train'].labels))
  choice = found.get('validation', found['train'])
  choice_rows = np.arange(len(choice.labels))
  if 'validation' not in splits:
    rows, choice_rows = _hold_out(found['train'].labels, config.seed)
    if not len(choice_rows):
      raise UserError(
        f'{train.folder}: split {train.split!r} has one video of each class, '
        'none of which can be held out; expected at least two videos of a '
        'class, or another config.dataset.validation_split'
      )
    _LOG.info(
      'held out %d of %d training videos, to choose by',
      len(choice_rows),
      len(all_rows),
    )
  data = Data(
    found['train'],
    rows,
    choice,
    choice_rows,
    all_rows,
    found['test'],
    train.class_names,
    dataset.multi_label,
  )
  return data, splits['test']


def _hold_out(
  labels: Num[np.ndarray, ' n'] | Num[np.ndarray, 'n k'], seed: int
) -> tuple[Int[np.ndarray, ' m'], Int[np.ndarray, ' h']]:
  """Returns the videos to train on, and a fifth of each class to choose by."""
  if labels.ndim == 2:  # several labels per video: a fifth of all
    labels = np.zeros(len(labels), np.int32)
  order = np.random.default_rng(seed).permutation(len(labels))
  held_out = []
  for label in np.unique(labels):
    members = order[labels[order] == label]
    if len(members) > 1:
      held_out.append(members[: max(1, round(_HELD_OUT * len(members)))])
  chosen = np.concatenate([order[:0], *held_out])
  return np.setdiff1d(order, chosen), np.sort(chosen)


def _quality(
  scores: np.ndarray, labels: np.ndarray, multi_label: bool
) -> float:
  """Returns the accuracy, or the mAP with several labels per video."""
  return next(iter(metrics.summary(scores, labels, multi_label).values()))


def _probe_neighbors(data: Data) -> Probe:
  """Chooses the number of nearest neighbors, and tests it."""
  one_hot = np.eye(len(data.class_names))

  def score(rows: np.ndarray, tested: Features, k: int, which: Any) -> float:
    train, labels = data.train.pooled[rows].mean(1), data.train.labels[rows]
    scores = neighbors.scores(
      train,
      labels if data.multi_label else one_hot[labels],
      tested.pooled[which].mean(1),
      k,
    )
    return _quality(scores, tested.labels[which], data.multi_label)

  options = [k for k in neighbors.NUMBERS if k <= len(data.train_rows)]
  choice = {
    k: score(data.train_rows, data.choice, k, data.choice_rows) for k in options
  }
  best = max(options, key=lambda k: choice[k])
  test = score(data.all_rows, data.test, best, slice(None))
  return Probe('nearest neighbors', {'k': best}, choice[best], test)


def _probe_head(model: DualFormer, data: Data, seed: int) -> Probe:
  """Trains the heads of a kind, chooses one, and tests it."""
  kind, multi_label = model.head, data.multi_label
  # Plain operations, which vmap can transform.
  plain = model.clone(kernels='reference', dtype='float32').make_head()
  pooled = data.train.pooled[data.all_rows].reshape(-1, model.embed_dims[-1])
  mean, std = pooled.mean(axis=0), pooled.std(axis=0) + 1e-6
  train = heads.Inputs(kind, data.train, mean, std)
  settings = heads.GRIDS[kind]
  options: dict[str, Any] = dict(seed=seed, multi_label=multi_label)
  params = heads.fit(plain, train, data.train_rows, settings, **options)
  choice = heads.Inputs(kind, data.choice, mean, std)
  loss = heads.validate(plain, params, choice, data.choice_rows, multi_label)
  best = int(np.argmin(loss))
  params = jax.tree.map(lambda x: x[best : best + 1], params)
  scores = _all_logits(plain, params, choice, data.choice_rows)
  quality = _quality(
    metrics.mean_probabilities(scores, multi_label),
    data.choice.labels[data.choice_rows],
    multi_label,
  )
  if len(data.all_rows) > len(data.train_rows):
    only = settings[best : best + 1]
    params = heads.fit(plain, train, data.all_rows, only, **options)
  if kind == 'linear':  # the model does not standardize
    kernel = params['fc_cls']['kernel'] / std[:, None]
    bias = params['fc_cls']['bias'] - mean @ kernel
    params = {'fc_cls': {'kernel': kernel, 'bias': bias}}
  # As the saved model computes them.
  test = heads.Inputs(kind, data.test, 0 * mean, 1 + 0 * std)
  logits = _all_logits(
    model.make_head(), params, test, np.arange(len(data.test.labels))
  )
  return Probe(
    kind,
    dict(zip(('learning_rate', 'weight_decay'), settings[best], strict=True)),
    quality,
    _quality(
      metrics.mean_probabilities(logits, multi_label),
      data.test.labels,
      multi_label,
    ),
    float(loss[best]),
    logits,
    jax.tree.map(lambda x: x[0], params),
  )


def _all_logits(
  head: nn.Module, params: Any, inputs: heads.Inputs, rows: np.ndarray
) -> Float[np.ndarray, 'n v k']:
  """Returns the logits of all views of videos for one setting."""
  batches = heads.logits(head, params, inputs, rows)
  return np.concatenate([batch[0] for batch in batches])


def _table(probes: Sequence[Probe], best: Probe) -> str:
  """Returns the results as a table."""
  lines = [f'{"probe":20}{"validation":>12}{"test":>8}  chosen']
  for probe in probes:
    setting = ', '.join(f'{n} {value:g}' for n, value in probe.setting.items())
    lines.append(
      f'{probe.kind:20}{probe.choice:12.1%}{probe.test:8.1%}  '
      f'{setting.replace("_", " ")}{" (saved)" if probe is best else ""}'
    )
  return '\n'.join(lines)
