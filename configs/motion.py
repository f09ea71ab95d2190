r"""
python -m dualformer_jax.main --config=configs/motion.py --workdir=WORKDIR

A small DualFormer that learns to classify eight motions from scratch, in
minutes on two CPU cores; see scripts/quickstart.sh. First render the videos:

  tfds build data/motion --data_dir=~/tensorflow_datasets
"""

import pathlib
import runpy

from ml_collections import config_dict

common = runpy.run_path(str(pathlib.Path(__file__).with_name('common.py')))


def get_config() -> config_dict.ConfigDict:
  """Returns the recipe."""
  config = common['get_config']()
  config.model.depths = (2, 1)
  config.model.embed_dims = (32, 64)
  config.model.num_heads = (1, 2)
  config.model.num_classes = 8
  config.model.num_frames = 16
  config.model.image_size = 32
  config.model.window = (8, 2, 2)
  config.model.fine_sizes = ((8, 4, 4), (8, 4, 4))
  config.model.coarse_sizes = ((4, 2, 2), None)
  config.model.drop_path_rate = 0.0
  config.model.head_dropout = 0.0
  config.model.dtype = 'float32'
  config.dataset.name = 'motion'
  config.dataset.frame_interval = 1
  config.dataset.start_multiple = 1
  config.dataset.train_short_side = 32
  # Flips would change the direction, crops could cut off the shape.
  config.dataset.random_crop = False
  config.dataset.flip = False
  config.dataset.num_threads = 2
  config.batch_size = 32
  config.num_epochs = 6
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_epochs = 0.5
  # From scratch, the whole backbone has the same learning rate. A head that
  # learns faster relies on the tokens at the shape, which Grad-CAM then shows.
  config.optimizer.multipliers = (
    ('backbone/pos_block.*', 1.0, 0.0),
    ('backbone/.*', 1.0, 1.0),
    ('.*', 10.0, 1.0),
  )
  config.validation.every_epochs = 2
  config.validation.resize_ratio = 1.0  # the same views as in the test
  config.test.num_clips = 1
  config.test.checkpoint = 'best'
  config.checkpoint.every_steps = 200
  return config
