r"""
python -m dualformer_jax.main --config=configs/k400_tiny.py \
  --workdir=WORKDIR --config.init_from=INIT --config.dataset.data_dir=DATA

DualFormer-T on Kinetics-400. Published top-1: 79.5%.

First prepare the videos:

  tfds build data/kinetics400 --manual_dir=VIDEOS --data_dir=DATA

INIT is the .pth file of a DualFormer-T image model (ImageNet-1K), which is
inflated to video.
"""

import pathlib
import runpy

from ml_collections import config_dict

common = runpy.run_path(str(pathlib.Path(__file__).with_name('common.py')))


def get_config() -> config_dict.ConfigDict:
  """Returns the recipe."""
  return common['get_config']()  # the defaults are this recipe
