r"""
python -m dualformer_jax.main --config=configs/k400_tiny_tokenlabel.py \
  --workdir=WORKDIR --config.init_from=INIT --config.dataset.data_dir=DATA \
  --config.token_labels.teacher=TEACHER

DualFormer-T with the token-label head on Kinetics-400.

First prepare the videos:

  tfds build data/kinetics400 --manual_dir=VIDEOS --data_dir=DATA

INIT is the .pth file of a DualFormer-T image model (ImageNet-1K), which is
inflated to video.

TEACHER is a DualFormer-B with the same classes: a workdir of
configs/k400_base.py, or a published .pth file converted with
dualformer_jax.convert. To run it once rather than in every step, see
dualformer_jax.token_labels.
"""

import pathlib
import runpy

from ml_collections import config_dict

common = runpy.run_path(str(pathlib.Path(__file__).with_name('common.py')))


def get_config() -> config_dict.ConfigDict:
  """Returns the recipe."""
  config = common['get_config']()
  # A head that learns the teacher's scores of every token.
  config.model.token_label = True
  config.batch_size = 128
  config.accumulation_steps = 2
  return config
