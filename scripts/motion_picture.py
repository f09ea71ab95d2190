"""Draws where a model looks in a video of each motion, as one PNG.

python scripts/motion_picture.py --workdir=WORKDIR --data_dir=DATA \
    --out=docs/motion.png

Each strip of frames is made by `python -m dualformer_jax.gradcam`.
"""

import pathlib
import subprocess
import sys
import tempfile

from absl import flags
import cv2
from jaxtyping import UInt8
import numpy as np

import dualformer_jax
from dualformer_jax import command_line
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import records

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Run of configs/motion.py.', required=True
)
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where `tfds build` has put the dataset.', required=True
)
OUT = flags.DEFINE_string('out', None, 'The PNG to write.', required=True)

_LAYER = 'blocks.0.1'
_SIDE = 64  # of a frame, in pixels of the picture
_MARGIN = 8
_TEXT = 150  # width of what is written beside a strip


def main() -> None:
  """Takes the first validation video of each class."""
  recognizer = dualformer_jax.load(WORKDIR.value)
  dataset = records.PreparedDataset('motion', 'validation', DATA_DIR.value)
  found: dict[int, bytes] = {}
  for index in range(len(dataset)):
    example = dataset[index]
    assert isinstance(example.label, int)  # a video of this dataset has one
    found.setdefault(example.label, example.video)
    if len(found) == len(dataset.class_names):
      break
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for label in sorted(found):
      video = pathlib.Path(folder, f'{label}.mp4')
      video.write_bytes(found[label])
      [(name, probability)] = recognizer.predict(video, top_k=1)
      rows.append(row(gradcam(video), f'{name} {probability:.0%}'))
  half = len(rows) // 2
  picture = np.hstack([np.vstack(rows[:half]), np.vstack(rows[half:])])
  if not cv2.imwrite(OUT.value or '', picture[..., ::-1]):
    raise UserError(f'--out={OUT.value}: cannot be written')


def gradcam(video: pathlib.Path) -> UInt8[np.ndarray, 'side width 3']:
  """The strip of frames that the command draws."""
  out = video.with_suffix('.png')
  subprocess.run(
    [
      *(sys.executable, '-m', 'dualformer_jax.gradcam'),
      f'--checkpoint={WORKDIR.value}',
      f'--layer={_LAYER}',
      f'--resolution={_SIDE}',
      f'--out={out}',
      str(video),
    ],
    check=True,
    stdout=subprocess.DEVNULL,
  )
  strip = cv2.imread(str(out))
  assert strip is not None
  return strip[..., ::-1]


def row(
  strip: UInt8[np.ndarray, 'h w 3'], text: str
) -> UInt8[np.ndarray, 'h2 w2 3']:
  """A strip with a text behind it, on white."""
  height, width = strip.shape[:2]
  picture = np.full((height + _MARGIN, width + _TEXT, 3), 255, np.uint8)
  picture[:height, :width] = strip
  name, share = text.split()
  for line, y in ((name.replace('_', '-'), 36), (share, 58)):
    cv2.putText(
      picture,
      line,
      (width + 8, y),
      cv2.FONT_HERSHEY_SIMPLEX,
      0.45,
      (30, 30, 30),
      1,
      cv2.LINE_AA,
    )
  return picture


if __name__ == '__main__':
  command_line.run(main)
