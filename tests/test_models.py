"""The models compute what the published implementation and the paper say."""

import itertools
import math
import pathlib
import runpy
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax import convert, errors, pytorch
from dualformer_jax.models import attention, layers, variants
from dualformer_jax.models.dualformer import DualFormer, drop_path, gelu
from dualformer_jax.training import checkpoint, program, sharding
from tests import reference_arrays

common = runpy.run_path(
  str(pathlib.Path(__file__).parents[1] / 'configs' / 'common.py')
)
SMALL: dict[str, Any] = dict(
  depths=(2, 2),
  embed_dims=(16, 32),
  num_heads=(2, 4),
  num_classes=5,
  num_frames=16,
  image_size=64,
  window=(8, 7, 7),
  fine_sizes=((4, 4, 4), (4, 4, 4)),
  coarse_sizes=((2, 4, 4), None),
  dtype='float32',
)


def converted(name: str, folder: pathlib.Path):
  """Returns model, variables and description of reference weights.

  They go the way of a user's: a .pth file on disk, the converter, the folder.
  """
  config = common['get_config']()
  config.model.update(reference_arrays.MODELS[name])
  config.model.dtype = 'float32'
  src, dst = folder / f'{name}.pth', folder / name
  pytorch.write_pth(src, reference_arrays.state_dict(name, seed=1))
  convert.pth_to_folder(src, dst, config)
  variables, description = checkpoint.load_model(dst)
  # They come to the CPU, whatever else is here.
  return description.build_model(), jax.device_put(variables, jax.devices()[0])


def assert_close(actual, expected, name, tolerance=1e-4):
  """Compares relative to the largest value of the expected array."""
  error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
  assert error < tolerance, f'{name}: {error}'


@pytest.mark.parametrize(
  'name', ['micro', 'micro16', 'micro_tokenlabel', 'tiny', 'tiny16']
)
def test_forward_agrees_with_the_published_implementation(name, tmp_path):
  model, variables = converted(name, tmp_path)
  figures = np.load(reference_arrays.DIRECTORY / f'forward_{name}_seed1.npz')
  batch = len(figures['logits'])
  clips = reference_arrays.clips(batch, model.num_frames, 224, seed=1)
  apply = jax.jit(lambda v, x: model.apply(v, x, mutable=['intermediates']))
  output, sown = apply(variables, clips)
  actual = {'logits': output.logits, 'features': output.features}
  if output.token_logits is not None:
    actual['token_logits'] = output.token_logits[:, ::2, ::3, ::3]
  for stage in range(4):
    x = np.asarray(sown['intermediates']['backbone'][f'stage_{stage}'][0])
    actual[f'stage{stage}_mean'] = x.mean((1, 2, 3))
    actual[f'stage{stage}_std'] = x.std((1, 2, 3), ddof=1)
    actual[f'stage{stage}_corner'] = x[:, :3, :4, :4, :4]
  assert set(figures) <= set(actual)
  for key, expected in figures.items():
    assert actual[key].shape == expected.shape
    assert_close(actual[key], expected, key)

  if name == 'tiny':
    coarse = model.clone(dtype='bfloat16')
    output: Any = jax.jit(coarse.apply)(variables, clips)
    logits = output.logits
    exact = figures['logits']
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 0 < error < 2e-2
    np.testing.assert_array_equal(logits.argmax(-1), exact.argmax(-1))


@pytest.mark.parametrize(
  'fields, count',
  [
    (variants.TINY, 21_767_360),
    (variants.SMALL, 48_908_064),
    (variants.BASE, 86_837_632),
  ],
)
def test_backbones_have_as_many_parameters_as_published(fields, count):
  model = DualFormer(**fields, num_classes=400)
  clips = jax.ShapeDtypeStruct(model.input_shape(), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), clips)
  leaves = jax.tree.leaves(shapes['params']['backbone'])
  assert sum(np.prod(leaf.shape) for leaf in leaves) == count


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def attend(q, k, v):
  """Attention of one head in float64: [l, e], [m, e], [m, e] -> [l, e]."""
  return softmax(q @ k.T / np.sqrt(q.shape[-1])) @ v


