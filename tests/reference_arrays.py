"""Weights and clips behind the figures in tests/reference/, from seeds.

The published PyTorch implementation was run on exactly these arrays. Each one
follows from its name, its shape and a seed alone, so no checkpoint has to be
stored beside the figures.
"""

import json
import math
import pathlib
import zlib

import numpy as np

DIRECTORY = pathlib.Path(__file__).parent / 'reference'

_MICRO = {
  'depths': (2, 2, 2, 2),
  'embed_dims': (16, 32, 64, 128),
  'num_heads': (1, 2, 4, 8),
  'num_classes': 10,
  'num_frames': 32,
}
_TINY = {
  'depths': (2, 2, 10, 4),
  'embed_dims': (64, 128, 256, 512),
  'num_heads': (2, 4, 8, 16),
  'num_classes': 400,
  'num_frames': 32,
}
# Name -> the fields in which the models differ; all take clips of 224 pixels.
MODELS = {
  'micro': _MICRO,
  'micro_tokenlabel': _MICRO | {'token_label': True},
  'micro16': {
    'depths': (2, 3, 4, 2),
    'embed_dims': (24, 48, 96, 192),
    'num_heads': (2, 4, 8, 16),
    'num_classes': 7,
    'num_frames': 16,
  },
  'tiny': _TINY,
  'tiny16': _TINY | {'num_classes': 101, 'num_frames': 16},
}
# For `jax.jit`: with clips of 224 pixels, programs compute for longer than they
# compile, unlike those of most tests.
OPTIMIZED = {'xla_backend_optimization_level': 1}


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the arrays of an .npz file, by default one of the figures."""
  with np.load(DIRECTORY / path) as arrays:
    return dict(arrays)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
  """Returns PyTorch parameter name -> shape, in the order of a state_dict."""
  text = (DIRECTORY / 'shapes' / f'{name}.json').read_text()
  return {key: tuple(shape) for key, shape in json.loads(text).items()}


def state_dict(shapes_name: str, seed: int) -> dict[str, np.ndarray]:
  """Returns PyTorch parameter name -> array for shapes/<shapes_name>.json."""
  return {
    name: _parameter(name, shape, seed)
    for name, shape in shapes(shapes_name).items()
  }


def clips(batch: int, frames: int, size: int, seed: int) -> np.ndarray:
  """Returns normalised clips, float32 [batch, frames, size, size, 3].

  The PyTorch implementation took the same values with channels first:
  [batch, 3, frames, size, size].
  """
  return _normal(_generator('clips', seed), (batch, frames, size, size, 3))


def _parameter(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  generator = _generator(name, seed)
  match name.rsplit('.', 1)[-1]:
    case 'num_batches_tracked':
      return np.zeros(shape, np.int64)
    case 'running_var':
      return (0.5 + generator.random(shape)).astype(np.float32)
    case 'running_mean':
      return _normal(generator, shape, scale=0.1)
    case 'weight' if len(shape) == 1:  # the scale of a norm
      return _normal(generator, shape, scale=0.1, mean=1)
    case _ if len(shape) == 1:  # a bias
      return _normal(generator, shape, scale=0.05)
    case _:  # a matrix or a convolution kernel, scaled by its inputs
      return _normal(generator, shape, scale=math.prod(shape[1:]) ** -0.5)


def _generator(name: str, seed: int) -> np.random.Generator:
  return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _normal(
  generator: np.random.Generator,
  shape: tuple[int, ...],
  scale: float = 1,
  mean: float = 0,
) -> np.ndarray:
  return (mean + scale * generator.standard_normal(shape)).astype(np.float32)
