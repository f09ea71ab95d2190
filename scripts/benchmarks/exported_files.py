"""Compares exported files: size, speed on a CPU, and accuracy.

  python scripts/benchmarks/exported_files.py --checkpoint=DIR --out=FOLDER \
    [--dataset=NAME --data_dir=DATA] [--rounds=9]

Exports the checkpoint as .zip and .onnx files, with float32 and with int8
weights, and prints megabytes and the median seconds and CPU seconds of one
view. The files take turns, so that other load on the machine slows all of them.
Both runtimes use all cores. With --data_dir, it also prints the accuracy of
each file on the validation videos of a prepared dataset, the fraction of videos
of which the most probable class is that of the float32 .zip file, and the
largest difference of a probability from it. Needs the extras onnx and int8.
"""

from collections.abc import Callable
import io
import os
import pathlib
import statistics
import time
from typing import Any
import zipfile

from absl import flags
import jax
from jax import export as jax_export
from jaxtyping import Float, Int, UInt8
import numpy as np
import onnxruntime

import dualformer_jax
from dualformer_jax import command_line, progress
from dualformer_jax.inference import exported, onnx_export, stored_weights
from dualformer_jax.inference.golden import golden_views
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.transforms import eval_views

FLAGS = flags.FLAGS

# From the views of a video to the probabilities of its classes.
Run = Callable[[UInt8[np.ndarray, 'v t h w 3']], Float[np.ndarray, ' k']]


def define_flags() -> None:
  """Defines the flags of the script."""
  flags.DEFINE_string('checkpoint', None, 'Checkpoint.', required=True)
  flags.DEFINE_string('out', None, 'Folder for the files.', required=True)
  flags.DEFINE_string('dataset', 'motion', 'Name of the dataset.')
  flags.DEFINE_string('data_dir', None, 'Folder of prepared datasets.')
  flags.DEFINE_integer('rounds', 9, 'Measurements of each file.')


def main() -> None:
  """Exports and measures."""
  folder = pathlib.Path(FLAGS.out)
  sizes, programs = {}, {}
  recognizer = dualformer_jax.load(FLAGS.checkpoint, dtype='float32')
  weights = stored_weights.flatten(recognizer.variables)
  quantized, int8_weights, _ = stored_weights.quantize_recognizer(recognizer)
  for dtype, model, arrays in (
    ('float32', recognizer, weights),
    ('int8', quantized, int8_weights),
  ):
    for suffix, write, open_file in (
      ('zip', exported.export_program, open_zip),
      ('onnx', onnx_export.export_onnx, open_onnx),
    ):
      path = folder / f'{dtype}.{suffix}'
      with progress.waiting(f'exporting {path}'):
        write(model, arrays, path)
      sizes[path.name] = path.stat().st_size
      programs[path.name] = open_file(path)
  seconds = measure(programs, recognizer)
  print(
    f'jax {jax.__version__}, onnxruntime {onnxruntime.__version__}, '
    f'{os.cpu_count()} threads, medians of {FLAGS.rounds}'
  )
  for name, size in sizes.items():
    wall, cpu = seconds[name]
    print(
      f'{name}: {size / 1e6:.1f} MB, {wall:.3f} s per view, {cpu:.3f} s of CPU'
    )
  if FLAGS.data_dir:
    compare(programs, recognizer)


def open_zip(path: pathlib.Path) -> Run:
  """Returns the program of a .zip file, as its README.txt describes."""
  with zipfile.ZipFile(path) as file:
    program = jax_export.deserialize(bytearray(file.read('program.stablehlo')))
    weights: Any = dict(np.load(io.BytesIO(file.read('weights.npz'))))
  weights = jax.device_put(weights)
  call = jax.jit(program.call)
  return lambda views: np.asarray(call(weights, views[None]))[0]


def open_onnx(path: pathlib.Path) -> Run:
  """Returns the graph of an ONNX file, run view by view as in the .zip file."""
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = os.cpu_count()
  session = onnxruntime.InferenceSession(path, options)

  def run(views: UInt8[np.ndarray, 'v t h w 3']) -> Float[np.ndarray, ' k']:
    rows: list[Any] = [session.run(None, {'views': v[None]})[0] for v in views]
    return np.concatenate(rows).mean(axis=0)

  return run


def measure(
  programs: dict[str, Run], recognizer: Recognizer
) -> dict[str, tuple[float, float]]:
  """Returns the median seconds of one view, and of CPU time."""
  p = recognizer.preprocessing
  view = golden_views(1, p.num_frames, p.image_size, p.image_size, 3)
  for run in programs.values():
    run(view)  # compiles
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
  for _ in progress.track(
    range(FLAGS.rounds), 'Measuring', FLAGS.rounds, 'rounds'
  ):
    for name, run in programs.items():
      start = time.perf_counter(), time.process_time()
      run(view)
      end = time.perf_counter(), time.process_time()
      times[name].append((end[0] - start[0], end[1] - start[1]))
  return {name: _medians(values) for name, values in times.items()}


def _medians(times: list[tuple[float, float]]) -> tuple[float, float]:
  walls, cpus = zip(*times, strict=True)
  return statistics.median(walls), statistics.median(cpus)


def compare(programs: dict[str, Run], recognizer: Recognizer) -> None:
  """Prints accuracy, and agreement with the float32 .zip file."""
  data = PreparedDataset(FLAGS.dataset, 'validation', FLAGS.data_dir)
  labels: list[Any] = []
  rows: dict[str, list[np.ndarray]] = {name: [] for name in programs}
  for index in progress.track(range(len(data)), 'Scoring', len(data), 'videos'):
    example = data[index]
    views = eval_views(example.video, recognizer.preprocessing)
    labels.append(example.label)
    for name, run in programs.items():
      rows[name].append(run(views))
  scores = {name: np.stack(values) for name, values in rows.items()}
  expected = scores['float32.zip']
  print(f'{len(data)} videos of {FLAGS.dataset}')
  for name, found in scores.items():
    print(
      f'{name}: top-1 {np.mean(top(found) == np.array(labels)):.2%}, same class'
      f' {np.mean(top(found) == top(expected)):.2%}, largest difference '
      f'{np.abs(found - expected).max():.2g}'
    )


def top(scores: Float[np.ndarray, 'n k']) -> Int[np.ndarray, ' n']:
  """Returns the most probable class of each video."""
  return scores.argmax(axis=1)


if __name__ == '__main__':
  command_line.run(main, define_flags)
