"""Checks that a model of data/motion recognizes motion, not appearance.

  python scripts/motion_proof.py --workdir=WORKDIR --data_dir=DATA

On the validation videos, three properties must hold. Frozen to one frame, they
are classified at chance. Played backwards, they are classified as the opposite
motion. The Grad-CAM heat is higher at the moving shape than elsewhere. The
command prints a line for each and fails if one does not hold.
"""

import pathlib
import sys

from absl import flags
from jaxtyping import UInt8
import numpy as np

import dualformer_jax
from dualformer_jax import command_line
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline import dataset, video_reader

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


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('workdir', None, 'Run of configs/motion.py.')
  flags.DEFINE_string('data_dir', None, '--data_dir of `tfds build`.')
  flags.mark_flags_as_required(['workdir', 'data_dir'])


def main() -> None:
  """Runs the three checks."""
  recognizer = dualformer_jax.load(flags.FLAGS.workdir)
  data = dataset.PreparedDataset('motion', 'validation', flags.FLAGS.data_dir)
  frozen, reversed_ = accuracy_of_manipulated(recognizer, data)
  print(
    f'Frozen to one frame: {frozen:.1%} of {len(data)} videos are classified '
    f'correctly; chance is {1 / len(OPPOSITES):.1%}.'
  )
  print(
    f'Played backwards: {reversed_:.1%} of {len(data)} videos are classified '
    'as the opposite motion.'
  )
  if frozen >= MAX_FROZEN or reversed_ < MIN_REVERSED:
    raise SystemExit(
      'The model has not learned motion: expected below '
      f'{MAX_FROZEN:.0%} and at least {MIN_REVERSED:.0%}.'
    )
  inside, outside = mean_heat(recognizer, data)
  print(
    f'Grad-CAM at {HEAT_LAYER}: the heat at the moving shape is '
    f'{inside / outside:.1f} times that elsewhere, over {HEAT_VIDEOS} videos.'
  )
  if inside < MIN_HEAT_RATIO * outside:
    raise SystemExit(
      'The model does not look at the shape: expected at least '
      f'{MIN_HEAT_RATIO:g} times.'
    )


def accuracy_of_manipulated(
  recognizer: Recognizer, data: dataset.PreparedDataset
) -> tuple[float, float]:
  """Classifies frozen and reversed videos.

  Returns:
    Fraction of frozen videos that are classified correctly, and of reversed
    videos that are classified as the opposite motion.
  """

  def predict(frames: UInt8[np.ndarray, 't h w 3']) -> str:
    [(name, _)] = recognizer.predict(frames, top_k=1)
    return name

  frozen, reversed_ = [], []
  for index in range(len(data)):
    example = data[index]
    assert isinstance(example.label, int)  # this dataset has one per video
    name = data.class_names[example.label]
    frames = _decode(example.video)
    still = np.repeat(frames[len(frames) // 2][None], len(frames), axis=0)
    frozen.append(predict(still) == name)
    reversed_.append(predict(frames[::-1]) == OPPOSITES[name])
  return float(np.mean(frozen)), float(np.mean(reversed_))


def _decode(video: bytes) -> np.ndarray:
  with video_reader.VideoReader(video) as reader:
    return np.stack(list(reader))


def mean_heat(
  recognizer: Recognizer, data: dataset.PreparedDataset
) -> tuple[float, float]:
  """Returns the mean heat (0..1) inside and outside of the moving shapes.

  The renderer of the dataset gives the pixels of the shape in each frame.
  """
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  from data.motion import motion_dataset_builder as motion

  inside, outside = [], []
  for index in range(HEAT_VIDEOS):
    example = data[index]
    split, number = example.video_id.split('/')
    scene, label = motion.scene_of(split, int(number))
    assert label == example.label
    is_shape = np.stack(
      [motion.cover(scene, label, i) > 0.5 for i in range(motion.NUM_FRAMES)]
    )
    views = recognizer.views(_decode(example.video))
    heat = recognizer.gradcam(recognizer.normalize(views), HEAT_LAYER)[0]
    inside.append(heat[is_shape].mean())
    outside.append(heat[~is_shape].mean())
  return float(np.mean(inside)), float(np.mean(outside))


if __name__ == '__main__':
  command_line.run(main, define_flags)
