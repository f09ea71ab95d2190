"""What is minimised, for a batch of class scores."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax


def cross_entropy(
  logits: Float[Array, 'b k'], labels: Int[Array, 'b'] | Float[Array, 'b k']
) -> Float[Array, '']:
  """Returns the mean cross-entropy, in nats.

  Args:
    logits: class scores.
    labels: one class for each clip; or, where a clip may have several classes,
      1 for those it has and 0 for the others. Then classes are independent,
      and the mean runs over clips and classes.
  """
  if labels.ndim == 1:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  else:
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
  return jnp.mean(losses)
