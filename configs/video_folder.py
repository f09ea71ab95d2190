r"""
python -m dualformer_jax.main --config=configs/video_folder.py \
  --workdir=WORKDIR --config.init_from=INIT --config.dataset.data_dir=DATA

DualFormer-T on your own videos, with a folder for each class:
VIDEOS/CLASS/video.mp4. First prepare the videos:

  tfds build data/video_folder --manual_dir=VIDEOS --data_dir=DATA

INIT is a DualFormer-T, for example trained on Kinetics-400: a published .pth
file, a checkpoint folder, or a workdir. Its normalization is used; a .pth file
does not store one, so set pixel_mean and pixel_std if it is not ImageNet's.
"""

import pathlib
import runpy

from ml_collections import config_dict

common = runpy.run_path(str(pathlib.Path(__file__).with_name('common.py')))


def get_config() -> config_dict.ConfigDict:
  """Returns the recipe."""
  config = common['get_config']()
  config.model.num_classes = 0  # the number of folders
  config.dataset.name = 'video_folder'
  config.dataset.pixel_mean = ()
  config.dataset.pixel_std = ()
  config.batch_size = 8
  config.optimizer.learning_rate = 2e-4
  config.optimizer.warmup_epochs = 1.0
  config.validation.every_epochs = 2
  # The same views as in the test.
  config.validation.num_clips = config.test.num_clips
  config.validation.resize_ratio = 1.0
  config.test.checkpoint = 'best'
  return config
