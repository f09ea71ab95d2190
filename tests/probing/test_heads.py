"""Heads that are trained together, against other optimizers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special

from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.models import heads as modules
from dualformer_jax.probing import heads
from tests.probing.stored import CHANNELS, make_inputs

PLAIN = Compute('float32', 'reference')
HEADS: dict[str, Any] = {
  'linear': modules.ClassificationHead(3, CHANNELS, 0.0, PLAIN),
  'attentive': modules.AttentiveHead(3, CHANNELS, 2, 0.0, PLAIN),
}


def is_kernel(params: Any) -> Any:
  return jax.tree.map(lambda p: p.ndim > 1, params)


@functools.partial(jax.jit, static_argnames='kind')
def train_alone(kind: str, x: Any, y: Any, rate: Any, decay: Any) -> Any:
  """Trains one head for 40 steps on all videos, with optimizers of Optax."""

  def schedule(step):
    warmup = jnp.minimum(1, (step + 1) / 2)  # 5% are two steps
    return rate * warmup * (1 + jnp.cos(jnp.pi * step / 40)) / 2

  if kind == 'linear':
    optimizer = optax.chain(
      optax.add_decayed_weights(decay, mask=is_kernel),
      optax.adam(schedule, b2=0.95),
    )
  else:
    optimizer = optax.adamw(schedule, weight_decay=decay, mask=is_kernel)

  def loss(params):
    logits = jax.nn.log_softmax(HEADS[kind].apply({'params': params}, x))
    return -jnp.mean(logits[jnp.arange(len(y)), y])

  def step(_, carry):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  params = HEADS[kind].init(jax.random.key(3), x)['params']
  return jax.lax.fori_loop(0, 40, step, (params, optimizer.init(params)))[0]


@pytest.mark.slow
@pytest.mark.parametrize('kind', HEADS)
def test_heads_trained_together_equal_heads_trained_alone(kind):
  inputs = make_inputs(kind, 30, 3, files=4)
  rows = np.arange(30)[::-1].copy()
  settings = [(0.03, 0.0), (0.01, 0.1), (0.003, 0.5)]
  together = heads.fit(HEADS[kind], inputs, rows, settings, seed=3, steps=40)
  x = jnp.asarray(inputs.read(rows, np.zeros(30, np.int64)))
  y = inputs.features.labels[rows]
  ends = []
  for index, setting in enumerate(settings):
    alone = train_alone(kind, x, y, *setting)
    one = jax.tree.map(lambda p, i=index: p[i], together)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
      one,
      alone,
    )
    ends.append(np.asarray(one['fc_cls']['kernel']))
  assert np.abs(ends[0] - ends[1]).max() > 0.1
  assert np.abs(ends[1] - ends[2]).max() > 0.1


def test_linear_head_reaches_the_optimum_that_scipy_finds():
  inputs = make_inputs('linear', 80, 3)
  rows, decays = np.arange(80), (0.003, 0.1)
  settings = [(0.03, decay) for decay in decays]
  found = heads.fit(HEADS['linear'], inputs, rows, settings, steps=400)
  x = inputs.read(rows, 0 * rows).astype(np.float64)
  labels = inputs.features.labels

  def objective(weights: np.ndarray, decay: float) -> float:
    kernel, bias = np.split(weights.reshape(-1, 3), [CHANNELS])
    logits = x @ kernel + bias
    total: Any = special.logsumexp(logits, axis=1)
    chosen = logits[rows, labels] - total
    return float(decay / 2 * np.sum(kernel**2) - np.mean(chosen))

  for index, decay in enumerate(decays):
    start = np.zeros(3 * (CHANNELS + 1))
    best = optimize.minimize(objective, start, args=(decay,), tol=1e-10)
    kernel, bias = np.split(best.x.reshape(-1, 3), [CHANNELS])
    layer = found['fc_cls']
    assert np.abs(kernel).max() > 0.1
    np.testing.assert_allclose(layer['kernel'][index], kernel, atol=2e-3)
    differences = np.asarray(layer['bias'][index]) - bias
    # A constant added to all biases changes nothing.
    np.testing.assert_allclose(differences, differences.mean(), atol=2e-3)


@pytest.mark.slow
def test_logits_and_cross_entropy_are_those_of_every_view(monkeypatch):
  monkeypatch.setattr(heads, '_BATCH_SIZE', 8)  # 20 is no multiple
  inputs = make_inputs('attentive', 24, 3, views=2, files=3)
  rows = np.random.default_rng(1).permutation(24)[:20]
  head = HEADS['attentive']
  params = heads.fit(head, inputs, rows, [(0.1, 0.0), (0.01, 0.0)], steps=3)
  batches = list(heads.logits(head, params, inputs, rows))
  found = np.concatenate(batches, axis=1)
  tokens = np.concatenate(inputs.features.token_files)
  apply = jax.jit(head.apply)
  losses = []
  for setting in range(2):
    one = jax.tree.map(lambda p, i=setting: p[i], params)
    probabilities = np.zeros((20, 3))
    for view in range(2):
      x = jnp.asarray(tokens[rows, view], np.float32)
      expected: Any = apply({'params': one}, x)
      np.testing.assert_allclose(found[setting, :, view], expected, atol=1e-4)
      probabilities = probabilities + special.softmax(expected, axis=1) / 2
    chosen = probabilities[np.arange(20), inputs.features.labels[rows]]
    losses.append(-np.mean(np.log(chosen)))
  validated = heads.validate(head, params, inputs, rows)
  np.testing.assert_allclose(validated, losses, rtol=1e-4)
