"""Exports a model as an ONNX file, and checks it with onnxruntime."""

from __future__ import annotations

import base64
from collections.abc import Mapping
import dataclasses
import json
import pathlib
from types import ModuleType
from typing import TYPE_CHECKING
import zlib

from jaxtyping import Float, UInt8
import numpy as np

from dualformer_jax.errors import UserError, missing_extra
from dualformer_jax.files import output_file
from dualformer_jax.inference.golden import golden_views

if TYPE_CHECKING:
  from dualformer_jax.inference.recognizer import Recognizer
  from dualformer_jax.inference.stored_weights import Weights

# Largest difference between probabilities of onnxruntime and of JAX.
_TOLERANCE = 1e-4
_FORMAT = 'dualformer_jax ONNX 1'


def require_onnxruntime() -> ModuleType:
  """Returns onnxruntime.

  Raises:
    UserError: the extra is not installed.
  """
  try:
    import onnx  # noqa: F401
    import onnxruntime
  except ImportError as error:
    raise UserError(missing_extra('an ONNX file', 'onnx')) from error
  return onnxruntime


def export_onnx(
  recognizer: Recognizer, weights: Weights, path: pathlib.Path
) -> str:
  """Exports a model in float32, and compares onnxruntime with JAX.

  Args:
    recognizer: the model, with compute dtype float32.
    weights: its weights, from `stored_weights`.
    path: the file to write.

  Returns:
    A line that describes input, output and agreement.

  Raises:
    UserError: the probabilities of the test input differ, or the file cannot
      be written.
  """
  require_onnxruntime()
  import onnx

  from dualformer_jax.inference import onnx_graph

  p, names = recognizer.preprocessing, recognizer.class_names
  model = onnx_graph.build(recognizer.model, weights, p, recognizer.multi_label)
  views = golden_views(2, p.num_frames, p.image_size, p.image_size, 3)
  expected, _ = recognizer.score(views)
  sizes = ', '.join(map(str, views.shape[1:]))
  description = {
    'format': _FORMAT,
    'input': f'uint8 [views, {sizes}], RGB',
    'output': f'float32 [views, {len(names)}], probabilities of each view',
    'class_names': json.dumps(names, ensure_ascii=False),
    'multi_label': json.dumps(recognizer.multi_label),
    'preprocessing': json.dumps(dataclasses.asdict(p)),
    'golden_input': base64.b64encode(zlib.compress(views.tobytes())).decode(),
    'golden_probabilities': json.dumps(expected.tolist()),
  }
  onnx.helper.set_model_props(model, description)
  onnx.checker.check_model(model, full_check=True)
  content = model.SerializeToString()
  difference = _difference(content, description)
  if not difference <= _TOLERANCE:
    raise UserError(
      f'{path} was not written: probabilities of onnxruntime differ by '
      f'{difference:.2g} from those of JAX; please report this'
    )
  with output_file(path) as file:
    file.write(content)
  return (
    f'{description["input"]} -> {description["output"]}, opset '
    f'{onnx_graph.OPSET}; onnxruntime agrees with JAX to {difference:.2g}'
  )


def check_onnx(path: pathlib.Path) -> float:
  """Runs an exported ONNX file on its test input, without JAX.

  Returns:
    The largest difference from the expected probabilities.

  Raises:
    UserError: the file is damaged, or its probabilities differ too much.
  """
  require_onnxruntime()
  try:
    # From bytes, so that a file can refer to no other files.
    difference = _difference(path.read_bytes())
  except FileNotFoundError:
    raise UserError(f'{path}: no such file') from None
  except Exception as error:  # a damaged file may raise anything
    reason = ' '.join(str(error).split())[:300]
    raise UserError(
      f'{path} is damaged, or was not written by dualformer_jax.export '
      f'({type(error).__name__}: {reason})'
    ) from error
  if not difference <= _TOLERANCE:
    raise UserError(
      f'{path}: probabilities of the test input differ by {difference:.2g}, '
      f'more than {_TOLERANCE:g}; do not use the file on this machine'
    )
  return difference


def _difference(
  content: bytes, description: Mapping[str, str] | None = None
) -> float:
  """Runs the test input, as one batch and view by view.

  Args:
    content: an ONNX file.
    description: its metadata; by default, it is read from the file.
  """
  runtime = require_onnxruntime()
  options = runtime.SessionOptions()
  options.log_severity_level = 4  # errors are raised anyway
  session = runtime.InferenceSession(
    content, options, providers=['CPUExecutionProvider']
  )
  if description is None:
    description = dict(session.get_modelmeta().custom_metadata_map)
  views, expected = _golden(description, session.get_inputs()[0].shape[1:])

  def run(views: UInt8[np.ndarray, 'v t h w 3']) -> Float[np.ndarray, 'v k']:
    return session.run(['probabilities'], {'views': views})[0]

  found = [run(views), np.concatenate([run(view[None]) for view in views])]
  return float(np.abs(np.stack(found) - expected).max())


def _golden(
  description: Mapping[str, str], sizes: list[int]
) -> tuple[UInt8[np.ndarray, 'v t h w 3'], Float[np.ndarray, 'v k']]:
  """Returns the test input and its expected output."""
  if description['format'] != _FORMAT:
    raise ValueError(f'format {description["format"]!r}')
  compressed = base64.b64decode(description['golden_input'])
  values = np.frombuffer(zlib.decompress(compressed), np.uint8)
  expected = json.loads(description['golden_probabilities'])
  return values.reshape(-1, *sizes), np.array(expected, np.float32)
