"""Features of a frozen backbone: computed once, stored, and read by index.

The folder of a split has features.json, which names model, dataset and views,
and files of at most 256 videos each, so an interruption loses little work:
00000.npz has the mean of the tokens of each view, and 00000.npy all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import logging
import pathlib
from typing import IO, Any
import zipfile

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int, Num
import numpy as np

from dualformer_jax import files
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import forward
from dualformer_jax.input_pipeline import loader, transforms
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.progress import counting

_META = 'features.json'
_FORMAT = 1
_MAX_VIDEOS = 256  # of a file
_MAX_BYTES = 2**28  # of a file, which is collected in memory
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainViews:
  """Which clips are cut at random; for the fields see TrainOptions."""

  seed: int
  random_crop: bool
  start_multiple: int
  flip: bool


@dataclasses.dataclass(frozen=True)
class Views:
  """The views that are cut from each video.

  They are those of transforms.eval_views or, with `train`, num_clips random
  training clips.
  """

  preprocessing: transforms.Preprocessing
  short_side: int
  train: TrainViews | None = None

  @property
  def count(self) -> int:
    """The number of views of a video."""
    return self.preprocessing.num_clips * self.preprocessing.num_crops

  def cut_train(self, video: bytes, index: int) -> np.ndarray:
    """Returns the training clips of the video with an index."""
    options = self.train
    assert options is not None
    rngs = [
      np.random.default_rng((options.seed, index, view))
      for view in range(self.count)
    ]
    clips, _ = transforms.train_clips(
      video,
      self.preprocessing,
      rngs,
      short_side=self.short_side,
      random_crop=options.random_crop,
      start_multiple=options.start_multiple,
    )
    return np.stack(
      [
        clip[..., ::-1, :] if options.flip and rng.random() < 0.5 else clip
        for clip, rng in zip(clips, rngs, strict=True)
      ]
    )


@dataclasses.dataclass(frozen=True)
class Features:
  """The features of the videos of a split that could be read, in order.

  Attributes:
    pooled: mean over the tokens of each view.
    token_files: arrays of files, float16 [videos, views, tokens, channels].
    labels: class indices or multi-hot.
    video_ids: names of the videos.
    indices: indices of the videos in the dataset.
    failed: id and reason of each video that could not be read.
  """

  pooled: Float32[np.ndarray, 'n v c']
  token_files: list[np.ndarray]
  labels: Num[np.ndarray, ' n'] | Num[np.ndarray, 'n k']
  video_ids: list[str]
  indices: Int[np.ndarray, ' n']
  failed: list[tuple[str, str]]

  def tokens(
    self, rows: Int[np.ndarray, ' b'], views: Int[np.ndarray, ' b']
  ) -> Float32[np.ndarray, 'b l c']:
    """Reads the tokens of views of videos."""
    ends = np.cumsum([len(array) for array in self.token_files])
    numbers = np.searchsorted(ends, rows, side='right')
    return np.stack(
      [
        self.token_files[number][row - ends[number], view]
        for number, row, view in zip(numbers, rows, views, strict=True)
      ]
    ).astype(np.float32)


def compute(
  folder: pathlib.Path,
  model: DualFormer,
  variables: Any,
  data: PreparedDataset,
  views: Views,
  mesh: jax.sharding.Mesh,
  *,
  with_tokens: bool,
  clips_per_batch: int,
  num_threads: int,
) -> Features:
  """Computes the features of a split, except for those that are stored.

  Raises:
    UserError: the folder has features of something else, or cannot be written;
      or no video can be read.
  """
  body = {n: t['backbone'] for n, t in variables.items() if 'backbone' in t}
  meta = {
    'format': _FORMAT,
    'checkpoint': checkpoint.variables_hash(body),
    'dataset': data.fingerprint,
    'dtype': model.dtype,
    'views': dataclasses.asdict(views),
    'tokens': with_tokens,
  }
  meta = _check_meta(folder, json.loads(json.dumps(meta)))
  num_tokens = int(np.prod(model.token_grid())) if meta['tokens'] else 0
  video_bytes = views.count * model.embed_dims[-1] * (4 + 2 * num_tokens)
  size = max(1, min(_MAX_VIDEOS, _MAX_BYTES // video_bytes))
  paths = [folder / f'{i:05d}.npz' for i in range(-(-len(data) // size))]
  first = [*(path.exists() for path in paths), False].index(False)
  if first < len(paths):
    missing = len(data) - first * size
    files.check_writable(folder / 'new', missing * video_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob('.*.partial'):  # of a process that was killed
      partial.unlink()
    with files.output_file(folder / _META) as file:
      file.write(json.dumps(meta, indent=2).encode())
    _LOG.info(
      'features of %d videos of split %r%s: %.1f MB in %s',
      len(data),
      data.split,
      f', the first {first * size} of which are stored' if first else '',
      len(data) * video_bytes / 1e6,
      folder,
    )
    shards = mesh.shape['data'] * mesh.shape['fsdp']
    batch_size = shards * max(1, clips_per_batch // (views.count * shards))
    encode = _make_encode(model, views.preprocessing, mesh, meta['tokens'])
    body = sharding.put_tree(body, sharding.tree_shardings(body, mesh))
    with (
      jax.set_mesh(mesh),
      counting(f'Encoding {data.split}', missing, 'videos') as add,
    ):
      for number in range(first, len(paths)):
        batches = loader.EvalLoader(
          data,
          views.preprocessing,
          batch_size,
          range(batch_size),
          num_threads=num_threads,
          short_side=views.short_side,
          videos=range(number * size, min((number + 1) * size, len(data))),
          cut_views=views.cut_train if views.train else None,
        )
        _write(paths[number], batches, encode, body, add)
  return _read(folder, paths, data, meta['tokens'])


def _check_meta(folder: pathlib.Path, meta: dict[str, Any]) -> dict[str, Any]:
  """Raises a UserError if a folder has other features; returns their metadata.

  Stored tokens need not be used.
  """
  try:
    found = json.loads((folder / _META).read_text('utf-8'))
    found = {name: found[name] for name in meta}
  except FileNotFoundError:
    return meta
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise _damaged(folder / _META, error) from error
  meta['tokens'] |= found['tokens']
  names = {'dtype': 'model dtype', 'tokens': '--head (tokens are missing)'}
  others = [names.get(n, n) for n in meta if meta[n] != found[n]]
  if others:
    raise UserError(
      f'{folder} has features of another {", ".join(others)}; nothing was '
      'changed: remove it to compute them again, or set another --features'
    )
  return meta


def _make_encode(
  model: DualFormer,
  p: transforms.Preprocessing,
  mesh: jax.sharding.Mesh,
  with_tokens: bool,
) -> Callable[..., tuple[jax.Array, ...]]:
  """Returns (variables, views) -> pooled [b, v, c], tokens [b, v, l, c]."""
  backbone: Any = model.make_backbone()
  all_gather = sharding.all_gather_params(mesh)

  def encode_clips(variables, clips):
    x = forward.normalize(clips, p.pixel_mean, p.pixel_std)
    tokens = backbone.apply(variables, x.astype(model.dtype), False)
    pooled = jnp.mean(tokens, axis=(1, 2, 3), dtype=jnp.float32)
    if not with_tokens:
      return (pooled,)
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    return pooled, tokens.astype(jnp.float16)

  def encode(variables, views):
    variables = all_gather(variables)
    return forward.map_views(lambda x: encode_clips(variables, x), views)

  return jax.jit(
    encode,
    compiler_options=sharding.compiler_options(mesh),
    out_shardings=jax.NamedSharding(mesh, jax.P()),
  )


def _write(
  path: pathlib.Path,
  batches: loader.EvalLoader,
  encode: Callable[..., tuple[jax.Array, ...]],
  variables: Any,
  add: Callable[[float], object],
) -> None:
  """Encodes the videos of a file, and writes it."""
  assert batches.videos is not None
  mesh = jax.tree.leaves(variables)[0].sharding.mesh
  arrays: dict[str, list[np.ndarray]] = {}
  ids, failed, left = [], [], len(batches.videos)
  for batch in batches:
    is_read = batch['mask']
    clips = sharding.put_batch({'views': batch['views']}, mesh)['views']
    outputs = [np.asarray(x)[is_read] for x in encode(variables, clips)]
    start = batches.videos.stop - left
    columns = {
      'labels': batch['labels'][is_read],
      'indices': start + np.flatnonzero(is_read),
      **dict(zip(('pooled', 'tokens'), outputs, strict=False)),
    }
    for name, values in columns.items():
      arrays.setdefault(name, []).append(values)
    pairs = zip(batch['video_ids'], is_read, strict=True)
    ids += [name for name, ok in pairs if ok]
    failed += batch['failed']
    done = min(len(is_read), left)
    left -= done
    add(done)
  whole = {name: np.concatenate(values) for name, values in arrays.items()}
  if not all(np.isfinite(x).all() for x in whole.values()):
    raise UserError(
      'the features are not finite: training diverged or the weights of the '
      'checkpoint are damaged; use another checkpoint'
    )
  if 'tokens' in whole:
    with files.output_file(path.with_suffix('.npy')) as file:
      _write_array(file, whole.pop('tokens'))
  with files.output_file(path) as file:  # last, as it completes the file
    names = {'video_ids': ids, 'failed': [x for pair in failed for x in pair]}
    for name, texts in names.items():
      whole[name] = np.array(texts, np.str_)
    np.savez(file, **whole)  # pyright: ignore[reportArgumentType]


def _write_array(file: IO[bytes], array: np.ndarray) -> None:
  """Writes an .npy file; np.save does not report a full disk."""
  header = np.lib.format.header_data_from_array_1_0(array)
  np.lib.format.write_array_header_1_0(file, header)
  file.write(np.ascontiguousarray(array).data)


def _read(
  folder: pathlib.Path,
  paths: list[pathlib.Path],
  data: PreparedDataset,
  with_tokens: bool,
) -> Features:
  """Opens the files of a split; tokens are read when they are used."""
  parts: list[dict[str, np.ndarray]] = []
  token_files = []
  for path in paths:
    try:
      with open(path, 'rb') as opened, np.load(opened) as arrays:
        parts.append({name: arrays[name] for name in arrays.files})
      if with_tokens:
        tokens: Any = np.load(path.with_suffix('.npy'), mmap_mode='r')
        if len(tokens) != len(parts[-1]['pooled']):
          raise ValueError(f'{path.with_suffix(".npy")} has other videos')
        token_files.append(tokens)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
      raise _damaged(path, error) from error
  arrays = {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
  failed = arrays['failed'].reshape(-1, 2).tolist()
  if not len(arrays['labels']):
    raise UserError(
      f'{data.folder}: none of the {len(failed)} videos of split '
      f'{data.split!r} could be read; the first: {": ".join(failed[0])}'
    )
  return Features(
    arrays['pooled'],
    token_files,
    arrays['labels'],
    arrays['video_ids'].tolist(),
    arrays['indices'],
    [(name, reason) for name, reason in failed],
  )


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
  return UserError(
    f'{path} is damaged ({type(error).__name__}: {error}); remove '
    f'{path.parent} to compute the features again'
  )
