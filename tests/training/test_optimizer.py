"""AdamW, its schedule and its multipliers, against the reference and NumPy."""

import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.training import optimizer
from tests import reference_arrays
from tests.kernels import interpreted_gpu

RECIPE = (
  ('backbone/pos_block.*', 1.0, 0.0),
  ('backbone/.*', 0.1, 1.0),
  ('.*', 1.0, 1.0),
)
SETTINGS: dict[str, Any] = dict(b1=0.8, b2=0.95, eps=1e-6)
# Parameter -> shape, and what RECIPE gives it.
SHAPES = {
  'backbone': {'pos_block_0': {'kernel': (3, 2)}, 'norm': {'scale': (4,)}},
  'cls_head': {'fc_cls': {'bias': (5,)}},
}
MULTIPLIERS = {
  'backbone/pos_block_0/kernel': (1.0, 0.0),
  'backbone/norm/scale': (0.1, 1.0),
  'cls_head/fc_cls/bias': (1.0, 1.0),
}


def _figures(name):
  return json.loads((reference_arrays.DIRECTORY / name).read_text())


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _random_tree(rng):
  return jax.tree.map(
    rng.standard_normal, SHAPES, is_leaf=lambda node: isinstance(node, tuple)
  )


# The schedule.


@pytest.mark.parametrize('run', _figures('schedule.json'))
def test_schedule_agrees_with_the_reference(run):
  schedule = jax.jit(
    optimizer.learning_rate_schedule(
      run['base_lr'],
      run['epochs'],
      run['warmup_epochs'],
      run['steps_per_epoch'],
    )
  )
  rates = [float(schedule(step)) for step in range(len(run['lr']))]
  np.testing.assert_allclose(rates, run['lr'], rtol=1e-6)


