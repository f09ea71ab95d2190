r"""Stores what a teacher says of every token of a dataset's videos, once.

  python -m dualformer_jax.token_labels --checkpoint=TEACHER \
    --config=configs/k400_tiny_tokenlabel.py --config.dataset.data_dir=DATA

Training with --config.token_labels.stored then needs no teacher beside it. Each
video is scored all along, its whole frames squeezed to a square; the highest
scores of each token are kept. An interrupted run goes on where it was.
"""

import collections
from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import itertools
import logging
import pathlib
import time
from typing import Any

from absl import flags
import grain
import jax
from jaxtyping import Int, UInt8
from ml_collections import config_flags
import numpy as np

from dualformer_jax import command_line
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import (
  decoding,
  records,
  stored_labels,
  views,
)
from dualformer_jax.training import augment, checkpoint, loop, sharding

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'The teacher: a checkpoint folder, or a workdir.'
)
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe of the student, which says what the dataset is.'
)
_OUT = flags.DEFINE_string(
  'out', '', 'Where to; DATASET/token_labels/SPLIT unless given.'
)
_TOP = flags.DEFINE_integer(
  'top', 5, 'How many scores to keep of each token; 0 for all.', 0
)
_CLIPS = flags.DEFINE_integer(
  'clips', 8, 'How many clips to score at a time, over all devices.', 1
)

_SECONDS_BETWEEN_LINES = 10
_LOG = logging.getLogger('dualformer_jax.token_labels')


@dataclasses.dataclass(frozen=True)
class _Video:
  """The clips of a video, or why there are none."""

  clips: UInt8[np.ndarray, 'n t h w 3']
  times: Int[np.ndarray, 'n frames']
  failure: str = ''


@dataclasses.dataclass(frozen=True)
class _Videos:
  """The videos of a split from one on, as Grain reads them."""

  data: records.PreparedDataset
  preprocessing: views.Preprocessing
  first: int

  def __len__(self) -> int:
    return len(self.data) - self.first

  def __getitem__(self, index: int) -> _Video:
    p = self.preprocessing
    times: list[Int[np.ndarray, 'n frames']] = []

    def pick(total: int) -> Int[np.ndarray, ' picked']:
      times[:] = [stored_labels.clips_of(p, total)]
      return times[0].ravel() % total

    name = f'record {self.first + index}'
    try:
      example = self.data[self.first + index]
      name = example.video_id
      frames = decoding.decode_frames(
        example.video,
        pick,
        lambda frame: views.resize_to(frame[None], p.image_size)[0],
      )
    except (decoding.VideoError, records.RecordError) as error:
      shape = (0, p.num_frames, p.image_size, p.image_size, 3)
      return _Video(
        np.zeros(shape, np.uint8),
        np.zeros((0, p.num_frames), np.int64),
        f'{name}: {error}',
      )
    return _Video(frames.reshape(*times[0].shape, *frames.shape[1:]), times[0])


def store(
  teacher: str, config: Any, out: str = '', top: int = 5, clips: int = 8
) -> pathlib.Path:
  """Scores the training split of a config's dataset; returns the folder.

  Args:
    teacher: a checkpoint folder or workdir.
    config: as configs/common.py has it.
    out: where to; '' for a place beside the dataset.
    top: how many scores to keep of each token; 0 for all.
    clips: how many to score at a time, over all devices.

  Raises:
    UserError: teacher, dataset and what is there already do not fit.
  """
  data = loop.open_split(config, config.dataset.train_split)
  variables, description = checkpoint.load_model(teacher)
  if description.class_names != data.class_names:
    raise UserError(
      f'{teacher} knows other classes than {data.folder}; expected the same in '
      'the same order'
    )
  num_classes = len(data.class_names)
  folder = pathlib.Path(out).expanduser() if out else (
    data.folder / 'token_labels' / data.split
  )  # fmt: skip
  meta = {
    'dataset': data.fingerprint,
    'teacher': _digest(variables),
    'top': min(top, num_classes) or num_classes,
    'num_classes': num_classes,
  }
  found = stored_labels.read_meta(folder)
  if found is not None and any(found.get(n) != v for n, v in meta.items()):
    raise UserError(
      f'{folder} holds token labels of another teacher, dataset or --top; '
      'nothing was changed: remove it, or choose another --out'
    )
  if found is not None and found.get('complete'):
    _LOG.info('%s is complete already', folder)
    return folder
  folder.mkdir(parents=True, exist_ok=True)
  stored_labels.write_meta(folder, meta)

  model = description.build_model(dtype=config.token_labels.dtype)
  p = description.preprocessing
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1}, clips)
  jax.set_mesh(mesh)
  variables = jax.device_put(
    variables, sharding.tree_shardings(variables, mesh)
  )

  @jax.jit
  def score(variables, batch):
    normalized = augment.normalize(batch, p.pixel_mean, p.pixel_std)
    output: Any = model.apply(variables, normalized, score_tokens=True)
    values, classes = jax.lax.top_k(output.token_logits, meta['top'])
    shares = jax.nn.logsumexp(values, -1) - jax.nn.logsumexp(
      output.token_logits, -1
    )
    return values, classes, jax.numpy.exp(shares)

  def score_batch(batch: np.ndarray) -> list[np.ndarray]:
    placed = sharding.put_batch({'clips': batch}, mesh)['clips']
    return [np.asarray(part) for part in score(variables, placed)]

  files = stored_labels.number_of_files(len(data))
  done = next(
    (i for i in range(files) if not stored_labels.path_of(folder, i).exists()),
    files,
  )
  first = done * stored_labels.VIDEOS_PER_FILE
  if done:
    _LOG.info('%d of %d videos were scored before', first, len(data))
  failed, share = _write_rest(
    folder, done, _Videos(data, p, first), score_batch, clips, config
  )
  stored_labels.write_meta(folder, {**meta, 'complete': True})
  _LOG.info(
    'token labels of %d videos in %s, %d could not be read; the %d scores that '
    'are kept of each token are %.1f%% of its probability; train with '
    '--config.token_labels.stored=%s',
    len(data),
    folder,
    failed,
    meta['top'],
    100 * share,
    folder,
  )
  return folder


