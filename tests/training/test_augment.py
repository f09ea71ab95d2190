"""Augmentation: against NumPy, hand-worked cases and statistics."""

import colorsys
import functools
import json
import re
import runpy

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax.input_pipeline import rand_augment, transforms
from dualformer_jax.training import augment
from tests import eight_devices, training_command

CONFIGS = training_command.REPOSITORY / 'configs'
PIXELS = {'pixel_mean': (100.0, 110.0, 120.0), 'pixel_std': (50.0, 60.0, 70.0)}
NO_NORMALIZATION = {'pixel_mean': (0.0,) * 3, 'pixel_std': (1.0,) * 3}
DEFAULTS = runpy.run_path(str(CONFIGS / 'common.py'))['get_config']()


def random_clips(*shape: int) -> np.ndarray:
  """Mostly dark pixels; the later half of the frames is brighter."""
  rng = np.random.default_rng(sum(shape))
  clips = rng.integers(20, 160, (*shape, 3)) ** 2 // 160
  clips[:, shape[1] // 2 :] += 80
  return clips.astype(np.uint8)


# --- Off


def test_recipes_use_no_extra_augmentation():
  for path in CONFIGS.glob('*.py'):
    config = runpy.run_path(str(path))['get_config']()
    assert config.dataset.repeats == 1
    switches = config.augment.to_dict()
    switches.pop('rand_augment_magnitude')
    assert not any(switches.values()), path


def augmentation(normalization=NO_NORMALIZATION, num_classes=3, **options):
  return functools.partial(
    augment.augment_batch,
    options=augment.AugmentOptions(
      **normalization, num_classes=num_classes, **options
    ),
  )


def test_disabled_augmentation_adds_nothing_to_the_step():
  key, clips = jax.random.key(0), random_clips(2, 2, 4, 4)

  def plain(key, clips, labels):
    del key
    mean = jnp.asarray(PIXELS['pixel_mean'])
    std = jnp.asarray(PIXELS['pixel_std'])
    return (clips.astype(jnp.float32) - mean) / std, labels

  for labels in (np.array([1, 2], np.int32), np.ones((2, 3), np.float32)):
    traces = [
      str(jax.make_jaxpr(function)(key, clips, labels))
      for function in (plain, augmentation(PIXELS))
    ]
    assert traces[0] == traces[1]


# --- YUV


def test_yuv_is_converted_as_by_opencv():
  rng = np.random.default_rng(0)
  clips = rng.integers(16, 236, (2, 3, 48, 32), np.uint8)
  found = np.asarray(jax.jit(augment.yuv420_to_rgb)(clips))
  assert found.shape == (2, 3, 32, 32, 3)
  for clip, frames in zip(clips, found, strict=True):
    for yuv, rgb in zip(clip, frames, strict=True):
      expected = cv2.cvtColor(yuv, cv2.COLOR_YUV2RGB_I420)
      # Theirs is in integers.
      assert np.abs(rgb.astype(int) - expected).max() <= 1


def test_colors_survive_conversion_to_yuv_and_back():
  # Primary and secondary colors, black, white and gray, in blocks.
  colors = np.array([*np.ndindex(2, 2, 2), (0.5, 0.5, 0.5)]) * 255
  frame = np.round(colors).astype(np.uint8).reshape(3, 3, 3)
  frame = frame.repeat(4, axis=0).repeat(4, axis=1)
  yuv = transforms.to_yuv420(frame)
  found = augment.yuv420_to_rgb(jnp.asarray(yuv)[None, None])[0, 0]
  assert np.abs(np.asarray(found).astype(int) - frame).max() <= 2


@pytest.mark.slow
def test_clips_in_yuv_are_augmented_as_in_rgb():
  rng = np.random.default_rng(0)
  yuv = jnp.asarray(rng.integers(0, 256, (4, 2, 24, 16), np.uint8))
  labels = jnp.arange(4)
  key = jax.random.key(0)
  function = augmentation(PIXELS, flip=True, color_jitter=0.4)
  found, _ = function(key, yuv, labels)
  expected, _ = function(key, augment.yuv420_to_rgb(yuv), labels)
  np.testing.assert_array_equal(found, expected)


# --- RandAugment's color operations


def gray(clip):
  return clip @ np.array([0.299, 0.587, 0.114])


def away_from(base, clip, magnitude):
  return base + (1 + 0.9 * magnitude) * (clip - base)


def by_values(clip, make_table):
  """Maps the values of each channel with a table made from them."""
  result = np.empty_like(clip)
  for channel in range(3):
    values = clip[..., channel].astype(int)
    table = make_table(sorted(values.ravel().tolist()))
    result[..., channel] = np.vectorize(table)(values)
  return result


def autocontrast(clip, magnitude):
  def make_table(values):
    low, high = values[0], values[-1]
    if low == high:
      return lambda value: value
    return lambda value: round((value - low) * 255 / (high - low))

  return by_values(clip, make_table)


def equalize(clip, magnitude):
  """As in Pillow, whose steps ignore the pixels with the highest value."""

  def make_table(values):
    step = (len(values) - values.count(values[-1])) // 255
    if not step:
      return lambda value: value
    table, total = {}, step // 2
    for value in range(256):
      table[value] = min(total // step, 255)
      total += values.count(value)
    return table.__getitem__

  return by_values(clip, make_table)


def sharpness(clip, magnitude):
  smooth = clip.astype(float)
  kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
  for row in range(1, clip.shape[1] - 1):
    for column in range(1, clip.shape[2] - 1):
      near = clip[:, row - 1 : row + 2, column - 1 : column + 2]
      smooth[:, row, column] = np.einsum('trsc,rs->tc', near, kernel)
  return away_from(smooth, clip, magnitude)


EXPECTED = {
  'identity': lambda clip, magnitude: clip,
  'autocontrast': autocontrast,
  'equalize': equalize,
  'invert': lambda clip, magnitude: 255.0 - clip,
  # 8 bits less 4 |magnitude|.
  'posterize': lambda clip, magnitude: (
    (clip.astype(int) // 2 ** round(4 * abs(magnitude)))
    * 2 ** round(4 * abs(magnitude))
  ),
  'solarize': lambda clip, magnitude: np.where(
    clip.astype(float) < 256 * (1 - abs(magnitude)), clip, 255.0 - clip
  ),
  'color': lambda clip, magnitude: away_from(
    gray(clip)[..., None], clip, magnitude
  ),
  'contrast': lambda clip, magnitude: away_from(
    gray(clip).mean(), clip, magnitude
  ),
  'brightness': lambda clip, magnitude: clip * (1 + 0.9 * magnitude),
  'sharpness': sharpness,
}


@functools.cache
def compiled(**options):
  function = augmentation(**options)

  def run(key, clips, **color_ops):
    labels = jnp.zeros(len(clips), jnp.int32)
    return function(key, clips, labels, **color_ops)[0]

  return jax.jit(run)


def apply(clips, *names_and_magnitudes):
  """Applies the same operations to all clips, and nothing else."""
  names, magnitudes = zip(*names_and_magnitudes, strict=True)
  numbers = [rand_augment.COLOR_OPS.index(name) for name in names]
  shape = (len(clips), len(names))
  return compiled()(
    jax.random.key(0),
    clips,
    color_ops=np.broadcast_to(np.array(numbers, np.int32), shape),
    magnitudes=np.broadcast_to(np.array(magnitudes, np.float32), shape),
  )


@pytest.mark.parametrize('magnitude', [-0.9, -0.3, 0.6, 1.0])
@pytest.mark.parametrize('name', rand_augment.COLOR_OPS)
def test_color_operations_agree_with_numpy(name, magnitude):
  # More values than 255, so that equalize has steps of more than one.
  clips = random_clips(2, 4, 12, 14)
  found = np.asarray(apply(clips, (name, magnitude)))
  np.testing.assert_array_equal(found, np.round(found))
  for clip, actual in zip(clips, found, strict=True):
    expected = np.clip(EXPECTED[name](clip, magnitude), 0, 255)
    assert name == 'identity' or np.any(expected != clip)
    # Rounded, in float32.
    np.testing.assert_allclose(actual, expected, atol=0.51)


def test_clip_of_one_color_is_unchanged():
  clips = np.full((1, 2, 16, 16, 3), 77, np.uint8)
  for name in ('autocontrast', 'equalize'):
    np.testing.assert_array_equal(apply(clips, (name, 0.9)), clips)


def test_each_clip_has_its_own_operations_in_order():
  clips = random_clips(4, 2, 6, 6)
  names = [
    ('invert', 'posterize'),
    ('posterize', 'invert'),
    ('identity', 'brightness'),
    ('solarize', 'identity'),
  ]
  magnitudes = np.array([[1, 0.5], [0.5, 1], [1, -0.5], [0.5, 1]], np.float32)
  found = compiled()(
    jax.random.key(0),
    clips,
    color_ops=np.array(
      [[rand_augment.COLOR_OPS.index(n) for n in pair] for pair in names],
      np.int32,
    ),
    magnitudes=magnitudes,
  )
  a, b, c, d = clips.astype(float)
  expected = (
    (255 - a) // 4 * 4,
    255 - b // 4 * 4,
    c * 0.55,
    np.where(d < 128, d, 255 - d),
  )
  for actual, wanted in zip(found, expected, strict=True):
    np.testing.assert_allclose(actual, wanted, atol=0.51)


# --- Color jitter


def test_color_jitter_factors_are_uniform_and_independent():
  # Each frame has one color; contrast is the difference between them.
  first, second = np.array([120, 90, 60]), np.array([140, 110, 80])
  clips = np.stack([first, second]).astype(np.uint8)[:, None, None]
  clips = np.broadcast_to(clips, (400, 2, 4, 4, 3))
  found = np.asarray(compiled(color_jitter=0.3)(jax.random.key(1), clips))
  # Frames keep one color each, in the valid range.
  assert np.ptp(found, axis=(2, 3)).max() < 1e-3
  assert 0 <= found.min() < found.max() <= 255

  colors = [
    [colorsys.rgb_to_hsv(*color) for color in clip]
    for clip in (found[:, :, 0, 0] / 255).tolist()
  ]
  hue, saturation, value = np.moveaxis(np.array(colors), -1, 0)
  # The middle of both frames' highest channel: 130 before.
  brightness = value.mean(1) * 255 / 130
  contrast = np.diff(value)[:, 0] * 255 / 20 / brightness
  turn = (hue - colorsys.rgb_to_hsv(120, 90, 60)[0] + 0.5) % 1 - 0.5
  np.testing.assert_allclose(turn[:, 0], turn[:, 1], atol=1e-4)
  # Contrast changes saturation, too: 1 - (70 - 10 c) / (130 - 10 c).
  unsaturated = 1 - (70 - 10 * contrast) / (130 - 10 * contrast)
  factors = saturation[:, 0] / unsaturated
  for factor in (brightness, contrast, factors):
    assert factor.min() == pytest.approx(0.7, abs=0.02)
    assert factor.max() == pytest.approx(1.3, abs=0.02)
    # Uniform: a standard deviation of the width over the root of 12.
    assert factor.mean() == pytest.approx(1.0, abs=0.03)
    assert factor.std() == pytest.approx(0.6 / 12**0.5, rel=0.1)
  assert turn.min() == pytest.approx(-0.075, abs=0.005)
  assert turn.max() == pytest.approx(0.075, abs=0.005)
  # The factors are uncorrelated.
  drawn = np.corrcoef([brightness, contrast, factors, turn[:, 0]])
  assert np.abs(drawn - np.eye(4)).max() < 0.15


# --- Random erasing


def boxes(erased):
  """Returns (top, left, height, width) of each clip's erased box, or None."""
  found = []
  for clip in erased:
    assert (clip == clip[0]).all()  # in all frames
    rows, columns = (
      np.flatnonzero(clip[0].any(1)),
      np.flatnonzero(clip[0].any(0)),
    )
    if not len(rows):
      found.append(None)
      continue
    top, left = rows[0], columns[0]
    height, width = len(rows), len(columns)
    assert clip[0, top : top + height, left : left + width].all()
    assert clip[0].sum() == height * width
    found.append((top, left, height, width))
  return found


@pytest.mark.slow
def test_random_erasing_has_the_distribution_of_the_paper():
  shape = (600, 2, 64, 64)
  clips = np.full((*shape, 3), 200, np.uint8)
  clips[:, 1] = 150
  labels = np.zeros(600, np.int32)
  found, _ = jax.jit(augmentation(PIXELS, random_erasing=0.7))(
    jax.random.key(2), clips, labels
  )
  left = (clips - np.array(PIXELS['pixel_mean'])) / PIXELS['pixel_std']
  found = np.asarray(found)
  erased = np.all(found == 0, axis=-1)
  np.testing.assert_allclose(
    found, np.where(erased[..., None], 0, left), rtol=1e-5
  )
  all_boxes = boxes(erased)
  drawn = np.array([box for box in all_boxes if box is not None])
  assert len(drawn) / 600 == pytest.approx(0.7, abs=0.06)
  top, left, height, width = drawn.T
  area, aspect = height * width / 64**2, height / width
  assert 0.015 < area.min() < 0.03
  assert 0.31 < area.max() < 0.34
  assert area.mean() == pytest.approx(0.175, abs=0.015)
  assert 0.25 < aspect.min() < 0.36
  assert 2.8 < aspect.max() < 3.7
  assert np.log(aspect).mean() == pytest.approx(0, abs=0.1)
  for place, room in ((top, 64 - height), (left, 64 - width)):
    assert np.all(place <= room)
    assert np.mean(place / np.maximum(room, 1)) == pytest.approx(0.5, abs=0.05)


# --- mixup and CutMix


@functools.cache
def mixing(*, num_classes=5, **options):
  options = augment.AugmentOptions(
    **NO_NORMALIZATION, num_classes=num_classes, **options
  )
  return jax.jit(functools.partial(augment.mix, options=options))


def numbered_clips(count, size=16):
  """Returns clips where frames of clip i have the values i and 100 + i."""
  clips = np.arange(count)[:, None] + np.array([0, 100])
  shape = (count, 2, size, size, 3)
  return np.broadcast_to(clips[..., None, None, None], shape).astype(np.float32)


def assert_soft(labels, own, partner, share):
  expected = np.zeros((len(own), labels.shape[1]))
  for row, a, b in zip(expected, own, partner, strict=True):
    row[a] += share
    row[b] += 1 - share
  np.testing.assert_allclose(labels, expected, atol=1e-6)


def test_mixup_mixes_pixels_and_labels_with_the_same_weight():
  clips = numbered_clips(6)
  labels = np.array([0, 1, 2, 3, 4, 0], np.int32)
  partner = [3, 4, 5, 0, 1, 2]
  shares = []
  for key in range(5):
    found, soft = mixing(mixup=0.8)(jax.random.key(key), clips, labels)
    # Of clip 0 and its partner, clip 3.
    share = 1 - np.asarray(found[0, 0], np.float64).mean() / 3
    np.testing.assert_allclose(
      found, share * clips + (1 - share) * clips[partner], rtol=1e-4, atol=1e-4
    )
    assert_soft(soft, labels, labels[partner], share)
    shares.append(float(share))
  assert len(set(shares)) == 5
  assert min(shares) > 0
  assert max(shares) < 1


@pytest.mark.parametrize('alpha', [0.2, 1.0])
def test_mixup_weights_have_the_beta_distribution(alpha):
  clips, labels = jnp.zeros((2, 1, 1, 1, 3)), jnp.array([0, 1])

  def share(key):
    _, soft = mixing(num_classes=2, mixup=alpha)(key, clips, labels)
    return soft[0, 0]

  shares = jax.jit(jax.vmap(share))(jax.random.split(jax.random.key(0), 4000))
  assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
  # Known for Beta(alpha, alpha).
  variance = 1 / (4 * (2 * alpha + 1))
  assert np.var(shares) == pytest.approx(variance, rel=0.06)


def test_cutmix_replaces_a_box_and_weights_labels_by_area():
  clips = numbered_clips(5, size=20)
  labels = np.array([0, 1, 2, 3, 4], np.int32)
  partner = [3, 4, 0, 1, 2]  # the one 5 // 2 = 2 before, as rows go round
  seen = set()
  for key in range(12):
    found, soft = map(
      np.asarray, mixing(cutmix=1.0)(jax.random.key(key), clips, labels)
    )
    is_own = np.all(found == clips, axis=-1)
    is_partners = np.all(found == clips[partner], axis=-1)
    assert np.all(is_own != is_partners)
    (box,) = set(boxes(is_partners))
    assert_soft(soft, labels, labels[partner], is_own.mean())
    seen.add(box)
  assert len(seen) > 8


def test_cutmix_boxes_are_square_and_centered_anywhere():
  clips, labels = jnp.asarray(numbered_clips(2, size=32)), jnp.array([0, 1])

  @jax.jit
  @jax.vmap
  def found(key):
    clip, _ = mixing(num_classes=2, cutmix=1.0)(key, clips, labels)
    return clip[0, 0, :, :, 0] == 1

  masks = np.asarray(found(jax.random.split(jax.random.key(0), 800)))
  drawn = [box for box in boxes(masks[:, None]) if box is not None]
  top, left, height, width = np.array(drawn).T
  is_whole = (top > 0) & (left > 0) & (top + height < 32) & (left + width < 32)
  assert 20 < is_whole.sum() < 700
  # Square, as the frames are.
  np.testing.assert_array_equal(height[is_whole], width[is_whole])
  # The middle is anywhere: as often in one half as in the other.
  often = masks.mean(0)
  assert often == pytest.approx(often[::-1, ::-1], abs=0.12)
  # Of any size: sides of 32 sqrt(1 - share), with shares uniform in 0..1.
  assert height.max() > 25
  assert height.min() < 6


def test_mixup_and_cutmix_alternate_at_random():
  clips, labels = numbered_clips(4), np.array([0, 1, 2, 3])
  function = mixing(mixup=0.8, cutmix=1.0)
  kinds = []
  for key in range(60):
    found, soft = map(np.asarray, function(jax.random.key(key), clips, labels))
    share = 1 - found[0, 0, :, :, 0].mean() / 2
    assert soft[0, 0] == pytest.approx(share, abs=1e-5)
    kinds.append(len(np.unique(found[0, 0])) > 1)
  assert 15 < sum(kinds) < 45


def test_multi_label_targets_are_mixed():
  clips = numbered_clips(2)
  labels = np.array([[1, 1, 0], [0, 1, 1]], np.float32)
  function = mixing(mixup=1.0, num_classes=3)
  found, soft = function(jax.random.key(3), clips, labels)
  share = 1 - np.mean(found[0, 0])
  np.testing.assert_allclose(
    soft, [[share, 1, 1 - share], [1 - share, 1, share]], atol=1e-5
  )


# --- All


@functools.cache
def everything():
  """Returns (key, batch) -> clips, labels with all augmentation, compiled."""
  function = augmentation(
    PIXELS,
    num_classes=4,
    flip=True,
    color_jitter=0.4,
    random_erasing=0.5,
    mixup=0.8,
    cutmix=1.0,
  )
  return jax.jit(lambda key, batch: function(key, **batch))


def batch_of(clips):
  count = len(clips)
  rng = np.random.default_rng(0)
  return {
    'clips': clips,
    'labels': np.arange(count, dtype=np.int32) % 4,
    'color_ops': rng.integers(0, 10, (count, 2), np.int32),
    'magnitudes': rng.uniform(-1, 1, (count, 2)).astype(np.float32),
  }


@pytest.mark.slow
def test_all_frames_of_a_clip_are_augmented_alike():
  frames = random_clips(8, 1, 12, 14)
  batch = batch_of(np.repeat(frames, 3, axis=1))
  for key in range(5):
    clips, _ = everything()(jax.random.key(key), batch)
    for frame in (1, 2):
      np.testing.assert_array_equal(clips[:, frame], clips[:, 0])


def test_same_key_gives_same_batch():
  batch = batch_of(random_clips(8, 3, 12, 14))
  first, again, other = (
    np.asarray(everything()(jax.random.key(key), batch)[0]) for key in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert np.mean(first != other) > 0.5


@pytest.mark.slow
def test_augmentation_does_not_depend_on_the_mesh():
  figures = json.loads(eight_devices.run('augmented_batch'))
  assert figures['devices'] == [1, 8]
  # Values of operations that are rounded may fall on either side.
  assert figures['share_of_pixels_that_differ'] < 1e-3
  assert figures['largest_difference_of_labels'] < 1e-6


@pytest.mark.slow
def test_training_with_all_augmentation(prepared_datasets, tmp_path):
  flags = (
    # Smaller than training_command.TINY, as augmentation is compiled as well.
    '--config.model.depths=(1,)',
    '--config.model.embed_dims=(8,)',
    '--config.model.num_heads=(1,)',
    '--config.model.fine_sizes=((8, 4, 4),)',
    '--config.model.coarse_sizes=(None,)',
    '--config.model.remat=none',
    f'--config.dataset.data_dir={prepared_datasets / "tfrecord"}',
    '--config.dataset.name=levels',
    '--config.dataset.repeats=2',
    '--config.model.num_classes=0',
    '--config.batch_size=4',
    '--config.num_epochs=2',
    '--config.log_every_steps=1',
    '--config.augment.color_jitter=0.4',
    '--config.augment.rand_augment_ops=2',
    '--config.augment.random_erasing=0.25',
    '--config.augment.mixup=0.8',
    '--config.augment.cutmix=1',
  )

  done = training_command.run_here(*flags, workdir=tmp_path)
  assert done.returncode == 0, done.stderr
  # Two clips of each of 11 videos make five batches of four.
  steps = re.findall(
    r'step (\d+)/10 \(epoch ([\d.]+)/2\).* loss (\S+)', done.stderr
  )
  assert [int(step) for step, *_ in steps] == list(range(1, 11))
  for step, epoch, loss in steps:
    assert float(epoch) == pytest.approx(int(step) / 5, abs=0.051)
    assert 0 < float(loss) < 5
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['num_videos'] == 5
