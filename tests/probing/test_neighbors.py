"""Nearest neighbors, against a loop over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dualformer_jax.probing import neighbors


@pytest.mark.parametrize('k', [1, 5, 30])
def test_scores_agree_with_a_loop_over_pairs(k, monkeypatch):
  monkeypatch.setattr(neighbors, '_QUERIES', 4)
  rng = np.random.default_rng(0)
  train, queries = rng.normal(size=(30, 6)), rng.normal(size=(11, 6))
  targets = (rng.random((30, 3)) < 0.4).astype(np.float64)  # several classes
  found = neighbors.scores(train, targets, queries, k)
  for query, scores in zip(queries, found, strict=True):
    similar = []
    for video, target in zip(train, targets, strict=True):
      norms = math.dist(query, 0 * query) * math.dist(video, 0 * video)
      similar.append((sum(query * video) / norms, target))
    nearest = sorted(similar, key=lambda pair: -pair[0])[:k]
    total = sum(math.exp(s / 0.07) for s, _ in nearest)
    expected = sum(math.exp(s / 0.07) / total * t for s, t in nearest)
    np.testing.assert_allclose(scores, expected, atol=1e-12)
