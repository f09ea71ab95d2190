"""The base requirements alone run every command promised without extras.

The package is installed into a new environment, from the package index.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import subprocess
import zipfile

import numpy as np
import pytest

from dualformer_jax.input_pipeline import video_writer
from tests import new_environment, small_checkpoint

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow

# Runs an exported program as its README.txt says, with JAX alone.
RUN_PROGRAM = """
import io, sys, zipfile, numpy
from jax import export
with zipfile.ZipFile(sys.argv[1]) as file:
  program = export.deserialize(bytearray(file.read('program.stablehlo')))
  weights = dict(numpy.load(io.BytesIO(file.read('weights.npz'))))
shape = [d if isinstance(d, int) else 1 for d in program.in_avals[-1].shape]
print(program.call(weights, numpy.zeros(shape, 'uint8')).sum())
"""


class Environment:
  """An environment with the base requirements, and a folder to work in."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.programs = folder / 'venv' / 'bin'

  def run(self, *command: object) -> str:
    done = self.try_run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return done.stdout

  def try_run(self, *command: object) -> subprocess.CompletedProcess[str]:
    program, *arguments = map(str, command)
    hidden = ('PYTHONPATH', 'VIRTUAL_ENV')
    return subprocess.run(
      [self.programs / program, *arguments],
      env={k: v for k, v in os.environ.items() if k not in hidden}
      | {'JAX_PLATFORMS': 'cpu', 'HOME': str(self.folder)},
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=1800,
    )


@pytest.fixture(scope='module', name='base')
def _base(tmp_path_factory) -> Iterator[Environment]:
  base = Environment(tmp_path_factory.mktemp('base'))
  new_environment.install(base.folder / 'venv', ROOT)
  yield base


@pytest.fixture(scope='module', name='model')
def _model(base) -> pathlib.Path:
  return small_checkpoint.save(base.folder / 'model')


@pytest.fixture(scope='module', name='video')
def _video(base) -> pathlib.Path:
  frames = np.random.default_rng(0).integers(0, 256, (40, 36, 48, 3), np.uint8)
  path = base.folder / 'video.mp4'
  path.write_bytes(video_writer.encode_mp4(frames, fps=10.0))
  return path


def test_extras_are_absent(base):
  installed = base.run('pip', 'list', '--format=freeze').lower()
  for name in ('tensorflow-cpu=', 'gradio=', 'torch=', 'pytest=', 'libtpu='):
    assert name not in installed


def test_predict_and_gradcam(base, model, video):
  lines = base.run(
    *('dualformer-predict', f'--checkpoint={model}', '--json', video),
    f'--features={base.folder}/f.npz',
  )
  assert len(json.loads(lines)['predictions']) == 5
  base.run(
    *('dualformer-predict', f'--checkpoint={model}', '--sliding', video),
    f'--timeline={base.folder}/t.json,{base.folder}/t.png',
    f'--save={base.folder}/copy.mp4',
  )
  for suffix in ('gif', 'png'):
    out = base.folder / f'map.{suffix}'
    base.run(
      'dualformer-gradcam', f'--checkpoint={model}', f'--out={out}', video
    )
    assert out.stat().st_size > 100


def test_export_and_its_artifact(base, model):
  out, weights = base.folder / 'm.zip', base.folder / 'm.safetensors'
  flags = (f'--checkpoint={model}', f'--out={out}', f'--weights={weights}')
  base.run('dualformer-export', *flags)
  assert 'agrees' in base.run('dualformer-export', f'--check={out}')
  assert zipfile.is_zipfile(out)
  total = float(base.run('python', '-c', RUN_PROGRAM, out))
  assert total == pytest.approx(1, abs=1e-5)  # probabilities of one video


def test_convert_there_and_back(base, model):
  pth = base.folder / 'model.pth'
  base.run('dualformer-convert', f'--src={model}', f'--dst={pth}')
  assert pth.stat().st_size > 1000


def test_complexity(base):
  table = base.run('dualformer-complexity', '--config=configs/k400_tiny.py')
  assert '21,767,360' in table  # parameters of the published backbone


EXPORT = ('dualformer-export', '--checkpoint=model')
PLAN = ('dualformer-plan', '--config=configs/motion.py', '--videos=8')


@pytest.mark.parametrize(
  ('command', 'extra'),
  [
    (('dualformer-demo', '--checkpoint=model'), 'demo'),
    ((*EXPORT, '--out=m.onnx'), 'onnx'),
    (('dualformer-export', '--check=m.onnx'), 'onnx'),
    ((*EXPORT, '--out=m.zip', '--weights_dtype=int8'), 'int8'),
    ((*PLAN, '--topology=v5e:2x2'), 'plan'),
    ((*PLAN, '--topology=h100:2'), 'cuda'),
  ],
)
def test_commands_that_need_an_extra_name_it(base, command, extra):
  done = base.try_run(*command)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert f'[{extra}]' in line


def test_all_commands_have_help_and_are_listed(base):
  listed = base.run('python', '-m', 'dualformer_jax')
  for script in base.programs.glob('dualformer-*'):
    assert '--' in base.run(script.name, '--help')
    assert script.name.removeprefix('dualformer-').replace('-', '_') in (
      listed.replace('main', 'main train')
    )
