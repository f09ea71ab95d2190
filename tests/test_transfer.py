"""Parameters pass from one model to another as the published code has it."""

import json
from typing import Any

import numpy as np
import pytest

from dualformer_jax import errors, transfer
from tests import reference_arrays


def of_model(name: str, seed: int = 1) -> dict[str, np.ndarray]:
  return reference_arrays.state_dict(name, seed)


@pytest.mark.parametrize('name', ['micro', 'tiny'])
def test_inflation_agrees_with_the_published_implementation(name):
  text = reference_arrays.DIRECTORY / f'inflate_{name}_seed1.json'
  figures = json.loads(text.read_text())
  images, initial = of_model(f'{name}_2d'), of_model(name, seed=2)
  result = transfer.transfer(
    images, initial, keep_head=False, name='images.pth'
  )
  assert list(result.state_dict) == list(initial)
  backbone = {
    key.removeprefix('backbone.'): array
    for key, array in result.state_dict.items()
    if key.startswith('backbone.')
  }
  assert set(backbone) == set(figures)
  for key, (total, norm, shape) in figures.items():
    array = backbone[key].astype(np.float64)
    assert list(array.shape) == shape, key
    assert abs(array.sum() - total) <= 1e-5 * max(norm, 1), key
    if f'backbone.{key}' in result.taken:
      # The figure is a float32 sum, itself off by 1e-5 for a million values.
      np.testing.assert_array_equal(array, images[key], key)
    else:
      assert abs(np.linalg.norm(array) - norm) <= 1e-5 * norm, key
  for key in ('cls_head.fc_cls.weight', 'cls_head.fc_cls.bias'):
    np.testing.assert_array_equal(result.state_dict[key], initial[key])
    assert key in result.anew
  assert result.left_out == ['head.weight', 'head.bias']
  assert result.adapted == []


def test_a_model_passes_into_itself_unchanged():
  source = of_model('micro_tokenlabel')
  result = transfer.transfer(
    source, of_model('micro_tokenlabel', 2), keep_head=True, name='x.pth'
  )
  assert result.taken == list(source)
  for key, array in source.items():
    np.testing.assert_array_equal(result.state_dict[key], array)


def test_half_the_frames_sum_the_kernels_over_time():
  source, initial = of_model('tiny'), of_model('tiny16', 2)
  result = transfer.transfer(source, initial, keep_head=False, name='x.pth')
  kernels = {
    key
    for key in initial
    if key.startswith('backbone') and source[key].shape != initial[key].shape
  }
  assert set(result.adapted) == kernels
  assert all('.sr.' in key or '.lr.3.' in key for key in kernels)
  key = 'backbone.blocks.0.1.attn.sr.weight'  # 2x8x8 there, 1x8x8 here
  assert initial[key].shape[2] == 1
  np.testing.assert_allclose(
    result.state_dict[key][:, :, 0], source[key].sum(axis=2), rtol=1e-5
  )
  key = 'backbone.blocks.0.1.attn.lr.3.weight'  # 4x2x2 there, 2x2x2 here
  old, new = source[key], result.state_dict[key]
  assert (old.shape[2], new.shape[2]) == (4, 2)
  # By hand: new frame 0 is between old frames 0 and 1, at 0.5, and a triangle
  # of half-width 2 gives 3/8, 3/8, 1/8 of 2 to those at distance 1/2, 3/2;
  # what would lie before the first frame is shared out among the others.
  weights = np.array([0.75, 0.75, 0.25])
  weights *= 2 / weights.sum()
  expected = np.tensordot(old[:, :, :3], weights, ((2,), (0,)))
  np.testing.assert_allclose(new[:, :, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('size', [4, 5, 8, 16])
def test_a_mean_stays_a_mean_at_any_kernel_size(size):
  key = 'backbone.blocks.0.1.attn.sr.weight'
  source = of_model('micro')
  source[key] = np.full_like(source[key], 1 / source[key][0].size)
  initial = of_model('micro', 2)
  initial[key] = np.zeros((16, 1, 2, size, size), np.float32)
  result = transfer.transfer(source, initial, keep_head=True, name='x.pth')
  np.testing.assert_allclose(result.state_dict[key], 1 / (2 * size**2))


def test_a_level_that_the_source_lacks_pools_to_a_mean():
  initial = of_model('micro', 2)
  source = of_model('micro')
  gone = [key for key in source if '.blocks.1.1.attn.lr.' in key]
  source = {key: a for key, a in source.items() if key not in gone}
  result = transfer.transfer(source, initial, keep_head=True, name='x.pth')
  assert result.anew == gone
  kernel = result.state_dict['backbone.blocks.1.1.attn.lr.0.weight']
  np.testing.assert_allclose(kernel, 1 / 49, rtol=1e-6)
  for name, value in (
    ('0.bias', 0),
    ('1.weight', 1),
    ('1.bias', 0),
    ('1.running_mean', 0),
    ('1.running_var', 1),
    ('1.num_batches_tracked', 0),
  ):
    array = result.state_dict[f'backbone.blocks.1.1.attn.lr.{name}']
    np.testing.assert_array_equal(array, value, name)
  back = transfer.transfer(initial, source, keep_head=True, name='x.pth')
  assert back.left_out == gone


def test_another_token_head_is_made_anew_or_left_out():
  plain, with_head = of_model('micro'), of_model('micro_tokenlabel', 2)
  result = transfer.transfer(plain, with_head, keep_head=True, name='x.pth')
  assert result.anew == [key for key in with_head if 'token_linear' in key]
  result = transfer.transfer(with_head, plain, keep_head=True, name='x.pth')
  assert result.left_out == [key for key in with_head if 'token_linear' in key]
  np.testing.assert_array_equal(
    result.state_dict['cls_head.fc_cls.weight'],
    with_head['cls_head.fc_cls.weight'],
  )


def test_other_models_are_one_error_that_lists_what_does_not_fit():
  source: dict[str, Any] = of_model('micro')
  source['backbone.stranger\n'] = np.zeros(3, np.float32)
  del source['backbone.norm.bias']
  key = 'backbone.blocks.0.0.mlp.fc1.bias'
  source[key] = source[key][:5]
  with pytest.raises(errors.UserError) as error:
    transfer.transfer(source, of_model('micro'), keep_head=True, name='x.pth')
  message = str(error.value)
  assert 'x.pth is of another model' in message
  assert 'backbone.norm.bias (128,) is missing' in message
  assert f'{key} is (5,), expected (64,)' in message
  assert r"'backbone.stranger\n' (3,) is unknown" in message
  assert '\n' not in message


def test_the_table_says_what_became_of_all():
  lines = transfer.transfer(
    of_model('tiny_2d'), of_model('tiny16'), keep_head=False, name='x.pth'
  ).table()
  text = '\n'.join(lines)
  for words in ('taken:', 'inflated from images:', 'made anew:', 'left out:'):
    assert words in text
  assert 'cls_head.fc_cls.weight' in text
  assert 'head.weight' in text
