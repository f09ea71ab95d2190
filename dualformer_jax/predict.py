r"""Predicts the classes of videos.

  python -m dualformer_jax.predict --checkpoint=DIR VIDEO [VIDEO ...]

VIDEO is a file, a folder (all videos in it and its subfolders), a pattern in
quotes ('*.mp4'), the number of a camera (0), or an address (rtsp://, rtmp://,
http://, https://). Write ./0 for a file that is named 0.

By default a video is scored as a whole, by the test views of the checkpoint.
With --sliding it is scored window by window. Cameras and addresses are scored
by windows until they end or the command is interrupted.

The exit status is 0 if all videos were scored, 1 if only some were, and 2 if
none was.
"""

import functools
import signal
import sys

from absl import flags

from dualformer_jax import command_line
from dualformer_jax.command_line import CHECKPOINT_HELP
from dualformer_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('checkpoint', None, CHECKPOINT_HELP, required=True)
  count = functools.partial(flags.DEFINE_integer, lower_bound=1)
  count('top_k', 5, 'Number of classes to print.')
  count('batch_size', 4, 'Number of views in a batch.')
  count('num_threads', 4, 'Number of videos to decode at the same time.')
  flags.DEFINE_bool('json', False, 'Print JSON alone, an object per line.')
  flags.DEFINE_bool(
    'sliding', False, 'Score windows, as with --window, --stride, --timeline.'
  )
  flags.DEFINE_float(
    'window', None, 'Seconds in a window; by default the span of a clip.'
  )
  flags.DEFINE_float(
    'stride', None, 'Seconds from window to window; by default --window.'
  )
  flags.DEFINE_float(
    'seconds', None, 'Stop after this many seconds of video; with --sliding.'
  )
  flags.DEFINE_multi_string(
    'timeline', [], 'Comma-separated .json, .csv or .png files for windows.'
  )
  flags.DEFINE_string(
    'save',
    None,
    'Write a copy of the video without sound, with the predictions drawn on '
    'it, to this .mp4 file; for several videos, to this folder.',
  )
  flags.DEFINE_string(
    'features', None, 'An .npz file for `names` and mean `features`.'
  )
  flags.DEFINE_bool(
    'features_per_token',
    False,
    'Also write `tokens`, [videos, d, h, w, channels], of the middle views.',
  )
  flags.DEFINE_bool('overwrite', False, 'Replace existing files.')


def main(arguments: list[str]) -> None:
  """Predicts and prints the classes of videos."""
  # The command ends silently if its reader does, as in `| head`.
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  # Imported late, so that --help does not wait for it.
  from dualformer_jax.inference import output_files, printer, sources

  videos = sources.find_videos(arguments)
  names = [video.name for video in videos if not video.error]
  is_live = any(map(sources.is_live, names))
  has_times = FLAGS.window is not None or FLAGS.stride is not None
  is_sliding = bool(FLAGS.sliding or has_times or FLAGS.timeline or is_live)
  for name in ('window', 'stride', 'seconds'):
    value = FLAGS[name].value
    if value is not None and not 0 < value < 1e6:
      raise UserError(f'--{name}={value:g}: expected more than 0 seconds')
  if FLAGS.seconds is not None and not is_sliding:
    raise UserError('--seconds has no effect without --sliding')
  if FLAGS.features and is_sliding:
    raise UserError('--features is for whole videos; omit --sliding')
  if is_live and len(videos) > 1:
    raise UserError('a camera or an address must be the only VIDEO')
  output = printer.Printer(FLAGS.json)
  if not names:
    for video in videos:
      output.print(printer.Prediction(video.name, error=video.error))
    sys.exit(2)
  files = output_files.plan(
    names,
    timelines=FLAGS.timeline,
    save=FLAGS.save,
    features=FLAGS.features,
    with_tokens=FLAGS.features_per_token,
    overwrite=FLAGS.overwrite,
  )

  import cv2

  from dualformer_jax.inference import prediction
  from dualformer_jax.inference.recognizer import Recognizer

  command_line.enable_compilation_cache()
  recognizer = Recognizer.load(FLAGS.checkpoint)
  cv2.setNumThreads(0)  # videos are decoded in threads already
  stop = command_line.stop_signals
  if is_live or files.timelines or files.features:
    stop.defer_exit()  # and write these files
  if is_sliding:
    predictions = prediction.predict_windows(
      recognizer,
      videos,
      files,
      seconds=FLAGS.seconds,
      window=FLAGS.window,
      stride=FLAGS.stride,
      batch_size=1 if is_live else FLAGS.batch_size,
      top_k=FLAGS.top_k,
      is_stopped=lambda: stop.received is not None,
    )
  else:
    predictions = prediction.predict_videos(
      recognizer,
      videos,
      files,
      batch_size=FLAGS.batch_size,
      num_threads=FLAGS.num_threads,
      top_k=FLAGS.top_k,
      is_stopped=lambda: stop.received is not None,
    )
  for found in predictions:
    output.print(found)
  if not is_live:  # these end in no other way
    stop.allow_exit()
  if output.num_failed:
    sys.exit(2 if output.num_failed == len(videos) else 1)


cli = functools.partial(command_line.run, main, define_flags, 'VIDEO')

if __name__ == '__main__':
  cli()