@pytest.mark.parametrize(
  'grid, window',
  [
    ((10, 20, 20), (8, 7, 7)),
    ((8, 7, 7), (8, 7, 7)),
    ((3, 9, 16), (8, 7, 7)),
    ((4, 6, 5), (4, 4, 4)),
  ],
)
def test_windows_that_do_not_fit_hold_real_tokens_alone(grid, window):
  channels, heads = 8, 2
  layer = attention.LocalWindowAttention(heads, window, 'float32')
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, *grid, channels)).astype(np.float32)
  variables = jax.jit(layer.init)(jax.random.key(1), x)
  variables = jax.tree.map(
    lambda p: rng.standard_normal(p.shape).astype(np.float32), variables
  )
  actual = jax.jit(layer.apply)(variables, x)

  p = jax.tree.map(np.float64, variables['params'])
  qkv = np.einsum('bdhwc,csne->bdhwsne', x, p['qkv']['kernel'])
  qkv += p['qkv']['bias']
  mixed = np.zeros((*x.shape[:-1], heads, channels // heads))
  starts = [range(0, g, w) for g, w in zip(grid, window, strict=True)]
  for b, n, *start in itertools.product(range(2), range(heads), *starts):
    place = (b, *(slice(s, s + w) for s, w in zip(start, window, strict=True)))
    tokens = qkv[place]
    q, k, v = (tokens[..., i, n, :].reshape(-1, 4) for i in range(3))
    mixed[(*place, n)] = attend(q, k, v).reshape(*tokens.shape[:3], 4)
  expected = np.einsum('bdhwne,nec->bdhwc', mixed, p['proj']['kernel'])
  expected += p['proj']['bias']
  assert_close(actual, expected, 'local window attention')


def pool(x, kernel, bias):
  """A depthwise convolution with stride = kernel: x [d, h, w, c], float64."""
  sizes = kernel.shape[:3]
  grid = [g // s for g, s in zip(x.shape[:3], sizes, strict=True)]
  out = np.zeros((*grid, x.shape[-1]))
  for place in itertools.product(*map(range, grid)):
    block = tuple(
      slice(i * s, (i + 1) * s) for i, s in zip(place, sizes, strict=True)
    )
    out[place] = (x[block] * kernel).sum((0, 1, 2)) + bias
  return out


def test_global_attention_sees_the_pyramid_as_convolutions_would_pool_it():
  # The fine level leaves a row out: 9 is no multiple of 9 // 4 = 2.
  grid, channels, heads = (4, 9, 12), 8, 2
  layer = attention.GlobalPyramidAttention(
    heads, (2, 4, 4), (2, 3, 3), 'float32'
  )
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, *grid, channels)).astype(np.float32)
  variables = jax.jit(layer.init)(jax.random.key(1), x)
  variables = jax.tree.map(
    lambda v: rng.uniform(0.5, 1.5, v.shape).astype(v.dtype), variables
  )
  actual = jax.jit(layer.apply)(variables, x)

  p = jax.tree.map(np.float64, variables['params'])
  statistics = jax.tree.map(np.float64, variables['batch_stats'])['lr_1']
  assert p['sr']['kernel'].shape[:3] == (2, 2, 3)
  assert p['lr_0']['kernel'].shape[:3] == (1, 3, 4)
  assert p['lr_3']['kernel'].shape[:3] == (2, 1, 1)
  fine = pool(x[0], p['sr']['kernel'], p['sr']['bias'])
  coarse = pool(x[0], p['lr_0']['kernel'], p['lr_0']['bias'])
  coarse = (coarse - statistics['mean']) / np.sqrt(statistics['var'] + 1e-5)
  coarse = np.maximum(coarse * p['lr_1']['scale'] + p['lr_1']['bias'], 0)
  coarse = pool(coarse, p['lr_3']['kernel'], p['lr_3']['bias'])
  keys = np.concatenate([y.reshape(-1, channels) for y in (fine, coarse)])
  keys = keys - keys.mean(-1, keepdims=True)
  keys = keys / np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-5)
  keys = keys * p['norm']['scale'] + p['norm']['bias']
  q = np.einsum('lc,cne->lne', x[0].reshape(-1, channels), p['q']['kernel'])
  q += p['q']['bias']
  kv = np.einsum('mc,csne->msne', keys, p['kv']['kernel']) + p['kv']['bias']
  mixed = np.stack(
    [attend(q[:, n], kv[:, 0, n], kv[:, 1, n]) for n in range(heads)], axis=1
  )
  expected = np.einsum('lne,nec->lc', mixed, p['proj']['kernel'])
  expected = (expected + p['proj']['bias']).reshape(x.shape)
  assert_close(actual, expected, 'global pyramid attention')


