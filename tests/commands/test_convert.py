"""Converting .pth files to checkpoint folders and back."""

import os
import pathlib
import pickle
import runpy
import subprocess
from typing import Any
import zipfile

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from dualformer_jax import convert
from dualformer_jax.checkpoints import (
  checkpoint,
  conversion,
  pth_file,
  pytorch_names,
)
from dualformer_jax.checkpoints import weights as weights_lib
from dualformer_jax.errors import UserError
from dualformer_jax.models import dualformer
from dualformer_jax.training import setup
from dualformer_jax.training.state import init_state
from tests import in_process, levels_datasets, reference_arrays

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / 'configs/k400_tiny.py'
# What differs between that config and the model `micro`, as flags.
MICRO_FLAGS = (
  f'--config={CONFIG}',
  '--config.model.depths=2,2,2,2',
  '--config.model.embed_dims=16,32,64,128',
  '--config.model.num_heads=1,2,4,8',
  '--config.model.num_classes=10',
)


def _convert(*flags: object) -> subprocess.CompletedProcess[str]:
  return in_process.run(convert, *flags, with_log=True)


def _assert_same(found: Any, expected: Any) -> None:
  assert list(found) == list(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, name, strict=True)


def _micro_config(**fields: Any) -> Any:
  config = runpy.run_path(str(CONFIG))['get_config']()
  config.model.update(reference_arrays.MODELS['micro'] | fields)
  return config


def _to_folder(
  pth: pathlib.Path,
  dst: pathlib.Path,
  config: Any,
  names: str = '',
  inflate: bool = False,
) -> str:
  preprocessing = setup.make_preprocessing(config, config.test)
  return conversion.pth_to_folder(
    pth, dst, config, preprocessing, names, inflate
  )


@pytest.fixture(scope='module', name='weights')
def _weights() -> dict[str, np.ndarray]:
  weights = reference_arrays.state_dict('micro', 1)
  weights['backbone.blocks.0.1.attn.lr.1.num_batches_tracked'] += 12345
  return weights


@pytest.fixture(name='pth')
def _pth(tmp_path, weights) -> pathlib.Path:
  pth_file.write_pth(tmp_path / 'model.pth', weights)
  return tmp_path / 'model.pth'


def _put_beside(path: pathlib.Path, beside: dict[str, Any]) -> None:
  """Rewrites a bare state_dict as {**beside, 'state_dict': state_dict}."""
  with zipfile.ZipFile(path) as archive:
    entries = {name: archive.read(name) for name in archive.namelist()}

  def push(value: object) -> bytes:  # a pickle without its head and its stop
    return pickle.dumps(value, 2)[2:-1]

  items = b''.join(push(key) + push(value) for key, value in beside.items())
  state_dict = entries['archive/data.pkl'][2:-1]
  entries['archive/data.pkl'] = (
    b'\x80\x02}(' + items + push('state_dict') + state_dict + b'u.'
  )
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in entries.items():
      archive.writestr(name, content)


# --- There and back


