"""Tells the memory of a process that predicts a long video, minute by minute.

  python scripts/benchmarks/predict_memory.py --checkpoint=DIR --minutes=30

Scores the windows of a video that it renders, as `predict --sliding` does, and
counts how many frames are decoded for it.
"""

from collections.abc import Iterator
import pathlib
import resource
import tempfile

from absl import flags
import numpy as np
from tqdm import auto as tqdm

import dualformer_jax
from dualformer_jax import command_line, scoring
from dualformer_jax.input_pipeline import decoding

CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A checkpoint folder or a workdir.', required=True
)
MINUTES = flags.DEFINE_integer('minutes', 30, 'Of video.', lower_bound=2)

_FPS = 25
_HEIGHT, _WIDTH = 240, 320


def resident_mb() -> float:
  """Memory of this process that is in use now."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize() / 1e6


def render() -> Iterator[decoding.Frame]:
  """A bright bar that wanders over a gradient."""
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
  """Renders, predicts, and prints."""
  decoded = 0

  def counted(frames: Iterator[decoding.Frame]) -> Iterator[decoding.Frame]:
    nonlocal decoded
    for frame in frames:
      decoded += 1
      yield frame

  recognizer = dualformer_jax.load(CHECKPOINT.value or '')
  with tempfile.TemporaryDirectory() as folder:
    video = f'{folder}/video.mp4'
    with open(video, 'wb') as file:
      decoding.write_mp4(file, render(), fps=_FPS)
    windows = scoring.score_windows(
      recognizer,
      counted(decoding.stream_frames(video)),
      decoding.frame_rate(video),
      batch_size=4,
    )
    memory = {}
    num_windows = 0
    with tqdm.tqdm(total=MINUTES.value * 60, unit=' s of video') as bar:
      for window in windows:
        num_windows += 1
        bar.update(window.end - bar.n)
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
