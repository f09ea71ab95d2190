"""Heat lies over the right pixels, in the right colours, at the right pace."""

import numpy as np
import pytest

from dualformer_jax import heat_maps
from dualformer_jax.input_pipeline import decoding
from dualformer_jax.input_pipeline.views import Preprocessing


def test_heat_is_laid_over_pictures_as_opaque_as_told():
  pictures = np.full((2, 4, 6, 3), 100, np.uint8)
  heat = np.zeros((2, 2, 3), np.float32)
  heat[1] = 1
  # `bone` goes from black to white.
  for opacity, cold, hot in ((0, 100, 100), (0.5, 50, 178), (1, 0, 255)):
    drawn = heat_maps.draw_heat(pictures, heat, 'bone', opacity)
    np.testing.assert_array_equal(drawn[0], cold)
    np.testing.assert_array_equal(drawn[1], hot)


def test_colors_are_rgb():
  # `hot` goes from black by red and yellow to white.
  reddish = heat_maps.colors(np.full((1, 1, 1), 0.3, np.float32), 'hot')[0, 0]
  assert reddish[0, 0] > 150
  assert reddish[0, 2] == 0


def test_every_pixel_has_the_value_of_its_token():
  pictures = np.zeros((4, 6, 6, 3), np.uint8)
  tokens = np.arange(8).reshape(2, 2, 2)
  cells = heat_maps.draw_cells(tokens, pictures)
  assert cells.shape == (4, 6, 6)
  np.testing.assert_array_equal(cells[1, 2], [0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(cells[2, 3], [6, 6, 6, 7, 7, 7])


@pytest.mark.parametrize(
  ('sampling', 'fps'),
  [('dense', 12 / 3), ('uniform', 8 / 2)],  # 8 frames of all two seconds
)
def test_a_clip_is_as_fast_as_its_video(tmp_path, sampling, fps):
  path = tmp_path / 'video.mp4'
  frames = np.zeros((24, 32, 32, 3), np.uint8)
  path.write_bytes(decoding.encode_mp4(frames, fps=12))
  preprocessing = Preprocessing(8, 3, 32, sampling=sampling)
  assert heat_maps.clip_fps(str(path), preprocessing) == pytest.approx(fps)
