"""A checkpoint of a small model with random weights, which sees differences."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.models.dualformer import DualFormer

FIELDS: dict[str, Any] = {
  'depths': (1,),  # little to compile
  'embed_dims': (16,),
  'num_heads': (2,),
  'num_classes': 5,
  'num_frames': 8,
  'image_size': 32,
  'window': (4, 4, 4),
  'fine_sizes': ((4, 4, 4),),
  'coarse_sizes': (None,),
  'dtype': 'float32',
}
CLASS_NAMES = ('walk', 'run', 'jump', 'fall over', 'größer werden')
# Six views of 8 frames, 2 apart: a clip spans 16 frames.
PREPROCESSING = Preprocessing(8, 2, 32, num_clips=2, num_crops=3)


def save(
  folder: pathlib.Path, multi_label: bool = False, **preprocessing: Any
) -> pathlib.Path:
  """Writes the checkpoint folder, PREPROCESSING changed, and returns it."""
  model = DualFormer(**FIELDS)
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct(model.input_shape(), 'float32'),
  )
  rng = np.random.default_rng(0)
  variables: Any = jax.tree.map(
    lambda leaf: np.float32(
      rng.uniform(0.5, 1.5, leaf.shape)
      * (1 if leaf.ndim == 1 else rng.choice([-1, 1], leaf.shape))
    ),
    shapes,
  )
  # What the classes have on average, lest one always wins.
  head = variables['params']['cls_head']['fc_cls']
  head['bias'] -= np.array([-2.1, 0.4, 9.9, 0.5, 1.1], 'float32')
  checkpoint.save_model(
    folder,
    variables,
    checkpoint.CheckpointMetadata(
      FIELDS,
      dataclasses.replace(PREPROCESSING, **preprocessing),
      CLASS_NAMES,
      multi_label,
    ),
  )
  return folder
