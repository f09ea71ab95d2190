"""The model card of a checkpoint: README.md of a repository on the Hub."""

from collections.abc import Iterator, Mapping
from typing import Any

from dualformer_jax.checkpoints.hub import Address, client
from dualformer_jax.checkpoints.messages import listed
from dualformer_jax.checkpoints.metadata import CheckpointMetadata
from dualformer_jax.checkpoints.portable import without_folders

_LIBRARY = 'dualformer_jax'
_TASK = 'video-classification'
_TAGS = ['dualformer', 'jax', 'flax', 'action-recognition']
_PAPER = 'https://arxiv.org/abs/2112.04674'
# Name in a report -> name in the card, name on the Hub.
_METRICS = {
  'top1': ('top-1 accuracy', 'accuracy'),
  'top5': ('top-5 accuracy', 'accuracy'),
  'mean_class_accuracy': ('mean class accuracy', 'accuracy'),
  'mAP': ('mean average precision', 'mean_average_precision'),
  'mmit_mAP': ('mean average precision of videos', 'mean_average_precision'),
}


def render(
  address: Address,
  metadata: CheckpointMetadata,
  num_parameters: int,
  files: Mapping[str, str],
  license_name: str,
  report: Mapping[str, Any] | None,
) -> str:
  """Returns the card, Markdown after YAML.

  Args:
    address: where the model will be.
    metadata: that of the checkpoint, its config without local folders.
    num_parameters: number of parameters.
    files: description of each file by name.
    license_name: identifier of the license on the Hub.
    report: report.json of a test of this checkpoint, if there is one.
  """
  lines = [
    f'# {address.repository.partition("/")[2]}',
    '',
    f'A video classifier for {len(metadata.class_names)} classes: '
    f'[DualFormer]({_PAPER}), for `{_LIBRARY}`.',
    '',
    *_usage(address),
    *_evaluation(report),
    *_model(metadata, num_parameters),
    *_training(metadata),
    '## Files',
    '',
    *_table(('file', 'content'), files),
    '## License',
    '',
    'The license of the weights was not stated.'
    if license_name == 'unknown'
    else f'`{license_name}`',
    '',
  ]
  fields = _fields(address, metadata, license_name, report)
  return f'---\n{fields}\n---\n\n' + '\n'.join(lines)


def _fields(
  address: Address,
  metadata: CheckpointMetadata,
  license_name: str,
  report: Mapping[str, Any] | None,
) -> str:
  """Returns what the Hub reads, in YAML."""
  hub = client(address)
  name = address.repository.partition('/')[2]
  options: dict[str, Any] = {}
  init_from = (metadata.config or {}).get('init_from', '')
  if init_from.startswith('hf://'):
    options['base_model'] = Address.parse(init_from).repository
  if report is not None:
    dataset = _dataset(report)
    options['model_name'] = name
    options['eval_results'] = [
      hub.EvalResult(
        task_type=_TASK,
        dataset_type=dataset['name'],
        dataset_name=dataset['name'],
        dataset_split=dataset['split'],
        metric_type=metric,
        metric_name=title,
        metric_value=round(report[key], 4),
      )
      for key, (title, metric) in _METRICS.items()
      if key in report
    ]
  card = hub.ModelCardData(
    library_name=_LIBRARY,
    license=license_name,
    pipeline_tag=_TASK,
    tags=[*_TAGS],
    **options,
  )
  return card.to_yaml()


def _usage(address: Address) -> Iterator[str]:
  yield '## Use'
  yield ''
  yield f'In a clone of {_LIBRARY}:'
  yield ''
  yield "    pip install -e '.[hub]'"
  yield ''
  yield '```python'
  yield f'import {_LIBRARY}'
  yield f"recognizer = {_LIBRARY}.load('{address}')"
  yield "print(recognizer.predict('video.mp4'))"
  yield '```'
  yield ''