def test_schedule_stays_exact_for_long_runs():
  per_epoch, epochs, warmup = 3750, 30, 2.5
  steps = np.unique(
    np.concatenate(
      [
        np.random.default_rng(0).integers(0, epochs * per_epoch, 5000),
        np.arange(epochs) * per_epoch,
        np.arange(1, epochs + 1) * per_epoch - 1,
        warmup * per_epoch + np.arange(-2, 3),
      ]
    ).astype(int)
  )
  expected = [
    1e-3
    * math.cos(math.pi * (step // per_epoch) / epochs / 2) ** 2
    * min(1, 0.1 + 0.9 * step / (warmup * per_epoch))
    for step in steps.tolist()
  ]
  schedule = optimizer.learning_rate_schedule(1e-3, epochs, warmup, per_epoch)
  rates = jax.jit(jax.vmap(schedule))(steps)
  assert rates.dtype == jnp.float32
  np.testing.assert_allclose(np.float64(rates), expected, rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_base_rate():
  schedule = optimizer.learning_rate_schedule(0.5, 4, 0, 3)
  assert [float(schedule(step)) for step in (0, 2)] == [0.5, 0.5]
  assert float(schedule(6)) == pytest.approx(0.25)


def test_schedule_ends_at_zero():
  schedule = optimizer.learning_rate_schedule(0.5, 4, 1, 3)
  assert [float(schedule(step)) for step in (12, 1000)] == [0, 0]


# The multipliers.


@pytest.mark.parametrize('variant', ['tiny', 'small'])
def test_multipliers_agree_with_the_reference(variant):
  def flax_path(name, shape):
    """`backbone.blocks.0.1.norm1.weight` -> backbone blocks_0_1 norm1 scale."""
    *modules, kind = re.sub(r'\.(?=\d)', '_', name).split('.')
    if kind == 'weight':
      kind = 'scale' if len(shape) == 1 else 'kernel'
    return [*modules, kind]

  params, expected = {}, {}
  figures = _figures(f'param_groups_{variant}.json')
  shapes = reference_arrays.shapes(variant)
  for name, multipliers in figures.items():
    *modules, kind = flax_path(name, shapes[name])
    node = params
    for module in modules:
      node = node.setdefault(module, {})
    node[kind] = jax.ShapeDtypeStruct(shapes[name], np.float32)
    expected['/'.join([*modules, kind])] = tuple(multipliers)

  tree = optimizer.parameter_multipliers(params, RECIPE)
  assert jax.tree.structure(tree) == jax.tree.structure(params)
  found = {
    _name(path): (leaf.learning_rate, leaf.decay)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  assert found == expected
  assert len(found) == len(figures) > 200


def test_first_full_match_applies():
  rules = (('a', 3.0, 3.0), ('a.*', 1.0, 0.0), ('.*', 2.0, 1.0))
  tree = optimizer.parameter_multipliers({'ab': 0, 'ba': 0, 'a': 0}, rules)
  assert {name: leaf.learning_rate for name, leaf in tree.items()} == {
    'a': 3.0,
    'ab': 1.0,
    'ba': 2.0,
  }


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    (RECIPE[:2], "no rule matches the parameter 'cls_head/fc_cls/bias'"),
    ((*RECIPE, ('norms', 1.0, 1.0)), "'norms' is the first to match no"),
    ((('(', 1.0, 1.0),), r"\('\(', 1.0, 1.0\) should be"),
    ((('.*', 1.0),), r"\('.\*', 1.0\) should be"),
    ((('.*', 'a', 1.0),), r"\('.\*', 'a', 1.0\) should be"),
  ],
)
def test_invalid_rule_raises(rules, message):
  with pytest.raises(errors.UserError, match=message):
    optimizer.make_optimizer(
      _random_tree(np.random.default_rng(0)), 1e-3, 0.1, rules
    )


# The updates.


def _numpy_adamw(params, gradients, rates, weight_decay, b1, b2, eps):
  """AdamW on {name: array}, written down from the paper, in float64."""
  params = dict(params)
  for name, (rate_multiplier, decay_multiplier) in MULTIPLIERS.items():
    mean = square = 0.0
    for step, (gradient, rate) in enumerate(
      zip(gradients, rates, strict=True), 1
    ):
      mean = b1 * mean + (1 - b1) * gradient[name]
      square = b2 * square + (1 - b2) * gradient[name] ** 2
      adam = mean / (1 - b1**step) / (np.sqrt(square / (1 - b2**step)) + eps)
      decay = weight_decay * decay_multiplier * params[name]
      params[name] = params[name] - rate * rate_multiplier * (adam + decay)
  return params


def _run(adamw, params, gradients):
  """Applies gradients; returns {name: parameter}, and the last norm."""
  step = jax.jit(adamw.apply_gradients)
  state = adamw.transformation.init(params)
  norm = 0.0
  for gradient in gradients:
    params, state, norm = step(gradient, state, params)
  return _by_name(params), float(norm)


def _by_name(tree):
  return {
    _name(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  'dtype, tolerance', [('float64', 1e-9), ('float32', 1e-5)]
)
def test_updates_agree_with_numpy(dtype, tolerance):
  rng = np.random.default_rng(0)
  params, *gradients = (_random_tree(rng) for _ in range(6))
  with jax.enable_x64(dtype == 'float64'):
    schedule = optimizer.learning_rate_schedule(0.1, 3, 1.5, 2)
    rates = [float(schedule(step)) for step in range(5)]

    def cast(tree):
      return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)

    result, _ = _run(
      optimizer.make_optimizer(params, schedule, 0.3, RECIPE, **SETTINGS),
      cast(params),
      [cast(gradient) for gradient in gradients],
    )
  expected = _numpy_adamw(
    _by_name(params),
    [_by_name(gradient) for gradient in gradients],
    rates,
    weight_decay=0.3,
    **SETTINGS,
  )
  for name in MULTIPLIERS:
    assert result[name].dtype == dtype
    np.testing.assert_allclose(
      result[name], expected[name], rtol=tolerance, atol=tolerance
    )


def kernel_arrays():
  """Returns parameters and gradients of five steps that need all paths."""
  rng = np.random.default_rng(2)
  # More than a block of 1024 elements, with and without a rest of less than
  # 128; less than a block; and no multiple of 32, for which there is no kernel.
  shapes = {
    'backbone': {
      'pos_block_0': {'kernel': (2, 1104)},
      'norm': {'scale': (96,)},
    },
    'cls_head': {'fc_cls': {'bias': (5,)}},
  }
  return [
    jax.tree.map(
      lambda shape: rng.standard_normal(shape, np.float32),
      shapes,
      is_leaf=lambda node: isinstance(node, tuple),
    )
    for _ in range(6)
  ]


@pytest.mark.parametrize('max_grad_norm', [0.0, 40.0])
def test_kernels_agree_with_numpy(monkeypatch, max_grad_norm):
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  params, *gradients = kernel_arrays()
  schedule = optimizer.learning_rate_schedule(0.1, 3, 1.5, 2)
  adamw = optimizer.make_optimizer(
    params,
    schedule,
    0.3,
    RECIPE,
    **SETTINGS,
    max_grad_norm=max_grad_norm,
    compute=Compute('bfloat16', 'experimental'),
  )
  interpreted_gpu.pretend(monkeypatch, 'NVIDIA H200')
  # A kernel for each array.
  with (
    interpreted_gpu.interpreted('adam_gpu') as module,
    interpreted_gpu.names_of_kernels() as names,
  ):
    monkeypatch.setattr(module, '_MAX_ARRAYS', 1)
    result, norm = _run(adamw, params, gradients)

  assert names == {'adamw', 'squared_norm'}
  exact = [
    {name: np.float64(array) for name, array in _by_name(gradient).items()}
    for gradient in gradients
  ]
  lengths = [
    np.sqrt(sum(np.square(array).sum() for array in arrays.values()))
    for arrays in exact
  ]
  assert norm == pytest.approx(lengths[-1], rel=1e-6)
  assert min(lengths) > 40
  if max_grad_norm:
    for arrays, length in zip(exact, lengths, strict=True):
      for array in arrays.values():
        array *= max_grad_norm / length
  expected = _numpy_adamw(
    {name: np.float64(array) for name, array in _by_name(params).items()},
    exact,
    [float(schedule(step)) for step in range(5)],
    weight_decay=0.3,
    **SETTINGS,
  )
  for name in MULTIPLIERS:
    np.testing.assert_allclose(result[name], expected[name], rtol=0, atol=1e-5)


def test_kernels_leave_the_state_of_other_devices(monkeypatch):
  if jax.__version_info__ < (0, 11):
    pytest.skip('this version of JAX has no interpreter of GPU kernels')
  params, gradient, *_ = kernel_arrays()
  adamw = optimizer.make_optimizer(
    params,
    lambda _: 0.1,
    0.3,
    RECIPE,
    compute=Compute('bfloat16', 'experimental'),
  )
  state = adamw.transformation.init(params)
  expected = optimizer.apply_gradients(
    adamw.transformation, gradient, state, params
  )
  interpreted_gpu.pretend(monkeypatch, 'NVIDIA H200')
  with interpreted_gpu.interpreted('adam_gpu'):
    actual = jax.jit(adamw.apply_gradients)(gradient, state, params)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
    actual,
    expected,
  )


def test_updates_agree_with_pytorch():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(1)
  params, *gradients = (
    jax.tree.map(np.float32, _random_tree(rng)) for _ in range(5)
  )
  result, _ = _run(
    optimizer.make_optimizer(params, 0.05, 0.2, RECIPE), params, gradients
  )

  tensors = {
    name: torch.nn.Parameter(torch.tensor(array))
    for name, array in _by_name(params).items()
  }
  adamw = torch.optim.AdamW(
    [
      dict(params=[tensors[name]], lr=0.05 * rate, weight_decay=0.2 * decay)
      for name, (rate, decay) in MULTIPLIERS.items()
    ]
  )
  for gradient in gradients:
    for name, array in _by_name(gradient).items():
      tensors[name].grad = torch.tensor(array)
    adamw.step()
  for name, tensor in tensors.items():
    np.testing.assert_allclose(
      result[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_gradients_are_clipped_by_global_norm():
  params = {'a': jnp.zeros(2), 'b': jnp.zeros(1)}
  # With b1 = b2 = 0 Adam divides a gradient by its size + eps.
  large = optimizer.make_optimizer(
    params, 1.0, 0.0, [('.*', 1.0, 1.0)], b1=0.0, b2=0.0, eps=1.0
  ).transformation
  clipped = optimizer.make_optimizer(
    params,
    1.0,
    0.0,
    [('.*', 1.0, 1.0)],
    b1=0.0,
    b2=0.0,
    eps=1.0,
    max_grad_norm=1.0,
  ).transformation
  gradients = {'a': jnp.array([3.0, 0.0]), 'b': jnp.array([4.0])}  # norm 5
  for tx, scale in ((large, 1.0), (clipped, 0.2)):
    updates: Any = tx.update(gradients, tx.init(params), params)[0]
    np.testing.assert_allclose(
      updates['a'][0], -3 * scale / (3 * scale + 1), rtol=1e-5
    )
    np.testing.assert_allclose(
      updates['b'][0], -4 * scale / (4 * scale + 1), rtol=1e-5
    )
  small = {'a': jnp.array([0.3, 0.0]), 'b': jnp.array([0.4])}  # norm 0.5
  updates = clipped.update(small, clipped.init(params), params)[0]
  np.testing.assert_allclose(updates['a'][0], -0.3 / 1.3, rtol=1e-5)


def _layers() -> Any:
  names = (
    'backbone/patch_embeds_0/proj/kernel',
    'backbone/blocks_0_0/attn/qkv/kernel',
    'backbone/blocks_0_1/mlp/fc1/kernel',
    'backbone/pos_block_0/proj_0/kernel',
    'backbone/patch_embeds_1/norm/scale',
    'backbone/blocks_1_0/norm1/bias',
    'backbone/norm/scale',
    'cls_head/fc_cls/kernel',
  )
  params: Any = {}
  for name in names:
    *folders, leaf = name.split('/')
    node = params
    for folder in folders:
      node = node.setdefault(folder, {})
    node[leaf] = jnp.ones(3)
  return params


def test_layer_decay_lowers_the_rate_per_layer():
  params = _layers()
  tx = optimizer.make_optimizer(
    params, 1.0, 0.5, [('.*', 1.0, 1.0)], layer_decay=0.5
  ).transformation
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  # Without gradients there is decay alone: half of the parameter, times rate.
  # Three blocks: the first is three layers from the head.
  expected = {
    'backbone/patch_embeds_0/proj/kernel': 1 / 8,
    'backbone/blocks_0_0/attn/qkv/kernel': 1 / 8,
    'backbone/pos_block_0/proj_0/kernel': 1 / 8,
    'backbone/blocks_0_1/mlp/fc1/kernel': 1 / 4,
    'backbone/patch_embeds_1/norm/scale': 1 / 2,
    'backbone/blocks_1_0/norm1/bias': 1 / 2,
    'backbone/norm/scale': 1.0,
    'cls_head/fc_cls/kernel': 1.0,
  }
  for name, update in _by_name(updates).items():
    np.testing.assert_allclose(update, -0.5 * expected[name], rtol=1e-6)


def test_frozen_parameters_get_no_update():
  params = _layers()
  tx = optimizer.make_optimizer(
    params, 1.0, 0.5, [('.*', 1.0, 1.0)], frozen='backbone/.*_0.*'
  ).transformation
  ones = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(ones, tx.init(params), params)
  for name, update in _by_name(updates).items():
    assert bool(np.any(update)) != ('_0' in name), name


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'frozen': 'backbone'}, 'does not match the full name'),
    ({'frozen': '('}, 'should be'),
  ],
)
def test_invalid_option_raises(options, message):
  with pytest.raises(errors.UserError, match=message):
    optimizer.make_optimizer(_layers(), 1.0, 0.1, [('.*', 1.0, 1.0)], **options)