def _write_rest(
  folder: pathlib.Path,
  done: int,
  videos: _Videos,
  score_batch: Callable[[np.ndarray], list[np.ndarray]],
  batch_size: int,
  config: Any,
) -> tuple[int, float]:
  """Writes the files from number `done` on.

  Returns:
    How many videos failed, and the mean share of the probability that is kept.
  """
  threads = config.dataset.num_threads
  source: Any = grain.MapDataset.source(videos)
  iterator = iter(
    source.to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if len(videos)
    else ()
  )
  failed = 0
  shares: list[float] = []
  labels: list[stored_labels.VideoLabels] = []
  start = last_line = time.monotonic()
  scored = _scored(iterator, score_batch, batch_size)
  for count, (video, parts) in enumerate(scored, 1):
    if video.failure:
      failed += 1
      _LOG.warning('not scored: %s', video.failure)
    else:
      shares.append(float(np.mean([part[2] for part in parts])))
    labels.append(_labels_of(video, parts))
    if len(labels) == stored_labels.VIDEOS_PER_FILE or count == len(videos):
      stored_labels.write_file(folder, done, labels)
      labels, done = [], done + 1
    now = time.monotonic()
    if now - last_line > _SECONDS_BETWEEN_LINES or count == len(videos):
      last_line = now
      rate = count / max(now - start, 1e-9)
      left = (len(videos) - count) / rate
      _LOG.info(
        'scored %d of %d videos, %.1f videos/s, %s left',
        count,
        len(videos),
        rate,
        time.strftime('%H:%M:%S', time.gmtime(left)),
      )
  return failed, float(np.mean(shares)) if shares else float('nan')


def _scored(
  videos: Iterator[_Video],
  score_batch: Callable[[np.ndarray], list[np.ndarray]],
  batch_size: int,
) -> Iterator[tuple[_Video, list[list[np.ndarray]]]]:
  """Yields each video with what was said of each of its clips.

  Batches have one size, as each size is compiled, and hold clips of several
  videos.
  """
  waiting: collections.deque[tuple[_Video, list[list[np.ndarray]]]]
  waiting, clips = collections.deque(), collections.deque[np.ndarray]()

  def score() -> None:
    batch = [clips.popleft() for _ in range(min(batch_size, len(clips)))]
    missing = [np.zeros_like(batch[0])] * (batch_size - len(batch))
    scores = score_batch(np.stack(batch + missing))
    rows = ([part[i] for part in scores] for i in range(len(batch)))
    for video, parts in waiting:
      while len(parts) < len(video.clips) and (row := next(rows, None)):
        parts.append(row)

  for video in itertools.chain(videos, [None]):
    if video is not None:
      waiting.append((video, []))
      clips.extend(video.clips)
    while len(clips) >= (batch_size if video is not None else 1):
      score()
    while waiting and len(waiting[0][1]) == len(waiting[0][0].clips):
      yield waiting.popleft()


def _labels_of(
  video: _Video, parts: list[list[np.ndarray]]
) -> stored_labels.VideoLabels:
  """Returns what is stored of a video."""
  if not parts:
    empty = np.zeros((0, 1, 1, 1))
    return stored_labels.VideoLabels(
      np.zeros(0, np.int32), empty.astype('f4'), empty.astype('u2')
    )
  return stored_labels.VideoLabels(
    # The first of the two frames that a token stands for.
    video.times[:, ::2].ravel(),
    np.concatenate([values for values, _, _ in parts]).astype(np.float32),
    np.concatenate([classes for _, classes, _ in parts]).astype(np.uint16),
  )


def _digest(variables: Any) -> str:
  """Tells one teacher from another."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(variables):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def main() -> None:
  """Scores what the flags name."""
  teacher = _CHECKPOINT.value
  assert teacher is not None  # cli requires it
  store(teacher, _CONFIG.value, _OUT.value, _TOP.value, _CLIPS.value)


def cli() -> None:
  """Runs the command."""
  flags.mark_flags_as_required(['config', 'checkpoint'])
  command_line.run(main)


if __name__ == '__main__':
  cli()
