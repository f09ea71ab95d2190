"""Checks that the prepared dataset of a config can be used.

  python scripts/check_dataset.py --config=CONFIG [--config.FIELD=VALUE ...]

Opens the splits for training, validation and test, compares their classes with
the config, and reads the first and the last video of each. Prints the numbers
of videos, the fingerprint, and how many listed videos are missing.
"""

from absl import flags
from ml_collections import config_flags

from dualformer_jax import command_line
from dualformer_jax.input_pipeline import video_reader
from dualformer_jax.training import config_check, guards, setup


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file('config', None, 'Config file.')
  flags.mark_flags_as_required(['config'])


def main() -> None:
  """Checks the splits."""
  config = flags.FLAGS.config
  config_check.check(config)
  train = setup.open_split(config, config.dataset.train_split)
  fingerprint = train.read_report('fingerprint', train.fingerprint)
  print(f'{train.folder}: fingerprint {fingerprint}')
  missing = train.read_report('missing_videos', {})
  for name in ('train', 'validation', 'test'):
    split = config.dataset[f'{name}_split']
    data = setup.open_split(config, split)
    for index in (0, len(data) - 1):
      with video_reader.VideoReader(data[index].video) as reader:
        reader.get_frames([0])
    print(
      f'{name}: {len(data):,} videos of split {split!r}, '
      f'{len(data.class_names)} classes, {missing.get(split, 0)} listed videos '
      'are missing'
    )
    if split != config.dataset.train_split:
      guards.warn_of_near_duplicates(train, data, name)
  undecodable = train.read_report('undecodable', [])
  print(f'{len(undecodable)} videos could not be decoded when it was prepared')


if __name__ == '__main__':
  command_line.run(main, define_flags)
