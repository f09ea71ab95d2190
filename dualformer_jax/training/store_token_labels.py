"""Scores every token of the training videos with a teacher, and stores it."""

from collections.abc import Callable, Iterator
import functools
import hashlib
import itertools
import logging
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from dualformer_jax import progress
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import forward
from dualformer_jax.files import check_writable
from dualformer_jax.input_pipeline import (
  stored_labels,
  transforms,
  video_reader,
)
from dualformer_jax.input_pipeline.dataset import PreparedDataset, RecordError
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import config_check, setup

# Clips, uint8 [n, t, h, w, 3], and their frame indices, [n, t].
_Video = tuple[np.ndarray, np.ndarray]
_LOG = logging.getLogger(__name__)


def store_labels(
  config: setup.Config,
  teacher: str,
  out: str = '',
  top: int = 5,
  batch_size: int = 8,
) -> None:
  """Stores token labels of the training split; resumes if interrupted.

  Args:
    config: Config of the student, which names the dataset.
    teacher: Checkpoint folder or workdir.
    out: Folder to write; by default DATASET/token_labels/SPLIT.
    top: Number of logits to store of each token; 0 for all.
    batch_size: Number of clips in a batch over all devices.
  """
  config_check.check(config)
  data = setup.open_split(config, config.dataset.train_split)
  variables, metadata = setup.load_model(teacher, data)
  num_classes = len(data.class_names)
  default = data.folder / 'token_labels' / data.split
  folder = pathlib.Path(out or default).expanduser()
  meta = {
    'dataset': data.fingerprint,
    'teacher': _digest(variables),
    'top': min(top, num_classes) or num_classes,
    'num_classes': num_classes,
  }
  found = stored_labels.read_meta(folder)
  if found and any(found.get(n) != v for n, v in meta.items()):
    raise UserError(
      f'{folder} has token labels of another teacher, dataset or --top; nothing'
      ' was changed: remove it, or set another --out'
    )
  if found and found.get('complete'):
    _LOG.info('%s is complete already', folder)
    return
  check_writable(folder / 'new')
  folder.mkdir(parents=True, exist_ok=True)
  stored_labels.write_meta(folder, meta)

  paths = stored_labels.file_paths(folder, len(data))
  first_file = [*(path.exists() for path in paths), False].index(False)
  first_video = min(first_file * stored_labels.VIDEOS_PER_FILE, len(data))
  if first_file:
    _LOG.info('resuming after %d of %d videos', first_video, len(data))
  num_threads = config.dataset.num_threads
  videos = _read(data, metadata.preprocessing, first_video, num_threads)
  model = metadata.build_model(dtype=config.token_labels.dtype)
  score_batch = _make_score_batch(
    model, variables, metadata.preprocessing, meta['top'], batch_size
  )
  shares = []
  num_videos = len(data) - first_video
  scored = _score_videos(videos, score_batch, batch_size)
  scored = progress.track(scored, 'Scoring tokens', num_videos, 'videos')
  missing = iter(paths[first_file:])
  while part := list(itertools.islice(scored, stored_labels.VIDEOS_PER_FILE)):
    stored_labels.write_file(next(missing), [labels for labels, _ in part])
    shares += itertools.chain.from_iterable(share for _, share in part)
  stored_labels.write_meta(folder, {**meta, 'complete': True})
  _LOG.info(
    'token labels of %d videos (%d could not be read); the stored classes hold '
    "%.1f%% of a token's probability on average; train with "
    '--config.token_labels.stored=%s',
    len(data),
    num_videos - len(shares),
    100 * np.mean(shares or np.nan),
    folder,
  )


def _read(
  data: PreparedDataset,
  p: transforms.Preprocessing,
  first: int,
  num_threads: int,
) -> Iterator[_Video]:
  """Yields the videos from `first` on, whole frames squeezed to a square."""
  size = p.image_size
  squeeze = functools.partial(transforms.resize, height=size, width=size)

  def read(index: int) -> _Video:
    name = f'record {index}'
    try:
      example = data[index]
      name = example.video_id
      with video_reader.VideoReader(example.video) as reader:
        indices = stored_labels.label_clip_indices(p, len(reader))
        frames = reader.get_frames(indices.ravel() % len(reader), squeeze)
    except (video_reader.VideoError, RecordError) as error:
      _LOG.warning('cannot be read: %s: %s', name, error)
      nothing = np.zeros((0, p.num_frames), np.int64)
      return nothing, nothing
    return frames.reshape(*indices.shape, *frames.shape[1:]), indices

  if first == len(data):
    return iter(())
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=num_threads
  )
  indices: Any = grain.MapDataset.range(first, len(data))
  return iter(indices.map(read).to_iter_dataset(options))


def _make_score_batch(
  model: DualFormer,
  variables: Any,
  p: transforms.Preprocessing,
  top: int,
  batch_size: int,
) -> Callable[[np.ndarray], list[np.ndarray]]:
  """Returns (clips) -> top logits, their classes, their total probability."""
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1}, batch_size)
  jax.set_mesh(mesh)
  variables = jax.device_put(
    variables, sharding.tree_shardings(variables, mesh)
  )

  @jax.jit
  def score(variables, clips):
    normalized = forward.normalize(clips, p.pixel_mean, p.pixel_std)
    output: Any = model.apply(variables, normalized, score_tokens=True)
    logits = output.token_logits
    values, classes = jax.lax.top_k(logits, top)
    shares = jax.nn.logsumexp(values, -1) - jax.nn.logsumexp(logits, -1)
    return values, classes, jnp.exp(shares)

  def score_batch(clips: np.ndarray) -> list[np.ndarray]:
    batch = sharding.put_batch({'clips': clips}, mesh)
    return [np.asarray(part) for part in score(variables, batch['clips'])]

  return score_batch


def _score_videos(
  videos: Iterator[_Video],
  score_batch: Callable[[np.ndarray], list[np.ndarray]],
  batch_size: int,
) -> Iterator[tuple[stored_labels.VideoLabels, list[float]]]:
  """Yields the labels of each video, which are empty if it cannot be read.

  With them a list of one number, the mean share of a token's probability that
  the labels have; empty as well. Batches can have clips of several videos: all
  have the size that is compiled.
  """
  videos, ahead = itertools.tee(videos)
  clips = itertools.chain.from_iterable(clips for clips, _ in ahead)

  def score_all() -> Iterator[Any]:
    while batch := list(itertools.islice(clips, batch_size)):
      padding = [np.zeros_like(batch[0])] * (batch_size - len(batch))
      parts = score_batch(np.stack(batch + padding))
      yield from itertools.islice(zip(*parts, strict=True), len(batch))

  scores = score_all()
  for video_clips, indices in videos:
    values = classes = np.zeros((0, 1, 1, 1))
    share = []
    if of_clips := list(itertools.islice(scores, len(video_clips))):
      values, classes, shares = map(np.concatenate, zip(*of_clips, strict=True))
      share = [float(np.mean(shares))]
    labels = stored_labels.VideoLabels(
      indices[:, ::2].ravel(),  # a token has two frames
      values.astype(np.float32),
      classes.astype(np.uint16),
    )
    yield labels, share


def _digest(variables: Any) -> str:
  """Returns a hash that identifies a teacher."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(variables):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:16]
