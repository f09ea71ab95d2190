"""Heat maps, values of tokens and GIF files are drawn as specified."""

import cv2
import numpy as np
import pytest

from dualformer_jax.inference import drawing, visualize
from dualformer_jax.input_pipeline import video_reader, video_writer
from dualformer_jax.input_pipeline.transforms import Preprocessing
from tests.input_pipeline import videos


def test_heat_is_blended_with_opacity():
  frames = np.full((2, 4, 6, 3), 100, np.uint8)
  heat = np.zeros((2, 2, 3), np.float32)
  heat[1] = 1
  # The colormap `bone` goes from black to white.
  for opacity, cold, hot in ((0, 100, 100), (0.5, 50, 178), (1, 0, 255)):
    drawn = drawing.draw_heat(frames, heat, 'bone', opacity)
    np.testing.assert_array_equal(drawn[0], cold)
    np.testing.assert_array_equal(drawn[1], hot)


def test_colors_are_rgb():
  # The colormap `hot` goes from black through red and yellow to white.
  reddish = drawing.colorize(np.full((1, 1, 1), 0.3, np.float32), 'hot')[0, 0]
  assert reddish[0, 0] > 150
  assert reddish[0, 2] == 0


@pytest.mark.skipif(
  int(cv2.__version__.split('.')[0]) < 5, reason='OpenCV 4 has ASCII letters'
)
def test_letters_of_other_languages_are_drawn():
  def drawn(text: str) -> bytes:
    image = np.zeros((40, 200, 3), np.uint8)
    fitted = drawing.fit_text(text, 0.6, 200)
    drawing.draw_text(image, fitted, (5, 30), 0.6, drawing.WHITE)
    return image.tobytes()

  for text, without in (('größer', 'großer'), ('ß', '?'), ('日本', '??')):
    assert drawn(text) not in (drawn(without), drawn('?' * len(text)))
  assert drawn('o\u0308') == drawn('ö')  # as file systems of macOS store it
  assert drawing.fit_text('a\nb', 0.6, 200) == 'a?b'


def test_each_pixel_has_the_value_of_its_token():
  frames = np.zeros((4, 6, 6, 3), np.uint8)
  tokens = np.arange(8).reshape(2, 2, 2)
  pixels = drawing.token_pixels(tokens, frames)
  assert pixels.shape == (4, 6, 6)
  np.testing.assert_array_equal(pixels[1, 2], [0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(pixels[2, 3], [6, 6, 6, 7, 7, 7])


@pytest.mark.parametrize(
  ('sampling', 'fps'),
  [('dense', 12 / 3), ('uniform', 8 / 2)],  # 8 frames of two seconds
)
def test_clip_plays_as_fast_as_its_video(tmp_path, sampling, fps):
  path = tmp_path / 'video.mp4'
  frames = np.zeros((24, 32, 32, 3), np.uint8)
  path.write_bytes(video_writer.encode_mp4(frames, fps=12))
  preprocessing = Preprocessing(8, 3, 32, sampling=sampling)
  assert visualize.clip_fps(str(path), preprocessing) == pytest.approx(fps)


def test_gif_has_the_frames_and_the_duration(tmp_path):
  frames = np.zeros((15, 20, 30, 3), np.uint8)
  frames[np.arange(15), :, 2 * np.arange(15)] = (250, 120, 10)
  with (tmp_path / 'frames.gif').open('wb') as file:
    drawing.write_gif(file, frames, fps=15)
  content = (tmp_path / 'frames.gif').read_bytes()
  np.testing.assert_array_equal(videos.decode_all(content), frames)
  # Frames take 6 or 7 hundredths of a second.
  with video_reader.VideoReader(content) as reader:
    assert reader.duration == pytest.approx(1, abs=0.01)