@pytest.mark.slow
def test_round_trip_through_the_command_is_exact(tmp_path):
  weights = reference_arrays.state_dict('micro_tokenlabel', 1)
  pth, folder = tmp_path / 'model.pth', tmp_path / 'new' / 'folder'
  pth_file.write_pth(pth, {f'module.{k}': w for k, w in weights.items()})
  _put_beside(pth, {'meta': {'epoch': 30}, 'optimizer': {}, 'amp': None})
  names = tmp_path / 'names.txt'
  names.write_text('\n'.join(f'Klasse {i} übt' for i in range(10)) + '\n')

  done = _convert(
    f'--src={pth}',
    f'--dst={folder}',
    *MICRO_FLAGS,
    '--config.test.num_crops=3',
    '--config.dataset.frame_interval=4',
    f'--class_names={names}',
  )
  assert (done.returncode, done.stderr) == (0, '')
  # Rows of the table: tensors and numbers of each part.
  rows = {
    line[:22].strip(): [int(n.replace(',', '')) for n in line[22:].split()]
    for line in done.stdout.splitlines()
    if line[22:].replace(',', '').replace(' ', '').isdigit()
  }
  parts = {
    'stage 2': ('patch_embeds.2.', 'blocks.2.', 'pos_block.2.'),
    'head': ('fc_cls.',),
    'token-label head': ('token_linear.',),
    'BatchNorm statistics': ('running_', 'num_batches_tracked'),
    'all': ('',),
  }
  for row, of_names in parts.items():
    sizes = [
      array.size
      for name, array in weights.items()
      if any(part in name for part in of_names)
    ]
    assert rows[row] == [len(sizes), sum(sizes)], row
  for dropped in ("'meta'", "'optimizer'", "'amp'", "'module.'"):
    assert dropped in done.stdout
  assert 'Klasse 9 übt' in done.stdout
  assert f"dualformer_jax.load('{folder}')" in done.stdout

  _, description = checkpoint.load_model(folder)
  assert description.class_names[3] == 'Klasse 3 übt'
  assert description.model['token_label'] is True
  preprocessing = description.preprocessing
  assert preprocessing.num_frames == 32
  assert preprocessing.frame_interval == 4
  assert preprocessing.image_size == 224
  assert (preprocessing.num_clips, preprocessing.num_crops) == (4, 3)
  assert preprocessing.pixel_mean == (123.675, 116.28, 103.53)
  assert preprocessing.pixel_std == (58.395, 57.12, 57.375)

  back = tmp_path / 'back.pth'
  done = _convert(f'--src={folder}', f'--dst={back}')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'class names' in done.stdout
  _assert_same(weights_lib.read(back)[0], weights)


def test_torch_reads_the_converted_file(tmp_path, pth, weights):
  torch = pytest.importorskip('torch')
  _to_folder(pth, tmp_path / 'folder', _micro_config())
  conversion.folder_to_pth(tmp_path / 'folder', tmp_path / 'back.pth')
  loaded = torch.load(tmp_path / 'back.pth', weights_only=True)
  _assert_same({name: t.numpy() for name, t in loaded.items()}, weights)


# --- Invalid input


class _Call:
  def __init__(self, command: str):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


