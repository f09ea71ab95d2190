"""One program of the speed benchmark, in a process of its own: see speed.py.

  python scripts/benchmarks/speed_worker.py '{"peer": "jax", ...}'

Builds what the case in its argument describes, prints a line of JSON about it,
then answers each line it reads with the seconds that another run took. Runs
that are short are timed many at a time, one behind the other as in training. At
the end of its input it prints the peak of its memory.
"""
# pyright: reportMissingImports=false
# (of the extra `benchmark`, which nothing else needs)

from __future__ import annotations

from collections.abc import Callable
import functools
import json
import math
import os
import resource
import sys
import time
from typing import Any

import numpy as np

# Runs as often as told and waits for the last, and what there is to tell of it.
Prepared = tuple[Callable[[int], None], dict[str, Any]]
# At least as long is timed at a time, in seconds.
_TIMED = 0.4
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def model_fields(case: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of the model of a case: of a variant, or of a stage.

  A stage alone embeds patches of smaller clips, of which as many tokens come
  as the stage has in the model.
  """
  from dualformer_jax.models import variants
  from dualformer_jax.models.dualformer import DualFormer

  fields = getattr(variants, case['variant'].upper())
  frames, size = case['num_frames'], case['image_size']
  if case.get('peer') == 'jax-full':  # all tokens attend to all, in all blocks
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


def inputs(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the same uint8 clips [b, t, y, x, 3] and labels [b] to everyone."""
  rng = np.random.default_rng(0)
  size = model_fields(case)['image_size']
  shape = (case['clips'], case['num_frames'], size, size, 3)
  return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 400, shape[0])


def prepare_jax(case: dict[str, Any]) -> Prepared:
  """The package's own step of training, or of scoring."""
  import jax
  import jax.numpy as jnp

  from dualformer_jax.models.dualformer import DualFormer
  from dualformer_jax.training import (
    augment,
    optimizer,
    program,
    sharding,
    step,
  )

  model = DualFormer(
    **model_fields(case), drop_path_rate=0.1, dtype=case['dtype']
  )
  sharding.keep_memory()  # as main does
  one = {'data': 1, 'fsdp': 1, 'tensor': 1}
  mesh = sharding.make_mesh(one, case['clips'], devices=jax.devices()[:1])
  options = sharding.compiler_options(mesh)
  clips, labels = map(jnp.asarray, inputs(case))
  pixels = dict(pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros(model.input_shape())
  )
  if case['pass'] == 'step':
    adamw = optimizer.make_optimizer(
      shapes['params'],
      1e-3,
      0.02,
      (('.*pos_block.*', 1, 0), ('backbone.*', 0.1, 1), ('.*', 1, 1)),
    )
    state = jax.jit(
      functools.partial(step.init_state, model, adamw, 0),
      compiler_options=options,
    )()
    function = jax.jit(
      functools.partial(
        step.train_step,
        model=model,
        optimizer=adamw,
        augment=functools.partial(augment.augment, flip=True, **pixels),
        seed=0,
      ),
      donate_argnums=0,
      compiler_options=options,
    )
    arguments = [state, {'clips': clips, 'labels': labels}]
  else:
    # Any will do. To compile what initialises takes more memory than scoring.
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
      lambda x: jnp.asarray(rng.uniform(0, 0.02, x.shape), x.dtype), shapes
    )
    normalize = functools.partial(augment.normalize, **pixels)
    function = jax.jit(
      functools.partial(step.view_logits, model=model, normalize=normalize),
      compiler_options=options,
    )
    arguments = [variables, clips[:, None]]
  start = time.perf_counter()
  lowered = function.lower(*arguments)
  traced = time.perf_counter()
  compiled = lowered.compile()
  done = time.perf_counter()
  told: dict[str, Any] = {'trace_s': traced - start, 'compile_s': done - traced}
  memory = compiled.memory_analysis()
  if memory is not None:
    told['temporary_bytes'] = memory.temp_size_in_bytes
  # XLA's own count takes a loop's body as if it ran once.
  told['bytes_accessed'] = program.read(compiled.as_text() or '', mesh).bytes
  told['device'] = jax.devices()[0].device_kind
  told['version'] = f'jax {jax.__version__}'

  def run(times: int) -> None:
    out = None
    for _ in range(times):
      out = compiled(*arguments)
      if case['pass'] == 'step':
        arguments[0] = out[0]
    jax.block_until_ready(out)

  return run, told


