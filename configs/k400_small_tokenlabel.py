r"""
python -m dualformer_jax.main --config=configs/k400_small_tokenlabel.py \
  --workdir=WORKDIR --config.init_from=INIT --config.dataset.data_dir=DATA

DualFormer-S with the token-label head on Kinetics-400.

Before it, prepare the videos, and inflate a DualFormer-S of images
(ImageNet-1K) to make INIT:

  tfds build data/kinetics400 --manual_dir=VIDEOS --data_dir=DATA
  python -m dualformer_jax.convert --config=configs/k400_small_tokenlabel.py \
    --src=IMAGES.pth --dst=INIT
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
  config.model.drop_path_rate = 0.2
  # The head that a teacher's scores of every token train.
  config.model.token_label = True
  config.accumulation_steps = 2
  config.optimizer.warmup_epochs = 2.5
  return config
