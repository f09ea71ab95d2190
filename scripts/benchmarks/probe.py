"""Compares probing with fine-tuning and training from scratch in equal time.

  python scripts/benchmarks/probe.py --checkpoint=.quickstart/motion/best \
    --out=FOLDER [--seeds=0,1,2]

For each seed, renders 64 training videos of each of eight motions that the
quickstart's model has not seen (those of fine_tuning.py), and 256 test videos.
Runs dualformer_jax.probe, then trains configs/motion.py from the checkpoint and
from scratch with as many epochs as fit into the same time. Nothing is chosen by
the test videos, and every run compiles from scratch. Prints test accuracies.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

from absl import flags
import fine_tuning  # pyright: ignore[reportMissingImports]

from dualformer_jax import command_line
from dualformer_jax.errors import UserError

FLAGS = flags.FLAGS
VIDEOS = {'train': 512, 'validation': 256}
CALIBRATION_EPOCHS = (1, 5)


def define_flags() -> None:
  """Defines the flags of the script."""
  flags.DEFINE_string(
    'checkpoint', None, 'Checkpoint of configs/motion.py.', required=True
  )
  flags.DEFINE_string(
    'out', None, 'Folder for videos, datasets and runs.', required=True
  )
  flags.DEFINE_list('seeds', '0,1,2', 'Seeds of videos and runs.')


def run(
  command: str, workdir: pathlib.Path, data_dir: pathlib.Path, *options: str
) -> tuple[dict[str, Any], float]:
  """Runs a command on a dataset; returns its report and its seconds."""
  if workdir.exists():
    raise UserError(f'{workdir} exists; remove it, or choose another --out')
  cache = workdir.with_name(f'{workdir.name}_cache')
  start = time.monotonic()
  subprocess.run(
    [
      sys.executable,
      '-m',
      f'dualformer_jax.{command}',
      f'--config={fine_tuning.REPOSITORY}/configs/motion.py',
      f'--workdir={workdir}',
      '--config.dataset.name=video_folder/verbatim',
      f'--config.dataset.data_dir={data_dir}',
      '--config.dataset.test_split=validation',
      *options,
    ],
    cwd=fine_tuning.REPOSITORY,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache)},
    check=True,
  )
  seconds = time.monotonic() - start
  shutil.rmtree(cache, ignore_errors=True)
  return json.loads((workdir / 'report.json').read_text('utf-8')), seconds


def train(
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  epochs: int,
  seed: str,
  start: str,
) -> tuple[float, float]:
  """Trains for some epochs; returns the test accuracy and the seconds."""
  report, seconds = run(
    'main',
    workdir,
    data_dir,
    f'--config.num_epochs={epochs}',
    f'--config.validation.every_epochs={epochs}',
    '--config.test.checkpoint=latest',
    f'--config.seed={seed}',
    f'--config.init_from={start}',
  )
  return report['top1'], seconds


def main() -> None:
  """Renders, prepares, runs and prints."""
  out = pathlib.Path(FLAGS.out).expanduser().absolute()
  checkpoint = str(pathlib.Path(FLAGS.checkpoint).expanduser().absolute())
  data_dirs = {}
  for seed in FLAGS.seeds:
    data_dirs[seed] = out / f'data_{seed}'
    videos = out / f'videos_{seed}'
    fine_tuning.render(videos, VIDEOS, 100 + int(seed))
    fine_tuning.prepare(videos, data_dirs[seed])
  data_dir = data_dirs[FLAGS.seeds[0]]
  few, many = (
    train(out / f'calibration_{n}', data_dir, n, '0', '')[1]
    for n in CALIBRATION_EPOCHS
  )
  epoch_seconds = (many - few) / (CALIBRATION_EPOCHS[1] - CALIBRATION_EPOCHS[0])
  print('| seed | method | epochs | seconds | test accuracy |')
  print('|---|---|---|---|---|')
  for seed, data_dir in data_dirs.items():
    report, budget = run(
      'probe',
      out / f'probe_{seed}',
      data_dir,
      f'--checkpoint={checkpoint}',
      f'--config.seed={seed}',
    )
    for probe in report['probes']:
      saved = report['config']['model']['head'] == probe['kind']
      name = f'probe: {probe["kind"]}{", saved" if saved else ""}'
      seconds = f'{budget:.0f}' if saved else ''
      print(f'| {seed} | {name} | | {seconds} | {probe["test"]:.1%} |')
    epochs = max(1, round(1 + (budget - few) / epoch_seconds))
    for name, start in (('fine-tuning', checkpoint), ('from scratch', '')):
      workdir = out / f'{name.replace(" ", "_")}_{seed}'
      top1, seconds = train(workdir, data_dir, epochs, seed, start)
      print(
        f'| {seed} | {name} | {epochs} | {seconds:.0f} | {top1:.1%} |',
        flush=True,
      )


if __name__ == '__main__':
  command_line.run(main, define_flags)
