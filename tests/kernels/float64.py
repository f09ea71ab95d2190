"""Layers and their gradients in float64, from the formulas."""

from collections.abc import Callable
import math

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
  """Returns the softmax over the last axis."""
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Returns the attention of one head: [..., l, e], [..., m, e] -> [..., l, e].

  Args:
    q: queries.
    k: keys.
    v: values.
  """
  return softmax(q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])) @ v


def attention_and_gradients(
  q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, num_heads: int
) -> list[np.ndarray]:
  """Returns the output and the gradients of q, k and v.

  Args:
    q: queries [g, b, l, c], with the heads on consecutive channels.
    k: keys [g, b, m, c].
    v: values [g, b, m, c].
    dout: gradient of the output [g, b, l, c].
    num_heads: number of heads.
  """

  def split(x):
    x = np.asarray(x, np.float64)
    return np.moveaxis(x.reshape(*x.shape[:-1], num_heads, -1), -2, 0)

  def merge(x):
    return np.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)

  q, k, v, dout = map(split, (q, k, v, dout))
  scale = q.shape[-1] ** -0.5
  weights = softmax(q @ np.swapaxes(k, -1, -2) * scale)
  dweights = dout @ np.swapaxes(v, -1, -2)
  mean = (dweights * weights).sum(-1, keepdims=True)
  dscores = weights * (dweights - mean) * scale
  gradients = (
    dscores @ k,
    np.swapaxes(dscores, -1, -2) @ q,
    np.swapaxes(weights, -1, -2) @ dout,
  )
  return [merge(x) for x in (weights @ v, *gradients)]


# An output, and the function from its gradient to those of the arguments.
Pullback = tuple[np.ndarray, Callable[[np.ndarray], tuple[np.ndarray, ...]]]


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> Pullback:
  """Returns the LayerNorm of the last axis."""
  centered = x - x.mean(-1, keepdims=True)
  inverse = (np.square(centered).mean(-1, keepdims=True) + 1e-5) ** -0.5
  normalized = centered * inverse

  def pullback(dy):
    scaled = dy * scale
    projection = (scaled * normalized).mean(-1, keepdims=True)
    mean = scaled.mean(-1, keepdims=True)
    dx = inverse * (scaled - mean - normalized * projection)
    axes = tuple(range(x.ndim - 1))
    return dx, (dy * normalized).sum(axes), dy.sum(axes)

  return normalized * scale + bias, pullback


def linear(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> Pullback:
  """Returns x @ kernel + bias."""

  def pullback(dy):
    axes = tuple(range(x.ndim - 1))
    return dy @ kernel.T, np.tensordot(x, dy, (axes, axes)), dy.sum(axes)

  return x @ kernel + bias, pullback


def gelu(x: np.ndarray) -> Pullback:
  """Returns the exact GELU."""
  below = 0.5 + 0.5 * np.vectorize(math.erf)(x * 0.5**0.5)
  density = np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)
  return x * below, lambda dy: (dy * (below + x * density),)
