r"""Exports a checkpoint as one file that JAX runs without this package.

  python -m dualformer_jax.export --checkpoint=DIR --out=model.zip \
    [--weights=model.safetensors] [--dtype=float32]
  python -m dualformer_jax.export --check=model.zip

The file holds a StableHLO program with its weights, for CPUs, CUDA GPUs and
TPUs: uint8 views in, averaged probabilities out, any number of videos and
views. Beside it are the class names, the preprocessing, and a golden clip with
what the model says of it, which --check compares.
"""

import dataclasses
import io
import json
import os
import pathlib
from typing import Any
import zipfile

from absl import flags
import numpy as np

from dualformer_jax import command_line
from dualformer_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A checkpoint folder, or the workdir of a training run.'
)
_OUT = flags.DEFINE_string('out', None, 'The file to write.')
_WEIGHTS = flags.DEFINE_string(
  'weights', None, 'A .safetensors file to write the weights to, as well.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'What the program computes in.'
)
_CHECK = flags.DEFINE_string(
  'check', None, 'A file that was exported: run it on its golden clip.'
)
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace existing files.')

_PLATFORMS = ('cpu', 'cuda', 'tpu')
_PROGRAM, _DESCRIPTION = 'program.stablehlo', 'description.json'
_GOLDEN, _README = 'golden.npz', 'README.txt'
# How far probabilities may be from the golden ones, on any platform.
_TOLERANCE = {'float32': 1e-3, 'bfloat16': 2e-2}
# What makes archives of the same content the same.
_DATE = (1980, 1, 1, 0, 0, 0)

_HOW_TO = """A DualFormer video classifier. To run it, with JAX alone:

  import json, zipfile
  import jax
  from jax import export

  with zipfile.ZipFile('{name}') as file:
    program = export.deserialize(bytearray(file.read('program.stablehlo')))
    class_names = json.loads(file.read('description.json'))['class_names']
  probabilities = program.call(views)

`views` is uint8, RGB, [videos, views, {frames}, {size}, {size}, 3]; what comes
back is float32 [videos, {classes}]. description.json says how views are taken
of a video. golden.npz holds `views` and the `probabilities` they must give.
"""


def export(checkpoint: str, out: pathlib.Path, dtype: str) -> dict[str, Any]:
  """Writes the file; returns its description.

  Args:
    checkpoint: its folder, or the workdir of a run.
    out: the file.
    dtype: 'float32' or 'bfloat16', what the program computes in.

  Raises:
    UserError: there is no checkpoint.
  """
  import jax
  from jax import export as jax_export
  import jax.numpy as jnp

  import dualformer_jax

  recognizer = dualformer_jax.load(checkpoint, dtype=dtype)
  p = recognizer.preprocessing
  activation = jax.nn.sigmoid if recognizer.multi_label else jax.nn.softmax

  def score(clip: jax.Array) -> jax.Array:
    clips = recognizer.normalize(clip[None])
    output: Any = recognizer.model.apply(recognizer.variables, clips)
    return activation(output.logits[0])

  def program(views: jax.Array) -> jax.Array:
    # One view at a time: how many there are is open, memory is not.
    scores = jax.lax.map(score, views.reshape(-1, *views.shape[2:]))
    return jnp.mean(scores.reshape(*views.shape[:2], -1), axis=1)

  shape = (p.num_frames, p.image_size, p.image_size, 3)
  sizes = ', '.join(map(str, shape))
  # As for a CPU, whatever is here: kernels of one platform run on no other.
  cpu = jax.sharding.Mesh(np.array(jax.devices('cpu')[:1]), ('data',))
  with jax.sharding.use_abstract_mesh(cpu.abstract_mesh):
    exported = jax_export.export(jax.jit(program), platforms=_PLATFORMS)(
      jax.ShapeDtypeStruct(
        jax_export.symbolic_shape(f'videos, views, {sizes}'), jnp.uint8
      )
    )
    views = golden_views(p.num_clips * p.num_crops, *shape)[None]
    expected = np.asarray(jax.jit(program)(views))
  description = {
    'format': 'dualformer_jax export 1',
    'input': f'uint8 [videos, views, {sizes}], RGB',
    'output': f'float32 [videos, {len(recognizer.class_names)}], probabilities',
    'class_names': list(recognizer.class_names),
    'multi_label': recognizer.multi_label,
    'preprocessing': dataclasses.asdict(p),
    'model': {
      field.name: getattr(recognizer.model, field.name)
      for field in dataclasses.fields(recognizer.model)
      if field.name not in ('parent', 'name')  # Linen's own
    },
    'dtype': dtype,
    'platforms': list(_PLATFORMS),
    'jax': jax.__version__,
  }
  golden = io.BytesIO()
  np.savez_compressed(golden, views=views, probabilities=expected)
  readme = _HOW_TO.format(
    name=out.name,
    frames=p.num_frames,
    size=p.image_size,
    classes=len(recognizer.class_names),
  )
  partial = out.with_name(f'{out.name}.partial')
  with zipfile.ZipFile(partial, 'w') as file:
    for name, content in (
      (_README, readme),
      (_DESCRIPTION, json.dumps(description, indent=2, ensure_ascii=False)),
      (_GOLDEN, golden.getvalue()),
      (_PROGRAM, bytes(exported.serialize())),
    ):
      file.writestr(zipfile.ZipInfo(name, _DATE), content)
  os.replace(partial, out)
  return description


