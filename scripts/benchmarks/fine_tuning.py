"""Compares the steps of fine-tuning with those of training from scratch.

  python scripts/benchmarks/fine_tuning.py --checkpoint=.quickstart/motion \
    --out=FOLDER [--seeds=0,1,2]

Renders videos of eight classes that the quickstart's model has not seen, each a
combination of two motions, and prepares them as a dataset. Trains
configs/motion.py on it from scratch and from the checkpoint, with each seed,
until the validation accuracy is 95%, and prints the number of steps.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys

from absl import flags
import numpy as np

from dualformer_jax import command_line
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import video_writer

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY)]

FLAGS = flags.FLAGS
TARGET_ACCURACY = 0.95
EPOCHS = 32
# A change of the scene by this script, and a motion of the renderer.
CLASSES = [
  *itertools.product(('up', 'down'), ('left', 'right')),
  *itertools.product(('grow', 'shrink'), ('clockwise', 'counter_clockwise')),
]
VIDEOS = {'train': 1024, 'validation': 256}


def define_flags() -> None:
  """Defines the flags of the script."""
  flags.DEFINE_string(
    'checkpoint', None, 'Run of configs/motion.py.', required=True
  )
  flags.DEFINE_string(
    'out', None, 'Folder for videos, dataset and runs.', required=True
  )
  flags.DEFINE_list('seeds', '0,1,2', 'Seeds of the runs.')


def render(
  folder: pathlib.Path, videos: dict[str, int] = VIDEOS, seed: int = 7
) -> None:
  """Writes FOLDER/SPLIT/CLASS/NUMBER.mp4, unless they exist."""
  from data.motion import motion_dataset_builder as motion

  done = folder / 'done'
  if done.exists():
    return
  for number, (split, count) in enumerate(videos.items()):
    for index in range(count):
      rng = np.random.default_rng((seed, number, index))
      scene = motion.draw_scene(rng)
      first, second = CLASSES[index % len(CLASSES)]
      label = motion.CLASSES.index(second)
      fall = {'up': -scene.shift, 'down': scene.shift}.get(first, 0.0)
      growth = {'grow': scene.growth, 'shrink': -scene.growth}.get(first, 0.0)
      frames = []
      for i in range(motion.NUM_FRAMES):
        time = i - (motion.NUM_FRAMES - 1) / 2
        changed = dataclasses.replace(
          scene,
          center=scene.center + np.array([0.0, fall * time]),
          size=scene.size + growth * time,
        )
        frames.append(motion.picture(changed, label, i))
      path = folder / split / f'{first}_{second}' / f'{index:05d}.mp4'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(
        video_writer.encode_mp4(
          np.stack(frames), fps=motion.FPS, crf=motion.CRF
        )
      )
  done.touch()


def prepare(videos: pathlib.Path, data_dir: pathlib.Path) -> None:
  """Prepares a dataset from a folder of videos."""
  command = [
    str(pathlib.Path(sys.executable).with_name('tfds')),
    'build',
    str(REPOSITORY / 'data' / 'video_folder'),
    '--config=verbatim',
    f'--manual_dir={videos}',
    f'--data_dir={data_dir}',
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise UserError(f'tfds build failed: {done.stderr[-2000:]}')


def accuracies(
  data_dir: pathlib.Path, workdir: pathlib.Path, seed: str, start: str
) -> Iterator[tuple[int, float]]:
  """Trains; yields step and accuracy of each validation."""
  process = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'dualformer_jax.main',
      f'--config={REPOSITORY}/configs/motion.py',
      f'--workdir={workdir}',
      '--config.dataset.name=video_folder/verbatim',
      f'--config.dataset.data_dir={data_dir}',
      '--config.dataset.test_split=validation',
      f'--config.model.num_classes={len(CLASSES)}',
      f'--config.num_epochs={EPOCHS}',
      '--config.validation.every_epochs=1',
      f'--config.seed={seed}',
      f'--config.init_from={start}',
    ],
    cwd=REPOSITORY,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr is not None
  try:
    for line in process.stderr:
      print(line, end='', file=sys.stderr)
      if found := re.search(r'validation at step (\d+): top1 ([\d.]+)', line):
        yield int(found[1]), float(found[2])
  finally:
    process.send_signal(signal.SIGTERM)
    process.wait()


def main() -> None:
  """Renders, prepares, trains and prints."""
  out = pathlib.Path(FLAGS.out).expanduser().absolute()
  render(out / 'videos')
  prepare(out / 'videos', out / 'data')
  rows = []
  for seed in FLAGS.seeds:
    row = {'seed': int(seed)}
    for name, start in (('scratch', ''), ('fine_tuned', FLAGS.checkpoint)):
      workdir = out / f'{name}_{seed}'
      if workdir.exists():
        raise UserError(f'{workdir} exists; remove it, or choose another --out')
      row[name] = EPOCHS * VIDEOS['train'] // 32 + 1  # if it is never reached
      for step, accuracy in accuracies(out / 'data', workdir, seed, start):
        if accuracy >= TARGET_ACCURACY:
          row[name] = step
          break
    rows.append(row)
    print(json.dumps(row), flush=True)
  for row in rows:
    share = row['fine_tuned'] / row['scratch']
    print(
      f'seed {row["seed"]}: {TARGET_ACCURACY:.0%} after {row["scratch"]} steps '
      f'from scratch, {row["fine_tuned"]} fine-tuned: {share:.2f} times as many'
    )


if __name__ == '__main__':
  command_line.run(main, define_flags)
