r"""
python -m dualformer_jax.main --config=configs/k400_tiny.py \
  --workdir=WORKDIR --config.init_from=INIT --config.dataset.data_dir=DATA

DualFormer-T on Kinetics-400: published with 79.5% top-1.

Before it, prepare the videos:

  tfds build data/kinetics400 --manual_dir=VIDEOS --data_dir=DATA

INIT is the .pth file of a DualFormer-T of images (ImageNet-1K).
It is inflated to one of videos.
"""

import pathlib
import runpy

from ml_collections import config_dict

common = runpy.run_path(str(pathlib.Path(__file__).with_name('common.py')))


def get_config() -> config_dict.ConfigDict:
  """Returns the recipe."""
  return common['get_config']()  # the defaults are this recipe
