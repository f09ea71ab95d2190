r"""Shows where a model looks in a video: Grad-CAM, attention or token classes.

python -m dualformer_jax.gradcam --checkpoint=DIR --out=FILE.gif VIDEO \
    [--layer=blocks.3.1] [--label=NAME] [--attention=FRAME,ROW,COLUMN] \
    [--tokens]
"""

import collections
import dataclasses
import fractions
import io
import os
import pathlib

from absl import flags
import av
import av.filter
import cv2
from jaxtyping import Int, UInt8
import numpy as np

from dualformer_jax import command_line, heat_maps
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding
from dualformer_jax.input_pipeline.views import test_views

Token = tuple[int, int, int]

_FORMATS = ('.gif', '.mp4', '.png')
_STRIP = 8  # frames of a strip
# Of the classes of tokens, these many have a colour and a line in the legend.
_CLASSES = 8
_LINE = 16  # height of that, in pixels

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'A checkpoint folder, or the workdir of a training run.',
  required=True,
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'What to make, by its ending: .gif, .mp4, or .png for a strip of frames.',
  required=True,
)
_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Whether to replace --out where it exists.'
)
_LAYER = flags.DEFINE_string(
  'layer', None, 'The block, blocks.STAGE.BLOCK from 0; by default the last.'
)
_LABEL = flags.DEFINE_string(
  'label', None, 'Name or number of a class; by default the most probable.'
)
_ATTENTION = flags.DEFINE_list(
  'attention',
  None,
  'FRAME,ROW,COLUMN of a token of the layer, of which BLOCK must be odd: shows '
  'where its global attention goes, the mean over heads, instead of Grad-CAM.',
)
_TOKENS = flags.DEFINE_bool(
  'tokens',
  False,
  'Shows the class that the token-label head gives to each token of the last '
  'stage, instead of Grad-CAM.',
)
_VIEW = flags.DEFINE_integer(
  'view',
  None,
  'Which of the test views to show, from 0; by default the middle one.',
  lower_bound=0,
)
_RESOLUTION = flags.DEFINE_integer(
  'resolution',
  None,
  "Pixels of the picture's side; by default as many as the model sees.",
  lower_bound=32,
  upper_bound=1024,
)
_COLORMAP = flags.DEFINE_enum(
  'colormap',
  'turbo',
  [*heat_maps.COLORMAPS],
  'Colours, by their name in OpenCV.',
)
_OPACITY = flags.DEFINE_float(
  'opacity', 0.5, 'Of the colours.', lower_bound=0.0, upper_bound=1.0
)
_FPS = flags.DEFINE_float(
  'fps',
  None,
  'Frames per second; by default the pace of the video.',
  lower_bound=0.1,
  upper_bound=100.0,
)