def _replace(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
  path.unlink()
  pth_file.write_pth(path, weights)


def _add_unknown(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
  odd = {'backbone.extra.weight': np.zeros((2, 3), np.float32)}
  _replace(path, {**weights, **odd})


def _take_away(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
  rest = {k: w for k, w in weights.items() if k != 'backbone.norm.weight'}
  _replace(path, rest)


def _reshape(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
  other = {'cls_head.fc_cls.weight': np.zeros((10, 64), np.float32)}
  _replace(path, {**weights, **other})


def _truncate(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
  del weights
  path.write_bytes(path.read_bytes()[:-1000])


def _attack(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
  del weights
  marker = path.with_name('code-was-run')
  _put_beside(path, {'meta': _Call(f'touch {marker}')})


@pytest.mark.parametrize(
  ('damage', 'expected'),
  [
    (_add_unknown, r"1 unknown: 'backbone.extra.weight' \(2, 3\)"),
    (_take_away, r'1 missing: backbone.norm.weight \(128,\)'),
    (_reshape, r'fc_cls.weight expected \(10, 128\) found \(10, 64\)'),
    (_truncate, 'truncated'),
    (_attack, 'system'),
  ],
)
def test_malformed_file_raises_and_writes_nothing(
  tmp_path, pth, weights, damage, expected
):
  damage(pth, weights)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(UserError, match=expected) as error:
    _to_folder(pth, tmp_path / 'folder', _micro_config())
  assert str(pth) in str(error.value)
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ([], '--config must be given to convert a .pth file'),
    (['--dst=other.pth'], 'no checkpoint folder at'),
    (['--src={folder}'], 'ends in .pth'),
    (
      ['--src={folder}', '--dst={folder}.pth', f'--config={CONFIG}'],
      '--config has no effect',
    ),
    (['--src={folder}', '--dst={folder}.pth'], 'holds no checkpoint'),
  ],
)
def test_invalid_flags_print_one_line(tmp_path, pth, flags, expected):
  folder = tmp_path / 'folder'
  folder.mkdir()
  flags = [f'--src={pth}', f'--dst={tmp_path / "new"}', *flags]
  done = _convert(*(flag.format(folder=folder) for flag in flags))
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert expected in line
  assert (done.returncode, done.stdout) == (2, '')
  assert sorted(tmp_path.iterdir()) == [folder, pth]


# --- Details


def test_number_of_classes_comes_from_the_file(tmp_path, pth):
  dst = tmp_path / 'folder'
  config = _micro_config(num_classes=400)
  message = r'10 classes.* 400.*--config\.model\.num_classes=10'
  with pytest.raises(UserError, match=message):
    _to_folder(pth, dst, config)
  assert not dst.exists()
  _to_folder(pth, dst, _micro_config(num_classes=0))
  assert checkpoint.load_model(dst)[1].model['num_classes'] == 10


def test_inflate_must_match_the_kind_of_model(tmp_path, pth):
  images = tmp_path / 'image.pth'
  pth_file.write_pth(images, reference_arrays.state_dict('micro_2d', 1))
  with pytest.raises(UserError, match='image model: add --inflate'):
    _to_folder(images, tmp_path / 'folder', _micro_config())
  with pytest.raises(UserError, match='video model: leave out --inflate'):
    _to_folder(pth, tmp_path / 'folder', _micro_config(), inflate=True)
  assert not (tmp_path / 'folder').exists()


def test_image_model_is_inflated(tmp_path):
  images = reference_arrays.state_dict('micro_2d', 1)
  pth_file.write_pth(tmp_path / 'image.pth', images)
  done = _convert(
    '--inflate',
    f'--src={tmp_path}/image.pth',
    f'--dst={tmp_path}/folder',
    *MICRO_FLAGS,
  )
  assert (done.returncode, done.stderr) == (0, '')
  for words in ('inflated from images:', 'reinitialized:', 'head.weight'):
    assert words in done.stdout
  variables, description = checkpoint.load_model(tmp_path / 'folder')
  assert len(description.class_names) == 10
  state_dict = pytorch_names.to_pytorch(variables)
  kernel = state_dict['backbone.patch_embeds.0.proj.weight']
  image = images['patch_embeds.0.proj.weight']
  for time in range(2):
    np.testing.assert_array_equal(kernel[:, :, time], image / 2)
  head = state_dict['cls_head.fc_cls.weight']
  assert 0.005 < head.std() < 0.015  # initialised with 0.01


def test_wrong_recipe_raises(tmp_path, pth):
  config = _micro_config(num_frames=16)
  with pytest.raises(UserError, match=r'blocks\.0\.1\.attn\.sr\.weight'):
    _to_folder(pth, tmp_path / 'folder', config)


def test_existing_files_are_kept(tmp_path, pth):
  config = _micro_config()
  taken = tmp_path / 'taken'
  taken.mkdir()
  (taken / 'file').write_text('mine')
  for dst in (taken, taken / 'file'):
    with pytest.raises(UserError, match='nothing was written'):
      _to_folder(pth, dst, config)
  with pytest.raises(UserError, match='cannot be written'):
    _to_folder(pth, taken / 'file' / 'below', config)
  assert (taken / 'file').read_text() == 'mine'

  _to_folder(pth, tmp_path / 'folder', config)
  content = pth.read_bytes()
  with pytest.raises(UserError, match='exists already'):
    conversion.folder_to_pth(tmp_path / 'folder', pth)
  assert pth.read_bytes() == content


def test_other_floats_are_cast_and_noted(tmp_path, weights):
  pth, dst = tmp_path / 'half.pth', tmp_path / 'folder'
  half = {
    name: w.astype(ml_dtypes.bfloat16) if w.dtype == np.float32 else w
    for name, w in weights.items()
  }
  pth_file.write_pth(pth, half)
  assert 'were bfloat16, now float32' in _to_folder(pth, dst, _micro_config())
  variables, _ = checkpoint.load_model(dst)
  found = variables['params']['cls_head']['fc_cls']['bias']
  assert found.dtype == np.float32
  expected = half['cls_head.fc_cls.bias'].astype(np.float32)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ('content', 'expected'),
  [
    (b'a\nb\n', 'has 2 classes, expected 10'),
    (b'a\n\n' + 8 * b'b\n', 'has an empty line'),
    (b'a\n' + 9 * b'b\n', "has 'b' 9 times"),
    (b'\xff\xfe', 'not UTF-8'),
    (None, 'cannot be read'),
  ],
)
def test_invalid_class_names_raise(tmp_path, pth, content, expected):
  names, dst = tmp_path / 'names.txt', tmp_path / 'folder'
  if content is not None:
    names.write_bytes(content)
  with pytest.raises(UserError, match=expected) as error:
    _to_folder(pth, dst, _micro_config(), str(names))
  assert str(names) in str(error.value)
  assert not dst.exists()


def test_byte_order_mark_is_not_part_of_a_class_name(tmp_path, pth):
  names = tmp_path / 'names.txt'
  expected = tuple(f'grüßen {number}' for number in range(10))
  names.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(expected).encode())
  _to_folder(pth, tmp_path / 'folder', _micro_config(), str(names))
  _, metadata = checkpoint.load_model(tmp_path / 'folder')
  assert metadata.class_names == expected


@pytest.mark.slow
def test_averages_and_safetensors_are_converted(tmp_path, weights):
  """Averages are half of the weights, under the names of Lightning."""
  path = tmp_path / 'model.safetensors'
  averages = {n: w if w.dtype == int else w / 2 for n, w in weights.items()}
  save_file(
    {f'model.{name}': weight for name, weight in weights.items()}
    | {f'ema_model.module.{name}': w for name, w in averages.items()},
    path,
  )
  for flags, expected in (((), weights), (('--ema',), averages)):
    folder = tmp_path / f'folder{len(flags)}'
    done = _convert(f'--src={path}', f'--dst={folder}', *MICRO_FLAGS, *flags)
    assert (done.returncode, done.stderr) == (0, '')
    assert f'{len(weights)} ' in done.stdout
    assert 'averages' in done.stdout
    assert f"'model.' before {len(weights)} names" in done.stdout
    variables, _ = checkpoint.load_model(folder)
    _assert_same(pytorch_names.to_pytorch(variables), expected)


def test_class_names_come_from_the_prepared_dataset(
  tmp_path, weights, prepared_datasets
):
  config = _micro_config(num_classes=0)
  config.dataset.name = 'levels'
  config.dataset.data_dir = str(prepared_datasets / 'tfrecord')
  for count, names in [
    (3, levels_datasets.CLASSES),
    (4, ('class 0', 'class 1', 'class 2', 'class 3')),
  ]:
    pth, dst = tmp_path / f'{count}.pth', tmp_path / str(count)
    head = {
      f'cls_head.fc_cls.{name}': weights[f'cls_head.fc_cls.{name}'][:count]
      for name in ('weight', 'bias')
    }
    pth_file.write_pth(pth, weights | head)
    printed = _to_folder(pth, dst, config)
    assert str(prepared_datasets / 'tfrecord' / 'levels') in printed
    assert ('are unknown' in printed) == (count == 4)
    assert checkpoint.load_model(dst)[1].class_names == names


@pytest.mark.slow
def test_only_the_model_of_a_training_checkpoint_is_written(tmp_path):
  model = dualformer.DualFormer(
    depths=(1, 1, 1, 1),
    embed_dims=(8, 8, 8, 8),
    num_heads=(1, 1, 1, 1),
    num_classes=2,
    num_frames=4,
    image_size=32,
  )
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda leaf: rng.integers(0, 9, leaf.shape).astype(leaf.dtype),
    jax.eval_shape(lambda: init_state(model, optax.adam(1e-3), seed=0)),
  )
  description = checkpoint.CheckpointMetadata(
    model={name: getattr(model, name) for name in _micro_config().model},
    preprocessing=setup.make_preprocessing(_micro_config()),
    class_names=('a', 'b'),
    step=7,
  )
  series = checkpoint.Checkpoints(tmp_path / 'run' / checkpoint.LATEST)
  series.save(state.trees(), description)
  series.close()

  printed = conversion.folder_to_pth(tmp_path / 'run', tmp_path / 'model.pth')
  assert 'dropped: the optimizer at step 7' in printed
  found, *_ = weights_lib.read(tmp_path / 'model.pth')
  assert all(name.startswith(('backbone.', 'cls_head.')) for name in found)
  assert len(found) == len(jax.tree.leaves([state.params, state.batch_stats]))
  np.testing.assert_array_equal(
    found['cls_head.fc_cls.weight'].T,
    state.params['cls_head']['fc_cls']['kernel'],
  )
