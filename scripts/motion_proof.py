"""Shows that a model of data/motion tells motion, not appearance.

  python scripts/motion_proof.py --workdir=WORKDIR --data_dir=DATA

It takes the validation videos twice: frozen to one frame, where a model that
has learnt motion can but guess, and played backwards, where it must see the
opposite motion. Prints a line for each, and fails where one does not hold.
"""

from absl import flags
import numpy as np

import dualformer_jax
from dualformer_jax import command_line
from dualformer_jax.input_pipeline import decoding, records

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Run of configs/motion.py.', required=True
)
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where `tfds build` has put the dataset.', required=True
)

MAX_FROZEN = 0.30  # chance is 1 of 8 classes, 12.5%
MIN_REVERSED = 0.90
OPPOSITES = {
  'left': 'right',
  'up': 'down',
  'clockwise': 'counter_clockwise',
  'grow': 'shrink',
}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}


def main() -> None:
  """Judges the model on the frozen and on the reversed videos."""
  recognizer = dualformer_jax.load(WORKDIR.value)
  dataset = records.PreparedDataset('motion', 'validation', DATA_DIR.value)

  def predict(frames: np.ndarray) -> str:
    [(name, _)] = recognizer.predict(frames, top_k=1)
    return name

  frozen, opposite = [], []
  for index in range(len(dataset)):
    example = dataset[index]
    assert isinstance(example.label, int)  # a video of this dataset has one
    name = dataset.class_names[example.label]
    frames = decoding.decode_all(example.video)
    still = np.repeat(frames[len(frames) // 2][None], len(frames), axis=0)
    frozen.append(predict(still) == name)
    opposite.append(predict(frames[::-1]) == OPPOSITES[name])

  print(
    f'Frozen to one frame: {np.mean(frozen):.1%} of {len(frozen)} videos are '
    f'told right; chance is {1 / len(OPPOSITES):.1%}.'
  )
  print(
    f'Played backwards: {np.mean(opposite):.1%} of {len(opposite)} videos are '
    'taken for the opposite motion.'
  )
  if np.mean(frozen) >= MAX_FROZEN or np.mean(opposite) < MIN_REVERSED:
    raise SystemExit(
      f'The model has not learnt motion: below {MAX_FROZEN:.0%} and at least '
      f'{MIN_REVERSED:.0%} are expected.'
    )


if __name__ == '__main__':
  command_line.run(main)
