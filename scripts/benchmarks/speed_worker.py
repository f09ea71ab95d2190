"""Runs one program of the speed benchmark in its own process; see speed.py.

  python scripts/benchmarks/speed_worker.py '{"peer": "jax", ...}'

Builds the program of the case in its argument and prints a JSON line about it.
Then, for each line of its input, times a run and prints its seconds. Short runs
are repeated back to back, as in training. At the end of the input it prints its
peak memory.
"""
# pyright: reportMissingImports=false
# (torch is in the extra `benchmark`, which nothing else needs)

from __future__ import annotations

from collections.abc import Callable
import functools
import json
import math
import os
import pathlib
import resource
import runpy
import sys
import time
from typing import Any

import numpy as np

# Runs n times and waits for the last; and what to report about the program.
Prepared = tuple[Callable[[int], None], dict[str, Any]]
_MIN_SECONDS = 0.4  # of one measurement
_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'common.py'
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def model_fields(case: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of the model of a case: a variant, or one of its stages.

  A single stage embeds patches of smaller clips, so that it has as many tokens
  as in the whole model.
  """
  from dualformer_jax.models import variants
  from dualformer_jax.models.dualformer import DualFormer

  fields = getattr(variants, case['variant'].upper())
  frames, size = case['num_frames'], case['image_size']
  if case.get('peer') == 'jax-full':  # full space-time attention in all blocks
    grids = [(frames // 2, *[size // 4 // 2**i] * 2) for i in range(4)]
    fields = fields | {
      'window': grids[0],
      'fine_sizes': tuple(grids),
      'coarse_sizes': (None,) * 4,
    }
  if case['stage']:
    index = case['stage'] - 1
    size //= 2**index
    for name in ('fine_sizes', 'coarse_sizes'):
      fields = {name: getattr(DualFormer, name)} | fields
    names = (*variants.TINY, 'fine_sizes', 'coarse_sizes')
    fields |= {name: fields[name][index : index + 1] for name in names}
  return fields | {'num_classes': 400, 'num_frames': frames, 'image_size': size}


def make_inputs(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Returns uint8 clips [b, t, y, x, 3] and labels [b], equal for all peers."""
  rng = np.random.default_rng(0)
  size = model_fields(case)['image_size']
  shape = (case['clips'], case['num_frames'], size, size, 3)
  return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 400, shape[0])


def prepare_jax(case: dict[str, Any]) -> Prepared:
  """Prepares the training step or the evaluation step of the package."""
  import jax
  import jax.numpy as jnp

  from dualformer_jax.evaluation import forward
  from dualformer_jax.planning import program
  from dualformer_jax.training import cpu_memory, setup

  cpu_memory.keep_memory()  # as dualformer_jax.main does
  config = runpy.run_path(str(_CONFIG))['get_config']()
  config.model.update(model_fields(case))
  config.model.dtype = case['dtype']
  config.dataset.update(pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD)
  config.batch_size = case['clips']
  training = setup.make_training(config, devices=jax.devices()[:1])
  clips, labels = map(jnp.asarray, make_inputs(case))
  if case['pass'] == 'step':
    with jax.set_mesh(training.mesh):
      state = training.init_state()
    function: Any = training.train_step
    arguments: list[Any] = [state, {'clips': clips, 'labels': labels}, None]
  else:
    # Random variables, as compiling the initialization takes more memory than
    # evaluation.
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
      lambda x: jnp.asarray(rng.uniform(0, 0.02, x.shape), x.dtype),
      training.abstract_state.variables(),
    )
    model: Any = training.model
    p = setup.make_preprocessing(config)
    function = forward.make_eval_step(
      model, p.pixel_mean, p.pixel_std, training.mesh
    )
    arguments = [variables, clips[:, None]]
  with jax.set_mesh(training.mesh):
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
  text = compiled.as_text() or ''
  info: dict[str, Any] = {
    'trace_s': traced - start,
    'compile_s': done - traced,
    # XLA's own count takes one iteration of each loop.
    'bytes_accessed': program.read(text, training.mesh).bytes_accessed,
    'device': jax.devices()[0].device_kind,
    'version': f'jax {jax.__version__}',
  }
  memory = compiled.memory_analysis()
  if memory is not None:
    info['temporary_bytes'] = memory.temp_size_in_bytes

  def run(times: int) -> None:
    output = None
    for _ in range(times):
      output = compiled(*arguments)
      if case['pass'] == 'step':
        arguments[0] = output[0]
    jax.block_until_ready(output)

  return run, info


