"""The model agrees with the published implementation."""

import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.checkpoints import checkpoint, conversion, pth_file
from dualformer_jax.models import variants
from dualformer_jax.models.dualformer import DualFormer, drop_path
from dualformer_jax.training import setup
from tests import random_variables, reference_arrays

common = runpy.run_path(
  str(pathlib.Path(__file__).parents[2] / 'configs' / 'common.py')
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

# One stage is enough, and compiles in half of the time.
ONE_STAGE: dict[str, Any] = SMALL | dict(
  depths=(2,),
  embed_dims=(16,),
  num_heads=(2,),
  fine_sizes=((4, 4, 4),),
  coarse_sizes=((2, 4, 4),),
)


def converted(name: str, folder: pathlib.Path):
  """Returns model and variables of reference weights.

  The weights are converted as a user does: from a .pth file to a folder.
  """
  config = common['get_config']()
  config.model.update(reference_arrays.MODELS[name])
  config.model.dtype = 'float32'
  src, dst = folder / f'{name}.pth', folder / name
  pth_file.write_pth(src, reference_arrays.state_dict(name, seed=1))
  preprocessing = setup.make_preprocessing(config, config.test)
  conversion.pth_to_folder(src, dst, config, preprocessing)
  variables, description = checkpoint.load_model(dst)
  # The loaded arrays are on the CPU, also if there is a GPU.
  return description.build_model(), jax.device_put(variables, jax.devices()[0])


def assert_close(actual, expected, name, tolerance=1e-4):
  """Compares relative to the largest value of the expected array."""
  error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
  assert error < tolerance, f'{name}: {error}'


@pytest.mark.parametrize(
  ('name', 'kernels'),
  [
    ('micro', 'auto'),
    pytest.param('micro', 'reference', marks=pytest.mark.slow),
    pytest.param('micro16', 'auto', marks=pytest.mark.slow),
    pytest.param('micro_tokenlabel', 'auto', marks=pytest.mark.slow),
    pytest.param('micro_tokenlabel', 'reference', marks=pytest.mark.slow),
    pytest.param('tiny', 'auto', marks=pytest.mark.slow),
    pytest.param('tiny16', 'auto', marks=pytest.mark.slow),
  ],
)
def test_forward_agrees_with_the_published_implementation(
  name, kernels, tmp_path
):
  model, variables = converted(name, tmp_path)
  model = model.clone(kernels=kernels)
  figures = reference_arrays.load(f'forward_{name}_seed1.npz')
  batch = len(figures['logits'])
  clips = reference_arrays.clips(batch, model.num_frames, 224, seed=1)
  apply = jax.jit(
    lambda v, x: model.apply(v, x, mutable=['intermediates']),
    compiler_options=reference_arrays.OPTIMIZED,
  )
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
    output: Any = jax.jit(
      coarse.apply, compiler_options=reference_arrays.OPTIMIZED
    )(variables, clips)
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
def test_backbones_have_the_published_number_of_parameters(fields, count):
  model = DualFormer(**fields, num_classes=400)
  clips = jax.ShapeDtypeStruct(model.input_shape(), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), clips)
  leaves = jax.tree.leaves(shapes['params']['backbone'])
  assert sum(np.prod(leaf.shape) for leaf in leaves) == count


def draw(model):
  """Returns clips, and variables."""
  rng = np.random.default_rng(0)
  clips = rng.standard_normal((2, *model.input_shape()[1:]), np.float32)
  return jnp.asarray(clips), random_variables.draw(model)


def gradients(model, clips, variables):
  """Returns gradients, the bytes of temporaries, and the lowered program."""

  def loss(params, batch_stats):
    output, _ = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      clips,
      True,
      rngs={'dropout': jax.random.key(1)},
      mutable=['batch_stats'],
    )
    return jnp.sum(output.logits**2)

  lowered = jax.jit(jax.grad(loss)).lower(
    variables['params'], variables['batch_stats']
  )
  compiled = lowered.compile()
  result = compiled(variables['params'], variables['batch_stats'])
  memory: Any = compiled.memory_analysis()
  return jax.tree.map(np.asarray, result), memory.temp_size_in_bytes, lowered


