"""How many steps fine-tuning saves: other motions, with and without a start.

  python scripts/benchmarks/fine_tuning.py --checkpoint=.quickstart/motion \
    --out=FOLDER [--seeds=0,1,2]

Renders videos of eight motions that the quickstart's model has not seen, each
two of its own at once, as a folder of videos; prepares it; and trains
configs/motion.py on it from scratch and from the checkpoint, with each seed,
until validation reaches 95%. Prints the steps that each took.
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
from dualformer_jax.input_pipeline import decoding

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / 'data')]

CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'Run of configs/motion.py.', required=True
)
OUT = flags.DEFINE_string(
  'out', None, 'For videos, dataset and runs.', required=True
)
SEEDS = flags.DEFINE_list('seeds', '0,1,2', 'Of the runs.')

ENOUGH = 0.95
EPOCHS = 32
# What is changed in the scene from frame to frame, and what the renderer does.
CLASSES = [
  *itertools.product(('up', 'down'), ('left', 'right')),
  *itertools.product(('grow', 'shrink'), ('clockwise', 'counter_clockwise')),
]
VIDEOS = {'train': 1024, 'validation': 256}


def render(folder: pathlib.Path) -> None:
  """Writes FOLDER/SPLIT/CLASS/NUMBER.mp4, unless that was done."""
  from motion import motion_dataset_builder as motion

  done = folder / 'done'
  if done.exists():
    return
  for number, (split, count) in enumerate(VIDEOS.items()):
    for index in range(count):
      rng = np.random.default_rng((7, number, index))
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
          centre=scene.centre + np.array([0.0, fall * time]),
          size=scene.size + growth * time,
        )
        frames.append(motion.picture(changed, label, i))
      path = folder / split / f'{first}_{second}' / f'{index:05d}.mp4'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(
        decoding.encode_mp4(np.stack(frames), fps=motion.FPS, crf=motion.CRF)
      )
  done.touch()


def prepare(videos: pathlib.Path, data_dir: pathlib.Path) -> None:
  """Makes a dataset of the folder."""
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
  """Trains; yields step and accuracy of each validation, as they come."""
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
  """Compares the steps."""
  out = pathlib.Path(OUT.value).expanduser().absolute()
  render(out / 'videos')
  prepare(out / 'videos', out / 'data')
  rows = []
  for seed in SEEDS.value:
    row = {'seed': int(seed)}
    for name, start in (('scratch', ''), ('fine_tuned', CHECKPOINT.value)):
      workdir = out / f'{name}_{seed}'
      if workdir.exists():
        raise UserError(f'{workdir} exists; remove it, or choose another --out')
      row[name] = EPOCHS * VIDEOS['train'] // 32 + 1  # if it is never enough
      for step, accuracy in accuracies(out / 'data', workdir, seed, start):
        if accuracy >= ENOUGH:
          row[name] = step
          break
    rows.append(row)
    print(json.dumps(row), flush=True)
  for row in rows:
    share = row['fine_tuned'] / row['scratch']
    print(
      f'seed {row["seed"]}: {ENOUGH:.0%} after {row["scratch"]} steps from '
      f'scratch, {row["fine_tuned"]} fine-tuned: {share:.2f} of them'
    )


if __name__ == '__main__':
  command_line.run(main)
