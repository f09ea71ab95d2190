"""Training steps and losses: against the reference and by hand."""

import dataclasses
import functools
import json
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualformer_jax.checkpoints import pytorch_names
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import losses, step
from dualformer_jax.training import optimizer as optimizers
from dualformer_jax.training.state import TrainState, init_state
from tests import reference_arrays

common = runpy.run_path(
  str(pathlib.Path(__file__).parents[2] / 'configs' / 'common.py')
)
SMALL: dict[str, Any] = dict(
  depths=(2,),
  embed_dims=(16,),
  num_heads=(2,),
  num_classes=5,
  num_frames=8,
  image_size=32,
  fine_sizes=((4, 4, 4),),
  coarse_sizes=(None,),
  dtype='float32',
)


def recording() -> optax.GradientTransformation:
  """Returns an optimizer that stores the gradients in its state."""
  return optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda updates, state, params=None: (updates, updates),
  )


def normalized(key, clips, labels):
  """Augmentation of clips that are normalized already: none."""
  del key
  return clips, labels


def assert_near(actual, expected, tolerance, name):
  assert abs(actual - expected) <= tolerance, (name, actual, expected)


@pytest.mark.slow
def test_three_steps_agree_with_the_published_implementation():
  figures = json.loads(
    (reference_arrays.DIRECTORY / 'train_micro_seed1.json').read_text()
  )
  model = DualFormer(
    **reference_arrays.MODELS['micro'], head_dropout=0.0, dtype='float32'
  )
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros(model.input_shape())
  )
  variables, _ = pytorch_names.from_pytorch(
    reference_arrays.state_dict('micro', seed=1), dict(shapes)
  )
  rules = common['get_config']().optimizer.multipliers
  optimizer = optax.chain(
    recording(),
    optimizers.make_optimizer(
      variables['params'],
      figures['lr'],
      figures['weight_decay'],
      rules,
      b1=figures['betas'][0],
      b2=figures['betas'][1],
      eps=figures['eps'],
    ).transformation,
  )
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=jax.tree.map(jnp.asarray, variables['params']),
    batch_stats=jax.tree.map(jnp.asarray, variables['batch_stats']),
    opt_state=optimizer.init(variables['params']),
  )

  @functools.partial(jax.jit, compiler_options=reference_arrays.OPTIMIZED)
  def train_step(state, batch):
    return step.train_step(
      state,
      batch,
      model=model,
      apply_gradients=functools.partial(optimizers.apply_gradients, optimizer),
      options=step.StepOptions(seed=0),
      augment=normalized,
    )

  def named(params, batch_stats=state.batch_stats):
    return pytorch_names.to_pytorch(
      {'params': params, 'batch_stats': batch_stats}
    )

  for index, expected in enumerate(figures['steps']):
    clips = reference_arrays.clips(
      figures['batch'], 32, 224, expected['clips_seed']
    )
    batch = {'clips': clips, 'labels': np.array(figures['labels'], np.int32)}
    state, metrics = train_step(state, batch)
    assert_near(
      metrics['loss'], expected['loss'], 1e-4 * expected['loss'], index
    )
    if index:
      continue

    gradients = named(state.opt_state[0])
    names = set(expected['grad_norm'])
    assert names == {n for n in gradients if 'num_b' not in n} - {
      n for n in gradients if 'running_' in n
    }
    for name, norm in expected['grad_norm'].items():
      gradient = gradients[name].astype(np.float64)
      scale = norm
      if name.endswith('attn.lr.0.bias'):
        # Zero but for rounding, as BatchNorm takes the mean away: what counts
        # is that it is nothing beside the gradient of the kernel.
        scale = expected['grad_norm'][name.replace('bias', 'weight')]
      actual = np.linalg.norm(gradient)
      assert_near(actual, norm, 1e-3 * scale, name)
      assert_near(
        gradient.sum(), expected['grad_sum'][name], 1e-3 * scale, name
      )

    statistics = named(state.params, state.batch_stats)
    for name, (mean, norm) in expected['batch_stats'].items():
      array = statistics[name].astype(np.float64)
      assert_near(array.mean(), mean, 1e-4 * norm, name)
      assert_near(np.linalg.norm(array), norm, 1e-4 * norm, name)

  parameters = named(state.params)
  for name, norm in figures['param_norm_after'].items():
    array = parameters[name].astype(np.float64)
    total = figures['param_sum_after'][name]
    wander, free = 0.0, 0
    if name.endswith(('attn.lr.0.bias', 'attn.qkv.bias', 'attn.kv.bias')):
      # What BatchNorm takes away, and what softmax does not see, the bias of
      # the keys: the gradient is zero but for rounding, of which Adam makes
      # steps of full length in any direction, there and here: three of 0.1 lr.
      wander = 2 * 3 * 0.1 * figures['lr']
      parts = {'qkv': 3, 'kv': 2}.get(name.split('.')[-2], 1)
      free = array.size // parts
    assert_near(
      np.linalg.norm(array),
      norm,
      max(1e-4 * norm, wander * free**0.5),
      name,
    )
    assert_near(
      array.sum(),
      total,
      max(1e-4 * max(norm, abs(total)), wander * free),
      name,
    )

  output = jax.jit(model.apply, compiler_options=reference_arrays.OPTIMIZED)(
    {'params': state.params, 'batch_stats': state.batch_stats},
    reference_arrays.clips(2, 32, 224, seed=1),
  )
  expected = np.array(figures['logits_after'])
  error = np.abs(output.logits - expected).max() / np.abs(expected).max()
  assert error < 1e-3