@pytest.mark.parametrize(
  'grid, coarse_size, first, second',
  [
    ((16, 56, 56), (4, 4, 4), (1, 7, 7), (4, 2, 2)),  # published, stage 0
    ((16, 28, 28), (4, 4, 4), (1, 7, 7), (4, 1, 1)),  # published, stage 1
    ((8, 56, 56), (4, 4, 4), (1, 7, 7), (2, 2, 2)),  # 16 frames
    ((16, 112, 112), (4, 4, 4), (1, 7, 7), (4, 4, 4)),  # 448 pixels
    ((16, 64, 64), (4, 4, 4), (1, 4, 4), (4, 4, 4)),  # 256 pixels
    ((16, 44, 48), (4, 4, 4), (1, 1, 6), (4, 11, 2)),
    ((2, 3, 4), (4, 4, 4), (1, 1, 1), (1, 1, 1)),
  ],
)
def test_coarse_kernels_share_the_reduction(grid, coarse_size, first, second):
  assert attention.coarse_kernels(grid, coarse_size) == (first, second)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_the_positional_convolution_and_its_gradients_are_a_convolution(
  monkeypatch, platform
):
  monkeypatch.setattr(layers, 'platform', lambda: platform)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 4, 5, 6, 3)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 3)), jnp.float32)
  dy = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

  def convolution(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel[:, :, :, None],
      (1, 1, 1),
      'SAME',
      dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
      feature_group_count=3,
    )

  expected, expected_vjp = jax.vjp(convolution, x, kernel)
  actual, actual_vjp = jax.vjp(layers.depthwise_conv, x, kernel)
  assert_close(actual, expected, 'output', 1e-5)
  for name, a, e in zip(
    ('dx', 'dkernel'), actual_vjp(dy), expected_vjp(dy), strict=True
  ):
    assert_close(a, e, name, 1e-5)


def test_batch_norm_keeps_statistics_as_pytorch_does():
  rng = np.random.default_rng(0)
  x = (3 * rng.standard_normal((2, 2, 3, 3, 4)) + 1).astype(np.float32)
  layer = layers.BatchNorm('float32')
  x = jnp.asarray(x)
  variables = layer.init(jax.random.key(0), x, train=True)
  np.testing.assert_array_equal(variables['batch_stats']['mean'], 0)
  y, updates = layer.apply(variables, x, train=True, mutable=['batch_stats'])
  flat = np.asarray(x, np.float64).reshape(-1, 4)
  expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
  np.testing.assert_allclose(y.reshape(-1, 4), expected, atol=1e-5)
  statistics: Any = updates['batch_stats']
  np.testing.assert_allclose(statistics['mean'], 0.1 * flat.mean(0), rtol=1e-5)
  np.testing.assert_allclose(
    statistics['var'], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5
  )
  assert statistics['num_batches_tracked'] == 1


class CoarseLevel(nn.Module):
  """The coarse level of the pyramid, with or without BatchNorm."""

  is_normalized: bool

  @nn.compact
  def __call__(self, x):
    y = layers.DepthwisePooling((1, 7, 7), 'float32')(x)
    if self.is_normalized:
      y = layers.BatchNorm('float32')(y, train=False)
    return layers.DepthwisePooling((4, 2, 2), 'float32')(nn.relu(y))


