r"""
python -m dualformer_jax.main --config=configs/video_folder.py \
  --workdir=WORKDIR --config.init_from=INIT --config.dataset.data_dir=DATA

DualFormer-T on videos of one's own, in a folder for each class:
VIDEOS/CLASS/video.mp4. Before it, prepare them:

  tfds build data/video_folder --manual_dir=VIDEOS --data_dir=DATA

INIT is a DualFormer-T, of Kinetics-400 say: a published .pth file, a checkpoint
folder, or the workdir of a run. Pixels are normalised as they were for it.
"""

import pathlib
import runpy

from ml_collections import config_dict

common = runpy.run_path(str(pathlib.Path(__file__).with_name('common.py')))


def get_config() -> config_dict.ConfigDict:
  """Returns the recipe."""
  config = common['get_config']()
  config.model.num_classes = 0  # as many as there are folders
  config.dataset.name = 'video_folder'
  config.dataset.pixel_mean = ()
  config.dataset.pixel_std = ()
  config.batch_size = 8
  config.optimizer.learning_rate = 2e-4
  config.optimizer.warmup_epochs = 1.0
  config.validation.every_epochs = 2
  return config
