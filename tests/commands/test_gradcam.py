"""The gradcam command: files, text and errors."""

from __future__ import annotations

import functools
import pathlib
import wave

import cv2
import numpy as np
import pytest

from dualformer_jax import gradcam
from dualformer_jax.checkpoints import checkpoint
from dualformer_jax.inference.recognizer import Recognizer
from dualformer_jax.input_pipeline import video_writer
from tests.inference import token_model
from tests.input_pipeline import videos


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('gradcam') / 'checkpoint'
  checkpoint.save_model(
    folder, token_model.make_variables(), token_model.make_metadata()
  )
  return folder


@pytest.fixture(scope='module', name='model')
def _model(folder) -> Recognizer:
  return Recognizer.load(folder)


@pytest.fixture(scope='module', name='video')
def _video(folder) -> pathlib.Path:
  """A white square that moves over grey, 40 frames, 10 a second."""
  frames = np.full((40, 80, 120, 3), 90, np.uint8)
  for i, frame in enumerate(frames):
    frame[30:50, 2 * i : 2 * i + 20] = 255
  path = folder.parent / 'video.mp4'
  path.write_bytes(video_writer.encode_mp4(frames, fps=10))
  return path


@pytest.fixture(name='run')
def _run(folder, run_command):
  return functools.partial(run_command, gradcam, f'--checkpoint={folder}')


@pytest.mark.slow
def test_gif_shows_gradcam_of_the_middle_view(run, model, video, tmp_path):
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
    assert line[12:] == token_model.NAMES[label]
    assert float(line[:12]) == pytest.approx(probabilities[label], abs=1e-5)
  name = token_model.NAMES[order[0]]
  assert last.startswith(f'Grad-CAM of {name!r} at blocks_0_0, view 1')

  info = videos.probe(out)
  assert (info.num_frames, info.height, info.width) == (8, 68, 68)
  expected = model.gradcam(clips, 'blocks.0.0', name)[1]
  assert expected.std() > 0.05
  # The colormap `bone` goes from black to white.
  shown = videos.decode_all(out).mean(-1) / 255
  assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.98


@pytest.mark.slow
def test_mp4_has_the_given_size_and_the_pace_of_the_video(run, video, tmp_path):
  out = tmp_path / 'map.mp4'
  out.write_text('something else')
  flags = ('--label=serve', '--view=0', '--resolution=100', '--opacity=0')
  done = run(f'--out={out}', '--overwrite', *flags, video)
  assert (done.returncode, done.stderr) == (0, '')
  assert "Grad-CAM of 'serve' at blocks.0.1, view 0" in done.stdout
  info = videos.probe(out)
  assert (info.num_frames, info.height, info.width) == (8, 100, 100)
  assert info.fps == pytest.approx(5)  # every other frame of ten a second
  # Opacity is 0: the white square moves as in the video, by two frames.
  white = videos.decode_all(out).min(-1) > 200
  columns = [np.nonzero(frame.any(0))[0].max() for frame in white[2:]]
  np.testing.assert_allclose(np.diff(columns), 5, atol=2)


def test_png_shows_classes_of_tokens_with_a_legend(run, model, video, tmp_path):
  out = tmp_path / 'tokens.png'
  done = run(f'--out={out}', '--tokens', '--opacity=1', video)
  assert (done.returncode, done.stderr) == (0, '')
  clips = model.normalize(model.views(str(video)))
  classes = model.token_logits(clips)[1].argmax(-1)
  counts = np.bincount(classes.ravel(), minlength=2)
  assert counts.all()
  for count, name in zip(counts, token_model.NAMES, strict=True):
    assert f'{count / classes.size:7.1%}  {name}' in done.stdout

  strip = cv2.imread(str(out))
  assert strip is not None
  assert strip.shape == (68 + 2 * 16, 8 * 68, 3)
  # The color of each class in the legend, the most frequent one first.
  order = np.argsort(-counts)
  colors = {label: strip[68 + 16 * i + 8, 8] for i, label in enumerate(order)}
  assert (colors[0] != colors[1]).any()
  middles = 4 * np.arange(17) + 2
  for frame in range(8):
    shown = strip[middles[:, None], 68 * frame + middles]
    for label, color in colors.items():
      # A token covers two frames.
      np.testing.assert_array_equal(
        (shown == color).all(-1), classes[frame // 2] == label
      )


@pytest.mark.slow
def test_png_shows_attention_and_the_query_token(run, model, video, tmp_path):
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


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ('--out=map.gif none.mp4', 'none.mp4: cannot be opened'),
    ('--out=map.gif sound.wav', 'sound.wav: '),
    ('--out=map.gif --checkpoint=. VIDEO', 'holds no checkpoint'),
    ('--out=map.gif --layer=blocks.3.9 VIDEO', "'blocks.3.9' is unknown"),
    ('--out=map.gif --label=swerve VIDEO', "such as 'serve'"),
    ('--out=map.gif --view=3 VIDEO', '--view=3: '),
    (
      '--out=map.gif --attention=0,0,9 --layer=blocks.0.0 VIDEO',
      'global attention',
    ),
    ('--out=map.gif --colormap=red VIDEO', 'expected one of autumn'),
    ('--out=map.gif --attention=1,2 VIDEO', '--attention=1,2: '),
    (
      '--out=map.gif --tokens --label=serve VIDEO',
      'At most one of',
    ),
    ('--out=map.jpg VIDEO', '.gif or .mp4 or .png'),
    ('--out=taken.gif VIDEO', 'taken.gif already exists'),
    ('--out=taken.gif/map.gif VIDEO', 'cannot be written'),
    ('--out=map.gif VIDEO VIDEO', 'expected one video'),
    ('--out=map.gif', 'VIDEO must be given'),
  ],
)
def test_invalid_arguments_fail_in_one_line(
  run, video, tmp_path, monkeypatch, flags, expected
):
  monkeypatch.chdir(tmp_path)
  silent, taken = tmp_path / 'sound.wav', tmp_path / 'taken.gif'
  taken.write_text('something else')
  with wave.open(str(silent), 'wb') as file:
    file.setparams((1, 2, 8000, 0, 'NONE', ''))
    file.writeframes(bytes(16000))
  done = run(*flags.replace('VIDEO', str(video)).split())
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert expected in line
  assert done.returncode == 2
  assert {*tmp_path.iterdir()} == {silent, taken}
  assert taken.read_text() == 'something else'
