"""Features in memory, for tests of probes."""

from __future__ import annotations

from typing import Any

import numpy as np

from dualformer_jax.probing.features import Features
from dualformer_jax.probing.heads import Inputs

CHANNELS = 4


def make_inputs(
  kind: str, count: int, classes: int, views: int = 1, files: int = 1
) -> Inputs:
  """Features of overlapping classes, in several files."""
  rng = np.random.default_rng(0)
  labels = rng.integers(classes, size=count).astype(np.int32)
  centers = rng.normal(size=(classes, CHANNELS))
  tokens = rng.normal(size=(count, views, 6, CHANNELS))
  tokens = (tokens + centers[labels][:, None, None]).astype(np.float16)
  pooled = tokens.astype(np.float32).mean(axis=2)
  features: Any = Features(
    pooled,
    np.array_split(tokens, files),
    labels,
    [f'video {i}' for i in range(count)],
    np.arange(count),
    [],
  )
  mean, std = pooled.mean((0, 1)), pooled.std((0, 1))
  return Inputs(kind, features, mean, std)
