"""Builds the objects of a training run from a config of configs/common.py."""

from collections.abc import Callable, Sequence
import copy
import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.checkpoints.messages import listed
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import loader
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.object_store import DiskCache
from dualformer_jax.input_pipeline.stored_labels import StoredLabels
from dualformer_jax.input_pipeline.transforms import Preprocessing
from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import augment
from dualformer_jax.training import optimizer as optimizers
from dualformer_jax.training import step as steps
from dualformer_jax.training import teacher as teachers
from dualformer_jax.training.state import TrainState, init_state

# An ml_collections.ConfigDict, whose fields type checkers cannot know.
Config = Any
TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@functools.cache  # All splits share its limit.
def _disk_cache(folder: str, gigabytes: float) -> DiskCache:
  return DiskCache(pathlib.Path(folder).expanduser(), int(1e9 * gigabytes))


def open_split(config: Config, split: str) -> PreparedDataset:
  """Opens a split of the dataset, and checks its classes and labels."""
  dataset = config.dataset
  cache = None
  if dataset.cache_dir:
    cache = _disk_cache(dataset.cache_dir, dataset.cache_gigabytes)
  data = PreparedDataset(dataset.name, split, dataset.data_dir, cache)
  if config.model.num_classes not in (0, len(data.class_names)):
    raise UserError(
      f'config.model.num_classes is {config.model.num_classes}, but '
      f'{data.folder} has {len(data.class_names)} classes; set it to that, or '
      'to 0 to use the classes of the dataset'
    )
  if data.multi_label != dataset.multi_label:
    raise UserError(
      f'config.dataset.multi_label is {dataset.multi_label}, but {data.folder} '
      f'needs {data.multi_label}, by the labels of its videos'
    )
  stored = data.read_report('stored_as', {})
  short_side = stored.get('short_side', config.model.image_size)
  if stored.get('form') != 'verbatim' and config.model.image_size > short_side:
    raise UserError(
      f'config.model.image_size is {config.model.image_size}, but frames of '
      f'{data.folder} are stored with a short side of {short_side}; set '
      'image_size to that or less, or prepare the dataset with larger frames'
    )
  return data


def resolve_normalization(
  config: Config, preprocessing: Preprocessing | None
) -> Config:
  """Returns a copy with empty pixel_mean and pixel_std filled in."""
  config = copy.deepcopy(config)
  for name in ('pixel_mean', 'pixel_std'):
    if not config.dataset[name] and preprocessing is not None:
      config.dataset[name] = getattr(preprocessing, name)
  return config


def make_preprocessing(
  config: Config, views: Config | None = None
) -> Preprocessing:
  """Returns the preprocessing of training clips or of views.

  `views` is a group with `num_clips` and `num_crops`, such as `config.test`.
  """
  dataset = config.dataset

  def rgb(name: str) -> tuple[Any, ...]:
    return tuple(map(float, dataset[name] or getattr(Preprocessing, name)))

  return Preprocessing(
    num_frames=config.model.num_frames,
    frame_interval=dataset.frame_interval,
    image_size=config.model.image_size,
    sampling=dataset.sampling,
    pixel_mean=rgb('pixel_mean'),
    pixel_std=rgb('pixel_std'),
    num_clips=views.num_clips if views else 1,
    num_crops=views.num_crops if views else 1,
  )


def describe_views(p: Preprocessing, short_side: int) -> str:
  """Returns the views of a video in words."""
  crops = 'center crop' if p.num_crops == 1 else f'{p.num_crops} crops'
  clips = 'clip' if p.num_clips == 1 else 'clips'
  return (
    f'{p.num_clips} {clips} of {p.num_frames} frames, {crops} of '
    f'{p.image_size} from a short side of {short_side} pixels'
  )


def load_model(
  path: str | os.PathLike[str], data: PreparedDataset
) -> tuple[dict[str, Any], checkpoint.CheckpointMetadata]:
  """Loads a model, as checkpoint.load_model, and checks its classes."""
  variables, metadata = checkpoint.load_model(path)
  names, wanted = metadata.class_names, data.class_names
  if names != wanted:
    raise UserError(
      f'{path} has the {len(names)} classes {listed(names, 3)}, but '
      f'{data.folder} has the {len(wanted)} classes {listed(wanted, 3)}; '
      'expected the same classes in the same order'
    )
  return variables, metadata


