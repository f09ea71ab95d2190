"""Loss functions."""

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
  """Returns the mean cross-entropy between logits and labels, in nats.

  With `multi_label`, classes are independent: the loss is the binary
  cross-entropy, averaged over clips and classes. Label smoothing spreads a
  share of the label evenly over all classes (Szegedy et al., arXiv 1512.00567)
  or, with `multi_label`, over 0 and 1.
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
  """Returns the mean cross-entropy; no gradient flows through the targets."""
  targets = jax.lax.stop_gradient(targets)
  return jnp.mean(optax.softmax_cross_entropy(logits, targets))
