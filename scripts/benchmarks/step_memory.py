"""Prints the peak memory and the duration of training steps.

  python scripts/benchmarks/step_memory.py --config=configs/k400_tiny.py \
    --clips=2 --config.model.dtype=float32

Runs the step of dualformer_jax.main on one device, with random clips instead of
a dataset.
"""

import resource
import sys
import time
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from dualformer_jax import command_line
from dualformer_jax.training import setup

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the script."""
  config_flags.DEFINE_config_file('config', None, 'Config file.')
  flags.DEFINE_integer('clips', 2, 'Clips per batch.', lower_bound=1)
  flags.DEFINE_integer('steps', 2, 'Steps to time.', lower_bound=1)
  flags.mark_flags_as_required(['config'])


def main() -> None:
  """Runs some steps and prints their memory and time."""
  config = FLAGS.config.copy_and_resolve_references()
  config.batch_size = FLAGS.clips
  config.mesh.update(data=1, fsdp=1, tensor=1)
  training = setup.make_training(config, devices=jax.devices()[:1])
  rng = np.random.default_rng(0)
  batch = {
    name: jax.device_put(rng.integers(0, 2, x.shape).astype(x.dtype))
    for name, x in training.abstract_batch().items()
  }
  with jax.set_mesh(training.mesh):
    state = training.init_state()
    start = time.perf_counter()
    step: Any = training.train_step
    compiled = step.lower(state, batch, None).compile()
    print(f'compilation: {time.perf_counter() - start:.1f} s', flush=True)
    memory = compiled.memory_analysis()
    if memory is not None:
      print(f'temporaries of a step: {memory.temp_size_in_bytes / 1e9:.2f} GB')
    for _ in range(FLAGS.steps):
      start = time.perf_counter()
      state, _ = jax.block_until_ready(compiled(state, batch, None))
      print(f'step: {time.perf_counter() - start:.1f} s', flush=True)
  # In KiB on Linux, in bytes on macOS.
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  print(f'peak memory of the process: {peak / 1e9:.2f} GB')


if __name__ == '__main__':
  command_line.run(main, define_flags)