def main(arguments: list[str]) -> None:
  """Makes the picture that the flags tell of."""
  video = arguments[0]
  out = pathlib.Path(_OUT.value or '').expanduser()
  token = _check_flags(arguments, out)

  import jax

  # What was compiled once is not compiled again.
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.path.expanduser('~/.cache/dualformer_jax')
    jax.config.update('jax_compilation_cache_dir', cache)

  from dualformer_jax.models import explain
  from dualformer_jax.recognizer import Recognizer

  recognizer = Recognizer.load(_CHECKPOINT.value or '')
  model, preprocessing = recognizer.model, recognizer.preprocessing
  # Mistakes are told before the video is read.
  last = len(model.depths) - 1
  layer = _LAYER.value or f'blocks.{last}.{model.depths[last] - 1}'
  explain.find_block(model, layer)
  label = None
  if _LABEL.value is not None:
    label = recognizer.class_number(_LABEL.value)
  if _TOKENS.value and not model.token_label:
    raise UserError(f'--tokens: {recognizer.folder} has no token-label head')

  views = recognizer.views(video)
  view = len(views) // 2 if _VIEW.value is None else _VIEW.value
  if view >= len(views):
    raise UserError(
      f'--view={view}: the model takes {len(views)} views of a video; expected '
      f'a number below {len(views)}'
    )
  clip = recognizer.normalize(views[view : view + 1])
  # The same view, but as sharp as the picture is to be.
  side = _RESOLUTION.value or model.image_size
  sharp = dataclasses.replace(preprocessing, image_size=side)
  pictures = test_views(video, sharp)[view]

  colormap, opacity = _COLORMAP.value or '', _OPACITY.value or 0.0
  legend = None
  if token is not None:
    attention = recognizer.attention(clip, layer, token)[0]
    low, high = attention.min(), attention.max()
    heat = (attention - low) / max(high - low, np.finfo(np.float32).tiny)
    cells = heat_maps.draw_cells(heat, pictures)
    pictures = heat_maps.draw_heat(pictures, cells, colormap, opacity)
    _outline(pictures, token, attention.shape)
    what = (
      f'attention of token {",".join(map(str, token))} at {layer}, '
      f'{low * attention.size:.2f} to {high * attention.size:.2f} times an '
      'even share'
    )
  elif _TOKENS.value:
    classes = recognizer.token_logits(clip)[0].argmax(axis=-1)
    colors, legend = _legend(classes, recognizer.class_names, side)
    cells = heat_maps.draw_cells(colors, pictures)
    pictures = heat_maps.blend(pictures, cells, opacity)
    what = 'classes of tokens'
  else:
    probabilities = recognizer.probabilities(views)
    for name, probability in recognizer.top(probabilities):
      print(f'{probability:10.6f}  {name}')
    label = int(probabilities.argmax()) if label is None else label
    heat = recognizer.gradcam(clip, layer, label)[0]
    pictures = heat_maps.draw_heat(pictures, heat, colormap, opacity)
    what = f'Grad-CAM of {recognizer.class_names[label]!r} at {layer}'
    if not heat.any():
      what += ' (which is empty: nothing there speaks for the class)'

  _write(
    out,
    pictures,
    legend,
    _FPS.value or heat_maps.clip_fps(video, preprocessing),
  )
  print(f'{what}, view {view} of 0 to {len(views) - 1} -> {out}')


def _check_flags(arguments: list[str], out: pathlib.Path) -> Token | None:
  """Returns the token of --attention, or raises a UserError."""
  if len(arguments) > 1:
    raise UserError(f'{arguments[1]!r} is too much; expected one video')
  if out.suffix.lower() not in _FORMATS:
    raise UserError(
      f'--out={out}: expected a name that ends in {", ".join(_FORMATS)}'
    )
  if out.is_dir() or (out.exists() and not _OVERWRITE.value):
    raise UserError(
      f'--out={out} exists; choose another, or add --overwrite to replace a '
      'file'
    )
  given = {
    '--label': _LABEL.value is not None,
    '--attention': _ATTENTION.value is not None,
    '--tokens': _TOKENS.value,
    '--layer': _LAYER.value is not None,
  }
  for one, other in (
    ('--attention', '--label'),
    ('--tokens', '--label'),
    ('--tokens', '--attention'),
    ('--tokens', '--layer'),
  ):
    if given[one] and given[other]:
      raise UserError(
        f'{other} has no effect with {one}; leave one of them out'
      )
  if _ATTENTION.value is None:
    return None
  if len(_ATTENTION.value) != 3 or not all(
    number.isdecimal() for number in _ATTENTION.value
  ):
    raise UserError(
      f'--attention={",".join(_ATTENTION.value)}: expected FRAME,ROW,COLUMN of '
      'a token, counted from 0'
    )
  frame, row, column = map(int, _ATTENTION.value)
  return frame, row, column


def _outline(
  pictures: UInt8[np.ndarray, 't h w 3'], token: Token, grid: Token
) -> None:
  """Draws a white frame around the place of a token."""
  tokens = np.zeros(grid, bool)
  tokens[token] = True
  drawn = heat_maps.draw_cells(tokens, pictures)
  for picture, cells in zip(pictures, drawn, strict=True):
    ys, xs = map(np.ndarray.tolist, np.nonzero(cells))
    if ys:
      white = (255, 255, 255)
      cv2.rectangle(picture, (xs[0], ys[0]), (xs[-1], ys[-1]), white)


