"""What is minimised, for a batch of class scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax


def cross_entropy(
  logits: Float[Array, 'b k'],
  labels: Int[Array, 'b'] | Float[Array, 'b k'],
  *,
  multi_label: bool = False,
  label_smoothing: float = 0.0,
) -> Float[Array, '']:
  """Returns the mean cross-entropy, in nats.

  Args:
    logits: class scores.
    labels: the class of each clip, or the shares that classes have in it, which
      add up to 1. With multi_label 1 for classes that a clip has and 0 for the
      others, or in between where clips are mixed.
    multi_label: whether a clip may have several classes. Then they are
      independent, and the mean runs over clips and classes.
    label_smoothing: share of the labels that is spread evenly over all classes
      (Szegedy et al., arXiv 1512.00567) or, with multi_label, over yes and no.
  """
  if label_smoothing and multi_label:
    labels = (1 - label_smoothing) * labels + label_smoothing / 2
  elif label_smoothing:
    if labels.ndim == 1:
      labels = jax.nn.one_hot(labels, logits.shape[-1])
    labels = optax.smooth_labels(labels, label_smoothing)
  if multi_label:
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
  elif labels.ndim == 1:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  else:
    losses = optax.softmax_cross_entropy(logits, labels)
  return jnp.mean(losses)


def soft_cross_entropy(
  logits: Float[Array, '... k'], targets: Float[Array, '... k']
) -> Float[Array, '']:
  """Returns the mean cross-entropy with soft labels, in nats.

  Args:
    logits: class scores, of tokens say.
    targets: the share of each class, which add up to 1; no gradient passes.
  """
  targets = jax.lax.stop_gradient(targets)
  return jnp.mean(optax.softmax_cross_entropy(logits, targets))
