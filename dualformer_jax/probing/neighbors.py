"""Weighted k-nearest-neighbor classification, as in DINO (arXiv 2104.14294)."""

from collections.abc import Iterator

from jaxtyping import Float, Int
import numpy as np

NUMBERS = (1, 5, 10, 20, 50, 100, 200)
_TEMPERATURE = 0.07
_QUERIES = 256  # at a time


def scores(
  train: Float[np.ndarray, 'n c'],
  targets: Float[np.ndarray, 'n k'],
  queries: Float[np.ndarray, 'q c'],
  number: int,
) -> Float[np.ndarray, 'q k']:
  """Returns the scores of classes from the nearest training videos.

  Each of the `number` neighbors of a query votes for its classes, with weight
  exp(cosine similarity / 0.07). Scores are divided by the sum of the weights.
  """
  result = np.zeros((len(queries), targets.shape[1]))
  for rows, similarity, indices in _nearest(train, queries, number):
    # Relative to the nearest, so that exp does not overflow.
    weights = np.exp((similarity - similarity.max(1)[:, None]) / _TEMPERATURE)
    weights /= weights.sum(axis=1, keepdims=True)
    for column in range(weights.shape[1]):
      votes = targets[indices[:, column]]
      result[rows] += weights[:, column, None] * votes
  return result


def _nearest(
  train: Float[np.ndarray, 'n c'],
  queries: Float[np.ndarray, 'q c'],
  number: int,
) -> Iterator[tuple[slice, Float[np.ndarray, 'b m'], Int[np.ndarray, 'b m']]]:
  """Yields rows of queries, similarities and indices of their neighbors."""
  train, queries = _normalized(train), _normalized(queries)
  for start in range(0, len(queries), _QUERIES):
    rows = slice(start, start + _QUERIES)
    similarity = queries[rows] @ train.T
    indices = np.argpartition(-similarity, number - 1, axis=1)[:, :number]
    yield rows, np.take_along_axis(similarity, indices, 1), indices


def _normalized(x: Float[np.ndarray, 'n c']) -> Float[np.ndarray, 'n c']:
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
