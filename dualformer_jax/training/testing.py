"""Testing: scores the test split with all views, and writes the report."""

import copy
import dataclasses
import datetime
import logging
import os
import pathlib
import time
from typing import Any

import jax

from dualformer_jax import store_client
from dualformer_jax.checkpoints import checkpoint, stored_folder
from dualformer_jax.distributed import processes, sharding
from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import forward, metrics, scoring
from dualformer_jax.evaluation import report as reports
from dualformer_jax.evaluation import result as results
from dualformer_jax.files import check_writable
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models import flops
from dualformer_jax.training import config_check, setup
from dualformer_jax.training.logging import MetricWriter, format_metrics

_LOG = logging.getLogger(__name__)


def make_scorer(
  config: setup.Config, model: Any, mesh: jax.sharding.Mesh
) -> scoring.Scorer:
  """Returns the scorer of a model with the normalization of a config."""
  p = setup.make_preprocessing(config)
  return scoring.Scorer(
    forward.make_eval_step(model, p.pixel_mean, p.pixel_std, mesh),
    mesh,
    clips_per_batch=config.batch_size,
    num_threads=config.dataset.num_threads,
  )


def adapt_config(
  config: setup.Config, metadata: checkpoint.CheckpointMetadata
) -> setup.Config:
  """Returns a copy with the model and the preprocessing of a checkpoint."""
  config, saved = copy.deepcopy(config), metadata.preprocessing
  with config.unlocked():
    config.model.update(metadata.model)
  config.dataset.update(
    frame_interval=saved.frame_interval,
    sampling=saved.sampling,
    pixel_mean=saved.pixel_mean,
    pixel_std=saved.pixel_std,
  )
  return config


def find_checkpoint(
  config: setup.Config, path: str | os.PathLike[str]
) -> pathlib.Path:
  """Returns the checkpoint to test, as checkpoint.find.

  For a workdir it is the best one if config.test.checkpoint is 'best' or early
  stopping is on, else the latest.
  """
  if config.test.checkpoint == 'best' or config.validation.patience:
    kinds = checkpoint.BEST, checkpoint.LATEST
    path = stored_folder.local_path(path, kinds).absolute()
    if folder := checkpoint.latest_of(path / checkpoint.BEST):
      return folder
  return checkpoint.find(path)


def test(
  config: setup.Config,
  workdir: str | os.PathLike[str],
  compare: str = '',
  *,
  recipe: str = '',
  folder: pathlib.Path | None = None,
  start: float | None = None,
  writer: MetricWriter | None = None,
) -> dict[str, Any]:
  """Tests a checkpoint, writes the report and returns it.

  Model and preprocessing are those of the checkpoint, videos and views those of
  the config. report.json, report.html and views.npz are written to the workdir.

  Args:
    config: Config of the dataset and the views.
    workdir: Folder of the report.
    compare: Another workdir, or its report.json, to compare with. If it is of
      other videos, UserError is raised after the report is written.
    recipe: Name of the config file, for the report.
    folder: Checkpoint; by default that of the workdir, or of config.init_from
      if the workdir has none.
    start: When the run began, by time.monotonic.
    writer: Where to write the scores and, for trackers, the report.
  """
  config_check.check(config)
  start = start or time.monotonic()
  workdir = pathlib.Path(workdir).expanduser().absolute()
  if folder is None:
    is_trained = checkpoint.latest_of(workdir / checkpoint.LATEST) is not None
    if not is_trained and not config.init_from:
      raise UserError(
        f'{workdir}: has no checkpoint to test; train there first, or name a'
        ' checkpoint with --config.init_from'
      )
    folder = find_checkpoint(
      config, workdir if is_trained else config.init_from
    )
  check_writable(workdir / 'report.json')
  data = setup.open_split(config, config.dataset.test_split)
  variables, metadata = setup.load_model(folder, data)
  # Read before the videos are scored, which can take hours.
  other = results.read(compare, data.class_names) if compare else None
  config = adapt_config(config, metadata)
  sha256 = checkpoint.variables_hash(variables)
  mesh = sharding.make_mesh(config.mesh.to_dict(), config.batch_size)
  jax.set_mesh(mesh)
  model: Any = metadata.build_model(dtype=config.model.dtype)
  variables = sharding.put_tree(
    variables, sharding.tree_shardings(variables, mesh)
  )
  p = setup.make_preprocessing(config, config.test)
  kind = 'best' if folder.parent.name == checkpoint.BEST else 'latest'
  _LOG.info(
    'testing the %s checkpoint, %s, on %d videos',
    kind,
    store_client.shown(folder),
    len(data),
  )
  scorer = make_scorer(config, model, mesh)
  scores = scoring.score_split(scorer, variables, data, p)
  assert scores is not None
  tested = Tested(config, model, p, data, folder, kind, sha256, metadata.step)
  return write_report(
    tested, scores, workdir, start, other, writer, recipe=recipe
  )


