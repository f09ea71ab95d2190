"""Maps of where a model looks are right, and become pictures."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any
import wave

import cv2
import jax
import numpy as np
import pytest

from dualformer_jax import pytorch
from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import decoding
from dualformer_jax.input_pipeline.views import Preprocessing
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.recognizer import Recognizer
from dualformer_jax.training import checkpoint
from tests import reference_arrays, training_command

# One stage of 4 x 17 x 17 tokens, of which pooling leaves a row and a column.
FIELDS: dict[str, Any] = dict(
  depths=(2,),
  embed_dims=(16,),
  num_heads=(2,),
  num_classes=2,
  num_frames=8,
  image_size=68,
  window=(2, 7, 7),
  fine_sizes=((4, 4, 4),),
  coarse_sizes=((2, 4, 4),),
  token_label=True,
)
NAMES = ('café spike', 'serve')


def describe(multi_label: bool = False, **fields: Any):
  return checkpoint.Description(
    FIELDS | fields, Preprocessing(8, 2, 68, num_clips=2), NAMES, multi_label
  )


def recognizer(variables: Any, **fields: Any) -> Recognizer:
  folder = pathlib.Path('folder')
  return Recognizer(variables, describe(**fields), folder, 'float32')


@pytest.fixture(scope='module', name='variables')
def _variables() -> dict[str, Any]:
  """Of a model that is not as even as a new one."""
  rng = np.random.default_rng(5)  # with tokens of either class

  def draw(path: Any, leaf: Any) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    if 'scale' in name or 'var' in name:
      values = rng.uniform(0.5, 1.5, leaf.shape)
    elif leaf.ndim < 2:
      values = rng.normal(0, 0.2, leaf.shape)
    else:
      values = rng.normal(0, leaf.size**-0.25, leaf.shape)
    return values.astype(leaf.dtype)

  shapes = checkpoint.variable_shapes(DualFormer(**FIELDS), 'FIELDS')
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope='module', name='model')
def _model(variables) -> Recognizer:
  return recognizer(variables)


@pytest.fixture(scope='module', name='clips')
def _clips() -> np.ndarray:
  return reference_arrays.clips(2, 8, 68, seed=3)


# --- Grad-CAM


def test_gradcam_agrees_with_the_published_implementation():
  fields = reference_arrays.MODELS['micro']
  variables, _ = pytorch.from_pytorch(
    reference_arrays.state_dict('micro', 1),
    checkpoint.variable_shapes(DualFormer(**fields), 'micro'),
    source='micro',
  )
  names = tuple(f'class {i}' for i in range(10))
  description = checkpoint.Description(fields, Preprocessing(32, 2, 224), names)
  micro = Recognizer(variables, description, pathlib.Path(), 'float32')
  clips = reference_arrays.clips(4, 32, 224, seed=1)
  figures = np.load(reference_arrays.DIRECTORY / 'gradcam_micro_seed1.npz')
  for layer in ('backbone.blocks.3.1', 'backbone.blocks.2.0'):
    for name, label in (('top', None), ('label2', 'class 2')):
      maps = micro.gradcam(clips, layer, label)
      assert maps.shape == (4, 32, 224, 224)
      assert maps.dtype == np.float32
      np.testing.assert_array_equal(maps.min((1, 2, 3)), 0)
      np.testing.assert_allclose(maps.max((1, 2, 3)), 1, atol=1e-6)
      expected = figures[f'{layer}.{name}']
      np.testing.assert_allclose(
        maps[:, ::4, ::8, ::8], expected, atol=1e-3, err_msg=f'{layer} {name}'
      )


def test_gradcam_is_the_same_whatever_is_recomputed(variables, clips, model):
  expected = model.gradcam(clips, 'blocks.0.0', 1)
  assert expected.std() > 0.05
  for remat in {'none', 'elementwise', 'block'} - {model.model.remat}:
    other = recognizer(variables, remat=remat)
    maps = other.gradcam(clips, 'blocks.0.0', 1)
    np.testing.assert_allclose(maps, expected, atol=1e-3)


def with_head(variables: Any, kernel: np.ndarray) -> dict[str, Any]:
  head = variables['params']['cls_head']
  fc_cls = head['fc_cls'] | {'kernel': kernel.astype(np.float32)}
  params = variables['params'] | {'cls_head': head | {'fc_cls': fc_cls}}
  return variables | {'params': params}


def test_a_model_that_is_certain_has_the_map_of_one_that_is_not(
  model, variables, clips, monkeypatch
):
  # With two classes the scale of the scores does not turn the gradient.
  expected = [model.gradcam(clips, 'blocks.0.0', label) for label in (0, 1)]
  assert np.abs(expected[0] - expected[1]).max() > 0.5
  kernel = variables['params']['cls_head']['fc_cls']['kernel']
  monkeypatch.setattr(model, 'variables', with_head(variables, 1e4 * kernel))
  logits = model.logits(clips)
  assert (np.ptp(logits, axis=1) > 200).all()
  for label in (0, 1):
    maps = model.gradcam(clips, 'blocks.0.0', label)
    np.testing.assert_allclose(maps, expected[label], atol=1e-3)


def test_classes_that_do_not_exclude_each_other_are_seen_alone(
  model, variables, clips, monkeypatch
):
  others = recognizer(variables, multi_label=True)
  actual = others.gradcam(clips, 'blocks.0.0', 'serve')
  # As against a class that sees nothing.
  kernel = variables['params']['cls_head']['fc_cls']['kernel'].copy()
  kernel[:, 0] = 0
  monkeypatch.setattr(model, 'variables', with_head(variables, kernel))
  expected = model.gradcam(clips, 'blocks.0.0', 'serve')
  np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_layers_and_classes_have_several_names(model, clips):
  expected = model.gradcam(clips, 'blocks.0.0', 'serve')
  for layer, label in (
    ('backbone/blocks/0/0', 1),
    ('backbone.blocks.0.0', '1'),
    ('blocks_0_0', 'serve'),
  ):
    np.testing.assert_array_equal(model.gradcam(clips, layer, label), expected)


@pytest.mark.parametrize(
  'layer, label, said',
  [
    ('blocks.0.2', None, 'expected one of blocks.0.0, blocks.0.1'),
    ('patch_embeds.0', None, 'expected one of blocks.0.0, blocks.0.1'),
    ('blocks.0.0', 'swerve', "expected 'serve', or a number below 2"),
    ('blocks.0.0', 'xyz', "such as 'café spike', 'serve', or a number below 2"),
    ('blocks.0.0', 2, 'a number below 2'),
    ('blocks.0.0', -1, 'a number below 2'),
  ],
)
def test_unknown_layers_and_classes_are_refused(
  model, clips, layer, label, said
):
  with pytest.raises(UserError, match=said):
    model.gradcam(clips, layer, label)


# --- Attention


def blocks(grid: Any, kernel: Any):
  """Yields what a convolution with stride = kernel sees, place by place."""
  counts = [g // k for g, k in zip(grid, kernel, strict=True)]
  for place in itertools.product(*map(range, counts)):
    yield tuple(
      slice(i * k, (i + 1) * k) for i, k in zip(place, kernel, strict=True)
    )


def test_attention_is_that_of_the_layer_laid_back_on_its_tokens(
  model, variables, clips
):
  def apply(variables: Any, clips: Any) -> Any:
    return model.model.apply(
      variables,
      clips,
      capture_intermediates=lambda module, _: module.name == 'norm1',
      mutable=['intermediates'],
    )

  state = jax.jit(apply)(variables, clips)[1]
  [x] = state['intermediates']['backbone']['blocks_0_1']['norm1']['__call__']
  x = np.asarray(x[1], np.float64)
  p, statistics = (
    jax.tree.map(np.float64, variables[name]['backbone']['blocks_0_1']['attn'])
    for name in ('params', 'batch_stats')
  )

  def pool(x, layer, kernel):
    weights, bias = p[layer]['kernel'], p[layer]['bias']
    assert weights.shape[:3] == kernel
    return np.array(
      [
        (x[b] * weights).sum((0, 1, 2)) + bias
        for b in blocks(x.shape[:3], kernel)
      ]
    )

  y = pool(x, 'lr_0', (1, 4, 4)).reshape(4, 4, 4, -1)
  y = (y - statistics['lr_1']['mean']) / np.sqrt(
    statistics['lr_1']['var'] + 1e-5
  )
  y = np.maximum(y * p['lr_1']['scale'] + p['lr_1']['bias'], 0)
  keys = np.concatenate([pool(x, 'sr', (1, 4, 4)), pool(y, 'lr_3', (2, 1, 1))])
  keys -= keys.mean(-1, keepdims=True)
  keys /= np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-5)
  keys = keys * p['norm']['scale'] + p['norm']['bias']
  k = np.einsum('mc,cne->nme', keys, p['kv']['kernel'][:, 0])
  k += p['kv']['bias'][0][:, None]
  token = (3, 6, 2)
  q = np.einsum('c,cne->ne', x[token], p['q']['kernel']) + p['q']['bias']
  weights = np.exp(np.einsum('ne,nme->nm', q, k) / np.sqrt(8))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.zeros((4, 17, 17))
  seen = [
    *blocks(expected.shape, (1, 4, 4)),
    *blocks(expected.shape, (2, 4, 4)),
  ]
  for place, weight in zip(seen, weights.mean(0), strict=True):
    expected[place] += weight / expected[place].size
  assert expected.max() > 1.5 * expected.mean()

  actual = model.attention(clips, 'blocks.0.1', token)[1]
  np.testing.assert_allclose(actual, expected, atol=1e-3 * expected.max())
  assert actual.sum() == pytest.approx(1, abs=1e-4)


def test_tokens_that_attend_nowhere_are_refused(model, clips):
  with pytest.raises(UserError, match='inside windows; .* such as blocks.0.1'):
    model.attention(clips, 'blocks.0.0', (0, 0, 0))
  with pytest.raises(UserError, match=r'below \(4, 17, 17\)'):
    model.attention(clips, 'blocks.0.1', (4, 0, 0))


# --- The command


@pytest.fixture(scope='module', name='folder')
def _folder(variables, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('gradcam') / 'checkpoint'
  checkpoint.save_model(folder, variables, describe())
  return folder


@pytest.fixture(scope='module', name='video')
def _video(folder) -> pathlib.Path:
  """A white square that moves over grey, 40 frames, 10 a second."""
  frames = np.full((40, 80, 120, 3), 90, np.uint8)
  for i, frame in enumerate(frames):
    frame[30:50, 2 * i : 2 * i + 20] = 255
  path = folder.parent / 'video.mp4'
  path.write_bytes(decoding.encode_mp4(frames, fps=10))
  return path


@pytest.fixture(name='run')
def _run(folder, compilation_cache):
  def run(*flags: object, checkpoint: object = folder):
    return subprocess.run(
      [
        sys.executable,
        '-m',
        'dualformer_jax.gradcam',
        f'--checkpoint={checkpoint}',
        *map(str, flags),
      ],
      env=training_command.environment(compilation_cache),
      capture_output=True,
      text=True,
      timeout=300,
    )

  return run


def test_a_gif_shows_the_map_over_the_middle_view(run, model, video, tmp_path):
  out = tmp_path / 'new' / 'folder' / 'map.gif'
  flags = ('--layer=blocks_0_0', '--opacity=1', '--colormap=bone')
  done = run(f'--out={out}', *flags, video)
  assert (done.returncode, done.stderr) == (0, '')
  clips = model.normalize(model.views(str(video)))
  scores = np.exp(model.logits(clips))
  probabilities = (scores / scores.sum(-1, keepdims=True)).mean(0)
  order = np.argsort(-probabilities)
  *lines, last = done.stdout.splitlines()
  for line, label in zip(lines, order, strict=True):
    assert line[12:] == NAMES[label]
    assert float(line[:12]) == pytest.approx(probabilities[label], abs=1e-5)
  name = NAMES[order[0]]
  assert last.startswith(f'Grad-CAM of {name!r} at blocks_0_0, view 1')

  info = decoding.probe(out)
  assert (info.num_frames, info.height, info.width) == (8, 68, 68)
  expected = model.gradcam(clips, 'blocks.0.0', name)[1]
  assert expected.std() > 0.05
  # `bone` grows brighter from black to white.
  shown = decoding.decode_all(out).mean(-1) / 255
  assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.98


def test_an_mp4_is_as_large_and_as_fast_as_it_is_told(run, video, tmp_path):
  out = tmp_path / 'map.mp4'
  out.write_text('something else')
  flags = ('--label=serve', '--view=0', '--resolution=100', '--opacity=0')
  done = run(f'--out={out}', '--overwrite', *flags, video)
  assert (done.returncode, done.stderr) == (0, '')
  assert "Grad-CAM of 'serve' at blocks.0.1, view 0" in done.stdout
  info = decoding.probe(out)
  assert (info.num_frames, info.height, info.width) == (8, 100, 100)
  assert info.fps == pytest.approx(5)  # every other frame of ten a second
  # Nothing covers the clip: its square is white, and moves two frames at once.
  white = decoding.decode_all(out).min(-1) > 200
  columns = [np.nonzero(frame.any(0))[0].max() for frame in white[2:]]
  np.testing.assert_allclose(np.diff(columns), 5, atol=2)


def test_a_strip_shows_classes_of_tokens_and_what_colors_mean(
  run, model, video, tmp_path
):
  out = tmp_path / 'tokens.png'
  done = run(f'--out={out}', '--tokens', '--opacity=1', video)
  assert (done.returncode, done.stderr) == (0, '')
  clips = model.normalize(model.views(str(video)))
  classes = model.token_logits(clips)[1].argmax(-1)
  counts = np.bincount(classes.ravel(), minlength=2)
  assert counts.all()
  for count, name in zip(counts, NAMES, strict=True):
    assert f'{count / classes.size:7.1%}  {name}' in done.stdout

  strip = cv2.imread(str(out))
  assert strip is not None
  assert strip.shape == (68 + 2 * 16, 8 * 68, 3)
  # The colour of each class in the legend, the most frequent one first.
  order = np.argsort(-counts)
  colors = {label: strip[68 + 16 * i + 8, 8] for i, label in enumerate(order)}
  assert (colors[0] != colors[1]).any()
  middles = 4 * np.arange(17) + 2
  for frame in range(8):
    shown = strip[middles[:, None], 68 * frame + middles]
    for label, color in colors.items():
      # A token stands for two frames.
      np.testing.assert_array_equal(
        (shown == color).all(-1), classes[frame // 2] == label
      )


def test_a_strip_shows_attention_and_the_token_that_attends(
  run, model, video, tmp_path
):
  out = tmp_path / 'attention.png'
  token = '--attention=2,3,4'
  flags = (token, '--layer=blocks.0.1', '--opacity=1', '--colormap=bone')
  done = run(f'--out={out}', *flags, video)
  assert (done.returncode, done.stderr) == (0, '')
  assert 'attention of token 2,3,4 at blocks.0.1' in done.stdout
  clips = model.normalize(model.views(str(video)))
  attention = model.attention(clips, 'blocks.0.1', (2, 3, 4))[1]
  strip = cv2.imread(str(out), cv2.IMREAD_GRAYSCALE)
  assert strip is not None
  assert strip.shape == (68, 8 * 68)
  middles = 4 * np.arange(17) + 1
  for frame in range(8):
    shown = strip[middles[:, None], 68 * frame + middles]
    assert (
      np.corrcoef(shown.ravel(), attention[frame // 2].ravel())[0, 1] > 0.98
    )
  edge = np.zeros((68, 8, 68), bool)
  edge[12:16, 4:6, 16:20] = True
  edge[13:15, 4:6, 17:19] = False
  assert (strip.reshape(68, 8, 68)[edge] == 255).all()


# Runs the command with each of the flags on its standard input.
MANY = """
import json, sys
from absl.testing import flagsaver
from dualformer_jax import gradcam
for arguments in json.load(sys.stdin):
  sys.argv[1:] = arguments
  with flagsaver.flagsaver():
    try:
      gradcam.cli()
    except SystemExit as error:
      print(error.code)
