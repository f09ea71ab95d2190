"""Recognizer: a checkpoint that is loaded and ready to use."""

import difflib
import functools
import os
import pathlib
from typing import Any

import jax
from jaxtyping import Float, UInt8
import numpy as np

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.errors import UserError
from dualformer_jax.evaluation import forward
from dualformer_jax.inference import explain
from dualformer_jax.input_pipeline import transforms

Video = str | os.PathLike[str] | UInt8[np.ndarray, 't h w 3']
Clips = Float[np.ndarray | jax.Array, 'b t h w 3']


class Recognizer:
  """A video classifier with its preprocessing and class names.

  A video is a path or RGB frames, uint8 [t, h, w, 3]. Views are uint8 clips of
  a video, [v, t, h, w, 3], as `views` returns them. Clips are normalized
  float32 [b, t, h, w, 3], as `normalize` returns them. Methods raise a
  UserError if a video cannot be decoded, or if there is no such class, layer or
  token.

  Attributes:
    class_names: name of each class.
    preprocessing: frame sampling, crops and normalization.
    model: the Flax module.
    variables: its parameters and BatchNorm statistics.
    folder: folder of the checkpoint, for error messages.
    multi_label: whether a video may have several classes.
    activation: sigmoid if `multi_label`, else softmax.
  """

  def __init__(
    self,
    variables: dict[str, Any],
    metadata: checkpoint.CheckpointMetadata,
    folder: pathlib.Path,
    dtype: str | None = None,
  ):
    """Initializes from the result of `checkpoint.load_model`; see `load`."""
    if dtype is None and jax.default_backend() == 'cpu':
      dtype = 'float32'  # few CPUs have instructions for bfloat16
    self.class_names = metadata.class_names
    self.preprocessing = metadata.preprocessing
    self.model = metadata.build_model(**({'dtype': dtype} if dtype else {}))
    self.variables = variables
    self.folder = folder
    self.multi_label = metadata.multi_label
    self.activation = jax.nn.sigmoid if self.multi_label else jax.nn.softmax
    self._apply = jax.jit(self.model.apply)
    self._view_logits = jax.jit(
      functools.partial(
        forward.view_logits, model=self.model, normalize=self.normalize
      )
    )

  @classmethod
  def load(
    cls, path: str | os.PathLike[str], *, dtype: str | None = None
  ) -> 'Recognizer':
    """Loads a checkpoint.

    Args:
      path: a checkpoint folder; the workdir of a training run for its latest
        checkpoint, WORKDIR/best for its best; or hf://OWNER/NAME[@REVISION].
      dtype: compute dtype, 'float32' or 'bfloat16'. By default float32 on a
        CPU and the dtype of the model config elsewhere.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    folder = checkpoint.find(path)
    variables, metadata = checkpoint.load_model(folder)
    device = jax.local_devices()[0]
    return cls(jax.device_put(variables, device), metadata, folder, dtype)

  def views(
    self, video: Video
  ) -> UInt8[np.ndarray, 'views frames size size 3']:
    """Returns the test views of a video, ordered by crop, then by time."""
    video = video if isinstance(video, np.ndarray) else os.fspath(video)
    return transforms.eval_views(video, self.preprocessing)

  def normalize(
    self, clips: UInt8[np.ndarray | jax.Array, 'b t h w 3']
  ) -> Float[jax.Array, 'b t h w 3']:
    """Returns normalized float32 clips of uint8 clips (or views)."""
    return forward.normalize(
      jax.numpy.asarray(clips),
      self.preprocessing.pixel_mean,
      self.preprocessing.pixel_std,
    )

  def logits(self, clips: Clips) -> Float[np.ndarray, 'b k']:
    """Returns the class logits of each normalized clip."""
    return np.asarray(self._apply(self.variables, clips).logits)

  def features(self, clips: Clips) -> Float[np.ndarray, 'b c']:
    """Returns the features of each normalized clip: the mean of `tokens`."""
    return np.asarray(self._apply(self.variables, clips).features)

  def tokens(
    self, clips: Clips
  ) -> Float[np.ndarray, 'b frames rows columns c']:
    """Returns the features of each token: the output of the last norm."""
    _, [tokens] = explain.apply_and_capture(
      self.model, self.variables, clips, ('norm',)
    )
    return np.asarray(tokens, np.float32)

  def token_logits(
    self, clips: Clips
  ) -> Float[np.ndarray, 'b frames rows columns k']:
    """Returns the class logits of each token, from the token-label head."""
    token_logits = self._apply(self.variables, clips).token_logits
    if token_logits is None:
      raise ValueError(f'{self.folder} has no token-label head')
    return np.asarray(token_logits)

  def probabilities(
    self, views: UInt8[np.ndarray, 'v t h w 3']
  ) -> Float[np.ndarray, ' k']:
    """Returns class probabilities, averaged over the views of a video."""
    [logits] = self._view_logits(self.variables, views[None])
    return np.asarray(self.activation(logits).mean(axis=0))

  def predict(self, video: Video, top_k: int = 5) -> list[tuple[str, float]]:
    """Returns the most probable classes of a video and their probabilities."""
    return self.top(self.probabilities(self.views(video)), top_k)

  def score(
    self, views: UInt8[np.ndarray, 'b t h w 3']
  ) -> tuple[Float[np.ndarray, 'b k'], Float[np.ndarray, 'b c']]:
    """Returns class probabilities and features of each uint8 view.

    Their means over the views of a video are those of the video.
    """
    output = self._apply(self.variables, self.normalize(views))
    probabilities = self.activation(output.logits)
    return np.asarray(probabilities), np.asarray(output.features)

  def top(
    self, probabilities: Float[np.ndarray, ' k'], top_k: int = 5
  ) -> list[tuple[str, float]]:
    """Returns names and probabilities of the most probable classes."""
    best = np.argsort(-probabilities, kind='stable')[:top_k]
    return [(self.class_names[i], float(probabilities[i])) for i in best]

  def gradcam(
    self,
    clips: Clips,
    layer: str | None = None,
    label: str | int | None = None,
  ) -> Float[np.ndarray, 'b t h w']:
    """Returns Grad-CAM maps, from 0 to 1: which pixels are evidence of a class.

    Args:
      clips: normalized views of one video.
      layer: a block, as 'blocks.STAGE.BLOCK', counted from 0; by default the
        last one.
      label: name or index of a class; by default the most probable class.
    """
    layer = layer or explain.last_layer(self.model)
    block = explain.find_block(self.model, layer)
    index = np.int32(-1 if label is None else self.class_index(label))
    heat = explain.gradcam(
      self.model, self.variables, clips, index, block, self.multi_label
    )
    return np.asarray(heat)

  def attention(
    self, clips: Clips, layer: str, token: tuple[int, int, int]
  ) -> Float[np.ndarray, 'b frames rows columns']:
    """Returns the attention of a token to each token in a global block.

    Weights are averaged over heads and sum to 1. The attention to a pooled
    token is divided among the tokens it was pooled from.

    Args:
      clips: normalized clips.
      layer: a block, as 'blocks.STAGE.BLOCK', counted from 0; BLOCK is odd.
      token: frame, row and column of the query token, from 0.
    """
    stage, index = explain.find_block(self.model, layer)
    if index % 2 == 0:
      raise UserError(
        f'layer {layer!r} has attention within windows; expected a block with '
        f'global attention, such as blocks.{stage}.{index + 1}'
      )
    grid = self.model.token_grid(stage)
    if not all(0 <= i < size for i, size in zip(token, grid, strict=True)):
      raise UserError(
        f'layer {layer!r} has no token {token}; expected numbers below {grid}'
      )
    attention = explain.global_attention(
      self.model, self.variables, clips, np.asarray(token), (stage, index)
    )
    return np.asarray(attention)

  def class_index(self, label: str | int) -> int:
    """Returns the index of a class, given its name or its index."""
    if label in self.class_names:
      return self.class_names.index(label)
    count = len(self.class_names)
    if str(label).isdecimal() and int(label) < count:
      return int(label)
    nearest = difflib.get_close_matches(str(label), self.class_names, 3)
    names = ', '.join(map(repr, nearest or self.class_names[:3]))
    raise UserError(
      f'there is no class {label!r}; expected one such as {names}, or a number '
      f'below {count}'
    )
