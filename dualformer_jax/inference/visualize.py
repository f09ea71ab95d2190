"""Draws explanations of a prediction on a clip, and writes the pictures."""

import collections
import dataclasses
import pathlib

from jaxtyping import UInt8
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.files import output_file
from dualformer_jax.inference import drawing
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline import transforms, video_writer
from dualformer_jax.input_pipeline.video_reader import VideoReader

_STRIP_FRAMES = 8  # of a .png file
_MAX_CLASSES = 8  # with a color and a line in the legend


@dataclasses.dataclass(frozen=True)
class Clip:
  """A view of a video."""

  view: UInt8[np.ndarray, 't h w 3']  # at the size of the model
  frames: UInt8[np.ndarray, 't y x 3']  # at the size that is shown
  fps: float  # frames per second at which it plays as fast as the video
  index: int  # of the view


@dataclasses.dataclass(frozen=True)
class Picture:
  """RGB frames with values drawn on them, and lines of the legend below."""

  frames: UInt8[np.ndarray, 't h w 3']
  caption: str
  legend: tuple[str, ...] = ()


def load_clip(
  recognizer: Recognizer,
  video: str,
  views: UInt8[np.ndarray, 'v t h w 3'],
  *,
  index: int | None = None,
  size: int | None = None,
) -> Clip:
  """Returns a view, by default the middle one, at a size in pixels.

  Raises:
    UserError: there is no such view, or the video cannot be decoded.
  """
  index = len(views) // 2 if index is None else index
  if index >= len(views):
    raise UserError(f'--view={index}: expected a number below {len(views)}')
  p = recognizer.preprocessing
  sharp = dataclasses.replace(p, image_size=size or p.image_size)
  frames = transforms.eval_views(video, sharp)[index]
  return Clip(views[index], frames, clip_fps(video, p), index)


def clip_fps(video: str, preprocessing: transforms.Preprocessing) -> float:
  """Returns frames per second at which a clip plays as fast as its video."""
  with VideoReader(video) as reader:
    fps, seconds = reader.fps, reader.duration
  if preprocessing.sampling == 'dense':
    return fps / preprocessing.frame_interval
  return min(fps, preprocessing.num_frames / seconds) if seconds else fps


def draw_gradcam(
  recognizer: Recognizer,
  clip: Clip,
  layer: str,
  label: str | int,
  style: tuple[str, float] = ('turbo', 0.5),
) -> Picture:
  """Draws Grad-CAM of a class with a colormap and its opacity."""
  name = recognizer.class_names[recognizer.class_index(label)]
  clips = recognizer.normalize(clip.view[None])
  heat = recognizer.gradcam(clips, layer, label)[0]
  caption = f'Grad-CAM of {name!r} at {layer}'
  if not heat.any():
    caption += ' (empty: no token there is evidence of the class)'
  frames = drawing.draw_heat(clip.frames, heat, *style)
  return Picture(frames, caption)


def draw_attention(
  recognizer: Recognizer,
  clip: Clip,
  layer: str,
  token: str,
  style: tuple[str, float] = ('turbo', 0.5),
) -> Picture:
  """Draws the attention of a token with a colormap and its opacity."""
  frame, row, column = map(int, token.split(','))
  clips = recognizer.normalize(clip.view[None])
  attention = recognizer.attention(clips, layer, (frame, row, column))[0]
  low, high = attention.min(), attention.max()
  heat = (attention - low) / max(high - low, np.finfo(np.float32).tiny)
  pixels = drawing.token_pixels(heat, clip.frames)
  frames = drawing.draw_heat(clip.frames, pixels, *style)
  drawing.outline_token(frames, (frame, row, column), attention.shape)
  return Picture(
    frames,
    f'attention of token {token} at {layer}, '
    f'{low * attention.size:.2f} to {high * attention.size:.2f} times the mean',
  )


def draw_token_classes(
  recognizer: Recognizer, clip: Clip, opacity: float
) -> tuple[Picture, list[tuple[str, float]]]:
  """Draws the most probable class of each token, with a legend.

  The most frequent classes have a color; others are gray.

  Returns:
    The picture, and the name of each class in it with its share of tokens.
  """
  clips = recognizer.normalize(clip.view[None])
  classes = recognizer.token_logits(clips)[0].argmax(axis=-1)
  counts = collections.Counter(classes.ravel().tolist())
  colors = np.full((*classes.shape, 3), 128, np.uint8)
  shares = []
  for i, (label, count) in enumerate(counts.most_common(_MAX_CLASSES)):
    colors[classes == label] = drawing.PALETTE[i]
    shares.append((recognizer.class_names[label], count / classes.size))
  pixels = drawing.token_pixels(colors, clip.frames)
  frames = drawing.blend(clip.frames, pixels, opacity)
  legend = tuple(f'{name} {share:.0%}' for name, share in shares)
  return Picture(frames, 'classes of tokens', legend), shares


def write(path: pathlib.Path, picture: Picture, fps: float) -> None:
  """Writes a .gif or .mp4 file, or a .png file with a strip of frames."""
  frames, suffix = picture.frames, path.suffix.lower()
  if suffix == '.png':
    count = min(_STRIP_FRAMES, len(frames))
    chosen = frames[np.arange(count) * len(frames) // count]
    frames = np.concatenate(chosen, axis=1)[None]
  if picture.legend:
    legend = drawing.draw_legend(picture.legend, frames.shape[2])
    legend = np.broadcast_to(legend, (len(frames), *legend.shape))
    frames = np.concatenate([frames, legend], axis=1)
  with output_file(path) as file:
    if suffix == '.png':
      file.write(drawing.encode_png(frames[0]))
    elif suffix == '.mp4':
      video_writer.write_mp4(file, frames, fps=fps)
    else:
      drawing.write_gif(file, frames, fps)