def prepare_torch(case: dict[str, Any]) -> Prepared:
  """Prepares the PyTorch peer: eager or compiled, with either attention."""
  import torch
  from torch.nn import functional
  import torch_peer

  options = case['peer'].split('-')
  if 'kept' in options:
    from dualformer_jax.training import cpu_memory

    cpu_memory.keep_memory()
  device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
  # PyTorch's default: no TensorFloat-32.
  torch.backends.cuda.matmul.allow_tf32 = False
  torch.backends.cudnn.allow_tf32 = False
  model = torch_peer.DualFormer(
    **model_fields(case),
    drop_path_rate=0.1,
    attention='sdpa' if 'sdpa' in options else 'materialized',
  ).to(device)
  model.train(case['pass'] == 'step')
  forward = torch.compile(model) if 'compile' in options else model
  optimizer = torch_peer.make_optimizer(model, 1e-3, 0.02)
  clips, labels = (torch.from_numpy(x).to(device) for x in make_inputs(case))
  mean, std = (
    torch.tensor(x, device=device).view(1, 3, 1, 1, 1)
    for x in (PIXEL_MEAN, PIXEL_STD)
  )
  autocast = torch.autocast(
    device.type, torch.bfloat16, enabled=case['dtype'] == 'bfloat16'
  )

  def logits() -> Any:
    with autocast:
      return forward((clips.permute(0, 4, 1, 2, 3).float() - mean) / std)

  def run(times: int) -> None:
    for _ in range(times):
      if case['pass'] == 'step':
        optimizer.zero_grad()
        functional.cross_entropy(logits().float(), labels).backward()
        optimizer.step()
      else:
        with torch.inference_mode():
          logits()
    if device.type == 'cuda':
      torch.cuda.synchronize()

  start = time.perf_counter()
  run(1)
  info = {
    'compile_s': time.perf_counter() - start,
    'version': f'torch {torch.__version__}',
  }
  if device.type == 'cuda':
    info['device'] = torch.cuda.get_device_name()
  return run, info


def prepare_peaks(case: dict[str, Any]) -> Prepared:
  """Measures the peak rates of matrix products and of memory traffic."""
  import jax
  import jax.numpy as jnp

  on_cpu = jax.default_backend() == 'cpu'
  size = 2048 if on_cpu else 8192
  # Random values: equal ones take less power, and so run faster.
  x = jax.random.normal(jax.random.key(0), (size, size), case['dtype'])
  long = jnp.ones(2**26 if on_cpu else 2**30, 'float32')
  precision = 'highest' if case['dtype'] == 'float32' else None
  # XLA uses the bfloat16 instructions of CPUs only with float32 sums.
  sums = 'float32' if on_cpu else None
  product = jax.jit(
    functools.partial(
      jnp.matmul, precision=precision, preferred_element_type=sums
    )
  )
  # In place, as the first access to new memory is slow.
  add = jax.jit(lambda x: x + 1, donate_argnums=0)

  products, additions = [], []
  for _ in range(8):
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    products.append(time.perf_counter() - start)
    start = time.perf_counter()
    long = jax.block_until_ready(add(long))
    additions.append(time.perf_counter() - start)
  info = {
    'peak_flops': 2 * size**3 / min(products),
    'peak_bandwidth': 2 * long.nbytes / min(additions),
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }
  return lambda _: None, info


def on_cuda() -> bool:
  """Returns whether PyTorch is imported and has a GPU."""
  return 'torch' in sys.modules and sys.modules['torch'].cuda.is_available()


def peak_bytes(case: dict[str, Any]) -> int:
  """Returns the peak memory of the device, or of the process on a CPU."""
  if case['peer'].startswith('jax'):
    import jax

    stats = jax.devices()[0].memory_stats()
    if stats and 'peak_bytes_in_use' in stats:
      return stats['peak_bytes_in_use']
  elif on_cuda():
    return sys.modules['torch'].cuda.max_memory_allocated()
  # In KiB on Linux, in bytes on macOS.
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
  """Prepares the case, and times a run for each line of the input."""
  case = json.loads(sys.argv[1])
  # Several processes share the GPU; all of them compile.
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
  prepare = {
    'jax': prepare_jax,
    'jax-full': prepare_jax,
    'peaks': prepare_peaks,
  }.get(case['peer'], prepare_torch)
  run, info = prepare(case)

  def seconds(times: int) -> float:
    start = time.perf_counter()
    run(times)
    return time.perf_counter() - start

  run(1)  # warm-up
  cache_is_empty = on_cuda()
  if cache_is_empty:
    import torch

    torch.cuda.empty_cache()  # for processes that warm up meanwhile
  print(json.dumps(info), flush=True)
  times = 1
  for _ in sys.stdin:
    if cache_is_empty:
      run(1)  # allocates it again
      cache_is_empty = False
    elapsed = seconds(times)
    if elapsed < _MIN_SECONDS:
      times = math.ceil(times * _MIN_SECONDS / elapsed)
      elapsed = seconds(times)
    print(json.dumps({'s': elapsed / times}), flush=True)
  print(json.dumps({'peak_bytes': peak_bytes(case)}), flush=True)


if __name__ == '__main__':
  main()
