"""Training starts from other classes, frames, sizes, and kinds of files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualformer_jax import errors, pytorch
from dualformer_jax.input_pipeline.views import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import checkpoint, initialize, step
from tests import reference_arrays, small_checkpoint, training_command

FIELDS = small_checkpoint.FIELDS
NAMES = small_checkpoint.CLASS_NAMES


def describe(**fields: Any) -> checkpoint.Description:
  names = fields.pop('class_names', NAMES)
  return checkpoint.Description(
    {**FIELDS, **fields, 'num_classes': len(names)},
    Preprocessing(8, 2, 32),
    names,
  )


def start(source: initialize.Source, description: checkpoint.Description):
  model = description.build_model()
  state = jax.jit(lambda: step.init_state(model, optax.sgd(0.1), seed=5))()
  new, result = initialize.start_from(state, source, description)
  return state, new, result


def test_a_folder_of_the_same_model_is_taken_whole(tmp_path):
  source = initialize.read(small_checkpoint.save(tmp_path / 'folder'))
  assert source.preprocessing == small_checkpoint.PREPROCESSING
  _, new, result = start(source, describe())
  variables, _ = checkpoint.load_model(tmp_path / 'folder')
  jax.tree.map(np.testing.assert_array_equal, new.params, variables['params'])
  assert not result.anew
  assert not result.adapted


def test_other_classes_get_a_new_head_even_if_they_are_as_many(tmp_path):
  source = initialize.read(small_checkpoint.save(tmp_path / 'folder'))
  for names in (('a', 'b', 'c', 'd', 'e'), ('a', 'b')):
    state, new, result = start(source, describe(class_names=names))
    jax.tree.map(
      np.testing.assert_array_equal,
      new.params['cls_head'],
      state.params['cls_head'],
    )
    assert result.anew == ['cls_head.fc_cls.weight', 'cls_head.fc_cls.bias']


def test_other_frames_and_sizes_adapt_the_pyramid_alone(tmp_path):
  source = initialize.read(small_checkpoint.save(tmp_path / 'folder'))
  other = describe(
    depths=FIELDS['depths'],
    num_frames=16,
    image_size=64,
    window=(8, 4, 4),
  )
  _, new, result = start(source, other)
  # One block with windows: nothing depends on the sizes.
  assert not result.adapted
  output: Any = other.build_model().apply(
    {'params': new.params}, jnp.zeros((1, 16, 64, 64, 3))
  )
  assert np.isfinite(output.logits).all()


def test_a_pth_file_of_images_or_videos_does_without_a_folder(tmp_path):
  fields = reference_arrays.MODELS['micro']
  names = tuple(map(str, range(10)))
  description = checkpoint.Description(
    {**fields, 'dtype': 'float32'}, Preprocessing(32, 2, 224), names
  )
  images = reference_arrays.state_dict('micro_2d', 1)
  pytorch.write_pth(tmp_path / 'images.pth', images)
  source = initialize.read(tmp_path / 'images.pth')
  assert source.preprocessing is None
  model = DualFormer(**fields, dtype='float32')
  shapes = jax.eval_shape(
    lambda: step.init_state(model, optax.identity(), seed=0)
  )
  initial: Any = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype),
    {'params': shapes.params, 'batch_stats': shapes.batch_stats},
  )
  variables, result = initialize.make_variables(source, initial, description)
  assert result.left_out == ['head.weight', 'head.bias']
  kernel = variables['params']['backbone']['pos_block_0']['proj_0']['kernel']
  expected = images['pos_block.0.proj.0.weight'][:, 0].transpose(1, 2, 0) / 3
  for time in range(3):
    np.testing.assert_allclose(kernel[time], expected, rtol=1e-6)

  video = reference_arrays.state_dict('micro', 1)
  pytorch.write_pth(tmp_path / 'video.pth', video)
  variables, result = initialize.make_variables(
    initialize.read(tmp_path / 'video.pth'), initial, description
  )
  assert not result.anew
  back = pytorch.to_pytorch(variables)
  for name, array in video.items():
    np.testing.assert_array_equal(back[name], array)


def test_another_model_is_one_line_that_says_what_differs(tmp_path):
  source = initialize.read(small_checkpoint.save(tmp_path / 'folder'))
  for fields, words in (
    ({'num_heads': (4,)}, r'model.num_heads is \(4,\), there \(2,\)'),
    ({'embed_dims': (32,)}, 'model.embed_dims'),
  ):
    with pytest.raises(errors.UserError, match=words):
      start(source, describe(**fields))


def test_an_average_is_what_a_checkpoint_gives_and_starts_anew(tmp_path):
  description = describe()
  model = description.build_model()
  state = jax.jit(
    lambda: step.init_state(model, optax.sgd(0.1), 0, with_ema=True)
  )()
  state = dataclasses.replace(
    state, ema_params=jax.tree.map(lambda p: p + 1, state.params)
  )
  series = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  series.save(state, dataclasses.replace(description, step=1, data_position={}))
  series.wait()
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    state,
  )
  restored, _ = series.restore(abstract)
  jax.tree.map(
    np.testing.assert_array_equal, restored.ema_params, state.ema_params
  )
  jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
  with pytest.raises(errors.UserError, match='saved with averaged parameters'):
    series.restore(dataclasses.replace(abstract, ema_params=None))
  series.close()
  variables, _ = checkpoint.load_model(tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal, variables['params'], state.ema_params
  )
  source = initialize.read(tmp_path)
  plain, new, _ = start(source, description)
  assert new.ema_params is None
  with_ema = dataclasses.replace(plain, ema_params=plain.params)
  new, _ = initialize.start_from(with_ema, source, description)
  for tree in (new.params, new.ema_params):
    jax.tree.map(np.testing.assert_array_equal, tree, state.ema_params)


@pytest.fixture(scope='module', name='fine_tuned')
def _fine_tuned(motion_dataset, compilation_cache, tmp_path_factory):
  """A run from another model with all the aids switched on; a copy is told."""
  folder = tmp_path_factory.mktemp('fine_tuned')
  data = folder / 'data'
  shutil.copytree(motion_dataset, data)
  (path,) = data.rglob('report.json')
  report = json.loads(path.read_text())
  report['near_copies'] = [
    {
      'splits': ['train', 'validation'],
      'videos': [['train/00003', 'validation/00004']],
    }
  ]
  path.write_text(json.dumps(report))
  fields: dict[str, Any] = dict(
    depths=(2,),
    embed_dims=(16,),
    num_heads=(2,),
    num_classes=3,
    num_frames=8,
    image_size=32,
    window=(4, 4, 4),
    fine_sizes=((2, 4, 4),),
    coarse_sizes=((2, 2, 2),),
    dtype='float32',
  )
  model = DualFormer(**fields)
  variables = step.init_state(model, optax.identity(), seed=0).variables()
  description = checkpoint.Description(
    fields,
    Preprocessing(
      8, 1, 32, pixel_mean=(99.0, 98.0, 97.0), pixel_std=(50.0, 51.0, 52.0)
    ),
    ('a', 'b', 'c'),
  )
  checkpoint.save_model(folder / 'source', variables, description)
  done = training_command.run(
    *training_command.TINY,
    f'--config.init_from={folder}/source',
    f'--config.dataset.data_dir={data}',
    '--config.dataset.pixel_mean=()',
    '--config.dataset.pixel_std=()',
    '--config.dataset.class_balanced=True',
    '--config.ema_decay=0.9',
    '--config.label_smoothing=0.1',
    '--config.optimizer.layer_decay=0.75',
    '--config.optimizer.max_grad_norm=1.0',
    '--config.optimizer.frozen=backbone/patch_embeds.*',
    '--config.overfit_steps=3',
    '--config.num_epochs=6',
    '--config.validation.every_epochs=1',
    '--config.validation.patience=1',
    # Too small a rate to get better: the first validation stays the best.
    '--config.optimizer.learning_rate=1e-9',
    workdir=folder / 'work',
    cache=compilation_cache,
  )
  assert done.returncode == 0, done.stderr
  return folder, done.stderr


def test_fine_tuning_tells_what_it_takes_and_how_the_loss_begins(fine_tuned):
  _, log = fine_tuned
  for words in (
    'taken:',
    'resized to this pyramid:',
    'made anew:',
    'cls_head.fc_cls.weight',
    'one batch, step 3/3',
    'one batch is NOT learnt',
    'loss of the first batch',
    'ln(8 classes) = 2.079',
    'near copies: validation/00004 of train/00003;',
  ):
    assert words in log


def test_fine_tuning_keeps_the_normalisation_and_what_is_frozen(fine_tuned):
  folder, _ = fine_tuned
  variables, description = checkpoint.load_model(folder / 'work')
  source, _ = checkpoint.load_model(folder / 'source')
  assert description.preprocessing.pixel_mean == (99.0, 98.0, 97.0)
  assert description.preprocessing.pixel_std == (50.0, 51.0, 52.0)
  jax.tree.map(
    np.testing.assert_array_equal,
    variables['params']['backbone']['patch_embeds_0'],
    source['params']['backbone']['patch_embeds_0'],
  )


def test_training_ends_early_where_nothing_gets_better(fine_tuned):
  folder, log = fine_tuned
  assert 'no validation since step 6 was better' in log
  assert 'training ends at step 12 of 36' in log
  report = json.loads((folder / 'work' / 'report.json').read_text())
  assert pathlib.Path(report['checkpoint']).name == '12'


def test_a_loss_that_is_not_finite_names_videos_and_last_checkpoint(
  motion_dataset, compilation_cache, tmp_path
):
  flags = (
    *training_command.TINY,
    f'--config.dataset.data_dir={motion_dataset}',
    '--config.checkpoint.every_steps=1',
    '--config.num_epochs=2',
    '--config.optimizer.warmup_epochs=0.0',
  )
  done = training_command.run(
    *flags,
    '--config.optimizer.learning_rate=1e30',
    workdir=tmp_path,
    cache=compilation_cache,
  )
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith('error: step ')
  assert 'loss nan' in last or 'loss inf' in last
  assert last.count('train/0') == 8  # the batch's videos
  kept = max(int(p.name) for p in (tmp_path / 'checkpoints').glob('[0-9]*'))
  assert f'{tmp_path}/checkpoints/{kept}' in last
  variables, _ = checkpoint.load_model(tmp_path)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
  assert 'Traceback' not in done.stderr