TRAINED: dict[str, Any] = ONE_STAGE | dict(
  depths=(3,),  # one block uses much of the memory of two
  drop_path_rate=0.3,
  head_dropout=0.3,
)


@pytest.fixture(scope='module', name='plain')
def _plain():
  """Clips and variables of TRAINED, and what `gradients` returns for them."""
  model = DualFormer(**TRAINED, remat='none')
  arguments = draw(model)
  return arguments, gradients(model, *arguments)


@pytest.mark.slow
def test_remat_and_kernels_change_memory_but_not_gradients(plain):
  arguments, (expected, memory, _) = plain
  largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
  sizes = {'none': memory}
  for remat, kernels in (
    ('elementwise', 'auto'),
    ('block', 'auto'),
    ('elementwise', 'reference'),
  ):
    model = DualFormer(**TRAINED, remat=remat, kernels=kernels)
    actual, size, lowered = gradients(model, *arguments)
    if kernels == 'auto':
      sizes[remat] = size
    if remat == 'elementwise':
      # XLA:CPU copies what is marked so: only the hidden layers of MLPs.
      count = lowered.as_text().count('reduce_precision')
      assert count <= sum(model.depths)
    jax.tree.map(
      lambda a, e: np.testing.assert_allclose(
        a, e, rtol=1e-4, atol=1e-6 * largest
      ),
      actual,
      expected,
    )
  assert sizes['none'] > sizes['elementwise'] > sizes['block']


@pytest.mark.slow
def test_drop_path_is_per_sample_and_only_in_training():
  model = DualFormer(**ONE_STAGE, drop_path_rate=0.5, head_dropout=0.0)
  clip = np.random.default_rng(0).standard_normal((1, 16, 64, 64, 3))
  clips = np.repeat(clip, 8, axis=0).astype(np.float32)
  variables = random_variables.draw(model)
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


def test_drop_path_keeps_the_mean_of_branches():
  rates = np.array([0.0, 0.25, 0.9, 1.0])
  scales = np.asarray(drop_path(jax.random.key(0), rates, 4000))
  assert scales.shape == (4, 2, 4000)
  np.testing.assert_array_equal(scales[0], 1)
  np.testing.assert_array_equal(scales[3], 0)
  np.testing.assert_allclose(np.unique(scales[1]), [0, 4 / 3], rtol=1e-6)
  np.testing.assert_allclose(scales[1:3].mean(-1), 1, atol=0.2)
  # Samples and branches are independent.
  assert (scales[1, 0] != scales[1, 1]).mean() > 0.3


def test_clips_of_another_size_raise():
  model = DualFormer(**SMALL)
  with pytest.raises(ValueError, match=r'expected \[batch, 16, 64, 64, 3\]'):
    model.init(jax.random.key(0), jnp.zeros((1, 16, 32, 32, 3)))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'remat': 'all'}, "model.remat is 'all'"),
    ({'dtype': 'float16'}, "model.dtype is 'float16'"),
    ({'kernels': 'fast'}, "model.kernels is 'fast'"),
    ({'depths': (2, 2, 2)}, 'expected 3 values, one for each stage'),
    ({'num_heads': (2, 5)}, 'expected multiples of model.num_heads'),
    ({'image_size': 4}, 'model.image_size is 4; expected at least 8'),
    ({'num_frames': 1}, 'model.num_frames is 1; expected at least 2'),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(errors.UserError, match=message):
    DualFormer(**(SMALL | fields))


@pytest.mark.slow
def test_bfloat16_gradients_are_close_to_float32(plain):
  arguments, (expected, *_) = plain
  model = DualFormer(**{**TRAINED, 'dtype': 'bfloat16'})
  exact, coarse = (
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for tree in (expected, gradients(model, *arguments)[0])
  )
  error = np.linalg.norm(coarse - exact) / np.linalg.norm(exact)
  assert 0 < error < 8e-2