def make_teacher(
  config: Config, data: PreparedDataset
) -> teachers.Teacher | None:
  """Returns the source of token labels for training videos, if there is one."""
  options = config.token_labels
  model = make_model(config, len(data.class_names))
  if bool(options.teacher) + bool(options.stored) != model.token_label:
    raise UserError(
      f'config.model.token_label is {model.token_label}, config.token_labels.'
      f'teacher is {options.teacher!r} and stored is {options.stored!r}; if '
      'token_label is True, set one of the two (to a checkpoint folder, or a '
      'folder written by dualformer_jax.token_labels), else none'
    )
  if options.stored:
    names = ('rand_augment_ops', 'mixup', 'cutmix')
    if any(config.augment[name] for name in names):
      raise UserError(
        'config.augment.rand_augment_ops, mixup and cutmix cannot be used with '
        'config.token_labels.stored, as stored labels do not follow these '
        'changes; set them to 0, or use token_labels.teacher'
      )
    stored = StoredLabels(options.stored, data)
    return teachers.teacher_from_labels(config, model, stored)
  if options.teacher:
    variables, metadata = load_model(options.teacher, data)
    teacher = metadata.build_model(dtype=options.dtype)
    p, theirs = make_preprocessing(config), metadata.preprocessing
    factor = np.divide(p.pixel_std, theirs.pixel_std).tolist()
    shift = np.subtract(p.pixel_mean, theirs.pixel_mean) / theirs.pixel_std
    return teachers.teacher_from_model(
      config, model, teacher, variables, (factor, shift.tolist())
    )
  return None


