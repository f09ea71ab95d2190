"""What happens to uint8 clips on the accelerator, before the model.

All that is random follows from a key for each clip or, where clips are mixed,
for the batch; all frames of a clip are changed alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from dualformer_jax.errors import UserError
from dualformer_jax.input_pipeline import rand_augment

_Clip = UInt8[Array, 't h w 3']
_Frame = UInt8[Array, 'h w 3']
_Digits = Float[Array, '3 pixels 16']
_Number = Float[Array, '']

# Folded into the batch's key; the clips' keys for the flip count from 0.
_JITTER, _ERASING, _MIXING = 2**32 - 1, 2**32 - 2, 2**32 - 3
# Of an erased box: its share of the frame's area, its height over its width.
_ERASED_AREA = (0.02, 0.33)
_ERASED_ASPECT = (0.3, 1 / 0.3)


def check(options: Mapping[str, Any], clips_per_pass: int) -> None:
  """Raises UserError where the config's group `augment` cannot be meant.

  Args:
    options: its fields.
    clips_per_pass: clips that are mixed with each other, if they are.
  """
  for name, highest in (
    ('color_jitter', 1),
    ('rand_augment_ops', 100),
    ('rand_augment_magnitude', rand_augment.MAX_MAGNITUDE),
    ('random_erasing', 1),
    ('mixup', 100),
    ('cutmix', 100),
  ):
    if not 0 <= options[name] <= highest:
      raise UserError(
        f'config.augment.{name} must be in 0..{highest}, got {options[name]}'
      )
  if clips_per_pass < 2 and (options['mixup'] or options['cutmix']):
    raise UserError(
      'config.augment.mixup and cutmix mix the clips of a pass, and there is'
      ' only one; set batch_size to 2 accumulation_steps or more'
    )


def normalize(
  clips: UInt8[Array, 'b t h w 3'] | Float[Array, 'b t h w 3'],
  pixel_mean: Sequence[float],
  pixel_std: Sequence[float],
) -> Float[Array, 'b t h w 3']:
  """Returns (clips - mean) / std, channel by channel, float32.

  Args:
    clips: RGB, 0..255.
    pixel_mean: what to subtract, on the same scale.
    pixel_std: what to divide by.
  """
  mean, std = jnp.asarray(pixel_mean), jnp.asarray(pixel_std)
  return (clips.astype(jnp.float32) - mean) / std


def augment(
  key: PRNGKeyArray,
  clips: UInt8[Array, 'b t h w 3'],
  pixel_mean: Sequence[float],
  pixel_std: Sequence[float],
  *,
  flip: bool,
  color_ops: Int[Array, 'b ops'] | None = None,
  magnitudes: Float[Array, 'b ops'] | None = None,
  color_jitter: float = 0.0,
  random_erasing: float = 0.0,
) -> Float[Array, 'b t h w 3']:
  """Returns normalised training clips, changed at random.

  Args:
    key: one key for the batch; each clip has its own, the same for all of its
      frames.
    clips: RGB, 0..255.
    pixel_mean: as in `normalize`.
    pixel_std: as in `normalize`.
    flip: whether to mirror left and right half of the clips.
    color_ops: RandAugment's operations on each clip, as places in
      rand_augment.COLOR_OPS, in the order to be done.
    magnitudes: of these, -1..1.
    color_jitter: how far the factors of brightness, contrast and saturation
      may be from 1; a quarter of it for the hue, in turns; 0..1.
    random_erasing: the share of clips to erase a box of, 0..1.
  """
  count = clips.shape[0]
  if flip:
    keys = jax.random.split(key, count)
    clips = jnp.asarray(jax.vmap(dm_pix.random_flip_left_right)(keys, clips))
  if color_ops is not None and magnitudes is not None:
    clips, _ = jax.lax.scan(
      lambda clips, drawn: (jax.vmap(_color_op)(*drawn, clips), None),
      clips,
      (color_ops.T, magnitudes.T),
    )
  pixels = clips
  if color_jitter:
    keys = jax.random.split(jax.random.fold_in(key, _JITTER), count)
    pixels = jax.vmap(_jitter, (0, 0, None))(keys, clips, color_jitter)
  result = normalize(pixels, pixel_mean, pixel_std)
  if random_erasing:
    keys = jax.random.split(jax.random.fold_in(key, _ERASING), count)
    result = jax.vmap(_erase, (0, 0, None))(keys, result, random_erasing)
  return result


def mix(
  key: PRNGKeyArray,
  clips: Float[Array, 'b t h w 3'],
  labels: Int[Array, 'b'] | Float[Array, 'b k'],
  *,
  num_classes: int,
  mixup: float,
  cutmix: float,
) -> tuple[
  Float[Array, 'b t h w 3'], Int[Array, 'b'] | Float[Array, 'b num_classes']
]:
  """Mixes each clip with the one half a batch further on, and their labels.

  mixup (Zhang et al., arXiv 1710.09412) takes a share of every pixel; CutMix
  (Yun et al., arXiv 1905.04899) all pixels but those of a box. All clips have
  the same share and box. With both, each of the two has half of the batches.

  Args:
    key: one key for the batch, the same as for `augment`.
    clips: normalised clips.
    labels: one class for each clip, or their shares.
    num_classes: of the labels.
    mixup: alpha of the share's Beta distribution; 0: no mixup.
    cutmix: likewise, of the share that lies outside of the box.

  Returns:
    The clips and the classes' shares in them, float32; without mixup and CutMix
    both as they were.
  """
  if not mixup and not cutmix:
    return clips, labels
  which_key, share_key, box_key = jax.random.split(
    jax.random.fold_in(key, _MIXING), 3
  )
  use_box = jnp.asarray(cutmix > 0)
  if mixup and cutmix:
    use_box = jax.random.bernoulli(which_key)
  alpha = jnp.where(use_box, cutmix, mixup)
  share = jax.random.beta(share_key, alpha, alpha)

  # The middle of the box is anywhere; what is beyond the border is left out.
  height, width = clips.shape[2:4]
  size = jnp.array([height, width])
  box_size = jnp.floor(jnp.sqrt(1 - share) * size)
  top, left = jax.random.randint(box_key, (2,), 0, size) - box_size // 2
  inside = _box((height, width), top, left, *box_size)
  own = jnp.where(use_box, 1.0 - inside, share)  # of each pixel
  share = jnp.mean(own)
  own = own[..., None]

  half = clips.shape[0] // 2
  if labels.ndim == 1:
    labels = jax.nn.one_hot(labels, num_classes)
  return (
    own * clips + (1 - own) * jnp.roll(clips, half, axis=0),
    share * labels + (1 - share) * jnp.roll(labels, half, axis=0),
  )


def _jitter(
  key: PRNGKeyArray, clip: UInt8[Array, 't h w 3'], strength: float
) -> Float[Array, 't h w 3']:
  """Changes brightness, contrast, saturation and hue, in this order."""
  factor_key, contrast_key, saturation_key, hue_key = jax.random.split(key, 4)
  low, high = 1 - strength, 1 + strength
  # As one high picture, so that all frames have one contrast to be changed.
  picture = clip.reshape(-1, *clip.shape[2:]) / 255
  factor = jax.random.uniform(factor_key, minval=low, maxval=high)
  picture = jnp.clip(picture * factor, 0, 1)
  picture = dm_pix.random_contrast(contrast_key, picture, low, high)
  picture = jnp.clip(picture, 0, 1)
  picture = dm_pix.random_saturation(saturation_key, picture, low, high)
  picture = dm_pix.random_hue(hue_key, picture, strength / 4)
  return 255 * jnp.reshape(picture, clip.shape)


def _erase(
  key: PRNGKeyArray, clip: Float[Array, 't h w 3'], probability: float
) -> Float[Array, 't h w 3']:
  """Puts the mean into a box (Zhong et al., arXiv 1708.04896), or does not."""
  which_key, area_key, aspect_key, corner_key = jax.random.split(key, 4)
  height, width = clip.shape[1:3]
  size = jnp.array([height, width])
  low, high = _ERASED_AREA
  area = jax.random.uniform(area_key, minval=low, maxval=high) * height * width
  low, high = map(jnp.log, _ERASED_ASPECT)
  aspect = jnp.exp(jax.random.uniform(aspect_key, minval=low, maxval=high))
  sides = jnp.sqrt(jnp.stack([area * aspect, area / aspect]))
  # A side longer than the frame's comes up in less than one in a hundred.
  box_size = jnp.minimum(jnp.round(sides).astype(int), size)
  corner = jax.random.randint(corner_key, (2,), 0, size - box_size + 1)
  inside = _box((height, width), *corner, *box_size)
  is_chosen = jax.random.bernoulli(which_key, probability)
  return jnp.where((inside & is_chosen)[..., None], 0.0, clip)


def _box(
  size: tuple[int, int],
  top: Array,
  left: Array,
  height: Array,
  width: Array,
) -> Bool[Array, 'h w']:
  """Whether a pixel of a frame of that size is inside of a box."""
  row, column = jnp.arange(size[0])[:, None], jnp.arange(size[1])
  return (
    (row >= top)
    & (row < top + height)
    & (column >= left)
    & (column < left + width)
  )


# ---------------------------------------------- RandAugment's colour operations
# As in Pillow, which the paper's are taken from, but with statistics of all
# frames together, and rounded.


def _color_op(op: Int[Array, ''], magnitude: _Number, clip: _Clip) -> _Clip:
  """Does the operation with that place in rand_augment.COLOR_OPS."""
  return jax.lax.switch(op, _IN_ORDER, clip, magnitude)


def _identity(clip: _Clip, magnitude: _Number) -> _Clip:
  del magnitude
  return clip


def _autocontrast(clip: _Clip, magnitude: _Number) -> _Clip:
  """Stretches each channel to 0..255."""
  del magnitude
  low = clip.min((0, 1, 2)).astype(jnp.float32)
  high = clip.max((0, 1, 2)).astype(jnp.float32)
  stretched = (clip - low) * (255 / jnp.maximum(high - low, 1))
  return jnp.where(high > low, _to_uint8(stretched), clip)


def _equalize(clip: _Clip, magnitude: _Number) -> _Clip:
  """Makes the values of each channel about equally frequent."""
  del magnitude

  # Values as pairs of digits, base 16, and products of matrices: accelerators
  # are slow at counting and looking up value by value.
  def digits(frame: _Frame) -> tuple[_Digits, _Digits]:
    values = jnp.moveaxis(frame, -1, 0).reshape(3, -1)
    return jax.nn.one_hot(values >> 4, 16), jax.nn.one_hot(values & 15, 16)

  def count(frame: _Frame) -> Int[Array, '3 16 16']:
    return jnp.einsum('cph,cpl->chl', *digits(frame)).astype(jnp.int32)

  def look_up(frame: _Frame) -> _Frame:
    high, low = digits(frame)
    rows = jnp.einsum('cph,chl->cpl', high, table)
    found = jnp.sum(rows * low, axis=-1).reshape(3, *frame.shape[:2])
    return jnp.moveaxis(found, 0, -1).astype(jnp.uint8)

  counts = jax.lax.map(count, clip).sum(0).reshape(3, 256)
  highest = jnp.take_along_axis(
    counts, clip.max((0, 1, 2)).astype(int)[:, None], axis=1
  )
  step = (counts.sum(1, keepdims=True) - highest) // 255
  below = jnp.cumsum(counts, axis=1) - counts
  table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
  table = jnp.where(step > 0, table, jnp.arange(256))
  table = table.reshape(3, 16, 16).astype(jnp.float32)
  return jax.lax.map(look_up, clip)


def _invert(clip: _Clip, magnitude: _Number) -> _Clip:
  del magnitude
  return 255 - clip


def _posterize(clip: _Clip, magnitude: _Number) -> _Clip:
  """Keeps the upper 8 to 4 bits."""
  dropped = jnp.round(4 * jnp.abs(magnitude)).astype(jnp.uint8)
  return (clip >> dropped) << dropped


def _solarize(clip: _Clip, magnitude: _Number) -> _Clip:
  """Inverts what is not below a threshold of 256 to 0."""
  return jnp.where(clip < 256 * (1 - jnp.abs(magnitude)), clip, 255 - clip)


def _color(clip: _Clip, magnitude: _Number) -> _Clip:
  return _enhanced(clip, _gray(clip), magnitude)


def _contrast(clip: _Clip, magnitude: _Number) -> _Clip:
  return _enhanced(clip, jnp.mean(_gray(clip)), magnitude)


def _brightness(clip: _Clip, magnitude: _Number) -> _Clip:
  return _enhanced(clip, 0.0, magnitude)


def _sharpness(clip: _Clip, magnitude: _Number) -> _Clip:
  """Compares with a smoothed clip, whose border is not smoothed."""
  pixels = clip.astype(jnp.float32)
  rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
  sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  inner = (sums + 4 * pixels[:, 1:-1, 1:-1]) / 13
  smooth = pixels.at[:, 1:-1, 1:-1].set(inner)
  return _enhanced(clip, smooth, magnitude)


def _enhanced(
  clip: _Clip, base: Float[Array, '...'] | float, magnitude: _Number
) -> _Clip:
  """Moves away from what lacks a quality: 0.1 to 1.9 times as far from it."""
  return _to_uint8(base + (1 + 0.9 * magnitude) * (clip - base))


def _gray(clip: _Clip) -> Float[Array, 't h w 1']:
  weights = jnp.array([0.299, 0.587, 0.114])
  return jnp.sum(clip * weights, axis=-1, keepdims=True)


def _to_uint8(pixels: Float[Array, 't h w 3']) -> _Clip:
  return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)


_COLOR_OPS: Mapping[str, Callable[..., Any]] = {
  'identity': _identity,
  'autocontrast': _autocontrast,
  'equalize': _equalize,
  'invert': _invert,
  'posterize': _posterize,
  'solarize': _solarize,
  'color': _color,
  'contrast': _contrast,
  'brightness': _brightness,
  'sharpness': _sharpness,
}
_IN_ORDER = [_COLOR_OPS[name] for name in rand_augment.COLOR_OPS]
