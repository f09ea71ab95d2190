"""Soft labels of tokens: what a frozen teacher says of each part of a clip.

The teacher is asked in the step, or was asked once for the whole dataset.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dualformer_jax.input_pipeline.stored_labels import StoredLabels
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Teacher:
  """What tells the step what the tokens of a clip show.

  Attributes:
    targets: makes soft labels; as of step.train_step.
    clip_frames: how many frames clips are to have for it.
    variables: of the model that is asked; None where labels are stored.
    stored: the stored labels; None where a model is asked.
  """

  targets: Callable[..., Float[Array, 'b d h w k']]
  clip_frames: int
  variables: Any = None
  stored: StoredLabels | None = None

  def on_mesh(self, mesh: jax.sharding.Mesh) -> Any:
    """Returns the variables, spread over the devices as a student's are."""
    return sharding.put_tree(
      self.variables, sharding.tree_shardings(self.variables, mesh)
    )


def soft_labels(
  logits: Float[Array, 'b teacher_frames h w k'], frames: int, top: int = 5
) -> Float[Array, 'b frames h w k']:
  """Returns the shares of classes that stand for a teacher's token scores.

  As in the published implementation: all scores but the highest `top` become 0
  (not minus infinity), then softmax. Of r times as many frames of tokens,
  frames i, i + frames, ... are averaged before.

  Args:
    logits: the teacher's scores.
    frames: of tokens, that the student has: a divisor or a multiple of the
      teacher's, whose scores are repeated if there are fewer.
    top: how many scores to keep, at most all.
  """
  b, teacher_frames, *rest = logits.shape
  if teacher_frames >= frames:
    logits = logits.reshape(b, teacher_frames // frames, frames, *rest)
    logits = jnp.mean(logits, axis=1)
  else:
    logits = jnp.repeat(logits, frames // teacher_frames, axis=1)
  return jax.nn.softmax(_keep_highest(logits, logits, top))


def _keep_highest(
  scores: Float[Array, '... k'], ranks: Float[Array, '... k'], top: int
) -> Float[Array, '... k']:
  """Sets the scores to 0 whose ranks are not among the highest `top`."""
  if top >= scores.shape[-1]:
    return scores
  lowest = jax.lax.top_k(ranks, top)[0][..., -1:]
  return jnp.where(ranks >= lowest, scores, 0.0)


def ask_teacher(
  key: PRNGKeyArray,
  teacher: Any,
  clips: Float[Array, 'b t y x 3'],
  *,
  model: DualFormer,
  frames: int,
  top: int,
  rescale: tuple[Sequence[float], Sequence[float]],
) -> Float[Array, 'b frames h w k']:
  """Returns soft labels of the tokens of clips, from a teacher at hand.

  Args:
    key: not used; see stored_labels.
    teacher: its parameters and BatchNorm statistics.
    clips: normalised as the student's are. If they have n times the teacher's
      frames, it takes every nth.
    model: the teacher, which is not trained: without dropout, with running
      statistics, and no gradient passes through it.
    frames: of tokens, that the student has.
    top: as in soft_labels.
    rescale: factor and summand of R, G, B that make the teacher's
      normalisation of the student's.
  """
  del key
  factor, summand = (jnp.asarray(values) for values in rescale)
  clips = clips[:, :: clips.shape[1] // model.num_frames] * factor + summand
  output: Any = model.apply(
    jax.lax.stop_gradient(teacher), clips, score_tokens=True
  )
  return soft_labels(output.token_logits, frames, top)


def stored_labels(
  key: PRNGKeyArray,
  teacher: Any,
  clips: Float[Array, 'b t y x 3'],
  *,
  token_values: Float[Array, 'b d i j top'],
  token_classes: Int[Array, 'b d i j top'],
  token_boxes: Float[Array, 'b 4'],
  grid: tuple[int, int],
  num_classes: int,
  top: int,
  flip: bool,
) -> Float[Array, 'b d h w k']:
  """Returns soft labels of the tokens of clips, from stored ones of videos.

  They are cut as the clip was: at the middle of each of its tokens, linearly
  between those of the whole frame, and mirrored where the clip is.

  Args:
    key: the one that augment.augment mirrors clips by.
    teacher: not used.
    clips: not used.
    token_values: scores of the whole frame, at the clip's times.
    token_classes: the classes that they are of; all others score 0.
    token_boxes: top, left, height and width of the clip, as shares of the
      frame.
    grid: rows and columns of the student's tokens.
    num_classes: number of classes, k.
    top: as in soft_labels.
    flip: whether clips are mirrored at random.
  """
  del teacher, clips
  empty = jnp.zeros((*token_values.shape[:-1], num_classes))

  def spread(values):
    """All classes of each stored token; those that have no value are 0."""
    return jnp.put_along_axis(
      empty, token_classes, values, axis=-1, inplace=False
    )

  def weights(first, size, tokens, stored):
    """Of each stored token for each of the clip's, [b, tokens, stored]."""
    middles = (jnp.arange(tokens) + 0.5) / tokens
    places = (first[:, None] + middles * size[:, None]) * stored - 0.5
    places = jnp.clip(places, 0, stored - 1)
    distance = jnp.abs(places[..., None] - jnp.arange(stored))
    return jnp.maximum(0, 1 - distance)

  top_edge, left, height, width = token_boxes.T
  rows = weights(top_edge, height, grid[0], empty.shape[2])
  columns = weights(left, width, grid[1], empty.shape[3])

  def cut(values):
    return jnp.einsum(
      'bhi,bwj,bdijk->bdhwk',
      rows,
      columns,
      spread(values),
      precision=jax.lax.Precision.HIGHEST,
    )

  scores, known = cut(token_values), cut(jnp.ones_like(token_values))
  if flip:
    keys = jax.random.split(key, scores.shape[0])
    mirror = jax.vmap(dm_pix.random_flip_left_right)
    scores, known = (jnp.asarray(mirror(keys, x)) for x in (scores, known))
  # A stored score may be negative, and yet higher than those that are not. What
  # has next to no weight is there by rounding.
  ranks = jnp.where(known > 1e-3, scores, -jnp.inf)
  return jax.nn.softmax(_keep_highest(scores, ranks, top))