def test_batch_norm_takes_no_pass_over_tokens_where_it_does_not_learn():
  x = jnp.zeros((1, 16, 56, 56, 64))
  mesh = sharding.make_mesh(
    {'data': 1, 'fsdp': 1, 'tensor': 1}, 1, devices=jax.devices()[:1]
  )

  def moved(is_normalized):
    level = CoarseLevel(is_normalized)
    variables = jax.eval_shape(level.init, jax.random.key(0), x)
    compiled = jax.jit(level.apply).lower(variables, x).compile()
    return program.read(compiled.as_text() or '', mesh).bytes

  # Of 1024 tokens, what it adds is as much as a few of them: its vectors.
  assert 0 < moved(True) - moved(False) <= 10 * 4 * 64
  assert moved(False) >= x.nbytes


def gradients(model):
  rng = np.random.default_rng(0)
  clips = jnp.asarray(
    rng.standard_normal((2, *model.input_shape()[1:])), jnp.float32
  )
  variables = jax.jit(model.init)(jax.random.key(0), clips)

  def loss(params, batch_stats):
    output, _ = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      clips,
      True,
      rngs={'dropout': jax.random.key(1)},
      mutable=['batch_stats'],
    )
    return jnp.sum(output.logits**2)

  compiled = (
    jax.jit(jax.grad(loss))
    .lower(variables['params'], variables['batch_stats'])
    .compile()
  )
  result = compiled(variables['params'], variables['batch_stats'])
  memory: Any = compiled.memory_analysis()
  return result, memory.temp_size_in_bytes


def test_what_is_recomputed_changes_memory_and_nothing_else():
  fields = {**SMALL, 'drop_path_rate': 0.3, 'head_dropout': 0.3}
  kept, most = gradients(DualFormer(**fields, remat='none'))
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(kept))
  memory = [most]
  for remat in ('elementwise', 'block'):
    again, size = gradients(DualFormer(**fields, remat=remat))
    memory.append(size)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(kept), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)
  assert memory[0] > memory[1] > memory[2]


def test_on_cpus_what_is_kept_is_not_copied_and_precision_is_reduced_as_asked():
  x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
  reduce = jax.jit(jax.lax.reduce_precision, static_argnums=(1, 2))
  for dtype, bits, copies in (
    ('float32', (8, 23), False),
    ('float32', (8, 7), True),
    ('bfloat16', (8, 7), False),
    ('bfloat16', (8, 5), True),
  ):
    text = reduce.lower(jnp.asarray(x, dtype), *bits).as_text()
    assert ('stablehlo.reduce_precision' in text) == copies, (dtype, bits)
  np.testing.assert_array_equal(reduce(x, 8, 23), x)
  expected = x.astype(jnp.bfloat16).astype(np.float32)  # by ml_dtypes
  assert (expected != x).any()
  np.testing.assert_array_equal(reduce(x, 8, 7), expected)


def test_branches_are_dropped_sample_by_sample_and_only_in_training():
  model = DualFormer(**SMALL, drop_path_rate=0.9, head_dropout=0.0)
  clip = np.random.default_rng(0).standard_normal((1, 16, 64, 64, 3))
  clips = np.repeat(clip, 8, axis=0).astype(np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), clips)
  apply = jax.jit(model.apply, static_argnames=('train', 'mutable'))

  def logits(train, key):
    output = apply(
      variables,
      clips,
      train=train,
      rngs={'dropout': jax.random.key(key)},
      mutable=('batch_stats',) if train else False,
    )
    return np.asarray((output[0] if train else output).logits)

  np.testing.assert_allclose(logits(False, 1)[1:], logits(False, 2)[:-1])
  first = logits(True, 1)
  np.testing.assert_array_equal(first, logits(True, 1))
  assert len(np.unique(first.round(6), axis=0)) > 2
  assert np.abs(first - logits(True, 2)).max() > 1e-6


