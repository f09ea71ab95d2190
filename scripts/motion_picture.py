"""Draws frames of some motions and where a model looks, as one PNG.

python scripts/motion_picture.py --workdir=WORKDIR --data_dir=DATA \
    --out=docs/motion.png

WORKDIR is a run of configs/motion.py; DATA is the --data_dir of `tfds build`.
"""

from __future__ import annotations

import math
import tempfile

from absl import flags
from jaxtyping import Float, UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import dualformer_jax
from dualformer_jax import command_line
from dualformer_jax.inference import drawing
from dualformer_jax.input_pipeline import dataset

# Validation videos whose shape is easy to follow in few frames: it has no
# symmetry and hardly touches the border, where it leaves to return on the other
# side. The text is the label next to the frames.
MOTIONS = {
  'validation/00433': 'moves right',
  'validation/00403': 'moves down',
  'validation/00429': 'rotates',
  'validation/00022': 'grows',
}
LAYER = 'blocks.0.1'  # its tokens are smaller than the shapes
FRAMES = (0, 3, 6, 9, 12, 15)
COLORMAP = 'inferno'
# Pixels.
SIDE, GAP, ROW_GAP = 76, 8, 24
LEFT, RIGHT, TOP, BOTTOM = 130, 226, 48, 70
INK, SOFT = (30, 30, 30), (110, 110, 110)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('workdir', None, 'Run of configs/motion.py.')
  flags.DEFINE_string('data_dir', None, '--data_dir of `tfds build`.')
  flags.DEFINE_string('out', None, 'The PNG to write.')
  flags.mark_flags_as_required(['workdir', 'data_dir', 'out'])


def main() -> None:
  """Draws one video of each motion."""
  recognizer = dualformer_jax.load(flags.FLAGS.workdir)
  strip = len(FRAMES) * (SIDE + GAP) - GAP
  row = 2 * SIDE + GAP + ROW_GAP
  picture = Image.new(
    'RGB',
    (LEFT + strip + RIGHT, TOP + len(MOTIONS) * row + BOTTOM),
    'white',
  )
  draw = ImageDraw.Draw(picture)
  draw_time(draw, LEFT, LEFT + strip)
  examples = read_videos(flags.FLAGS.data_dir)
  for index, (video_id, label) in enumerate(MOTIONS.items()):
    with tempfile.NamedTemporaryFile(suffix='.mp4') as file:
      file.write(examples[video_id].video)
      file.flush()
      views = recognizer.views(file.name)
    [frames] = views  # of one view
    [(predicted, probability)] = recognizer.predict(frames, top_k=1)
    [heat] = recognizer.gradcam(recognizer.normalize(views), LAYER)
    top = TOP + index * row
    for column, frame in enumerate(FRAMES):
      corner = LEFT + column * (SIDE + GAP)
      picture.paste(enlarge(frames[frame]), (corner, top))
      heated = draw_heat(frames[frame], heat[frame])
      picture.paste(enlarge(heated), (corner, top + SIDE + GAP))
    middle = top + SIDE / 2
    write(draw, (LEFT - 16, middle), label, 17, anchor='rm')
    draw_motion(draw, label, (LEFT - 48, middle + 30))
    write(draw, (LEFT - 16, middle + SIDE + GAP), 'heat', 15, SOFT, anchor='rm')
    text = predicted.replace('_', '-')
    right = LEFT + strip + 16
    write(draw, (right, middle - 12), 'predicted:', 15, SOFT)
    write(draw, (right, middle + 12), f'{text}, {probability:.0%}', 17)
  draw_scale(picture, draw, TOP + len(MOTIONS) * row + 6)
  picture.save(flags.FLAGS.out, optimize=True)


def read_videos(data_dir: str) -> dict[str, dataset.Example]:
  """Returns the examples of MOTIONS by name."""
  data = dataset.PreparedDataset('motion', 'validation', data_dir)
  examples = (data[index] for index in range(len(data)))
  return {
    example.video_id: example
    for example in examples
    if example.video_id in MOTIONS
  }


def draw_heat(
  frame: UInt8[np.ndarray, 'h w 3'], heat: Float[np.ndarray, 'h w']
) -> UInt8[np.ndarray, 'h w 3']:
  """Returns the frame in gray, under heat whose opacity is its value."""
  gray = frame.mean(axis=2, keepdims=True) * 0.7
  color = drawing.colorize(heat[None].astype(np.float32), COLORMAP)[0]
  opacity = np.sqrt(heat)[..., None]
  return ((1 - opacity) * gray + opacity * color).round().astype(np.uint8)


def enlarge(frame: UInt8[np.ndarray, 'h w 3']) -> Image.Image:
  """Returns the frame as a picture of SIDE x SIDE pixels."""
  image = Image.fromarray(frame)
  return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def draw_time(draw: ImageDraw.ImageDraw, left: int, right: int) -> None:
  """Draws the time axis above the frames."""
  draw_arrow(draw, (left, TOP - 14), (right, TOP - 14), SOFT)
  text = f'time: every third of {FRAMES[-1] + 1} frames'
  write(draw, ((left + right) / 2, TOP - 30), text, 15, SOFT, anchor='mm')


def draw_motion(
  draw: ImageDraw.ImageDraw, label: str, center: tuple[float, float]
) -> None:
  """Draws a motion as arrows around a point."""
  x, y = center
  if label == 'moves right':
    draw_arrow(draw, (x - 18, y), (x + 18, y))
  elif label == 'moves down':
    draw_arrow(draw, (x, y - 14), (x, y + 14))
  elif label == 'rotates':
    draw.arc((x - 13, y - 13, x + 13, y + 13), 270, 180, INK, 2)
    draw_arrow(draw, (x + 1, y - 13), (x - 6, y - 13))
  elif label == 'grows':
    for sign in (-1, 1):
      draw_arrow(draw, (x + 4 * sign, y), (x + 22 * sign, y))


def draw_arrow(
  draw: ImageDraw.ImageDraw,
  start: tuple[float, float],
  end: tuple[float, float],
  color: tuple[int, int, int] = INK,
) -> None:
  """Draws an arrow."""
  angle = math.atan2(end[1] - start[1], end[0] - start[0])
  draw.line((start, end), color, 2)
  barbs = [
    (
      end[0] - 9 * math.cos(angle + turn),
      end[1] - 9 * math.sin(angle + turn),
    )
    for turn in (-0.45, 0.45)
  ]
  draw.polygon([end, *barbs], color)


def draw_scale(
  picture: Image.Image, draw: ImageDraw.ImageDraw, top: int
) -> None:
  """Draws the color scale of the heat."""
  heat = np.tile(np.linspace(0, 1, 240), (16, 1))
  gray = np.full((16, 240, 3), 90, np.uint8)
  picture.paste(Image.fromarray(draw_heat(gray, heat)), (LEFT, top))
  write(draw, (LEFT, top + 28), '0', 15, SOFT, anchor='mm')
  write(draw, (LEFT + 240, top + 28), '1', 15, SOFT, anchor='mm')
  text = 'heat (Grad-CAM): how strongly a place supports the predicted class'
  write(draw, (LEFT, top + 50), text, 15, SOFT)


def write(
  draw: ImageDraw.ImageDraw,
  position: tuple[float, float],
  text: str,
  size: int,
  color: tuple[int, int, int] = INK,
  anchor: str = 'lm',
) -> None:
  """Writes text in Pillow's own font; `anchor` is that of Pillow."""
  font = ImageFont.load_default(size)
  draw.text(position, text, color, font, anchor=anchor)


if __name__ == '__main__':
  command_line.run(main, define_flags)
