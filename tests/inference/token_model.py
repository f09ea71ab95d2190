"""A small model with a token-label head and global attention."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer

# One stage of 4 x 17 x 17 tokens; pooling by 4 drops the last row and column.
FIELDS: dict[str, Any] = dict(
  depths=(2,),
  embed_dims=(16,),
  num_heads=(2,),
  num_classes=2,
  num_frames=8,
  image_size=68,
  window=(2, 7, 7),
  fine_sizes=((4, 4, 4),),
  coarse_sizes=((2, 4, 4),),
  token_label=True,
)
NAMES = ('café spike', 'serve')


def make_metadata(multi_label: bool = False, **fields: Any):
  return checkpoint.CheckpointMetadata(
    FIELDS | fields, Preprocessing(8, 2, 68, num_clips=2), NAMES, multi_label
  )


def make_recognizer(variables: Any, **fields: Any) -> Recognizer:
  folder = pathlib.Path('folder')
  return Recognizer(variables, make_metadata(**fields), folder, 'float32')


def make_variables() -> dict[str, Any]:
  """Draws variables for which predictions and maps vary."""
  rng = np.random.default_rng(5)  # gives tokens of both classes

  def draw(path: Any, leaf: Any) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    if 'scale' in name or 'var' in name:
      values = rng.uniform(0.5, 1.5, leaf.shape)
    elif leaf.ndim < 2:
      values = rng.normal(0, 0.2, leaf.shape)
    else:
      values = rng.normal(0, leaf.size**-0.25, leaf.shape)
    return values.astype(leaf.dtype)

  shapes = checkpoint.variable_shapes(DualFormer(**FIELDS), 'FIELDS')
  return jax.tree_util.tree_map_with_path(draw, shapes)
