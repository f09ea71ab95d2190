"""Prints the peak memory and time of training steps, as a whole process.

  python scripts/benchmarks/step_memory.py --config=configs/k400_tiny.py \
    --clips=2 --config.model.dtype=float32

No dataset is needed: the clips are random. What is run is the step that
dualformer_jax.main runs, with the config's optimiser.
"""

import functools
import resource
import sys
import time

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from dualformer_jax import command_line
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import augment, sharding, step
from dualformer_jax.training import optimizer as optimizers

CONFIG = config_flags.DEFINE_config_file('config', None, 'The recipe.')
CLIPS = flags.DEFINE_integer('clips', 2, 'Clips in a batch.', lower_bound=1)
STEPS = flags.DEFINE_integer('steps', 2, 'Steps to time.', lower_bound=1)


def main() -> None:
  """Runs some steps and prints what they took."""
  config = CONFIG.value
  model = DualFormer(**config.model.to_dict())
  settings = config.optimizer.to_dict()
  settings.pop('warmup_epochs')
  variables = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct(model.input_shape(), np.float32),
  )
  optimizer = optimizers.make_optimizer(variables['params'], **settings)
  one = {'data': 1, 'fsdp': 1, 'tensor': 1}
  mesh = sharding.make_mesh(one, CLIPS.value, devices=jax.devices()[:1])
  options = sharding.compiler_options(mesh)
  state = jax.jit(
    functools.partial(step.init_state, model, optimizer, 0),
    compiler_options=options,
  )()
  train_step = jax.jit(
    functools.partial(
      step.train_step,
      model=model,
      optimizer=optimizer,
      augment=functools.partial(
        augment.augment,
        pixel_mean=config.dataset.pixel_mean,
        pixel_std=config.dataset.pixel_std,
        flip=config.dataset.flip,
      ),
      seed=0,
    ),
    donate_argnums=0,
    compiler_options=options,
  )
  rng = np.random.default_rng(0)
  shape = (CLIPS.value, *model.input_shape()[1:])
  batch = {
    'clips': rng.integers(0, 256, shape, np.uint8),
    'labels': rng.integers(0, model.num_classes, CLIPS.value, np.int32),
  }
  start = time.perf_counter()
  compiled = train_step.lower(state, batch).compile()
  print(f'compilation: {time.perf_counter() - start:.1f} s', flush=True)
  memory = compiled.memory_analysis()
  if memory is not None:
    print(f'temporaries of a step: {memory.temp_size_in_bytes / 1e9:.2f} GB')
  for _ in range(STEPS.value):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(compiled(state, batch))
    print(f'step: {time.perf_counter() - start:.1f} s', flush=True)
  # In KiB on Linux, in bytes on macOS.
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  print(f'peak memory of the process: {peak / 1e9:.2f} GB')


if __name__ == '__main__':
  command_line.run(main)
