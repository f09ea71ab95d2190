"""Exports a model as a StableHLO program in a .zip file, and checks it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import io
import json
import pathlib
from typing import TYPE_CHECKING, Any
import zipfile

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.files import output_file
from dualformer_jax.inference import stored_weights
from dualformer_jax.inference.golden import golden_views

if TYPE_CHECKING:
  from dualformer_jax.inference.recognizer import Recognizer
  from dualformer_jax.inference.stored_weights import Weights

_PLATFORMS = ('cpu', 'cuda', 'tpu')
# Largest difference between probabilities on two platforms.
_TOLERANCE = {'float32': 1e-3, 'bfloat16': 2e-2}
# JAX guarantees that versions of the next six months read an exported program:
# docs.jax.dev, "Compatibility guarantees" of exporting.
_GUARANTEE, _MONTH = datetime.timedelta(days=182), datetime.timedelta(days=30)
# A fixed date, so that the same content gives the same file.
_DATE = (1980, 1, 1, 0, 0, 0)

_HOW_TO = """A DualFormer video classifier. To run it, with JAX alone
(pip install jax flatbuffers):

  import io, json, zipfile
  import jax, numpy
  from jax import export

  with zipfile.ZipFile('{name}') as file:
    program = export.deserialize(bytearray(file.read('program.stablehlo')))
    weights = dict(numpy.load(io.BytesIO(file.read('weights.npz'))))
    class_names = json.loads(file.read('description.json'))['class_names']
  weights = jax.device_put(weights)
  probabilities = jax.jit(program.call)(weights, views)

`views` is uint8, RGB, [videos, views, {sizes}]. The result
is float32, [videos, {classes}]. description.json describes how views are taken
of a video. golden.npz has an example of `views` and the `probabilities` that
they give. Weights are float32, or int8 and then multiplied by the float32 array
whose name ends in `_int8_scale`.

New releases of JAX are guaranteed to read the program until the date
`readable_until` in description.json. To export it again with the installed JAX:

  python -m dualformer_jax.export --renew={name} --overwrite
