"""A whole model with all kernels for Hopper GPUs, interpreted."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.models.dualformer import DualFormer
from tests import random_variables
from tests.kernels import interpreted_gpu

FIELDS: dict[str, Any] = dict(
  depths=(2,),
  embed_dims=(64,),
  num_heads=(2,),
  num_classes=5,
  num_frames=32,
  image_size=16,
  window=(8, 2, 4),
  fine_sizes=((8, 4, 4),),
  coarse_sizes=(None,),
  drop_path_rate=0.2,
  # Recomputation does not support what the interpreter calls.
  remat='none',
)
KERNELS = {
  'layer_norm',
  'layer_norm_gradient',
  'mlp_forward',
  'mlp_input_gradient',
  'mlp_weight_gradients',
  'norm_pool',
  'norm_project',
  'norm_project_gradient',
  'positional_conv',
  'positional_conv_gradient',
  'short_attention',
  'short_attention_key_gradients',
  'short_attention_query_gradients',
  'window_branch',
  'window_branch_gradient',
}


@pytest.mark.slow
def test_model_agrees_with_reference(monkeypatch):
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  rng = np.random.default_rng(0)
  clips = rng.standard_normal((2, 32, 16, 16, 3)).astype(np.float32)
  weights = rng.standard_normal((2, 5)).astype(np.float32)
  variables = random_variables.draw(DualFormer(**FIELDS))

  def run(dtype, kernels):
    model: Any = DualFormer(**FIELDS, dtype=dtype, kernels=kernels)

    def loss(params):
      output, _ = model.apply(
        {**variables, 'params': params},
        clips,
        train=True,
        rngs={'dropout': jax.random.key(1)},
        mutable=['batch_stats'],
      )
      return jnp.sum(output.logits * weights)

    results = jax.jit(jax.value_and_grad(loss))(variables['params'])
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(results)]
    return np.concatenate(leaves)

  expected = run('float32', 'reference')

  interpreted_gpu.pretend(monkeypatch, 'NVIDIA H200')
  module = importlib.import_module('dualformer_jax.kernels.window_branch_gpu')
  monkeypatch.setattr(module, '_MIN_WINDOWS', 1)
  with (
    interpreted_gpu.interpreted('hopper'),
    interpreted_gpu.names_of_kernels() as names,
  ):
    difference = run('bfloat16', 'experimental') - expected
  # The reference in bfloat16 rounds more arrays, and differs by 9.5e-3.
  assert np.linalg.norm(difference) < 1.2e-2 * np.linalg.norm(expected)
  assert names == KERNELS
