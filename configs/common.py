"""Every field of a config, with the defaults: tiny on Kinetics-400.

A recipe loads this file from beside itself, whatever the working directory, and
changes what differs. Fields cannot be added, and keep their types.
"""

from ml_collections import config_dict

from dualformer_jax.models import variants


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults."""
  config = config_dict.ConfigDict(
    {
      'model': {
        **variants.TINY,
        'num_classes': 400,  # 0: as many as the dataset has
        'num_frames': 32,
        'image_size': 224,
        # Sizes are (frames, rows, columns) of tokens, one for each stage.
        'window': (8, 7, 7),
        'fine_sizes': ((8, 7, 7), (8, 7, 7), (8, 7, 7), (16, 7, 7)),
        'coarse_sizes': ((4, 4, 4), (4, 4, 4), None, None),
        'drop_path_rate': 0.1,
        'head_dropout': 0.5,
        'token_label': False,
        'remat': 'elementwise',  # or 'none', 'block'
        'dtype': 'bfloat16',  # or 'float32'
      },
      'dataset': {
        'name': 'kinetics400',  # or 'name/config'
        'data_dir': '~/tensorflow_datasets',  # as given to `tfds build`
        'train_split': 'train',
        'validation_split': 'validation',
        'test_split': 'validation',
        'multi_label': False,
        'sampling': 'dense',  # or 'uniform': one frame from each segment
        'frame_interval': 2,
        'train_short_side': 256,
        'random_crop': True,
        'flip': True,  # left and right, in half of the training clips
        'repeats': 1,  # training clips of each video that is read
        'class_balanced': False,  # every class as often as any other
        # RGB, on the scale of 0 to 255; (): those of init_from.
        'pixel_mean': (123.675, 116.28, 103.53),
        'pixel_std': (58.395, 57.12, 57.375),
        'num_threads': 16,  # that read and decode
        'prefetch': 2,  # batches
      },
      # What else is done to training clips; 0 is off.
      'augment': {
        # Brightness, contrast and saturation times 1 -+ this, 0..1; the hue is
        # turned by up to a quarter of it.
        'color_jitter': 0.0,
        'rand_augment_ops': 0,  # operations on each clip
        'rand_augment_magnitude': 9,  # how strong they are, 0..10
        'random_erasing': 0.0,  # share of the clips
        # Alpha of a Beta distribution; with both, each has half of the batches.
        'mixup': 0.0,
        'cutmix': 0.0,
      },
      # Besides the label of a clip, soft labels of its tokens, for a model with
      # token_label: from a teacher's checkpoint folder, asked in each step, or
      # from what dualformer_jax.token_labels stored of one.
      'token_labels': {
        'teacher': '',
        'stored': '',
        'top': 5,  # scores that are kept of a token; the others become 0
        'weight': 0.5,  # share of the loss
        'dtype': 'bfloat16',  # what the teacher computes in
      },
      # Devices along each axis; -1: all that remain.
      'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},
      'batch_size': 64,  # clips an optimiser step, over all devices
      'accumulation_steps': 1,  # passes that a batch is split into
      'num_epochs': 30,
      'seed': 0,
      # What to start from: a checkpoint folder, the workdir of a run, or a .pth
      # file, of videos or of images. Classes, frames, size may be others.
      'init_from': '',
      'label_smoothing': 0.0,
      'ema_decay': 0.0,  # 0.9999, say: use an average of the parameters
      'overfit_steps': 0,  # of a check on one batch, before training
      'optimizer': {
        'learning_rate': 1e-3,
        'weight_decay': 0.02,
        'warmup_epochs': 3.0,
        'b1': 0.9,
        'b2': 0.999,
        'eps': 1e-8,
        # (name, learning rate multiplier, decay multiplier); the first regular
        # expression that matches all of a parameter's name counts.
        'multipliers': (
          ('backbone/pos_block.*', 1.0, 0.0),
          ('backbone/.*', 0.1, 1.0),
          ('.*', 1.0, 1.0),
        ),
        'layer_decay': 1.0,  # of the rate, for each layer away from the head
        'max_grad_norm': 0.0,  # clips gradients to it; 0: never
        'frozen': '',  # a regular expression of names that are not trained
      },
      # Clips along a video, times crops along its longer side (1 or 3).
      'validation': {
        'every_epochs': 5,
        'num_clips': 1,
        'num_crops': 1,
        'patience': 0,  # stop after as many without a better one; 0: never
      },
      'test': {'num_clips': 4, 'num_crops': 1},
      'checkpoint': {
        'every_steps': 1000,
        'keep': 1,  # of the newest, beside the best
      },
      'log_every_steps': 20,
    }
  )
  return config.lock()