def _legend(
  classes: Int[np.ndarray, 'd y x'], names: tuple[str, ...], width: int
) -> tuple[UInt8[np.ndarray, 'd y x 3'], UInt8[np.ndarray, 'h width 3']]:
  """Returns the colour of each token, and a picture of what colours mean.

  Classes beyond the most frequent ones are grey.
  """
  shown = collections.Counter(classes.ravel().tolist()).most_common(_CLASSES)
  colors = np.full((*classes.shape, 3), 128, np.uint8)
  legend = np.zeros((_LINE * len(shown), width, 3), np.uint8)
  for place, (label, count) in enumerate(shown):
    hsv = np.array([[[180 * place // _CLASSES, 200, 255]]], np.uint8)
    color = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]
    colors[classes == label] = color
    line = legend[_LINE * place : _LINE * (place + 1)]
    line[2:-2, 2 : _LINE - 2] = color
    text = f'{names[label]} {count / classes.size:.0%}'
    text = text.encode('ascii', 'replace').decode()  # all that OpenCV can draw
    white = (255, 255, 255)
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(line, text, (_LINE + 2, 12), font, 0.4, white)
    print(f'{count / classes.size:7.1%}  {names[label]}')
  return colors, legend


def _write(
  out: pathlib.Path,
  pictures: UInt8[np.ndarray, 't h w 3'],
  legend: UInt8[np.ndarray, 'lines w 3'] | None,
  fps: float,
) -> None:
  """Writes the file that `out` names, as its ending says; whole or not at all.

  Raises:
    UserError: it cannot be written.
  """
  kind = out.suffix.lower()
  if kind == '.png':
    count = min(_STRIP, len(pictures))
    chosen = pictures[np.arange(count) * len(pictures) // count]
    pictures = np.concatenate(chosen, axis=1)[None]
  if legend is not None:
    missing = pictures.shape[2] - legend.shape[1]
    legend = np.pad(legend, [(0, 0), (0, missing), (0, 0)])
    legend = np.broadcast_to(legend, (len(pictures), *legend.shape))
    pictures = np.concatenate([pictures, legend], axis=1)
  if kind == '.png':
    content = cv2.imencode('.png', pictures[0][..., ::-1])[1].tobytes()
  elif kind == '.mp4':
    content = decoding.encode_mp4(pictures, fps=fps)
  else:
    content = _encode_gif(pictures, fps)
  partial = out.with_name(f'.{out.name}.partial')
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    partial.replace(out)
  except OSError as error:
    raise UserError(f'--out={out} cannot be written: {error}') from error


def _encode_gif(pictures: UInt8[np.ndarray, 't h w 3'], fps: float) -> bytes:
  """A GIF that repeats for ever, in the 256 colours that suit it best."""
  rate = fractions.Fraction(fps).limit_denominator(1001)
  height, width = pictures.shape[1:3]
  file = io.BytesIO()
  with av.open(file, 'w', format='gif') as container:
    stream = container.add_stream('gif', rate=rate)
    stream.height, stream.width, stream.pix_fmt = height, width, 'pal8'
    graph = av.filter.Graph()
    rgb = av.VideoFormat('rgb24')
    source = graph.add_buffer(
      width=width, height=height, format=rgb, time_base=1 / rate
    )
    split, palette, use, sink = map(
      graph.add, ('split', 'palettegen', 'paletteuse', 'buffersink')
    )
    source.link_to(split)
    split.link_to(palette)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, picture in enumerate(pictures):
      frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
      frame.pts = index
      graph.vpush(frame)
    graph.vpush(None)
    for index in range(len(pictures)):
      frame = graph.vpull()
      frame.pts, frame.time_base = index, 1 / rate
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return file.getvalue()


def cli() -> None:
  """Runs the command."""
  command_line.run(main, arguments='VIDEO')


if __name__ == '__main__':
  cli()
