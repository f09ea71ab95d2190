"""Compares reading clips from prepared datasets with reading original videos.

  python scripts/benchmarks/input_throughput.py --videos=VIDEOS

Prepares VIDEOS/CLASS/video.mp4 in every form with `tfds build`, and reads clips
as in training: 32 frames of interval 2, a random resized crop of 224. Reads the
same clips from the original files with decord and OpenCV, as the published
implementation does (pip install decord).

Measures every row in every round, and prints medians. Rates on one core are of
CPU time, which other programs affect less. The scaling with threads and
processes is of wall time, and needs an idle machine.
"""

from collections.abc import Callable
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags
import cv2
from many_videos import ManyVideos
import numpy as np
from tqdm import auto as tqdm

from dualformer_jax import command_line
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import frame_sampling, loader, transforms
from dualformer_jax.input_pipeline.dataset import PreparedDataset

FLAGS = flags.FLAGS
PREPROCESSING = transforms.Preprocessing(
  num_frames=32, frame_interval=2, image_size=224
)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
    'videos', None, 'Folder of CLASS/video.mp4.', required=True
  )
  flags.DEFINE_list('crf', ['23', '21', '26'], 'CRF of re-encoded datasets.')
  flags.DEFINE_integer('clips', 40, 'Clips per row and round.')
  flags.DEFINE_integer('rounds', 5, 'Rounds.')
  flags.DEFINE_string('json', None, 'File to write the results to.')


def prepare(form: str, crf: int, out: str) -> PreparedDataset:
  """Builds a dataset of the videos."""
  name = f'{form}{crf}'
  config = {'name': name, 'form': form, 'crf': crf, 'validation_share': 0.0}
  builder = pathlib.Path(__file__).parents[2] / 'data' / 'video_folder'
  videos = pathlib.Path(FLAGS.videos).expanduser().absolute()
  done = subprocess.run(
    [
      pathlib.Path(sys.executable).with_name('tfds'),
      'build',
      builder,
      f'--manual_dir={videos}',
      f'--data_dir={out}',
      f'--config={json.dumps(config)}',
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise UserError(f'{videos}: cannot be prepared: {done.stderr[-500:]}')
  return ManyVideos(f'video_folder/{name}', 'train', out)


def read_prepared(
  dataset: PreparedDataset, *, start_multiple: int = 2, yuv420: bool = False
) -> Callable[[int], object]:
  """Returns a function that reads one clip of a prepared dataset."""

  def read(number: int) -> object:
    rng = np.random.default_rng(number)
    video = dataset[number % len(dataset)].video
    return transforms.train_clips(
      video,
      PREPROCESSING,
      [rng],
      start_multiple=start_multiple,
      yuv420=yuv420,
    )

  return read


def read_originals(paths: list[pathlib.Path]) -> Callable[[int], object]:
  """Returns a function that reads a clip of a file with decord and OpenCV."""
  try:
    import decord  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise UserError(
      'decord is not installed, but reads the original videos: pip install'
      ' decord'
    ) from None

  def read(number: int) -> object:
    rng = np.random.default_rng(number)
    path = paths[number % len(paths)]
    reader = decord.VideoReader(str(path), num_threads=1)
    picked = frame_sampling.train_frames(len(reader), 32, 2, rng)
    frames = reader.get_batch(picked).asnumpy()
    decoded = transforms.Preprocessing(32, 1, 224)
    return transforms.train_clips(frames, decoded, [rng])

  return read


def rate_of_loader(
  dataset: PreparedDataset, kind: str, number: int, num_clips: int
) -> float:
  """Returns the loader's clips per second with some threads or processes."""
  clips = loader.TrainLoader(
    dataset,
    PREPROCESSING,
    loader.TrainOptions(seed=0, start_multiple=2),
    4,
    range(4),
    num_threads=number if kind == 'threads' else 1,
    num_processes=number if kind == 'processes' else 0,
  )
  next(clips)  # starts them
  for _ in range(2 * number // 4 + 4):
    next(clips)  # drops batches that were read ahead meanwhile
  start = time.perf_counter()
  batches = max(1, num_clips // 4)
  for _ in range(batches):
    next(clips)
  seconds = time.perf_counter() - start
  clips.close()
  return 4 * batches / seconds


def main() -> None:
  """Prepares, measures and prints a table."""
  cv2.setNumThreads(0)
  all_cores = sorted(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory() as out:
    forms = [('reencoded', int(crf)) for crf in FLAGS.crf]
    forms += [('jpeg', 18), ('verbatim', 18)]
    datasets = {
      f'{form}, CRF {crf}' if form == 'reencoded' else form: prepare(
        form, crf, out
      )
      for form, crf in tqdm.tqdm(forms, desc='Preparing')
    }
    first = datasets['verbatim']
    num_videos = PreparedDataset.__len__(first)
    root = pathlib.Path(FLAGS.videos).expanduser()
    paths = [root / first[i].video_id for i in range(num_videos)]
    readers = {'original files, decord and OpenCV': read_originals(paths)}
    readers |= {name: read_prepared(d) for name, d in datasets.items()}
    sizes = {
      name: statistics.mean(len(d[i].video) for i in range(num_videos))
      for name, d in datasets.items()
    }
    sizes['original files, decord and OpenCV'] = sizes['verbatim']
    best = next(iter(datasets))
    for change, fields in {
      'as YUV': {'yuv420': True},
      'clips from any frame': {'start_multiple': 1},
    }.items():
      name = f'{best}, {change}'
      readers[name] = read_prepared(datasets[best], **fields)
      sizes[name] = sizes[best]
    rates: dict[str, list[float]] = {name: [] for name in readers}
    numbers = sorted({1, 2, len(all_cores)} & set(range(1, len(all_cores) + 1)))
    scaling: dict[str, dict[int, list[float]]] = {
      kind: {n: [] for n in numbers} for kind in ('threads', 'processes')
    }
    for turn in tqdm.trange(FLAGS.rounds, desc='Measuring'):
      os.sched_setaffinity(0, all_cores[:1])
      for name, read in readers.items():
        start = time.process_time()
        for number in range(FLAGS.clips):
          read(turn * FLAGS.clips + number)
        rates[name].append(FLAGS.clips / (time.process_time() - start))
      for kind, of_kind in scaling.items():
        for number, kept in of_kind.items():
          os.sched_setaffinity(0, all_cores[:number])
          num_clips = number * FLAGS.clips
          kept.append(rate_of_loader(datasets[best], kind, number, num_clips))
      os.sched_setaffinity(0, all_cores)
  medians = {name: statistics.median(values) for name, values in rates.items()}
  base = medians['original files, decord and OpenCV']
  print('| source | MB per video | clips/s on one core | ratio |')
  print('|---|---|---|---|')
  for name, rate in medians.items():
    size = sizes[name] / 1e6
    print(f'| {name} | {size:.2f} | {rate:.1f} | {rate / base:.1f} |')
  for kind, of_kind in scaling.items():
    for number, values in of_kind.items():
      pairs = zip(values, of_kind[1], strict=True)
      ratio = statistics.median(many / one for many, one in pairs)
      print(f'{best}, {number} {kind} on as many cores: {ratio:.2f} times one')
  if FLAGS.json:
    content = {
      'machine': platform.processor() or platform.machine(),
      'cores': len(all_cores),
      'clips_per_second': medians,
      'bytes_per_video': sizes,
      **{
        f'clips_per_second_by_{kind}': {
          number: statistics.median(values)
          for number, values in of_kind.items()
        }
        for kind, of_kind in scaling.items()
      },
    }
    pathlib.Path(FLAGS.json).write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  command_line.run(main, define_flags)