def test_branches_are_scaled_so_that_their_mean_stays():
  rates = np.array([0.0, 0.25, 0.9, 1.0])
  scales = np.asarray(drop_path(jax.random.key(0), rates, 4000))
  assert scales.shape == (4, 2, 4000)
  np.testing.assert_array_equal(scales[0], 1)
  np.testing.assert_array_equal(scales[3], 0)
  np.testing.assert_allclose(np.unique(scales[1]), [0, 4 / 3], rtol=1e-6)
  np.testing.assert_allclose(scales[1:3].mean(-1), 1, atol=0.2)
  # Samples and branches are drawn one by one.
  assert (scales[1, 0] != scales[1, 1]).mean() > 0.3


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_layer_norm_and_its_gradient(dtype):
  rng = np.random.default_rng(0)
  # Means far from zero, where a variance from squares would lose its digits.
  means = 30 * rng.standard_normal((2, 3, 5, 1))
  x = means + rng.standard_normal((2, 3, 5, 48))
  x = np.asarray(jnp.asarray(x, dtype), np.float64)
  scale, bias = rng.standard_normal((2, 48))
  dy = np.asarray(jnp.asarray(rng.standard_normal(x.shape), dtype), np.float64)

  centred = x - x.mean(-1, keepdims=True)
  inverse = (np.square(centred).mean(-1, keepdims=True) + 1e-5) ** -0.5
  normalized = centred * inverse
  y = normalized * scale + bias
  # The Jacobian of each token, written out.
  channels = x.shape[-1]
  centre = np.eye(channels) - 1 / channels
  outer = normalized[..., :, None] * normalized[..., None, :] / channels
  jacobian = inverse[..., None] * (centre - outer) * scale[:, None]
  expected = {
    'x': np.einsum('abco,abcoi->abci', dy, jacobian),
    'scale': (dy * normalized).sum((0, 1, 2)),
    'bias': dy.sum((0, 1, 2)),
  }

  def run(x, scale, bias):
    norm = layers.LayerNorm(dtype)
    return norm.apply({'params': {'scale': scale, 'bias': bias}}, x)

  weights = (jnp.asarray(a, jnp.float32) for a in (scale, bias))
  arguments = (jnp.asarray(x, dtype), *weights)
  actual, pullback = jax.jit(lambda *a: jax.vjp(run, *a))(*arguments)
  gradients = pullback(jnp.asarray(dy, dtype))
  digits = 2e-6 if dtype == 'float32' else 1e-2
  assert actual.dtype == dtype
  np.testing.assert_allclose(actual, y, atol=20 * digits * np.abs(y).max())
  for (name, value), gradient in zip(expected.items(), gradients, strict=True):
    assert gradient.shape == value.shape, name
    error = np.abs(np.asarray(gradient, np.float64) - value).max()
    assert error <= 10 * digits * np.abs(value).max(), name


def test_clips_of_other_sizes_are_refused():
  model = DualFormer(**SMALL)
  with pytest.raises(ValueError, match=r'model takes \[batch, 16, 64, 64, 3\]'):
    model.init(jax.random.key(0), jnp.zeros((1, 16, 32, 32, 3)))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'remat': 'all'}, "model.remat is 'all'"),
    ({'dtype': 'float16'}, "model.dtype is 'float16'"),
    ({'depths': (2, 2, 2)}, 'expected 3 values, one for each stage'),
    ({'num_heads': (2, 5)}, 'expected multiples of model.num_heads'),
    ({'image_size': 4}, 'at least 2 frames and 8 pixels'),
    ({'num_frames': 1}, 'at least 2 frames and 8 pixels'),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(errors.UserError, match=message):
    DualFormer(**(SMALL | fields))


def test_gelu_is_the_exact_one():
  x = jnp.linspace(-6, 6, 1001)
  exact = nn.gelu(np.asarray(x, np.float32), approximate=False)
  np.testing.assert_allclose(gelu(x), exact, atol=1e-6)


