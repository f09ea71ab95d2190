"""What is minimised, for a batch of class scores."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax


def cross_entropy(
  logits: Float[Array, 'b k'],
  labels: Int[Array, 'b'] | Float[Array, 'b k'],
  *,
  multi_label: bool = False,
) -> Float[Array, '']:
  """Returns the mean cross-entropy, in nats.

  Args:
    logits: class scores.
    labels: the class of each clip, or the shares that classes have in it, which
      add up to 1. With multi_label 1 for classes that a clip has and 0 for the
      others, or in between where clips are mixed.
    multi_label: whether a clip may have several classes. Then they are
      independent, and the mean runs over clips and classes.
  """
  if multi_label:
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
  elif labels.ndim == 1:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  else:
    losses = optax.softmax_cross_entropy(logits, labels)
  return jnp.mean(losses)