def count_steps(config: Config, data: PreparedDataset) -> int:
  """Returns the number of steps of an epoch: at least one."""
  return max(1, config.dataset.repeats * len(data) // config.batch_size)


def make_model(config: Config, num_classes: int = 0) -> DualFormer:
  """Returns the model; `num_classes` replaces 0 in `config.model`."""
  fields = config.model.to_dict()
  fields['num_classes'] = fields['num_classes'] or num_classes
  return DualFormer(**fields)


@dataclasses.dataclass(frozen=True)
class Training:
  """The model, the optimizer and the training step, on a mesh of devices."""

  config: Config
  mesh: Mesh  # run and lower steps with `jax.set_mesh(mesh)`
  model: DualFormer
  optimizer: optimizers.AdamW
  schedule: Callable[[int], Any]  # learning rate as a function of the step
  teacher: teachers.Teacher | None

  def _init(self) -> Callable[[], TrainState]:
    config = self.config
    return functools.partial(
      init_state,
      self.model,
      self.optimizer.transformation,
      config.seed,
      config.ema_decay > 0,
    )

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings of the training state."""
    return with_shardings(jax.eval_shape(self._init()), self.mesh)

  def init_state(self) -> TrainState:
    """Returns a randomly initialized state on the devices."""
    return jax.jit(
      self._init(),
      out_shardings=sharding.tree_shardings(self.abstract_state, self.mesh),
      compiler_options=sharding.compiler_options(self.mesh),
    )()

  def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, types and shardings of a batch of the train loader."""
    config, model, teacher = self.config, self.model, self.teacher
    where = NamedSharding(self.mesh, sharding.BATCH)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
      shape = (config.batch_size, *shape)
      return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    num_frames = teacher.clip_frames if teacher else model.num_frames
    _, *pixels = make_preprocessing(config).clip_shape(config.dataset.yuv420)
    batch = {
      'clips': array(np.uint8, num_frames, *pixels),
      'labels': array(np.int32),
    }
    if config.dataset.multi_label:
      batch['labels'] = array(np.float32, model.num_classes)
    if num_ops := config.augment.rand_augment_ops:
      batch['color_ops'] = array(np.int32, num_ops)
      batch['magnitudes'] = array(np.float32, num_ops)
    if teacher is not None and teacher.variables is None:
      # Stored labels with the student's token grid.
      shape = (*model.token_grid(), teacher.top)
      batch['token_values'] = array(np.float32, *shape)
      batch['token_classes'] = array(np.int32, *shape)
      batch['token_boxes'] = array(np.float32, 4)
    return batch

  @functools.cached_property
  def train_step(self) -> TrainStep:
    """(state, batch, teacher variables) -> (state, metrics); donates state."""
    config, teacher = self.config, self.teacher
    preprocessing = make_preprocessing(config)
    return jax.jit(
      functools.partial(
        steps.train_step,
        model=self.model,
        apply_gradients=self.optimizer.apply_gradients,
        options=steps.StepOptions(
          seed=config.seed,
          accumulation_steps=config.accumulation_steps,
          multi_label=config.dataset.multi_label,
          label_smoothing=config.label_smoothing,
          token_loss_weight=config.token_labels.weight,
          ema_decay=config.ema_decay,
          frozen=config.optimizer.frozen,
        ),
        augment=functools.partial(
          augment.augment_batch,
          options=augment.AugmentOptions(
            pixel_mean=preprocessing.pixel_mean,
            pixel_std=preprocessing.pixel_std,
            num_classes=self.model.num_classes,
            flip=config.dataset.flip,
            color_jitter=config.augment.color_jitter,
            random_erasing=config.augment.random_erasing,
            mixup=config.augment.mixup,
            cutmix=config.augment.cutmix,
          ),
        ),
        token_targets=teacher.targets if teacher else None,
        all_gather=sharding.all_gather_params(self.mesh),
      ),
      donate_argnums=0,
      compiler_options=sharding.compiler_options(self.mesh),
      out_shardings=(
        sharding.tree_shardings(self.abstract_state, self.mesh),
        NamedSharding(self.mesh, PartitionSpec()),
      ),
    )


def make_training(
  config: Config,
  *,
  num_classes: int = 0,
  steps_per_epoch: int = 1000,
  teacher: teachers.Teacher | None = None,
  devices: Sequence[Any] | None = None,
) -> Training:
  """Builds model, optimizer and training step, without arrays or files.

  `num_classes` replaces 0 in `config.model`. `devices` are all devices by
  default, and can be those of a topology to compile for.
  """
  size, num_microbatches = config.batch_size, config.accumulation_steps
  mesh = sharding.make_mesh(
    config.mesh.to_dict(), size, num_microbatches, devices
  )
  model = make_model(config, num_classes)
  options = config.optimizer.to_dict()
  base_lr, warmup = options.pop('learning_rate'), options.pop('warmup_epochs')
  schedule = optimizers.learning_rate_schedule(
    base_lr, config.num_epochs, warmup, steps_per_epoch
  )
  params = checkpoint.variable_shapes(model, 'the config')['params']
  optimizer = optimizers.make_optimizer(
    params, schedule, **options, compute=Compute(model.dtype, model.kernels)
  )
  return Training(config, mesh, model, optimizer, schedule, teacher)


def with_shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns the shapes, types and shardings of a tree of parameters."""
  return jax.tree.map(
    lambda leaf, where: leaf.update(sharding=where),
    tree,
    sharding.tree_shardings(tree, mesh),
  )


def make_train_loader(
  training: Training, data: PreparedDataset
) -> loader.TrainLoader:
  """Returns this host's batches of training clips."""
  config, teacher = training.config, training.teacher
  dataset = config.dataset
  preprocessing = make_preprocessing(config)
  if teacher is not None:
    # The clip's duration stays, with as many frames as the teacher needs.
    factor = teacher.clip_frames // preprocessing.num_frames
    preprocessing = dataclasses.replace(
      preprocessing,
      num_frames=teacher.clip_frames,
      frame_interval=preprocessing.frame_interval // factor,
    )
  options = loader.TrainOptions(
    seed=config.seed,
    short_side=dataset.train_short_side,
    random_crop=dataset.random_crop,
    start_multiple=dataset.start_multiple,
    yuv420=dataset.yuv420,
    repeats=dataset.repeats,
    class_balanced=dataset.class_balanced,
    rand_augment_ops=config.augment.rand_augment_ops,
    rand_augment_magnitude=config.augment.rand_augment_magnitude,
  )
  return loader.TrainLoader(
    data,
    preprocessing,
    options,
    config.batch_size,
    sharding.local_batch_indices(training.mesh, config.batch_size),
    num_threads=dataset.num_threads,
    num_processes=_reader_processes(
      dataset, training.mesh.devices.flat[0].platform
    ),
    prefetch=dataset.prefetch,
    token_labels=teacher.stored if teacher else None,
  )


def _reader_processes(dataset: Config, platform: str) -> int:
  """Returns the number of processes that read clips; 0 is for threads."""
  if dataset.reader_processes >= 0:
    return dataset.reader_processes
  # Steps on a CPU take all of its cores, so that reading is a small part.
  cores = 0 if platform == 'cpu' else len(os.sched_getaffinity(0))
  return min(cores, dataset.num_threads)