def golden_views(
  views: int, frames: int, height: int, width: int, channels: int
) -> np.ndarray:
  """Smooth colours that move, uint8 [views, frames, height, width, channels].

  The same everywhere, and unlike noise neither all alike nor without structure.
  """
  v, t, y, x, c = np.ogrid[:views, :frames, :height, :width, :channels]
  phase = 0.7 * v + 0.2 * t + 2.1 * c
  waves = np.sin(6 * x / width + phase) + np.cos(5 * y / height - phase)
  return (127.5 + 63 * waves).astype(np.uint8)


def check(path: pathlib.Path) -> tuple[float, float]:
  """Runs an exported file on its golden clip, with JAX and NumPy alone.

  Returns:
    The largest difference in probability, and the largest allowed.

  Raises:
    UserError: the file is damaged or is not one, or cannot run here.
  """
  import jax
  from jax import export as jax_export

  try:
    with zipfile.ZipFile(path) as file:
      description = json.loads(file.read(_DESCRIPTION))
      golden = io.BytesIO(file.read(_GOLDEN))
      with np.load(golden, allow_pickle=False) as arrays:
        views, expected = arrays['views'], arrays['probabilities']
      program = jax_export.deserialize(bytearray(file.read(_PROGRAM)))
    tolerance = _TOLERANCE[description['dtype']]
  except FileNotFoundError:
    raise UserError(f'{path}: there is no such file') from None
  except Exception as error:  # Of a stranger's file, anything.
    raise UserError(
      f'{path}: is damaged, or was not written by this command'
      f' ({type(error).__name__}: {error})'
    ) from error
  platform = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  if platform not in program.platforms:
    raise UserError(
      f'{path}: is for {", ".join(program.platforms)}, and this is {platform}'
    )
  found = np.asarray(program.call(views))
  return float(np.abs(found - expected).max()), tolerance


def write_weights(checkpoint: str, out: pathlib.Path) -> int:
  """Writes parameters and BatchNorm statistics as safetensors.

  Returns:
    How many arrays there are; their names are the paths in the checkpoint.
  """
  import flax.traverse_util
  from safetensors.numpy import save

  import dualformer_jax

  variables = dualformer_jax.load(checkpoint).variables
  arrays = {
    name: np.ascontiguousarray(array)
    for name, array in flax.traverse_util.flatten_dict(
      variables, sep='/'
    ).items()
  }
  partial = out.with_name(f'{out.name}.partial')
  partial.write_bytes(save(arrays))  # readable by all, unlike with save_file
  os.replace(partial, out)
  return len(arrays)


def main() -> None:
  """Exports or checks, as the flags say."""
  if _CHECK.value:
    difference, tolerance = check(pathlib.Path(_CHECK.value))
    if not difference <= tolerance:
      raise UserError(
        f'{_CHECK.value}: its probabilities differ by {difference:.2g} from the'
        f' golden ones, more than {tolerance:g}: do not use it on this machine'
      )
    print(f'{_CHECK.value}: agrees with its golden clip to {difference:.2g}')
    return
  if not _CHECKPOINT.value or not (_OUT.value or _WEIGHTS.value):
    raise UserError(
      '--checkpoint and --out must be given, or --check; --help tells the flags'
    )
  for name in filter(None, (_OUT.value, _WEIGHTS.value)):
    path = pathlib.Path(name)
    if path.exists() and not _OVERWRITE.value:
      raise UserError(f'{path}: is there already; --overwrite replaces it')
    if not path.absolute().parent.is_dir():
      raise UserError(f'{path.absolute().parent}: there is no such folder')
  if _OUT.value:
    out = pathlib.Path(_OUT.value)
    description = export(_CHECKPOINT.value, out, _DTYPE.value)
    print(
      f'{out}: {out.stat().st_size / 1e6:.1f} MB, {description["input"]} ->'
      f' {description["output"]}, for {", ".join(_PLATFORMS)}'
    )
  if _WEIGHTS.value:
    count = write_weights(_CHECKPOINT.value, pathlib.Path(_WEIGHTS.value))
    print(f'{_WEIGHTS.value}: {count} arrays')


def cli() -> None:
  """Runs the command."""
  command_line.run(main)


if __name__ == '__main__':
  cli()
