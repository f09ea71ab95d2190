"""Scores every video of a split, once, with all its views."""

from collections.abc import Callable, Iterable
import dataclasses
import json
import logging
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, Num
import numpy as np

from dualformer_jax.training import sharding

_SECONDS_BETWEEN_LINES = 10
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a model says of the videos of a split.

  Attributes:
    logits: class scores of each view of each video that could be read.
    labels: class, or 0s and 1s, of each of these.
    video_ids: the name of each of these.
    places: where in the dataset each of these is.
    failed: [name, reason] of each video that could not be read. They are
      left out of the scores: none is replaced by another.
  """

  logits: Float[np.ndarray, 'v n k']
  labels: Num[np.ndarray, ' v'] | Num[np.ndarray, 'v k']
  video_ids: list[str]
  places: Int[np.ndarray, ' v']
  failed: list[list[str]]


def score_videos(
  batches: Iterable[dict[str, Any]],
  num_batches: int,
  eval_step: Callable[..., jax.Array],
  variables: Any,
  mesh: jax.sharding.Mesh,
  *,
  should_stop: Callable[[], bool] = lambda: False,
) -> Scores | None:
  """Returns the scores of all videos, the same on every host.

  Args:
    batches: this host's rows, as test_loader makes them.
    num_batches: how many there are, for the time left.
    eval_step: (variables, views) -> logits of each view, on all devices.
    variables: parameters and BatchNorm statistics.
    mesh: the devices.
    should_stop: asked after each batch; the same on every host.

  Returns:
    The scores; None if `should_stop` said so first.
  """
  logits, labels, masks = [], [], []
  # [place in the dataset, name, why it failed or None] of this host's videos.
  names: list[list[Any]] = []
  start = last_line = time.monotonic()
  for done, batch in enumerate(batches, 1):
    arrays = sharding.put_batch(
      {name: batch[name] for name in ('views', 'labels', 'mask')}, mesh
    )
    scores = np.asarray(eval_step(variables, arrays['views']))
    mask = _gather(arrays['mask'])
    masks.append(mask)
    logits.append(scores[mask])
    labels.append(_gather(arrays['labels'])[mask])
    reasons = iter(batch['failed'])
    for row, name, is_scored in zip(
      sharding.host_rows(mesh, len(mask)),
      batch['video_ids'],
      batch['mask'],
      strict=True,
    ):
      if name:
        reason = None if is_scored else next(reasons)[1]
        names.append([(done - 1) * len(mask) + row, name, reason])
    now = time.monotonic()
    if now - last_line > _SECONDS_BETWEEN_LINES or done == num_batches:
      last_line = now
      left = (now - start) / done * (num_batches - done)
      _LOG.info(
        'scored %d of %d batches, %.1f videos/s, %s left',
        done,
        num_batches,
        sum(map(len, labels)) / max(now - start, 1e-9),
        time.strftime('%H:%M:%S', time.gmtime(left)),
      )
    if should_stop():
      return None
  # Of all hosts, of which several may hold the same rows.
  videos = {place: rest for place, *rest in _gather_lists(names)}
  ordered = [videos[place] for place in sorted(videos)]
  return Scores(
    np.concatenate(logits),
    np.concatenate(labels),
    [name for name, reason in ordered if reason is None],
    np.flatnonzero(np.concatenate(masks)),
    [[name, reason] for name, reason in ordered if reason is not None],
  )


def _gather(rows: jax.Array) -> np.ndarray:
  """Returns all rows of an array that is spread over hosts."""
  return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def _gather_lists(items: list[list[Any]]) -> list[list[Any]]:
  """Returns the items of all hosts, in their order."""
  if jax.process_count() == 1:
    return items
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
