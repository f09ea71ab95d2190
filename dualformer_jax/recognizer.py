"""Recognizer: a loaded checkpoint, ready to use; the one inference path."""

import difflib
import functools
import os
import pathlib
from typing import Any

import jax
from jaxtyping import Float, UInt8
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import views
from dualformer_jax.models import explain
from dualformer_jax.models.dualformer import Output
from dualformer_jax.training import augment, checkpoint, step

Video = str | os.PathLike[str] | UInt8[np.ndarray, 't h w 3']


class Recognizer:
  """A video classifier with all that it takes to use it.

  A video is the path of a file or its frames, RGB, uint8 [t, h, w, 3]. Clips
  are normalised, float32 [b, t, h, w, 3]; see `normalize`.

  Attributes:
    class_names: one for each class, in order.
    preprocessing: how videos become views.
    model: the Flax module.
    variables: its parameters and BatchNorm statistics.
    folder: of the checkpoint.
    multi_label: whether a video may have several classes; then probabilities
      do not add to 1.
  """

  def __init__(
    self,
    variables: dict[str, Any],
    description: checkpoint.Description,
    folder: pathlib.Path,
    dtype: str | None = None,
  ):
    """Makes a recognizer of what `checkpoint.load_model` returns; see load."""
    if dtype is None and jax.default_backend() == 'cpu':
      dtype = 'float32'  # where few have instructions for bfloat16
    changes = {} if dtype is None else {'dtype': dtype}
    self.class_names = description.class_names
    self.preprocessing = description.preprocessing
    self.model = description.build_model(**changes)
    self.variables = variables
    self.folder = folder
    self.multi_label = description.multi_label
    self._apply = jax.jit(self.model.apply)
    self._probabilities = jax.jit(
      functools.partial(
        step.eval_step,
        model=self.model,
        normalize=self.normalize,
        multi_label=self.multi_label,
      )
    )
    self._score = jax.jit(self._scores_of)
    self._tokens = jax.jit(self._tokens_of)
    self._gradcam = jax.jit(
      functools.partial(
        explain.gradcam, model=self.model, multi_label=self.multi_label
      ),
      static_argnames='block',
    )
    self._attention = jax.jit(
      functools.partial(explain.global_attention, model=self.model),
      static_argnames='block',
    )

  @classmethod
  def load(
    cls, path: str | os.PathLike[str], *, dtype: str | None = None
  ) -> 'Recognizer':
    """Returns the checkpoint at `path`, ready to use.

    Args:
      path: a checkpoint folder, or the workdir of a training run, of which the
        newest checkpoint is taken (WORKDIR/best for the best).
      dtype: 'float32' or 'bfloat16', what to compute in; by default float32 on
        a CPU, and elsewhere what the model was trained with.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    folder = checkpoint.find(path)
    variables, description = checkpoint.load_model(folder)
    device = jax.local_devices()[0]
    return cls(jax.device_put(variables, device), description, folder, dtype)

  def views(
    self, video: Video
  ) -> UInt8[np.ndarray, 'views frames size size 3']:
    """Returns the test views of a video: crop by crop, clips in time order.

    Raises:
      UserError: the video cannot be decoded.
    """
    return views.test_views(_as_video(video), self.preprocessing)

  def normalize(
    self, clips: UInt8[np.ndarray | jax.Array, 'b t h w 3']
  ) -> Float[jax.Array, 'b t h w 3']:
    """Returns what the model takes, of clips (or the views of one video)."""
    return augment.normalize(
      jax.numpy.asarray(clips),
      self.preprocessing.pixel_mean,
      self.preprocessing.pixel_std,
    )

  def logits(
    self, clips: Float[np.ndarray | jax.Array, 'b t h w 3']
  ) -> Float[np.ndarray, 'b k']:
    """Returns the class scores of each clip."""
    return np.asarray(self._output(clips).logits)

  def features(
    self, clips: Float[np.ndarray | jax.Array, 'b t h w 3']
  ) -> Float[np.ndarray, 'b c']:
    """Returns the mean over tokens of the last norm, of each clip."""
    return np.asarray(self._output(clips).features)

  def tokens(
    self, clips: Float[np.ndarray | jax.Array, 'b t h w 3']
  ) -> Float[np.ndarray, 'b frames rows columns c']:
    """Returns the last norm of each token, of which `features` is the mean."""
    return np.asarray(self._tokens(self.variables, clips))

  def token_logits(
    self, clips: Float[np.ndarray | jax.Array, 'b t h w 3']
  ) -> Float[np.ndarray, 'b frames rows columns k']:
    """Returns the class scores of each token of each clip.

    Raises:
      ValueError: the model has no token-label head.
    """
    token_logits = self._output(clips).token_logits
    if token_logits is None:
      raise ValueError(f'{self.folder} has no token-label head')
    return np.asarray(token_logits)

  def probabilities(
    self, views: UInt8[np.ndarray, 'v t h w 3']
  ) -> Float[np.ndarray, ' k']:
    """Returns the probability of each class, averaged over a video's views."""
    return np.asarray(self._probabilities(self.variables, views[None])[0])

  def predict(self, video: Video, top_k: int = 5) -> list[tuple[str, float]]:
    """Returns the most probable classes of a video and their probabilities.

    Args:
      video: path or frames.
      top_k: how many classes, at most.

    Raises:
      UserError: the video cannot be decoded.
    """
    return self.top(self.probabilities(self.views(video)), top_k)

  def score(
    self, views: UInt8[np.ndarray, 'b t h w 3']
  ) -> tuple[Float[np.ndarray, 'b k'], Float[np.ndarray, 'b c']]:
    """Returns class probabilities and features of each view, in one pass.

    Averaged over the views of a video they are `probabilities` and its
    features; the views may be of several videos.
    """
    probabilities, features = self._score(self.variables, views)
    return np.asarray(probabilities), np.asarray(features)

  def top(
    self, probabilities: Float[np.ndarray, ' k'], top_k: int = 5
  ) -> list[tuple[str, float]]:
    """Returns the names and probabilities of the most probable classes."""
    # Equal probabilities: the lower class first.
    best = np.argsort(-probabilities, kind='stable')[:top_k]
    return [(self.class_names[i], float(probabilities[i])) for i in best]

  def gradcam(
    self,
    clips: Float[np.ndarray | jax.Array, 'v t h w 3'],
    layer: str = 'blocks.3.1',
    label: str | int | None = None,
  ) -> Float[np.ndarray, 'v t h w']:
    """Returns where a block sees a class in each clip, from 0 to 1 (Grad-CAM).

    Args:
      clips: views of one video, normalised.
      layer: the block, as 'blocks.STAGE.BLOCK', counted from 0.
      label: name or number of the class; None for the one that is the most
        probable over all the clips.

    Raises:
      UserError: there is no such block or class.
    """
    block = explain.find_block(self.model, layer)
    number = -1 if label is None else self.class_number(label)
    maps = self._gradcam(self.variables, clips, np.int32(number), block=block)
    return np.asarray(maps)

  def attention(
    self,
    clips: Float[np.ndarray | jax.Array, 'b t h w 3'],
    layer: str,
    token: tuple[int, int, int],
  ) -> Float[np.ndarray, 'b frames rows columns']:
    """Returns how much a token attends to each other in a global block.

    It is the mean over heads, and adds up to 1. What goes to a pooled token is
    shared out among those that it was pooled from.

    Args:
      clips: normalised.
      layer: the block, as 'blocks.STAGE.BLOCK', counted from 0; BLOCK is odd.
      token: frame, row and column of the token that attends.

    Raises:
      UserError: there is no such block or token, or the block attends inside
        windows.
    """
    stage, place = explain.find_block(self.model, layer)
    if place % 2 == 0:
      raise UserError(
        f'layer {layer!r} attends inside windows; expected one with an odd '
        f'number in the end, such as blocks.{stage}.{place + 1}'
      )
    grid = explain.token_grid(self.model, stage)
    if not all(0 <= i < size for i, size in zip(token, grid, strict=True)):
      raise UserError(
        f'there is no token {token} at layer {layer!r}; expected a frame, a '
        f'row and a column, from 0 and below {grid}'
      )
    block = (stage, place)
    attention = self._attention(
      self.variables, clips, np.asarray(token), block=block
    )
    return np.asarray(attention)

  def class_number(self, label: str | int) -> int:
    """Returns the number of a class, given its name or its number.

    Raises:
      UserError: there is no such class.
    """
    if label in self.class_names:
      return self.class_names.index(label)
    count = len(self.class_names)
    if str(label).isdecimal() and int(label) < count:
      return int(label)
    nearest = difflib.get_close_matches(str(label), self.class_names, 3)
    names = ' or '.join(map(repr, nearest)) or 'one such as ' + ', '.join(
      map(repr, self.class_names[:3])
    )
    raise UserError(
      f'there is no class {label!r}; expected {names}, or a number below '
      f'{count}'
    )

  def _scores_of(self, variables: Any, views: Any) -> Any:
    output: Any = self.model.apply(variables, self.normalize(views))
    activation = jax.nn.sigmoid if self.multi_label else jax.nn.softmax
    return activation(output.logits), output.features

  def _tokens_of(self, variables: Any, clips: Any) -> Any:
    state: Any = self.model.apply(
      variables,
      clips,
      capture_intermediates=lambda module, _: module.name == 'norm',
      mutable=['intermediates'],
    )[1]
    (tokens,) = state['intermediates']['backbone']['norm']['__call__']
    return tokens.astype('float32')

  def _output(
    self, clips: Float[np.ndarray | jax.Array, 'b t h w 3']
  ) -> Output:
    return self._apply(self.variables, clips)


def _as_video(video: Video) -> Any:
  return video if isinstance(video, np.ndarray) else os.fspath(video)
