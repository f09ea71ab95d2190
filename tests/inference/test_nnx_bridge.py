"""The README's lines that turn a recognizer into an NNX module."""

from __future__ import annotations

import pathlib
import re
import textwrap
from typing import Any

from flax import nnx
import jax
import numpy as np
import pytest

from tests.inference import token_model

README = pathlib.Path(__file__).parents[2] / 'README.md'


@pytest.mark.slow
def test_module_has_the_logits_and_gradients_of_the_model():
  variables = jax.device_put(token_model.make_variables())
  recognizer = token_model.make_recognizer(variables)
  shape = (2, 8, 68, 68, 3)
  views = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  clips = recognizer.normalize(views)
  blocks = re.findall(
    r'^```python\n(.*?)^```$',
    README.read_text('utf-8'),
    re.MULTILINE | re.DOTALL,
  )
  [code] = [block for block in blocks if 'nnx.bridge' in block]
  names: dict[str, Any] = {'recognizer': recognizer, 'clips': clips}
  exec(textwrap.dedent(code), names)
  module = names['module']

  def loss(output):
    return (output.logits**2).sum() + (output.token_logits**2).mean()

  def nnx_loss(module, clips):
    output = module(clips)
    return loss(output), output.logits

  gradients, logits = nnx.jit(nnx.grad(nnx_loss, has_aux=True))(module, clips)
  np.testing.assert_allclose(logits, recognizer.logits(clips), atol=1e-5)
  found = nnx.to_pure_dict(nnx.state(gradients))

  def linen_loss(params, clips):
    output: Any = recognizer.model.apply({**variables, 'params': params}, clips)
    return loss(output)

  expected = jax.jit(jax.grad(linen_loss))(variables['params'], clips)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max())
    assert np.abs(y).max() > 0
