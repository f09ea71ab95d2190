"""Measures the memory of a process that predicts the windows of a long video.

  python scripts/benchmarks/predict_memory.py --checkpoint=DIR --minutes=30

Renders a video, scores its windows as `predict --sliding` does, and prints
memory after some minutes of video and the number of frames decoded.
"""

from collections.abc import Iterable, Iterator
import pathlib
import resource
import tempfile

from absl import flags
import numpy as np
from tqdm import auto as tqdm

import dualformer_jax
from dualformer_jax import command_line
from dualformer_jax.inference import batches
from dualformer_jax.input_pipeline import video_reader, video_writer

CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A checkpoint folder or a workdir.', required=True
)
MINUTES = flags.DEFINE_integer('minutes', 30, 'Length of the video.', 2)

_FPS = 25
_HEIGHT, _WIDTH = 240, 320


def resident_mb() -> float:
  """Returns the resident memory of this process."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize() / 1e6


def render() -> Iterator[video_reader.Frame]:
  """Yields frames of a bright bar that moves over a gradient."""
  gradient = np.linspace(0, 120, _WIDTH, dtype=np.uint8)
  background = np.broadcast_to(gradient[:, None], (_HEIGHT, _WIDTH, 3))
  for index in tqdm.trange(
    MINUTES.value * 60 * _FPS, desc='rendering', unit=' frames'
  ):
    frame = background.copy()
    left = 3 * index % _WIDTH
    frame[60:180, left : left + 40] = 230
    yield frame


def main() -> None:
  """Renders and predicts the video, and prints."""
  decoded = 0

  def counted(
    frames: Iterable[video_reader.Frame],
  ) -> Iterator[video_reader.Frame]:
    nonlocal decoded
    for frame in frames:
      decoded += 1
      yield frame

  recognizer = dualformer_jax.load(CHECKPOINT.value or '')
  with tempfile.TemporaryDirectory() as folder:
    video = f'{folder}/video.mp4'
    with open(video, 'wb') as file:
      video_writer.write_mp4(file, render(), fps=_FPS)
    with video_reader.VideoReader(video) as reader:
      timed = ((i / _FPS, frame) for i, frame in enumerate(counted(reader)))
      windows = batches.score_windows(recognizer, timed, _FPS, batch_size=4)
      memory = {}
      num_windows = 0
      for window in windows:
        num_windows += 1
        memory.setdefault(int(window.end // 60), resident_mb())
  minutes = sorted({1, MINUTES.value // 2, MINUTES.value - 1} & {*memory})
  for minute in minutes:
    print(f'after {minute:3} minutes: {memory[minute]:.0f} MB')
  print(
    f'{decoded:,} frames were decoded for {num_windows:,} windows; the video '
    f'has {MINUTES.value * 60 * _FPS:,}'
  )


if __name__ == '__main__':
  command_line.run(main)
