"""Memory of a training step on the CPU is kept for the next one."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

_COUNT_PAGE_FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from dualformer_jax.training import cpu_memory
if sys.argv[1] == 'keep':
  cpu_memory.keep_memory()
# The product, 64 MiB, is a temporary.
step = jax.jit(lambda x: jnp.sum(jnp.sin(x @ x.T)))
x = jnp.ones([4096, 64])
for _ in range(16):
  jax.block_until_ready(step(x))
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
  return subprocess.run(
    [sys.executable, '-c', code, *arguments],
    check=True,
    capture_output=True,
    text=True,
    env=os.environ | environment,
  ).stdout


@pytest.mark.slow
@pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='needs glibc, which has mallopt'
)
def test_step_reuses_the_memory_of_the_step_before():
  def page_faults(mode: str) -> int:
    """Returns the number of page faults of the step with the fewest."""
    # Huge pages would be too few to tell.
    environment = {'GLIBC_TUNABLES': '', 'JAX_PLATFORMS': 'cpu'}
    counts = run(_COUNT_PAGE_FAULTS, mode, **environment).split()
    # A step can begin before the memory of the step before is free, and the
    # system may reclaim memory while the process waits.
    return int(np.diff([int(count) for count in counts]).min())

  # By default as many as the product has pages, or, with jax 0.12, huge pages.
  kept = page_faults('keep')
  assert kept < 2**26 // os.sysconf('SC_PAGE_SIZE') / 20
  assert kept <= page_faults('default')


@pytest.mark.slow
def test_accelerators_keep_their_settings():
  code = """
import jax
from dualformer_jax.training import cpu_memory
cpu_memory.keep_memory()
print(jax.config.read('jax_cpu_enable_async_dispatch'))
"""
  assert run(code, JAX_PLATFORMS='cuda,cpu').strip() == 'True'
  assert run(code, JAX_PLATFORMS='cpu').strip() == 'False'