def test_gelu_in_bfloat16_is_rounded_but_at_its_end():
  x = jnp.linspace(-3, 3, 1001, dtype=jnp.bfloat16)
  exact = np.asarray(x, np.float64)
  cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in exact])
  pdf = np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
  y, pullback = jax.jit(lambda x: jax.vjp(gelu, x))(x)
  (slope,) = pullback(jnp.ones_like(x))
  for actual, expected in ((y, exact * cdf), (slope, cdf + exact * pdf)):
    assert actual.dtype == jnp.bfloat16
    # Half of the distance of two numbers of 8 bits, and the error of float32.
    np.testing.assert_allclose(
      np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize('shape', [(392, 64, 96), (392, 96, 64), (15, 8, 3)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_linear_and_its_gradients(dtype, shape):
  tokens, inputs, outputs = shape
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  x, dy = draw(2, tokens, inputs), draw(2, tokens, outputs)
  kernel, bias = draw(inputs, outputs), draw(outputs)
  parameters = {'kernel': kernel, 'bias': bias}
  layer = layers.Linear(outputs, dtype)

  @jax.jit
  def run(parameters, x, dy):
    y, pullback = jax.vjp(
      lambda p, x: layer.apply({'params': p}, x), parameters, x
    )
    return y, *pullback(dy)

  y, gradients, dx = run(jax.tree.map(jnp.float32, parameters), x, dy)
  assert y.dtype == dx.dtype == dtype
  exact = [np.asarray(a, np.float64) for a in (x, dy, kernel, bias)]
  x, dy, kernel, bias = exact
  digits = 1e-5 if dtype == 'float32' else 2**-8
  assert_close(np.asarray(y, np.float64), x @ kernel + bias, 'y', digits)
  assert_close(np.asarray(dx, np.float64), dy @ kernel.T, 'dx', digits)
  # Sums over tokens have the digits of float32, whatever they are of.
  dkernel = np.einsum('bni,bno->io', x, dy)
  assert_close(gradients['kernel'], dkernel, 'dkernel', 1e-5)
  assert_close(gradients['bias'], dy.sum((0, 1)), 'dbias', 2 * digits)


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_attention_in_blocks_and_its_gradients(monkeypatch, dtype, groups):
  monkeypatch.setattr(attention, '_block_bytes', lambda: 40_000)
  rng = np.random.default_rng(0)
  shape = groups, 2, 48, 3, 16
  q, k, v, dout = (
    jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)
  )
  assert attention._steps(q, k)[0] > 1

  @jax.jit
  def run(q, k, v, dout):
    out, pullback = jax.vjp(attention.blocked_attention, q, k, v, None)
    return out, *pullback(dout)[:3]

  def heads(x):  # [groups * batch * heads, tokens, channels]
    x = np.asarray(x, np.float64)
    return np.moveaxis(x, 3, 2).reshape(-1, *x.shape[2:3], x.shape[-1])

  actual = [heads(x) for x in run(q, k, v, dout)]
  q, k, v, dout = map(heads, (q, k, v, dout))
  scale = q.shape[-1] ** -0.5
  weights = softmax(np.einsum('hle,hme->hlm', q, k) * scale)
  out = np.einsum('hlm,hme->hle', weights, v)
  dweights = np.einsum('hle,hme->hlm', dout, v)
  mean = (dweights * weights).sum(-1, keepdims=True)
  dscores = weights * (dweights - mean) * scale
  expected = (
    out,
    np.einsum('hlm,hme->hle', dscores, k),
    np.einsum('hlm,hle->hme', dscores, q),
    np.einsum('hlm,hle->hme', weights, dout),
  )
  digits = 1e-5 if dtype == 'float32' else 2**-6
  for name, a, e in zip(
    ('out', 'dq', 'dk', 'dv'), actual, expected, strict=True
  ):
    assert_close(a, e, name, digits)


def test_gradients_in_bfloat16_are_near_those_in_float32():
  exact, coarse = (
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for dtype in ('float32', 'bfloat16')
    for tree, _ in [gradients(DualFormer(**{**SMALL, 'dtype': dtype}))]
  )
  error = np.linalg.norm(coarse - exact) / np.linalg.norm(exact)
  assert 0 < error < 8e-2
