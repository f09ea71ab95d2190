"""Prints how fast clips are read: prepared datasets against the originals.

  python scripts/benchmarks/input_throughput.py --videos=VIDEOS

VIDEOS/CLASS/video.mp4 are prepared in every form, with `tfds build`, and read
as in training: 32 frames of interval 2, a random resized crop of 224. The same
clips are taken of the original files with decord and OpenCV, as the published
implementation's pipeline takes them (pip install decord). Every row is measured
in every round; the table has medians. Its seconds are those of a core (CPU
time), which other programs disturb less than those of a clock; how two threads
compare with one is by the clock, and needs a machine that does nothing else.
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
import numpy as np
from tqdm import auto as tqdm

from dualformer_jax import command_line
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import (
  frame_sampling,
  loader,
  records,
  views,
)

VIDEOS = flags.DEFINE_string(
  'videos', None, 'Folder of CLASS/video.mp4.', required=True
)
CRFS = flags.DEFINE_list(
  'crf', ['20', '18', '23'], 'Of the re-encoded datasets.'
)
CLIPS = flags.DEFINE_integer('clips', 40, 'Clips a row and round.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds.')
JSON = flags.DEFINE_string('json', None, 'File to write the figures to.')

PREPROCESSING = views.Preprocessing(
  num_frames=32, frame_interval=2, image_size=224
)


def prepare(form: str, crf: int, out: str) -> records.PreparedDataset:
  """Builds a dataset of the videos."""
  name = f'{form}{crf}'
  config = {'name': name, 'form': form, 'crf': crf, 'validation_share': 0.0}
  builder = pathlib.Path(__file__).parents[2] / 'data' / 'video_folder'
  videos = pathlib.Path(VIDEOS.value).expanduser().absolute()
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
  return records.PreparedDataset(f'video_folder/{name}', 'train', out)


def read_prepared(dataset: records.PreparedDataset) -> Callable[[int], object]:
  """What makes one clip of a prepared dataset, the record read included."""

  def read(number: int) -> object:
    rng = np.random.default_rng(number)
    video = dataset[number % len(dataset)].video
    return views.train_clip(video, PREPROCESSING, rng)

  return read


def read_originals(paths: list[pathlib.Path]) -> Callable[[int], object]:
  """What makes one clip of an original file, with decord and OpenCV."""
  try:
    import decord  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise UserError(
      'decord is not installed, which the originals are read with: pip install'
      ' decord'
    ) from None

  def read(number: int) -> object:
    rng = np.random.default_rng(number)
    path = paths[number % len(paths)]
    reader = decord.VideoReader(str(path), num_threads=1)
    (picked,) = frame_sampling.train_frames(len(reader), 32, 2, 1, rng)
    frames = reader.get_batch(picked).asnumpy()
    frames = views.resize_short_side(frames, 256)
    return views.random_resized_crop(frames, 224, rng)

  return read


def rate_of_threads(
  dataset: records.PreparedDataset, num_threads: int, num_clips: int
) -> float:
  """Clips per second of the loader."""
  clips = loader.train_loader(
    dataset,
    PREPROCESSING,
    batch_size=4,
    seed=0,
    num_threads=num_threads,
  )
  next(clips)  # starts the threads
  for _ in range(2 * num_threads // 4 + 2):
    next(clips)  # and empties what was read ahead meanwhile
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
    forms = [('reencoded', int(crf)) for crf in CRFS.value]
    forms += [('jpeg', 18), ('verbatim', 18)]
    datasets = {
      f'{form}, CRF {crf}' if form == 'reencoded' else form: prepare(
        form, crf, out
      )
      for form, crf in tqdm.tqdm(forms, desc='Preparing')
    }
    first = datasets['verbatim']
    root = pathlib.Path(VIDEOS.value).expanduser()
    paths = [root / first[i].video_id for i in range(len(first))]
    readers = {'original files, decord and OpenCV': read_originals(paths)}
    readers |= {name: read_prepared(d) for name, d in datasets.items()}
    sizes = {
      name: statistics.mean(len(d[i].video) for i in range(len(d)))
      for name, d in datasets.items()
    }
    sizes['original files, decord and OpenCV'] = sizes['verbatim']
    rates: dict[str, list[float]] = {name: [] for name in readers}
    threads = sorted({1, 2, len(all_cores)} & set(range(1, len(all_cores) + 1)))
    scaling: dict[int, list[float]] = {n: [] for n in threads}
    best = next(iter(datasets))
    for turn in tqdm.trange(ROUNDS.value, desc='Measuring'):
      os.sched_setaffinity(0, all_cores[:1])
      for name, read in readers.items():
        start = time.process_time()
        for number in range(CLIPS.value):
          read(turn * CLIPS.value + number)
        rates[name].append(CLIPS.value / (time.process_time() - start))
      for number, kept in scaling.items():
        os.sched_setaffinity(0, all_cores[:number])
        kept.append(
          rate_of_threads(datasets[best], number, number * CLIPS.value)
        )
      os.sched_setaffinity(0, all_cores)
  medians = {name: statistics.median(values) for name, values in rates.items()}
  base = medians['original files, decord and OpenCV']
  print('| read from | MB a video | clips/s on one core | ratio |')
  print('|---|---|---|---|')
  for name, rate in medians.items():
    size = sizes[name] / 1e6
    print(f'| {name} | {size:.2f} | {rate:.1f} | {rate / base:.1f} |')
  by_threads = {n: statistics.median(values) for n, values in scaling.items()}
  for number, values in scaling.items():
    pairs = zip(values, scaling[1], strict=True)
    ratio = statistics.median(many / one for many, one in pairs)
    print(f'{best}, {number} threads on as many cores: {ratio:.2f} times one')
  if JSON.value:
    content = {
      'machine': platform.processor() or platform.machine(),
      'cores': len(all_cores),
      'clips_per_second': medians,
      'bytes_per_video': sizes,
      'clips_per_second_by_threads': by_threads,
    }
    pathlib.Path(JSON.value).write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  command_line.run(main)
