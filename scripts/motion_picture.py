"""Draws a clip of each motion and what a model says of it, as a PNG.

python scripts/motion_picture.py --workdir=WORKDIR --data_dir=DATA \
    --out=docs/motion.png
"""

from absl import flags
import cv2
from jaxtyping import UInt8
import numpy as np

import dualformer_jax
from dualformer_jax import command_line
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding, records

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Run of configs/motion.py.', required=True
)
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where `tfds build` has put the dataset.', required=True
)
OUT = flags.DEFINE_string('out', None, 'The PNG to write.', required=True)

_FRAMES = range(0, 16, 2)
_SIDE = 56  # of a frame, in pixels of the picture
_MARGIN = 8
_TEXT = 150  # width of what is written beside a strip


def main() -> None:
  """Takes the first validation video of each class."""
  recognizer = dualformer_jax.load(WORKDIR.value)
  dataset = records.PreparedDataset('motion', 'validation', DATA_DIR.value)
  strips = {}
  for index in range(len(dataset)):
    example = dataset[index]
    if example.label not in strips:
      frames = decoding.decode_all(example.video)
      [(name, probability)] = recognizer.predict(frames, top_k=1)
      strips[example.label] = strip(frames, f'{name} {probability:.0%}')
    if len(strips) == len(dataset.class_names):
      break
  rows = [strips[label] for label in sorted(strips)]
  half = len(rows) // 2
  picture = np.hstack([np.vstack(rows[:half]), np.vstack(rows[half:])])
  if not cv2.imwrite(OUT.value, picture[..., ::-1]):
    raise UserError(f'--out={OUT.value}: cannot be written')


def strip(
  frames: UInt8[np.ndarray, 't h w 3'], text: str
) -> UInt8[np.ndarray, 'y x 3']:
  """A row of frames with a text behind it, on white."""
  height = _SIDE + _MARGIN
  row = np.full((height, len(_FRAMES) * (_SIDE + 2) + _TEXT, 3), 255, np.uint8)
  for place, index in enumerate(_FRAMES):
    x = place * (_SIDE + 2)
    row[:_SIDE, x : x + _SIDE] = cv2.resize(
      frames[index], (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC
    )
  name, share = text.split()
  x = len(_FRAMES) * (_SIDE + 2) + 4
  for line, y in ((name.replace('_', '-'), 24), (share, 44)):
    cv2.putText(
      row,
      line,
      (x, y),
      cv2.FONT_HERSHEY_SIMPLEX,
      0.45,
      (30, 30, 30),
      1,
      cv2.LINE_AA,
    )
  return row


if __name__ == '__main__':
  command_line.run(main)
