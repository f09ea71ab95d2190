"""Token labels: soft labels of each token, from a teacher model or stored."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline.stored_labels import StoredLabels
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training.step import TokenTargets


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Source of token labels: a teacher model or stored labels."""

  targets: TokenTargets
  clip_frames: int  # frames per clip that the training loader must provide
  top: int  # logits kept per token
  variables: Any = None  # arrays or their shapes; None for stored labels
  stored: StoredLabels | None = None

  def variables_on(self, mesh: jax.sharding.Mesh) -> Any:
    """Returns the variables, sharded over the mesh like the student's."""
    return sharding.put_tree(
      self.variables, sharding.tree_shardings(self.variables, mesh)
    )


def teacher_from_labels(
  config: Any, model: DualFormer, stored: StoredLabels | None = None
) -> Teacher:
  """Returns a teacher from stored labels of whole frames.

  Stored logits are interpolated linearly at the centers of the clip's tokens,
  and flipped where augment.augment_batch flips the clip with the same key.
  Logits that are not stored are 0. `stored` is None when compiling without
  data.
  """
  _, num_rows, num_columns = model.token_grid()
  top = config.token_labels.top or model.num_classes

  def targets(
    key,
    variables,
    clips,
    *,
    token_values: Float[Array, 'b d i j top'],
    token_classes: Int[Array, 'b d i j top'],
    token_boxes: Float[Array, 'b 4'],
  ):
    del variables, clips
    empty = jnp.zeros((*token_values.shape[:-1], model.num_classes))
    # Of the clip, relative to the frame.
    top_edge, left, height, width = token_boxes.T
    rows = _weights(top_edge, height, num_rows, empty.shape[2])
    columns = _weights(left, width, num_columns, empty.shape[3])

    def crop(values):
      dense = jnp.put_along_axis(
        empty, token_classes, values, axis=-1, inplace=False
      )
      path = 'bhi,bwj,bdijk->bdhwk'
      return jnp.einsum(path, rows, columns, dense, precision='highest')

    logits, known = crop(token_values), crop(jnp.ones_like(token_values))
    if config.dataset.flip:
      keys = jax.random.split(key, logits.shape[0])
      mirror = jax.vmap(dm_pix.random_flip_left_right)
      logits, known = (jnp.asarray(mirror(keys, x)) for x in (logits, known))
    # A stored logit can be negative and still rank above classes that are not
    # stored. Tiny weights are rounding errors.
    ranks = jnp.where(known > 1e-3, logits, -jnp.inf)
    return _softmax_of_top(logits, ranks, top)

  return Teacher(targets, model.num_frames, top, stored=stored)


def teacher_from_model(
  config: Any,
  model: DualFormer,
  teacher: DualFormer,
  variables: Any,
  rescale: tuple[Sequence[float], Sequence[float]],
) -> Teacher:
  """Returns a teacher with a model that runs inside the training step.

  It runs in evaluation mode, and no gradient flows through it. If the clips
  have n times its frames, it takes every nth. `model` is the student. `rescale`
  has the factor and the offset of R, G and B from the student's normalization
  to the teacher's.
  """
  num_frames, *grid = model.token_grid()
  _, *teacher_grid = teacher.token_grid()
  clip_frames = max(teacher.num_frames, model.num_frames)
  dataset = config.dataset
  span = dataset.frame_interval * model.num_frames
  if (
    clip_frames % teacher.num_frames
    or clip_frames % model.num_frames
    or teacher.image_size != model.image_size
    or teacher_grid != grid
    or (dataset.sampling == 'dense' and span % clip_frames)
  ):
    raise UserError(
      f'config.token_labels.teacher={config.token_labels.teacher} has '
      f'{teacher.num_frames} frames of {teacher.image_size} pixels and '
      f'{teacher_grid} tokens, the model {model.num_frames} of '
      f'{model.image_size}, at an interval of {dataset.frame_interval}, and '
      f'{grid}; expected the same size and grid, and one number of frames to '
      'be a multiple of the other'
    )
  top = config.token_labels.top or model.num_classes

  def targets(key, variables, clips):
    del key
    factor, offset = (jnp.asarray(values) for values in rescale)
    clips = clips[:, :: clips.shape[1] // teacher.num_frames] * factor + offset
    output: Any = teacher.apply(
      jax.lax.stop_gradient(variables), clips, score_tokens=True
    )
    return soft_labels(output.token_logits, num_frames, top)

  return Teacher(targets, clip_frames, top, variables)


def soft_labels(
  logits: Float[Array, 'b teacher_frames h w k'], num_frames: int, top: int = 5
) -> Float[Array, 'b num_frames h w k']:
  """Returns soft labels from a teacher's token logits.

  As in the published implementation, all logits but the `top` highest become 0
  (not minus infinity) before softmax. Before that, frames i, i + num_frames,
  ... are averaged if the teacher has more token frames than the student's
  `num_frames`, and repeated if it has fewer; one must be a multiple of the
  other.
  """
  b, teacher_frames, *rest = logits.shape
  if teacher_frames >= num_frames:
    logits = logits.reshape(b, teacher_frames // num_frames, num_frames, *rest)
    logits = jnp.mean(logits, axis=1)
  else:
    logits = jnp.repeat(logits, num_frames // teacher_frames, axis=1)
  return _softmax_of_top(logits, logits, top)


def _weights(
  start: Float[Array, 'b'],
  size: Float[Array, 'b'],
  num_tokens: int,
  num_stored: int,
) -> Float[Array, 'b tokens stored']:
  """Returns interpolation weights for the tokens of a part of an axis."""
  centers = (jnp.arange(num_tokens) + 0.5) / num_tokens
  positions = (start[:, None] + centers * size[:, None]) * num_stored - 0.5
  positions = jnp.clip(positions, 0, num_stored - 1)
  distance = jnp.abs(positions[..., None] - jnp.arange(num_stored))
  return jnp.maximum(0, 1 - distance)


def _softmax_of_top(
  logits: Float[Array, '... k'], ranks: Float[Array, '... k'], top: int
) -> Float[Array, '... k']:
  """Sets the logits to 0 whose ranks are not among the `top` highest."""
  if top < logits.shape[-1]:
    lowest = jax.lax.top_k(ranks, top)[0][..., -1:]
    logits = jnp.where(ranks >= lowest, logits, 0.0)
  return jax.nn.softmax(logits)
