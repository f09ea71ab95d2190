"""Shows that a model of data/motion tells motion, not appearance.

  python scripts/motion_proof.py --workdir=WORKDIR --data_dir=DATA

It takes the validation videos twice: frozen to one frame, where a model that
has learnt motion can but guess, and played backwards, where it must see the
opposite motion. And where it looks, by Grad-CAM, must be at the shape that
moves. Prints a line for each, and fails where one does not hold.
"""

import pathlib
import sys

from absl import flags
import numpy as np

import dualformer_jax
from dualformer_jax import command_line
from dualformer_jax.input_pipeline import decoding, records
from dualformer_jax.recognizer import Recognizer

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Run of configs/motion.py.', required=True
)
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where `tfds build` has put the dataset.', required=True
)

MAX_FROZEN = 0.30  # chance is 1 of 8 classes, 12.5%
MIN_REVERSED = 0.90
HEAT_VIDEOS = 100
HEAT_LAYER = 'blocks.0.1'  # its tokens are smaller than the shapes
MIN_HEAT_RATIO = 3.0
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

  inside, outside = heat_by_place(recognizer, dataset)
  print(
    f'Where it looks ({HEAT_LAYER}): the heat at the moving shape is '
    f'{inside / outside:.1f} times that elsewhere, over {HEAT_VIDEOS} videos.'
  )
  if inside < MIN_HEAT_RATIO * outside:
    raise SystemExit(
      f'It does not look at the shape: {MIN_HEAT_RATIO:g} times is expected.'
    )


def heat_by_place(
  recognizer: Recognizer, dataset: records.PreparedDataset
) -> tuple[float, float]:
  """Returns the mean heat inside and outside of the moving shapes, 0 to 1.

  Where a shape is, pixel by pixel, is what the renderer says.
  """
  # As `tfds build data/motion` finds it.
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'data'))
  from motion import motion_dataset_builder as motion

  inside, outside = [], []
  for index in range(HEAT_VIDEOS):
    example = dataset[index]
    split, number = example.video_id.split('/')
    scene, label = motion.scene_of(split, int(number))
    assert label == example.label
    is_shape = np.stack(
      [motion.cover(scene, label, i) > 0.5 for i in range(motion.NUM_FRAMES)]
    )
    views = recognizer.views(decoding.decode_all(example.video))
    heat = recognizer.gradcam(recognizer.normalize(views), HEAT_LAYER)[0]
    inside.append(heat[is_shape].mean())
    outside.append(heat[~is_shape].mean())
  return float(np.mean(inside)), float(np.mean(outside))


if __name__ == '__main__':
  command_line.run(main)
