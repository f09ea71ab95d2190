"""Scores every video of a split, once, with all its views."""

from collections.abc import Callable
import dataclasses
import json
import logging
from typing import Any

import jax
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, Num
import numpy as np

from dualformer_jax import progress
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import loader
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.transforms import Preprocessing

_LOG = logging.getLogger(__name__)
_compiled: set[tuple[Any, ...]] = set()  # steps and shapes of views


@dataclasses.dataclass(frozen=True)
class Scorer:
  """An evaluation step with its mesh and input settings.

  A batch has at most `clips_per_batch` views over all devices, but at least one
  video for each device.
  """

  eval_step: Callable[..., jax.Array]
  mesh: jax.sharding.Mesh
  clips_per_batch: int
  num_threads: int


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of the videos that could be read, the same on all hosts.

  `indices` are those of these videos in the dataset; `failed` has the id and
  the reason of each video that could not be read.
  """

  logits: Float[np.ndarray, 'n v k']
  labels: Num[np.ndarray, ' n'] | Num[np.ndarray, 'n k']
  video_ids: list[str]
  indices: Int[np.ndarray, ' n']
  failed: list[tuple[str, str]]


def score_split(
  scorer: Scorer,
  variables: Any,
  data: PreparedDataset,
  preprocessing: Preprocessing,
  *,
  short_side: int | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> Scores | None:
  """Scores the videos of a split; returns None if `should_stop` returns True.

  Frames are resized to `short_side`, by default image_size, before the crops.
  `should_stop` is called after each batch; its result is the same on all hosts.

  Raises:
    UserError: no video could be read.
  """
  mesh = scorer.mesh
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  num_views = preprocessing.num_clips * preprocessing.num_crops
  batch_size = shards * max(1, scorer.clips_per_batch // (num_views * shards))
  local_indices = sharding.local_batch_indices(mesh, batch_size)
  batches = loader.EvalLoader(
    data,
    preprocessing,
    batch_size,
    local_indices,
    num_threads=scorer.num_threads,
    short_side=short_side,
  )
  logits, labels, masks = [], [], []
  # (index in the dataset, id, reason of failure or '') of this host's videos
  videos: list[tuple[int, str, str]] = []
  with progress.counting(f'Scoring {data.split}', len(data), 'videos') as add:
    for number, batch in enumerate(batches):
      first = number * batch_size
      names = ('views', 'labels', 'mask')
      arrays = sharding.put_batch({name: batch[name] for name in names}, mesh)
      if (program := (scorer.eval_step, batch['views'].shape)) not in _compiled:
        _compiled.add(program)
        _LOG.info('compiling the evaluation')
      scores = np.asarray(scorer.eval_step(variables, arrays.pop('views')))
      rows = multihost_utils.process_allgather(arrays, tiled=True)
      masks.append(rows['mask'])
      logits.append(scores[rows['mask']])
      labels.append(rows['labels'][rows['mask']])
      reasons = dict(batch['failed'])
      for index, video_id in zip(
        local_indices, batch['video_ids'], strict=True
      ):
        if video_id:
          videos.append((first + index, video_id, reasons.get(video_id, '')))
      add(min(batch_size, len(data) - first))
      if should_stop():
        return None
  # Several hosts can have the same videos.
  unique = {index: rest for index, *rest in _gather_lists(videos)}
  ordered = [rest for _, rest in sorted(unique.items())]
  failed = [(name, reason) for name, reason in ordered if reason]
  indices = np.flatnonzero(np.concatenate(masks))
  if not len(indices):
    raise UserError(
      f'{data.folder}: none of the {len(failed)} videos of split '
      f'{data.split!r} could be read; the first: {": ".join(failed[0])}'
    )
  return Scores(
    np.concatenate(logits),
    np.concatenate(labels),
    [name for name, reason in ordered if not reason],
    indices,
    failed,
  )


def _gather_lists(items: list[Any]) -> list[Any]:
  """Returns the items of all hosts; they must be JSON."""
  data = np.frombuffer(json.dumps(items).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(data.size))
  padded = np.zeros(int(np.max(sizes)), np.uint8)
  padded[: data.size] = data
  gathered = np.asarray(multihost_utils.process_allgather(padded))
  return [
    item
    for row, size in zip(gathered, np.ravel(sizes), strict=True)
    for item in json.loads(row[:size].tobytes())
  ]