def prepare_torch(case: dict[str, Any]) -> Prepared:
  """The PyTorch peer: eager, autocast or compiled, either attention."""
  import torch
  from torch.nn import functional
  import torch_peer

  options = case['peer'].split('-')
  if 'kept' in options:
    from dualformer_jax.training import sharding

    sharding.keep_memory()
  device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
  # What a user gets: TensorFloat-32 would not be float32.
  torch.backends.cuda.matmul.allow_tf32 = False
  torch.backends.cudnn.allow_tf32 = False
  model = torch_peer.DualFormer(
    **model_fields(case),
    drop_path_rate=0.1,
    attention='sdpa' if 'sdpa' in options else 'materialised',
  ).to(device)
  model.train(case['pass'] == 'step')
  score = torch.compile(model) if 'compile' in options else model
  optimizer = torch_peer.optimizer_of(model, 1e-3, 0.02)
  clips, labels = (torch.from_numpy(x).to(device) for x in inputs(case))
  mean, std = (
    torch.tensor(x, device=device).view(1, 3, 1, 1, 1)
    for x in (PIXEL_MEAN, PIXEL_STD)
  )
  autocast = torch.autocast(
    device.type, torch.bfloat16, enabled=case['dtype'] == 'bfloat16'
  )

  def logits() -> Any:
    with autocast:
      return score((clips.permute(0, 4, 1, 2, 3).float() - mean) / std)

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
  told = {
    'compile_s': time.perf_counter() - start,
    'version': f'torch {torch.__version__}',
  }
  if device.type == 'cuda':
    told['device'] = torch.cuda.get_device_name()
  return run, told


def prepare_peaks(case: dict[str, Any]) -> Prepared:
  """Measures what the machine can do: matrix products, and copying."""
  import jax
  import jax.numpy as jnp

  on_cpu = jax.default_backend() == 'cpu'
  size = 2048 if on_cpu else 8192
  # Random, as chips multiply what they know to be equal with less power.
  x = jax.random.normal(jax.random.key(0), (size, size), case['dtype'])
  long = jnp.ones(2**26 if on_cpu else 2**30, 'float32')
  precision = 'highest' if case['dtype'] == 'float32' else None
  # XLA on a CPU uses what the CPU has for bfloat16 only with float32 sums.
  sums = 'float32' if on_cpu else None
  product = jax.jit(
    functools.partial(
      jnp.matmul, precision=precision, preferred_element_type=sums
    )
  )
  # In place: new memory is slow on the first touch.
  add = jax.jit(lambda x: x + 1, donate_argnums=0)

  products, additions = [], []
  for _ in range(8):
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    products.append(time.perf_counter() - start)
    start = time.perf_counter()
    long = jax.block_until_ready(add(long))
    additions.append(time.perf_counter() - start)
  told = {
    'peak_flops': 2 * size**3 / min(products),
    'peak_bandwidth': 2 * long.nbytes / min(additions),
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }
  return lambda _: None, told


def on_cuda() -> bool:
  """Returns whether PyTorch is loaded, and runs on a GPU."""
  return 'torch' in sys.modules and sys.modules['torch'].cuda.is_available()


def peak_bytes(case: dict[str, Any]) -> int:
  """Returns the peak of device memory, or of the process on a CPU."""
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
  """Prepares the case, then runs it as often as asked."""
  case = json.loads(sys.argv[1])
  # Several processes share a GPU here. Nothing is compiled by an earlier run.
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
  prepare = {
    'jax': prepare_jax,
    'jax-full': prepare_jax,
    'peaks': prepare_peaks,
  }.get(case['peer'], prepare_torch)
  run, told = prepare(case)

  def seconds(times: int) -> float:
    start = time.perf_counter()
    run(times)
    return time.perf_counter() - start

  run(1)  # warm-up
  shares_memory = on_cuda()
  if shares_memory:
    import torch

    torch.cuda.empty_cache()  # for those that warm up meanwhile
  print(json.dumps(told), flush=True)
  times = 1
  for _ in sys.stdin:
    if shares_memory:
      run(1)  # takes it back
      shares_memory = False
    took = seconds(times)
    if took < _TIMED:
      times = math.ceil(times * _TIMED / took)
      took = seconds(times)
    print(json.dumps({'s': took / times}), flush=True)
  print(json.dumps({'peak_bytes': peak_bytes(case)}), flush=True)


if __name__ == '__main__':
  main()
