"""Recomputation of activations in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental.xla_metadata import set_xla_metadata

from dualformer_jax.kernels.dispatch import Compute

# (module, *arrays) -> arrays
ModuleFunction = Callable[..., Any]


def recomputed(
  function: ModuleFunction, compute: Compute, saved: Sequence[str] = ()
) -> ModuleFunction:
  """Rematerializes a function: saves its inputs and the arrays in `saved`.

  Inputs are cheaper to save than arrays named in `saved`
  (jax.ad_checkpoint.checkpoint_name): jax.checkpoint marks the latter by
  `reduce_precision`, which XLA:CPU copies unless it can fuse the mark into the
  operation before (docs/performance.md). On a CPU, apply `isolated` as well.
  """
  # XLA:CPU removes the barriers that prevent CSE before it runs CSE.
  prevent_cse = compute.choose(True, cpu=False)
  policy = jax.checkpoint_policies.save_only_these_names(*saved)
  return nn.remat(function, prevent_cse=prevent_cse, policy=policy)


def isolated(function: ModuleFunction, compute: Compute) -> ModuleFunction:
  """Runs the backward pass in a computation that XLA:CPU does not inline.

  If it is inlined, XLA:CPU finds that the forward pass and its recomputation
  are equal, computes them once and stores everything. It also computes the
  gradient of the residual stream, a sum with a term from each later block,
  again from its terms wherever it is used.
  """

  def forward(module, *arrays):
    return nn.vjp(function, module, *arrays)

  def backward(pullback, dy):
    gradients = jax.jit(lambda pullback, dy: pullback(dy))(pullback, dy)
    return set_xla_metadata(gradients, inlineable='false')

  separate = nn.custom_vjp(function, forward, backward, grad_vars='params')
  return compute.choose(function, cpu=separate)
