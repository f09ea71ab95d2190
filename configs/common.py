"""All config fields and their defaults: DualFormer-T on Kinetics-400.

Recipes load this file and override values. The config is locked: recipes cannot
add fields or change their types.
"""

from ml_collections import config_dict

from dualformer_jax.models import variants


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults."""
  config = config_dict.ConfigDict(
    {
      'model': {
        **variants.TINY,
        'num_classes': 400,  # 0: as in the dataset
        'num_frames': 32,
        'image_size': 224,
        # Sizes in tokens (frames, rows, columns), one for each stage.
        'window': (8, 7, 7),
        'fine_sizes': ((8, 7, 7), (8, 7, 7), (8, 7, 7), (16, 7, 7)),
        'coarse_sizes': ((4, 4, 4), (4, 4, 4), None, None),
        'drop_path_rate': 0.1,
        'head': 'linear',  # or 'attentive': pools by cross-attention
        'head_dropout': 0.5,
        'token_label': False,
        'remat': 'elementwise',  # or 'none', 'block'
        'dtype': 'bfloat16',  # or 'float32'
        # 'auto': the fastest implementations for the platform. 'experimental':
        # docs/performance.md, "Kernels on Hopper".
        # 'reference': plain JAX, for debugging.
        'kernels': 'auto',
      },
      'dataset': {
        'name': 'kinetics400',  # or 'name/config'
        # The --data_dir of `tfds build`, or where it was copied to: a URL with
        # gs://, s3:// or hf://.
        'data_dir': '~/tensorflow_datasets',
        # Keeps videos of an object store in this folder; '' for none.
        'cache_dir': '',
        'cache_gigabytes': 500.0,
        'train_split': 'train',
        'validation_split': 'validation',
        'test_split': 'validation',
        'multi_label': False,  # whether a video has several labels
        'sampling': 'dense',  # or 'uniform': one frame from each segment
        'frame_interval': 2,
        'train_short_side': 256,
        # Training clips of dense sampling start at multiples of this frame.
        # Frames in between are not decoded: with 2 and an even interval, half
        # of them. 1, as published: at any frame.
        'start_multiple': 2,
        # Training clips go to the devices as YUV 4:2:0, half the bytes of RGB.
        # This takes less time on the host; colors have half the resolution, as
        # they have in video files.
        'yuv420': False,
        'random_crop': True,
        'flip': True,  # horizontally, half of the training clips
        'repeats': 1,  # clips per video read, in training
        'class_balanced': False,  # sample classes equally often
        # RGB in 0..255. (): those of the init_from checkpoint, or ImageNet's if
        # it is a .pth file, which does not store them.
        'pixel_mean': (123.675, 116.28, 103.53),
        'pixel_std': (58.395, 57.12, 57.375),
        'num_threads': 16,  # to read and decode videos
        # Processes that read training clips instead of these threads, of which
        # Python runs only one at a time for a fifth of their work. 0: none; -1:
        # as many as threads or cores, if a GPU or TPU trains.
        'reader_processes': -1,
        'prefetch': 2,  # batches
      },
      # More augmentation of training clips; 0 is off.
      'augment': {
        # Largest relative change of brightness, contrast and saturation, 0..1;
        # hue changes by up to a quarter of it.
        'color_jitter': 0.0,
        'rand_augment_ops': 0,  # operations per clip
        'rand_augment_magnitude': 9,  # 0..10
        'random_erasing': 0.0,  # probability
        # Alpha of a Beta distribution; with both, one is drawn per batch.
        'mixup': 0.0,
        'cutmix': 0.0,
      },
      # Soft labels of tokens, for a model with token_label: from a teacher's
      # checkpoint, which runs in every step, or from a folder written by
      # dualformer_jax.token_labels.
      'token_labels': {
        'teacher': '',
        'stored': '',
        'top': 5,  # logits kept per token, 0: all; the others are set to 0
        'weight': 0.5,  # of the token loss; the class loss has 1 - weight
        'dtype': 'bfloat16',  # of the teacher's computations
      },
      # Number of devices along each axis; -1: the remaining devices.
      'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},
      'batch_size': 64,  # clips per optimizer step, over all devices
      'accumulation_steps': 1,  # micro-batches of a batch
      'num_epochs': 30,
      'seed': 0,
      # Pretrained model: a checkpoint folder, a workdir, a .pth or .safetensors
      # file, of a video or an image model, or hf://OWNER/NAME[@REVISION][/FILE].
      # Classes, frames and image size may differ.
      'init_from': '',
      'init_from_ema': False,  # use the EMA weights of such a file
      'label_smoothing': 0.0,
      'ema_decay': 0.0,  # of an average of parameters, such as 0.9999; 0: off
      'overfit_steps': 0,  # check that one batch can be overfit; 0: off
      'optimizer': {
        'learning_rate': 1e-3,
        'weight_decay': 0.02,
        'warmup_epochs': 3.0,
        'b1': 0.9,
        'b2': 0.999,
        'eps': 1e-8,
        # (regular expression, learning rate multiplier, decay multiplier); the
        # first that matches the full name of a parameter applies.
        'multipliers': (
          ('backbone/pos_block.*', 1.0, 0.0),
          ('backbone/.*', 0.1, 1.0),
          ('.*', 1.0, 1.0),
        ),
        'layer_decay': 1.0,  # of the learning rate, per layer below the head
        'max_grad_norm': 0.0,  # clip gradients to it; 0: off
        'frozen': '',  # regular expression of parameters not trained
      },
      # Views of validation and test: clips per video, crops per clip (1 or 3).
      'validation': {
        'every_epochs': 5,
        'num_clips': 1,
        'num_crops': 1,
        # Short side before cropping, as a multiple of image_size. In the test
        # it is 1, as in the published recipes.
        'resize_ratio': 256 / 224,
        # Stop after this many validations without improvement; 0: off.
        'patience': 0,
      },
      'test': {
        'num_clips': 4,
        'num_crops': 1,
        # Tested after training: 'latest', or 'best' of the validation; always
        # 'best' with validation.patience.
        'checkpoint': 'latest',
      },
      'checkpoint': {
        'every_steps': 1000,
        'keep': 1,  # latest checkpoints, besides the best
      },
      'log_every_steps': 20,
      # Also sends metrics, config and report to 'wandb', 'mlflow' or 'trackio';
      # several are separated by commas.
      'trackers': '',
      # '': that of the tracker's environment variable, or 'dualformer'.
      'tracker_project': '',
      'tracker_run': '',  # '': the name of the workdir
    }
  )
  return config.lock()
