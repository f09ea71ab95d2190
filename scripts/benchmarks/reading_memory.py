"""Plots memory and open files of the processes that read many clips.

  python scripts/benchmarks/reading_memory.py --config=configs/motion.py \
    --clips=20000 --out=docs/reading_memory.png

Reads the training split of the config's dataset for several epochs, as training
does: with threads, or with --config.dataset.reader_processes=N. Prints both
figures at the start, in the middle and at the end.
"""

import multiprocessing
import os
import pathlib
import re

from absl import flags
import cv2
from ml_collections import config_flags
import numpy as np
from tqdm import auto as tqdm

from dualformer_jax import command_line
from dualformer_jax.input_pipeline import loader, transforms
from dualformer_jax.input_pipeline.dataset import PreparedDataset

FLAGS = flags.FLAGS
_WIDTH, _HEIGHT, _MARGIN = 900, 320, 60


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file('config', None, 'The recipe.')
  flags.DEFINE_integer('clips', 20_000, 'Number of clips.', lower_bound=1)
  flags.DEFINE_string('out', None, 'PNG file of the plot.')
  flags.mark_flag_as_required('config')


def memory_mb() -> float:
  """Returns the memory of this process and its readers, shared pages once."""
  total = 0
  for process in (
    os.getpid(),
    *(c.pid for c in multiprocessing.active_children()),
  ):
    maps = pathlib.Path(f'/proc/{process}/smaps_rollup').read_text()
    total += int(re.findall(r'^Pss: +(\d+) kB', maps, re.MULTILINE)[0])
  return total * 1024 / 1e6


def plot(counts: list[int], memory: list[float]) -> np.ndarray:
  """Returns a plot of megabytes over clips, RGB."""
  picture = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
  top = 1.25 * max(memory)

  def point(count: float, value: float) -> tuple[int, int]:
    width, height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    return (
      round(_MARGIN + width * count / counts[-1]),
      round(_HEIGHT - _MARGIN - height * value / top),
    )

  def text(words: str, place: tuple[int, int]) -> None:
    cv2.putText(
      picture, words, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1,
      cv2.LINE_AA,
    )  # fmt: skip

  for share in (0.0, 0.5, 1.0):
    left, y = point(0, share * top)
    cv2.line(picture, (left, y), (_WIDTH - _MARGIN, y), (220, 220, 220), 1)
    text(f'{share * top:.0f}', (8, y + 5))
    x, bottom = point(share * counts[-1], 0)
    text(f'{share * counts[-1]:.0f}', (x - 25, bottom + 22))
  line = np.array([point(*pair) for pair in zip(counts, memory, strict=True)])
  cv2.polylines(picture, [line], False, (30, 90, 200), 2, cv2.LINE_AA)
  text('MB in use while clips are read', (_MARGIN, 30))
  text('clips', (_WIDTH - _MARGIN - 40, _HEIGHT - 12))
  return picture


def main() -> None:
  """Reads, prints and plots."""
  config = FLAGS.config
  dataset = config.dataset
  data = PreparedDataset(dataset.name, dataset.train_split, dataset.data_dir)
  clips = loader.TrainLoader(
    data,
    transforms.Preprocessing(
      num_frames=config.model.num_frames,
      frame_interval=dataset.frame_interval,
      image_size=config.model.image_size,
      sampling=dataset.sampling,
    ),
    loader.TrainOptions(
      seed=config.seed,
      short_side=dataset.train_short_side,
      random_crop=dataset.random_crop,
    ),
    config.batch_size,
    range(config.batch_size),
    num_threads=dataset.num_threads,
    num_processes=max(0, dataset.reader_processes),
    prefetch=dataset.prefetch,
  )
  counts, memory, files = [], [], []
  batches = -(-FLAGS.clips // config.batch_size)
  for number in tqdm.trange(batches, unit=' batches', mininterval=1.0):
    next(clips)
    if number >= 10:  # Readers have started, and buffers are full.
      counts.append((number + 1) * config.batch_size)
      memory.append(memory_mb())
      files.append(len(os.listdir('/proc/self/fd')))
  clips.close()
  for i in (0, len(counts) // 2, len(counts) - 1):
    print(f'after {counts[i]} clips: {memory[i]:.0f} MB, {files[i]} open files')
  half = len(memory) // 2
  first, second = np.median(memory[:half]), np.median(memory[half:])
  print(f'median of the first half {first:.0f} MB, of the second {second:.0f}')
  if FLAGS.out:
    cv2.imwrite(FLAGS.out, plot(counts, memory)[..., ::-1])


if __name__ == '__main__':
  command_line.run(main, define_flags)