def _evaluation(report: Mapping[str, Any] | None) -> Iterator[str]:
  yield '## Evaluation'
  yield ''
  if report is None:
    yield 'This checkpoint was not evaluated.'
    yield ''
    return
  dataset, views = _dataset(report), report['views']
  rows = {}
  for key, (title, _) in _METRICS.items():
    if key in report:
      rows[title] = f'{report[key]:.1%}'
  interval = _interval(report)
  if interval:
    low, high = interval
    rows['top-1 accuracy'] += f' (95% interval {low:.1%} to {high:.1%})'
  yield from _table(('metric', 'value'), rows)
  facts = {
    'dataset': f'{_code(dataset["name"])}, split {_code(dataset["split"])}',
    'fingerprint of the dataset': _code(dataset['fingerprint']),
    'videos': f'{report["num_videos"]:,}',
    'videos that could not be read': f'{len(report["failed_videos"]):,}',
    'clips x crops of a video': f'{views["num_clips"]} x {views["num_crops"]}',
    'checkpoint': f'the {report["checkpoint_kind"]} of the run',
  }
  if 'hardware' in report:
    facts['hardware'] = report['hardware']
  yield from _table(('test', ''), facts)


def _interval(report: Mapping[str, Any]) -> list[float] | None:
  """Returns the interval of the accuracy with all views."""
  for row in report['view_budget']:
    if all(row[name] == report['views'][name] for name in report['views']):
      return row.get('interval')
  return None


def _dataset(report: Mapping[str, Any]) -> dict[str, str]:
  """Returns name, split and fingerprint of the tested dataset."""
  dataset = report['dataset']
  config = without_folders(report['config'])
  return {
    'name': str(config['dataset']['name']),
    'split': str(dataset['split']),
    'fingerprint': str(dataset['fingerprint']),
  }


def _model(metadata: CheckpointMetadata, num_parameters: int) -> Iterator[str]:
  p = metadata.preprocessing
  names = [_code(name) for name in metadata.class_names]
  facts = {
    'parameters': f'{num_parameters:,}',
    'input': f'{p.num_frames} frames of {p.image_size} x {p.image_size} pixels',
    'sampling': f'dense, frames {p.frame_interval} apart'
    if p.sampling == 'dense'
    else 'uniform, one frame from each segment',
    'clips x crops of a video': f'{p.num_clips} x {p.num_crops}',
    'classes': listed(names, 20),
    'several labels per video': 'yes' if metadata.multi_label else 'no',
  }
  yield '## Model'
  yield ''
  yield from _table(('', ''), facts)


def _training(metadata: CheckpointMetadata) -> Iterator[str]:
  yield '## Training'
  yield ''
  config = metadata.config
  if config is None:
    yield 'The weights were converted; how they were trained is not recorded.'
    yield ''
    return
  optimizer = config['optimizer']
  augmentations = [
    f'{name} {value}'
    for name, value in config['augment'].items()
    if value and name != 'rand_augment_magnitude'
  ]
  if config['dataset']['random_crop']:
    augmentations.insert(0, 'random crops')
  if config['dataset']['flip']:
    augmentations.insert(0, 'flips')
  facts = {
    'dataset': _code(config['dataset']['name']),
    'initialized from': _code(config['init_from'])
    if config['init_from']
    else 'random parameters',
    'steps': f'{metadata.step:,} of {config["batch_size"]} clips',
    'epochs': f'at most {config["num_epochs"]}',
    'learning rate': f'{optimizer["learning_rate"]:g}, after '
    f'{optimizer["warmup_epochs"]:g} epochs of warmup',
    'weight decay': f'{optimizer["weight_decay"]:g}',
    'label smoothing': f'{config["label_smoothing"]:g}',
    'decay of averaged parameters': f'{config["ema_decay"]:g}',
    'augmentation': ', '.join(augmentations) or 'none',
    'seed': f'{config["seed"]}',
  }
  if record := metadata.training:
    facts['hardware'] = ', '.join(record['hardware'])
    facts['hours'] = f'{record["hours"]:.2f}'
  if teacher := config['token_labels']['teacher']:
    facts['teacher of token labels'] = _code(teacher)
  yield from _table(('', ''), facts)
  yield 'The whole config is in `config.json`.'
  yield ''


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> Iterator[str]:
  yield f'| {head[0]} | {head[1]} |'
  yield '|---|---|'
  for name, value in rows.items():
    yield f'| {name} | {value} |'
  yield ''


def _code(text: object) -> str:
  """Returns text of a user as code, which Markdown does not interpret."""
  plain = ' '.join(str(text).split()).translate({ord('`'): "'", ord('|'): '/'})
  return f'`{plain}`'