@pytest.fixture(scope='module', name='state')
def _state() -> TrainState:
  model = DualFormer(**SMALL)
  return jax.jit(lambda: init_state(model, optax.sgd(1.0), seed=0))()


def small_step(accumulation_steps, **fields):
  model = DualFormer(**{**SMALL, **fields})
  rng = np.random.default_rng(0)
  batch = {
    'clips': jnp.asarray(rng.standard_normal((8, 8, 32, 32, 3)), jnp.float32),
    'labels': jnp.asarray(rng.integers(0, 5, 8), jnp.int32),
  }
  return jax.jit(
    lambda state, seed: step.train_step(
      state,
      batch,
      model=model,
      apply_gradients=functools.partial(
        optimizers.apply_gradients, optax.sgd(1.0)
      ),
      options=step.StepOptions(seed, accumulation_steps),
      augment=normalized,
    ),
  )


@pytest.mark.slow
def test_accumulation_equals_the_whole_batch(state):
  whole = small_step(1, head_dropout=0.0)
  parts = small_step(4, head_dropout=0.0)
  expected, expected_metrics = whole(state, 0)
  actual, metrics = parts(state, 0)
  np.testing.assert_allclose(
    metrics['loss'], expected_metrics['loss'], rtol=1e-5
  )
  changed = 0.0
  for before, a, e in zip(
    *map(jax.tree.leaves, (state.params, actual.params, expected.params)),
    strict=True,
  ):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)
    changed = max(changed, float(jnp.abs(e - before).max()))
  assert changed > 1e-3


@pytest.mark.slow
def test_randomness_depends_on_seed_and_step_alone(state):
  train_step = small_step(1, head_dropout=0.5, drop_path_rate=0.5)
  loss = {
    (seed, at): float(
      train_step(dataclasses.replace(state, step=jnp.int32(at)), seed)[1][
        'loss'
      ]
    )
    for seed in (0, 1)
    for at in (0, 1)
  }
  assert len(set(loss.values())) == 4
  assert float(train_step(state, 0)[1]['loss']) == loss[0, 0]


