"""Token labels: from a teacher model, and from stored labels."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualformer_jax import errors
from dualformer_jax import token_labels as store_command
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.evaluation import forward
from dualformer_jax.input_pipeline import loader, stored_labels, transforms
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import augment, losses, step
from dualformer_jax.training import optimizer as optimizers
from dualformer_jax.training import teacher as token_labels
from dualformer_jax.training.state import init_state
from tests import in_process, reference_arrays, training_command

# Little to compile.
FIELDS: dict[str, Any] = dict(
  depths=(1,),
  embed_dims=(16,),
  num_heads=(2,),
  num_classes=8,
  num_frames=16,
  image_size=32,
  window=(8, 4, 4),
  fine_sizes=((8, 4, 4),),
  coarse_sizes=(None,),
  dtype='float32',
)
HEAD: dict[str, Any] = {'token_label': True}
# The flags of a student like that.
STUDENT = (*training_command.ONE_BLOCK, '--config.model.token_label=True')


@pytest.mark.parametrize('case', ['same', 'ratio'])
def test_loss_agrees_with_the_published_implementation(case):
  arrays = reference_arrays.load('tokenlabel_seed1.npz')
  student, teacher, logits, labels, expected = (
    arrays[f'{case}_{name}']
    for name in (
      'student_tokens',
      'teacher_tokens',
      'logits',
      'labels',
      'loss',
    )
  )
  targets = token_labels.soft_labels(jnp.asarray(teacher), student.shape[1])
  loss = 0.5 * losses.cross_entropy(
    jnp.asarray(logits), jnp.asarray(labels, 'int32')
  ) + 0.5 * losses.soft_cross_entropy(jnp.asarray(student), targets)
  assert abs(float(loss) - expected) <= 1e-5 * expected


def test_fewer_teacher_frames_are_repeated():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, 1, 9)))
  soft = token_labels.soft_labels(logits, 6, top=9)
  expected = np.asarray(jax.nn.softmax(logits))
  np.testing.assert_allclose(soft, expected[:, [0, 0, 0, 1, 1, 1]], rtol=1e-6)


def augmentation(mean=120.0, std=60.0, **options: Any):
  return functools.partial(
    augment.augment_batch,
    options=augment.AugmentOptions(
      (mean,) * 3, (std,) * 3, num_classes=8, **options
    ),
  )


def config_of(top: int, flip: bool = False) -> Any:
  return types.SimpleNamespace(
    dataset=types.SimpleNamespace(
      sampling='dense', frame_interval=2, flip=flip
    ),
    token_labels=types.SimpleNamespace(teacher='teacher', top=top),
  )


def targets_of(teacher_model: DualFormer, student: DualFormer, top: int = 5):
  """The targets of a teacher with the normalization of its student."""
  rescale = (1.0,) * 3, (0.0,) * 3
  return token_labels.teacher_from_model(
    config_of(top), student, teacher_model, None, rescale
  ).targets


def make_step(teacher_model: DualFormer, student: DualFormer, **options: Any):
  """A training step and its first state, with a teacher or stored labels."""
  optimizer = optax.sgd(0.1)
  ask = targets_of(teacher_model, student)
  train_step = functools.partial(
    step.train_step,
    model=student,
    apply_gradients=functools.partial(optimizers.apply_gradients, optimizer),
    options=step.StepOptions(seed=0),
    augment=augmentation(flip=True),
    **({'token_targets': ask} | options),
  )
  return train_step, jax.jit(lambda: init_state(student, optimizer, 1))()


def batch_of(frames: int = 16, rows: int = 2) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(3)
  return {
    'clips': rng.integers(0, 256, (rows, frames, 32, 32, 3), dtype=np.uint8),
    'labels': np.arange(rows, dtype=np.int32),
  }


@pytest.mark.slow
def test_teacher_is_constant_and_has_no_gradient():
  # Wide, so that gradients or kept activations would show in the memory.
  wide = {**FIELDS, 'embed_dims': (512,), 'remat': 'none'}
  teacher, student = DualFormer(**wide), DualFormer(**FIELDS, **HEAD)
  init = jax.jit(lambda: init_state(teacher, optax.sgd(0.1), seed=2))
  variables = init().variables()
  train_step, state = make_step(teacher, student)
  compiled = jax.jit(train_step).lower(state, batch_of(), variables).compile()
  before = jax.tree.map(np.array, variables)
  state, _ = compiled(state, batch_of(), variables)
  state, values = compiled(state, batch_of(), variables)
  assert values['token_loss'] > 0
  jax.tree.map(np.testing.assert_array_equal, before, variables)

  # The teacher alone, forward, is all that is added; its gradient would be
  # twice that more, and as large as its parameters.
  alone = (
    jax.jit(lambda v, c: teacher.apply(v, c, score_tokens=True).token_logits)  # pyright: ignore
    .lower(variables, jnp.zeros((2, 16, 32, 32, 3)))
    .compile()
  )
  without, first = make_step(teacher, student, token_targets=None)
  plain = jax.jit(without).lower(first, batch_of()).compile()

  def flops(program: Any) -> float:
    return program.cost_analysis()['flops']

  added = flops(compiled) - flops(plain)
  assert added < 1.3 * flops(alone)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables['params']))

  def temporary(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes

  assert temporary(compiled) < temporary(plain) + temporary(alone) + size / 2


@pytest.mark.slow
def test_teacher_with_more_frames_sees_all_of_them():
  teacher = DualFormer(**FIELDS)
  student = DualFormer(**{**FIELDS, 'num_frames': 8}, **HEAD)
  init = jax.jit(lambda: init_state(teacher, optax.sgd(0.1), seed=2))
  variables = init().variables()
  train_step, state = make_step(teacher, student)
  batch = batch_of()
  new, values = jax.jit(train_step)(state, batch, variables)
  # By hand, of the same keys.
  key = jax.random.fold_in(jax.random.key(0), 0)
  augment_key, dropout_key = jax.random.split(key)
  clips, _ = augmentation(flip=True)(
    augment_key, **jax.tree.map(jnp.asarray, batch)
  )
  scored: Any = jax.jit(functools.partial(teacher.apply, score_tokens=True))(
    variables, clips
  )
  output: Any = jax.jit(
    functools.partial(student.apply, train=True, mutable=['batch_stats'])
  )(
    {'params': state.params, 'batch_stats': state.batch_stats},
    clips[:, ::2],
    rngs={'dropout': dropout_key},
  )[0]
  scores = np.asarray(scored.token_logits).reshape(2, 2, 4, 8, 8, 8)
  scores = scores[:, 0] / 2 + scores[:, 1] / 2
  kept = np.sort(scores, axis=-1)[..., -5, None]
  scores = np.where(scores >= kept, scores, 0)
  soft = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
  expected = -np.mean(
    np.sum(soft * np.asarray(jax.nn.log_softmax(output.token_logits)), axis=-1)
  )
  assert abs(values['token_loss'] - expected) < 1e-5
  assert int(new.step) == 1


@pytest.fixture(scope='module', name='teacher')
def _teacher(motion_dataset, tmp_path_factory) -> pathlib.Path:
  """A checkpoint of the same size as the student, without the head."""
  folder = tmp_path_factory.mktemp('teacher')
  init = jax.jit(lambda: init_state(DualFormer(**FIELDS), optax.identity(), 0))
  names = PreparedDataset('motion', 'train', str(motion_dataset)).class_names
  checkpoint.save_model(
    folder,
    init().variables(),
    checkpoint.CheckpointMetadata(
      FIELDS, transforms.Preprocessing(16, 1, 32), names
    ),
  )
  return folder


def store(teacher, data_dir, *flags: str):
  return in_process.run(
    store_command,
    f'--config={training_command.REPOSITORY}/configs/motion.py',
    f'--checkpoint={teacher}',
    f'--config.dataset.data_dir={data_dir}',
    '--config.token_labels.dtype=float32',
    *flags,
    with_log=True,
  )


@pytest.fixture(scope='module', name='all_scores')
def _all_scores(teacher, motion_dataset, tmp_path_factory) -> pathlib.Path:
  """Stored token labels with all of the scores."""
  out = tmp_path_factory.mktemp('stored') / 'all'
  done = store(teacher, motion_dataset, f'--out={out}', '--top=0')
  assert done.returncode == 0, done.stderr
  assert 'token labels of 48 videos' in done.stderr
  assert "hold 100.0% of a token's probability" in done.stderr
  return out


def losses_of(
  teacher: pathlib.Path, data_dir: pathlib.Path, stored: pathlib.Path, top: int
) -> list[float]:
  """The token loss of the same batch, on the fly and from stored labels."""
  variables, description = checkpoint.load_model(teacher)
  model = description.build_model(dtype='float32')
  dataset = PreparedDataset('motion', 'train', str(data_dir))
  p = dataclasses.replace(description.preprocessing, num_clips=1, num_crops=1)
  batches = loader.TrainLoader(
    dataset,
    p,
    loader.TrainOptions(seed=4, short_side=32, random_crop=False),
    6,
    range(6),
    num_threads=2,
    token_labels=stored_labels.StoredLabels(str(stored), dataset),
  )
  batch = next(batches)
  batches.close()
  key = jax.random.key(9)
  # Not mirrored: a teacher may see another thing in a mirror.
  clips = forward.normalize(
    jnp.asarray(batch['clips']), p.pixel_mean, p.pixel_std
  )
  asked = jax.jit(targets_of(model, model, top))(key, variables, clips)
  found = token_labels.teacher_from_labels(config_of(top), model).targets(
    key,
    None,
    clips,
    **{n: jnp.asarray(a) for n, a in batch.items() if n.startswith('token_')},
  )
  student = np.random.default_rng(2).normal(size=asked.shape)
  return [
    float(losses.soft_cross_entropy(jnp.asarray(student), targets))
    for targets in (asked, found)
  ]


@pytest.mark.slow
def test_stored_labels_agree_with_the_teacher(
  teacher, motion_dataset, all_scores
):
  # Whole frames; all of the scores, and the best five of them.
  for top in (8, 5):
    asked, stored = losses_of(teacher, motion_dataset, all_scores, top)
    assert abs(asked - stored) <= 1e-4


@pytest.mark.slow
def test_stored_labels_are_cropped_and_flipped_like_clips():
  # Scores that rise along columns, and from top to bottom for another class.
  grid = np.arange(4.0)
  values = np.zeros((8, 1, 4, 4, 2), np.float32)
  values[..., 0], values[..., 1] = grid, grid[:, None]
  key = jax.random.key(3)
  frames = np.zeros((8, 2, 8, 8, 3), np.uint8)
  columns = np.arange(8, dtype=np.uint8)[:, None]
  frames[..., :] = columns  # brighter to the right
  clips, _ = augmentation(0.0, 1.0, flip=True)(
    key, jnp.asarray(frames), jnp.zeros(8, jnp.int32)
  )
  mirrored = np.asarray(clips[:, 0, 0, 0, 0]) > 0
  assert 0 < mirrored.sum() < 8
  model = DualFormer(**{**FIELDS, 'image_size': 16, 'num_classes': 3})
  stored = token_labels.teacher_from_labels(config_of(top=3, flip=True), model)
  targets = stored.targets(
    key,
    None,
    clips,
    token_values=jnp.asarray(values),
    token_classes=jnp.broadcast_to(jnp.array([2, 0]), values.shape),
    # The left half; in it, one column of the stored tokens is two of the clip.
    token_boxes=jnp.tile(jnp.array([0.0, 0.0, 1.0, 0.5]), (8, 1)),
  )
  logs = np.log(np.asarray(targets[:, 0]))
  # Softmax leaves differences: of class 2 and of class 0 to class 1, at 0.
  across, down = logs[..., 2] - logs[..., 1], logs[..., 0] - logs[..., 1]
  for row, is_mirrored in enumerate(mirrored):
    expected = np.array([0.0, 0.25, 0.75, 1.25])  # clamped at the edge
    expected = expected[::-1] if is_mirrored else expected
    for line in range(4):
      np.testing.assert_allclose(across[row, line], expected, atol=1e-5)
      np.testing.assert_allclose(down[row, :, line], grid, atol=1e-5)


@pytest.mark.slow
def test_five_stored_logits_are_enough(teacher, motion_dataset, tmp_path):
  done = store(teacher, motion_dataset, f'--out={tmp_path}/five')
  assert done.returncode == 0, done.stderr
  asked, stored = losses_of(teacher, motion_dataset, tmp_path / 'five', 5)
  assert abs(asked - stored) <= 1e-4


@pytest.mark.slow
def test_interrupted_run_resumes_and_complete_one_is_kept(
  teacher, motion_dataset, all_scores, tmp_path
):
  meta_path = all_scores / 'token_labels.json'
  (file,) = all_scores.glob('*.array_record')
  content = file.read_bytes()
  meta = json.loads(meta_path.read_text())
  assert meta['complete']
  again = store(teacher, motion_dataset, f'--out={all_scores}', '--top=0')
  assert 'is complete already' in again.stderr
  # As it is while the first file is being written.
  folder = tmp_path / 'begun'
  folder.mkdir()
  del meta['complete']
  (folder / 'token_labels.json').write_text(json.dumps(meta))
  dataset = PreparedDataset('motion', 'train', str(motion_dataset))
  with pytest.raises(errors.UserError, match='is incomplete'):
    stored_labels.StoredLabels(str(folder), dataset)
  done = store(teacher, motion_dataset, f'--out={folder}', '--top=0')
  assert done.returncode == 0, done.stderr
  (file,) = folder.glob('*.array_record')
  assert file.read_bytes() == content
  other = store(teacher, motion_dataset, f'--out={folder}', '--top=3')
  assert other.returncode == 2
  assert 'of another teacher, dataset or --top' in other.stderr
  assert len(other.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['teacher', 'stored'])
def test_training_with_token_labels(
  teacher, motion_dataset, all_scores, tmp_path, kind
):
  place = teacher if kind == 'teacher' else all_scores
  done = training_command.run_here(
    *STUDENT,
    f'--config.dataset.data_dir={motion_dataset}',
    f'--config.token_labels.{kind}={place}',
    '--config.num_epochs=1',
    '--config.log_every_steps=2',
    workdir=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert 'token_loss' in done.stderr
  assert json.loads((tmp_path / 'report.json').read_text())['num_videos'] == 48


def test_clips_cover_a_video_and_loop_short_ones():
  p = transforms.Preprocessing(8, 2, 32)
  clips = stored_labels.label_clip_indices(p, 50)
  assert clips.shape == (4, 8)
  assert clips[0, 0] == 0
  assert clips[-1, -1] == 48
  assert np.all(np.diff(clips[:, 0]) <= 16)
  np.testing.assert_array_equal(
    stored_labels.label_clip_indices(p, 5), np.arange(0, 16, 2)[None]
  )
