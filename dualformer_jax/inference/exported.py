"""Exports a model as a StableHLO program in a .zip file, and checks it."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from typing import TYPE_CHECKING, Any
import zipfile

import jax
from jax import export as jax_export
import jax.numpy as jnp
from jaxtyping import UInt8
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.files import output_file

if TYPE_CHECKING:
  from dualformer_jax.inference.recognizer import Recognizer

_PLATFORMS = ('cpu', 'cuda', 'tpu')
# Largest difference between probabilities on two platforms.
_TOLERANCE = {'float32': 1e-3, 'bfloat16': 2e-2}
# A fixed date, so that the same content gives the same file.
_DATE = (1980, 1, 1, 0, 0, 0)

_HOW_TO = """A DualFormer video classifier. To run it, with JAX alone
(pip install jax flatbuffers):

  import json, zipfile
  import jax
  from jax import export

  with zipfile.ZipFile('{name}') as file:
    program = export.deserialize(bytearray(file.read('program.stablehlo')))
    class_names = json.loads(file.read('description.json'))['class_names']
  probabilities = program.call(views)

`views` is uint8, RGB, [videos, views, {sizes}]. The result
is float32, [videos, {classes}]. description.json describes how views are taken
of a video. golden.npz has an example of `views` and the `probabilities` that
they give.
"""


def export_program(recognizer: Recognizer, path: pathlib.Path) -> str:
  """Exports a model, in its compute dtype, for CPUs, CUDA GPUs and TPUs.

  Returns:
    A line that describes input, output and platforms of the program.
  """
  model, p = recognizer.model, recognizer.preprocessing

  def score(clip: jax.Array) -> jax.Array:
    clips = recognizer.normalize(clip[None])
    output: Any = model.apply(recognizer.variables, clips)
    return recognizer.activation(output.logits[0])

  def program(views: jax.Array) -> jax.Array:
    # One view at a time: memory does not depend on the number of views.
    scores = jax.lax.map(score, views.reshape(-1, *views.shape[2:]))
    return jnp.mean(scores.reshape(*views.shape[:2], -1), axis=1)

  shape = (p.num_frames, p.image_size, p.image_size, 3)
  sizes = ', '.join(map(str, shape))
  # Compiled as for a CPU, as kernels of a platform run on that one alone.
  cpu = jax.sharding.Mesh(np.array(jax.devices('cpu')[:1]), ('data',))
  with jax.sharding.use_abstract_mesh(cpu.abstract_mesh):
    exported = jax_export.export(jax.jit(program), platforms=_PLATFORMS)(
      jax.ShapeDtypeStruct(
        jax_export.symbolic_shape(f'videos, views, {sizes}'), jnp.uint8
      )
    )
    views = _golden_views(p.num_clips * p.num_crops, *shape)[None]
    probabilities = np.asarray(jax.jit(program)(views))
  golden = io.BytesIO()
  np.savez_compressed(golden, views=views, probabilities=probabilities)
  num_classes = len(recognizer.class_names)
  description = {
    'format': 'dualformer_jax export 1',
    'input': f'uint8 [videos, views, {sizes}], RGB',
    'output': f'float32 [videos, {num_classes}], probabilities',
    'class_names': list(recognizer.class_names),
    'multi_label': recognizer.multi_label,
    'preprocessing': dataclasses.asdict(p),
    'model': {
      field.name: getattr(model, field.name)
      for field in dataclasses.fields(model)
      if field.name not in ('parent', 'name')  # added by Linen
    },
    'dtype': model.dtype,
    'platforms': list(_PLATFORMS),
    'jax': jax.__version__,
  }
  files = {
    'README.txt': _HOW_TO.format(
      name=path.name, sizes=sizes, classes=num_classes
    ),
    'description.json': json.dumps(description, indent=2, ensure_ascii=False),
    'golden.npz': golden.getvalue(),
    'program.stablehlo': bytes(exported.serialize()),
  }
  with output_file(path) as output, zipfile.ZipFile(output, 'w') as file:
    for name, content in files.items():
      file.writestr(zipfile.ZipInfo(name, _DATE), content)
  platforms = ', '.join(_PLATFORMS)
  return f'{description["input"]} -> {description["output"]}, for {platforms}'


def _golden_views(
  views: int, frames: int, height: int, width: int, channels: int
) -> UInt8[np.ndarray, 'views frames height width channels']:
  """Returns views of smooth, moving colors, the same on every machine."""
  v, t, y, x, c = np.ogrid[:views, :frames, :height, :width, :channels]
  phase = 0.7 * v + 0.2 * t + 2.1 * c
  waves = np.sin(6 * x / width + phase) + np.cos(5 * y / height - phase)
  return (127.5 + 63 * waves).astype(np.uint8)


def check_program(path: pathlib.Path) -> float:
  """Runs an exported file on its golden input, with JAX and NumPy alone.

  Returns:
    The largest difference from the expected probabilities.

  Raises:
    UserError: the file is damaged, cannot run on this machine, or its
      probabilities differ too much.
  """
  try:
    with zipfile.ZipFile(path) as file:
      description = json.loads(file.read('description.json'))
      golden = np.load(io.BytesIO(file.read('golden.npz')), allow_pickle=False)
      views, expected = golden['views'], golden['probabilities']
      program = jax_export.deserialize(
        bytearray(file.read('program.stablehlo'))
      )
    tolerance = _TOLERANCE[description['dtype']]
  except FileNotFoundError:
    raise UserError(f'{path}: no such file') from None
  except Exception as error:  # a damaged file may raise anything
    raise UserError(
      f'{path} is damaged, or was not written by dualformer_jax.export '
      f'({type(error).__name__}: {error})'
    ) from error
  platform = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  if platform not in program.platforms:
    raise UserError(
      f'{path} was exported for {", ".join(program.platforms)}, but this '
      f'platform is {platform}'
    )
  probabilities = np.asarray(program.call(views))
  difference = float(np.abs(probabilities - expected).max())
  if not difference <= tolerance:
    raise UserError(
      f'{path}: probabilities of the golden input differ by {difference:.2g}, '
      f'more than {tolerance:g}; do not use the file on this machine'
    )
  return difference


def save_weights(recognizer: Recognizer, path: pathlib.Path) -> int:
  """Writes a .safetensors file and returns the number of arrays in it.

  Their names are paths such as 'params/backbone/norm/scale'.
  """
  import flax.traverse_util
  from safetensors.numpy import save

  variables = flax.traverse_util.flatten_dict(recognizer.variables, sep='/')
  # Not ascontiguousarray, which makes vectors of scalars.
  arrays = {name: np.asarray(x, order='C') for name, x in variables.items()}
  with output_file(path) as file:
    file.write(save(arrays))
  return len(arrays)
