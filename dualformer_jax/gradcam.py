r"""Draws where a model looks: Grad-CAM, attention or classes of tokens.

python -m dualformer_jax.gradcam --checkpoint=DIR --out=FILE.gif VIDEO \
    [--layer=blocks.3.1] [--label=NAME] [--attention=FRAME,ROW,COLUMN] \
    [--tokens]
"""

import functools
import pathlib
import re

from absl import flags

from dualformer_jax import command_line, progress
from dualformer_jax.command_line import CHECKPOINT_HELP
from dualformer_jax.errors import UserError
from dualformer_jax.files import check_target

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('checkpoint', None, CHECKPOINT_HELP, required=True)
  flags.DEFINE_string(
    'out', None, 'A .gif or .mp4 file, or .png for a strip.', required=True
  )
  flags.DEFINE_bool('overwrite', False, 'Replace an existing file.')
  flags.DEFINE_string(
    'layer', None, 'A block, blocks.STAGE.BLOCK from 0; by default the last.'
  )
  flags.DEFINE_string(
    'label', None, 'Name or index of a class; by default the most probable.'
  )
  flags.DEFINE_string(
    'attention',
    None,
    'Draw the attention of the token at FRAME,ROW,COLUMN, averaged over heads, '
    'instead of Grad-CAM. --layer must be a block with global attention (BLOCK '
    'is odd).',
  )
  flags.DEFINE_bool(
    'tokens',
    None,
    'Draw the classes by the token-label head instead of Grad-CAM.',
  )
  flags.DEFINE_integer(
    'view', None, 'Index of a test view; by default the middle.', lower_bound=0
  )
  flags.DEFINE_integer(
    'resolution', None, "Height and width; by default the model's.", 32, 1024
  )
  flags.DEFINE_string(
    'colormap',
    'turbo',
    'A colormap of OpenCV, such as turbo, jet, viridis or bone.',
  )
  flags.DEFINE_float('opacity', 0.5, 'Opacity of the colors.', 0, 1)
  flags.DEFINE_float(
    'fps', None, 'Frames per second; by default as in the video.', 0.1, 100
  )
  flags.mark_flags_as_mutual_exclusive(['attention', 'label', 'tokens'])
  flags.mark_flags_as_mutual_exclusive(['layer', 'tokens'])


def main(arguments: list[str]) -> None:
  """Draws what the flags ask for and writes the file."""
  video, out = arguments[0], pathlib.Path(FLAGS.out).expanduser()
  if len(arguments) > 1:
    raise UserError(f'expected one video, but there is {arguments[1]!r}, too')
  check_target(out, FLAGS.overwrite, ('.gif', '.mp4', '.png'))
  token = FLAGS.attention
  if token is not None and not re.fullmatch(r'\d+,\d+,\d+', token):
    raise UserError(f'--attention={token}: expected FRAME,ROW,COLUMN, from 0')

  # Imported late, so that --help and errors in flags do not wait for JAX.
  from dualformer_jax.inference import drawing, explain, visualize
  from dualformer_jax.inference.recognizer import Recognizer

  if FLAGS.colormap not in drawing.COLORMAPS:
    raise UserError(
      f'--colormap={FLAGS.colormap}: expected one of '
      f'{", ".join(drawing.COLORMAPS)}'
    )
  command_line.enable_compilation_cache()
  recognizer = Recognizer.load(FLAGS.checkpoint)
  # Errors in flags are reported before the video is read.
  layer = FLAGS.layer or explain.last_layer(recognizer.model)
  explain.find_block(recognizer.model, layer)
  if FLAGS.label is not None:
    recognizer.class_index(FLAGS.label)
  if FLAGS.tokens and not recognizer.model.token_label:
    raise UserError(f'--tokens: {recognizer.folder} has no token-label head')

  with progress.waiting('reading the video'):
    views = recognizer.views(video)
    clip = visualize.load_clip(
      recognizer, video, views, index=FLAGS.view, size=FLAGS.resolution
    )
  style = (FLAGS.colormap, FLAGS.opacity)
  with progress.waiting('computing the picture'):
    if token is not None:
      picture = visualize.draw_attention(recognizer, clip, layer, token, style)
    elif FLAGS.tokens:
      picture, shares = visualize.draw_token_classes(
        recognizer, clip, FLAGS.opacity
      )
      for name, share in shares:
        print(f'{share:7.1%}  {name}')
    else:
      probabilities = recognizer.probabilities(views)
      for name, probability in recognizer.top(probabilities):
        print(f'{probability:10.6f}  {name}')
      label = FLAGS.label or int(probabilities.argmax())
      picture = visualize.draw_gradcam(recognizer, clip, layer, label, style)
  visualize.write(out, picture, FLAGS.fps or clip.fps)
  print(
    f'{picture.caption}, view {clip.index} of 0 to {len(views) - 1} -> {out}'
  )


cli = functools.partial(command_line.run, main, define_flags, arguments='VIDEO')

if __name__ == '__main__':
  cli()