@dataclasses.dataclass(frozen=True)
class Tested:
  """What was tested: a model with its config, its views and the videos.

  `folder` is that of the checkpoint, `kind` is which of its run, such as
  'best', and `sha256` is the hash of its variables.
  """

  config: setup.Config
  model: Any
  preprocessing: Preprocessing
  data: PreparedDataset
  folder: pathlib.Path
  kind: str
  sha256: str
  step: int = 0


def write_report(
  tested: Tested,
  scores: scoring.Scores,
  workdir: pathlib.Path,
  start: float,
  other: results.Result | None = None,
  writer: MetricWriter | None = None,
  **more: Any,
) -> dict[str, Any]:
  """Writes report.json, report.html and views.npz, and returns the report.

  Args:
    tested: What was tested.
    scores: The scores of the videos.
    workdir: Folder of the report.
    start: When the run began, by time.monotonic.
    other: Result of another test, to compare with. If it is of other videos,
      UserError is raised after the report is written.
    writer: Where to write the scores and, for trackers, the report.
    **more: More fields of the report.
  """
  config, p, data = tested.config, tested.preprocessing, tested.data
  result = results.Result(
    scores.logits,
    scores.labels,
    scores.video_ids,
    data.class_names,
    p.num_clips,
    store_client.shown(workdir),
  )
  summary = metrics.summary(
    result.probabilities(), scores.labels, config.dataset.multi_label
  )
  rows = flops.count(tested.model)
  multiply_adds = sum(
    row.multiply_adds for row in rows if row.part != flops.TOKEN_HEAD
  )
  report = {
    **summary,
    'num_videos': len(scores.labels),
    'failed_videos': [
      {'video': video, 'reason': reason} for video, reason in scores.failed
    ],
    'views': {'num_clips': p.num_clips, 'num_crops': p.num_crops},
    **reports.details(result, multiply_adds / 1e9),
    'checkpoint': store_client.shown(tested.folder),
    'checkpoint_kind': tested.kind,
    'checkpoint_sha256': tested.sha256,
    'training': _training_record(tested.folder),
    'dataset': {
      'folder': str(data.folder),
      'split': data.split,
      'fingerprint': data.read_report('fingerprint', data.fingerprint),
    },
    'config': config.to_dict(),
    'hardware': processes.hardware(),
    'time': {
      'finished': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
      'seconds': round(time.monotonic() - start, 1),
    },
    **more,
  }
  mismatch = None
  if other is not None:
    try:
      report['comparison'] = reports.compare(result, other)
      _LOG.info('%s', report['comparison']['in_words'])
    except UserError as error:
      mismatch = error  # raised once the report is written
  if jax.process_index() == 0:
    figures = {n: v for n, v in report.items() if isinstance(v, float)}
    mistakes = reports.write(workdir, report, result, data, scores.indices)
    if writer is not None:
      writer.write(tested.step, 'test', figures)
      writer.write_report(tested.step, mistakes)
    _LOG.info(
      'test of the %s checkpoint: %s  (%s) on %d videos, %d failed; report: %s',
      tested.kind,
      format_metrics(figures),
      setup.describe_views(p, p.image_size),
      len(scores.labels),
      len(scores.failed),
      store_client.shown(workdir / 'report.json'),
    )
  if mismatch is not None:
    raise mismatch
  return report


def _training_record(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns hours, hardware and config of training; None if converted.

  The best checkpoint of a run has those of the latest one.
  """
  latest = checkpoint.latest_of(folder.parent.parent / checkpoint.LATEST)
  metadata = checkpoint.read_metadata(latest or folder)
  if metadata.config is None:
    return None
  record = metadata.training or {'hours': None, 'hardware': None}
  return {**record, 'config': metadata.config}