"""


def export_program(
  recognizer: Recognizer, weights: Weights, path: pathlib.Path
) -> str:
  """Exports a model, in its compute dtype, for CPUs, CUDA GPUs and TPUs.

  Args:
    recognizer: the model.
    weights: its weights, from `stored_weights`.
    path: the file to write.

  Returns:
    A line that describes input, output and platforms of the program.
  """
  model, p = recognizer.model, recognizer.preprocessing

  def program(weights: dict[str, jax.Array], views: jax.Array) -> jax.Array:
    variables = stored_weights.restore(weights)

    def score(clip: jax.Array) -> jax.Array:
      clips = recognizer.normalize(clip[None])
      output: Any = model.apply(variables, clips)
      return recognizer.activation(output.logits[0])

    # One view at a time: memory does not depend on the number of views.
    scores = jax.lax.map(score, views.reshape(-1, *views.shape[2:]))
    return jnp.mean(scores.reshape(*views.shape[:2], -1), axis=1)

  shape = (p.num_frames, p.image_size, p.image_size, 3)
  sizes = ', '.join(map(str, shape))
  # Compiled as for a CPU, as kernels of a platform run on that one alone.
  cpu = jax.sharding.Mesh(np.array(jax.devices('cpu')[:1]), ('data',))
  with jax.sharding.use_abstract_mesh(cpu.abstract_mesh):
    exported = jax_export.export(jax.jit(program), platforms=_PLATFORMS)(
      {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in weights.items()},
      jax.ShapeDtypeStruct(
        jax_export.symbolic_shape(f'videos, views, {sizes}'), jnp.uint8
      ),
    )
    views = golden_views(p.num_clips * p.num_crops, *shape)[None]
    probabilities = np.asarray(jax.jit(program)(weights, views))
  golden = io.BytesIO()
  np.savez_compressed(golden, views=views, probabilities=probabilities)
  num_classes = len(recognizer.class_names)
  today = datetime.date.today()
  description = {
    'format': 'dualformer_jax export 2',
    'input': f'uint8 [videos, views, {sizes}], RGB',
    'output': f'float32 [videos, {num_classes}], probabilities',
    'class_names': list(recognizer.class_names),
    'multi_label': recognizer.multi_label,
    'preprocessing': dataclasses.asdict(p),
    'dtype': model.dtype,
    'platforms': list(_PLATFORMS),
    'jax': jax.__version__,
    'exported': today.isoformat(),
    'readable_until': (today + _GUARANTEE).isoformat(),
  }
  files = {
    'README.txt': _HOW_TO.format(
      name=path.name, sizes=sizes, classes=num_classes
    ),
    'description.json': json.dumps(description, indent=2, ensure_ascii=False),
    'checkpoint.json': json.dumps(_metadata(recognizer), ensure_ascii=False),
    'golden.npz': golden.getvalue(),
    'program.stablehlo': bytes(exported.serialize()),
  }
  with output_file(path) as output, zipfile.ZipFile(output, 'w') as file:
    for name, content in files.items():
      file.writestr(zipfile.ZipInfo(name, _DATE), content)
    info = zipfile.ZipInfo('weights.npz', _DATE)
    with file.open(info, 'w', force_zip64=True) as target:
      arrays: dict[str, Any] = {**weights}
      np.savez(target, **arrays)
  platforms = ', '.join(_PLATFORMS)
  return (
    f'{description["input"]} -> {description["output"]}, for {platforms}; '
    f'exported with jax {jax.__version__}, which new releases are guaranteed '
    f'to read until {description["readable_until"]}'
  )


def _metadata(recognizer: Recognizer) -> dict[str, Any]:
  """Returns the metadata of a checkpoint of the model, as JSON."""
  # Imported late, as checking a file needs no checkpoints.
  from dualformer_jax.checkpoints.metadata import CheckpointMetadata

  return CheckpointMetadata(
    model={
      field.name: getattr(recognizer.model, field.name)
      for field in dataclasses.fields(recognizer.model)
      if field.name not in ('parent', 'name')  # added by Linen
    },
    preprocessing=recognizer.preprocessing,
    class_names=recognizer.class_names,
    multi_label=recognizer.multi_label,
  ).to_json()


def check_program(path: pathlib.Path) -> tuple[float, str | None]:
  """Runs an exported file on its test input, with JAX and NumPy alone.

  Returns:
    The largest difference from the expected probabilities, and a warning if
    JAX is soon no longer guaranteed to read the file.

  Raises:
    UserError: the file is damaged, cannot run on this machine, or its
      probabilities differ too much.
  """
  with _reading(path) as file:
    description = json.loads(file.read('description.json'))
    golden = np.load(io.BytesIO(file.read('golden.npz')), allow_pickle=False)
    views, expected = golden['views'], golden['probabilities']
    inputs: list[Any] = [views]
    if 'weights.npz' in file.namelist():  # else the program has them
      inputs = [_read_weights(file), views]
    tolerance = _TOLERANCE[description['dtype']]
    warning = expiry_warning(path, description, datetime.date.today())
    content = bytearray(file.read('program.stablehlo'))
    try:
      program = jax_export.deserialize(content)
    except Exception as error:
      if warning is None:
        raise
      raise UserError(
        f'jax {jax.__version__} cannot read the program in {warning}'
      ) from error
  platform = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  if platform not in program.platforms:
    raise UserError(
      f'{path} was exported for {", ".join(program.platforms)}, but this '
      f'platform is {platform}'
    )
  probabilities = np.asarray(program.call(*inputs))
  difference = float(np.abs(probabilities - expected).max())
  if not difference <= tolerance:
    raise UserError(
      f'{path}: probabilities of the test input differ by {difference:.2g}, '
      f'more than {tolerance:g}; do not use the file on this machine'
    )
  return difference, warning


def expiry_warning(
  path: pathlib.Path, description: dict[str, Any], today: datetime.date
) -> str | None:
  """Returns a warning if the guarantee of JAX ends in less than a month."""
  if 'readable_until' not in description:
    return (
      f'{path}: does not state until when JAX is guaranteed to read it; export '
      'it again from the checkpoint'
    )
  until = datetime.date.fromisoformat(description['readable_until'])
  if until - today >= _MONTH:
    return None
  verb = 'was' if until < today else 'is'
  return (
    f'{path}: JAX {verb} guaranteed to read it only until {until}; export it '
    f'again, or renew it with --renew={path} --overwrite'
  )


def read_for_renewal(path: pathlib.Path) -> tuple[Recognizer, Weights]:
  """Returns the model in an exported file, in its compute dtype, and weights.

  Raises:
    UserError: the file is damaged, or an earlier version wrote it.
  """
  from dualformer_jax.checkpoints import checkpoint
  from dualformer_jax.checkpoints.metadata import from_json
  from dualformer_jax.inference.recognizer import Recognizer

  with _reading(path) as file:
    if 'weights.npz' not in file.namelist():
      raise UserError(
        f'{path} cannot be renewed, as an earlier version wrote it, without '
        'separate weights; export it again from the checkpoint'
      )
    metadata = from_json(json.loads(file.read('checkpoint.json')))
    weights = _read_weights(file)
    variables = jax.jit(stored_weights.restore)(weights)
    model = metadata.build_model()
    shapes = checkpoint.variable_shapes(model, str(path))
    expected = {name: tree for name, tree in shapes.items() if tree}
    if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, expected):
      raise ValueError('weights.npz does not fit the model')
  recognizer = Recognizer(variables, metadata, path, dtype=model.dtype)
  return recognizer, weights


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
  """Opens an exported file; whatever its content raises becomes a UserError."""
  try:
    with zipfile.ZipFile(path) as file:
      yield file
  except UserError:
    raise
  except FileNotFoundError:
    raise UserError(f'{path}: no such file') from None
  except Exception as error:  # a damaged file may raise anything
    raise UserError(
      f'{path} is damaged, or was not written by dualformer_jax.export '
      f'({type(error).__name__}: {error})'
    ) from error


def _read_weights(file: zipfile.ZipFile) -> Weights:
  content = io.BytesIO(file.read('weights.npz'))
  with np.load(content, allow_pickle=False) as arrays:
    return dict(arrays)


def save_weights(weights: Weights, path: pathlib.Path) -> int:
  """Writes a .safetensors file and returns the number of arrays in it."""
  from safetensors.numpy import save

  with output_file(path) as file:
    file.write(save(weights))
  return len(weights)