def test_cross_entropy_agrees_with_numpy():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((6, 4)).astype(np.float32)
  labels = np.array([0, 3, 1, 1, 2, 0], np.int32)
  shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = -np.log(shares[np.arange(6), labels]).mean()
  actual = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
  np.testing.assert_allclose(actual, expected, rtol=1e-5)

  mixed = rng.dirichlet(np.ones(4), 6).astype(np.float32)
  expected = -(mixed * np.log(shares)).sum(-1).mean()
  actual = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(mixed))
  np.testing.assert_allclose(actual, expected, rtol=1e-5)

  several = rng.integers(0, 2, (6, 4)).astype(np.float32)
  p = 1 / (1 + np.exp(-logits))
  expected = -(several * np.log(p) + (1 - several) * np.log(1 - p)).mean()
  actual = losses.cross_entropy(
    jnp.asarray(logits), jnp.asarray(several), multi_label=True
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_label_smoothing_agrees_with_numpy():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((6, 4)).astype(np.float32)
  labels = np.array([0, 3, 1, 1, 2, 0], np.int32)
  log_shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  shares = np.full((6, 4), 0.1 / 4)
  shares[np.arange(6), labels] += 0.9
  for given in (labels, np.eye(4, dtype=np.float32)[labels]):
    actual = losses.cross_entropy(
      jnp.asarray(logits), jnp.asarray(given), label_smoothing=0.1
    )
    np.testing.assert_allclose(
      actual, -(shares * log_shares).sum(-1).mean(), rtol=1e-5
    )
  several = rng.integers(0, 2, (6, 4)).astype(np.float32)
  smooth = np.where(several == 1, 0.95, 0.05)
  p = 1 / (1 + np.exp(-logits))
  actual = losses.cross_entropy(
    jnp.asarray(logits),
    jnp.asarray(several),
    multi_label=True,
    label_smoothing=0.1,
  )
  expected = -(smooth * np.log(p) + (1 - smooth) * np.log(1 - p)).mean()
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.slow
def test_parameter_average_and_frozen_parameters():
  # A stage that is frozen, statistics included, and one that is not.
  fields = dict(
    depths=(2, 1),
    embed_dims=(16, 32),
    num_heads=(2, 4),
    fine_sizes=((4, 4, 4), (4, 4, 4)),
    coarse_sizes=((2, 2, 2), None),
  )
  model = DualFormer(**{**SMALL, **fields})
  frozen = r'backbone/(patch_embeds|blocks)_0.*'
  optimizer = optimizers.make_optimizer(
    jax.eval_shape(lambda: init_state(model, optax.identity(), 0)).params,
    0.01,
    0.1,
    common['get_config']().optimizer.multipliers,
    frozen=frozen,
  )
  init = jax.jit(
    lambda: init_state(model, optimizer.transformation, 0, with_ema=True)
  )
  state = first = init()
  rng = np.random.default_rng(0)
  batch = {
    'clips': jnp.asarray(rng.standard_normal((4, 8, 32, 32, 3)), jnp.float32),
    'labels': jnp.asarray(rng.integers(0, 5, 4), jnp.int32),
  }
  train_step = jax.jit(
    lambda state: step.train_step(
      state,
      batch,
      model=model,
      apply_gradients=optimizer.apply_gradients,
      options=step.StepOptions(seed=0, ema_decay=0.8, frozen=frozen),
      augment=normalized,
    )[0]
  )
  average = jax.tree.map(np.asarray, first.params)
  for _ in range(3):
    state = train_step(state)
    average = jax.tree.map(
      lambda old, new: 0.8 * old + 0.2 * np.asarray(new), average, state.params
    )
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7),
    state.ema_params,
    average,
  )
  assert state.variables()['params'] is state.ema_params

  stays = moves = 0
  for tree, then in (
    (state.params, first.params),
    (state.batch_stats, first.batch_stats),
  ):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, now), old in zip(leaves, jax.tree.leaves(then), strict=True):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      same = np.array_equal(now, old)
      if name.startswith(('backbone/patch_embeds_0/', 'backbone/blocks_0_')):
        assert same, name
        stays += 1
      else:
        moves += not same
  assert stays > 30  # the statistics of the coarse level among them
  assert moves > 20
