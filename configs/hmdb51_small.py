r"""
python -m dualformer_jax.main --config=configs/hmdb51_small.py \
  --workdir=WORKDIR --config.init_from=INIT --config.dataset.data_dir=DATA

DualFormer-S on HMDB51, split 1. Published top-1: 76.4%.

First prepare the videos:

  tfds build data/hmdb51 --manual_dir=VIDEOS --data_dir=DATA --config=split1

INIT is a DualFormer-S trained on Kinetics-400: a workdir of
configs/k400_small.py, or a published .pth file.
"""

import pathlib
import runpy

from ml_collections import config_dict

from dualformer_jax.models import variants

common = runpy.run_path(str(pathlib.Path(__file__).with_name('common.py')))


def get_config() -> config_dict.ConfigDict:
  """Returns the recipe."""
  config = common['get_config']()
  config.model.update(variants.SMALL)
  config.model.num_classes = 51
  config.model.drop_path_rate = 0.3
  config.dataset.name = 'hmdb51/split1'
  config.dataset.validation_split = 'test'
  config.dataset.test_split = 'test'
  config.dataset.frame_interval = 4
  config.dataset.pixel_mean = (104.0, 117.0, 128.0)
  config.dataset.pixel_std = (1.0, 1.0, 1.0)
  config.batch_size = 128
  config.accumulation_steps = 4
  config.num_epochs = 16
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.weight_decay = 0.1
  config.validation.every_epochs = 2
  config.validation.num_clips = 4
  config.test.num_crops = 3
  return config