"""


def test_mistakes_are_told_in_one_line(
  folder, video, compilation_cache, tmp_path
):
  silent, taken = tmp_path / 'sound.wav', tmp_path / 'taken.gif'
  taken.write_text('something else')
  with wave.open(str(silent), 'wb') as file:
    file.setparams((1, 2, 8000, 0, 'NONE', ''))
    file.writeframes(bytes(16000))
  here, gif = f'--checkpoint={folder}', f'--out={tmp_path}/map.gif'
  cases = {
    (here, gif, tmp_path / 'none.mp4'): 'none.mp4: cannot be opened',
    (here, gif, silent): 'sound.wav: ',
    (f'--checkpoint={tmp_path}', gif, video): 'holds no checkpoint',
    (here, gif, '--layer=blocks.3.9', video): "'blocks.3.9' is unknown",
    (here, gif, '--label=swerve', video): "expected 'serve'",
    (here, gif, '--view=3', video): '--view=3: ',
    (here, gif, '--attention=0,0,9', '--layer=blocks.0.0', video): 'windows',
    (here, gif, '--attention=1,2', video): '--attention=1,2: ',
    (here, gif, '--tokens', '--label=serve', video): 'no effect with --tokens',
    (here, f'--out={tmp_path}/map.jpg', video): '.gif, .mp4, .png',
    (here, f'--out={taken}', video): 'taken.gif exists',
    (here, f'--out={taken}/map.gif', video): 'cannot be written',
    (here, gif, video, video): 'expected one video',
    (here, gif): 'VIDEO must be given',
  }
  done = subprocess.run(
    [sys.executable, '-c', MANY],
    input=json.dumps([[*map(str, case)] for case in cases]),
    env=training_command.environment(compilation_cache),
    capture_output=True,
    text=True,
    timeout=300,
  )
  lines = done.stderr.splitlines()
  assert len(lines) == len(cases), done.stderr
  for line, said in zip(lines, cases.values(), strict=True):
    assert line.startswith('error: ')
    assert said in line
  assert done.stdout.split().count('2') == len(cases)
  assert {*tmp_path.iterdir()} == {silent, taken}
  assert taken.read_text() == 'something else'
