"""Augmentation of uint8 clips on the accelerator, and their normalization."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

from dualformer_jax.evaluation import forward
from dualformer_jax.input_pipeline import rand_augment

_Clip = UInt8[Array, 't h w 3']
_Number = Float[Array, '']

# Folded into the batch's key. Large, as jax.random.split gives flips the keys
# of 0, 1, ...
_JITTER, _ERASING, _MIXING = 2**32 - 1, 2**32 - 2, 2**32 - 3
# Range of an erased box's share of the frame area, and of its height / width.
_ERASED_AREA = (0.02, 0.33)
_ERASED_ASPECT = (0.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True)
class AugmentOptions:
  """Options of augment_batch; configs/common.py has their meaning."""

  pixel_mean: Sequence[float]
  pixel_std: Sequence[float]
  num_classes: int  # for labels of mixed clips
  flip: bool = False
  color_jitter: float = 0.0
  random_erasing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0


def augment_batch(
  key: PRNGKeyArray,
  clips: UInt8[Array, 'b t h w 3'] | UInt8[Array, 'b t rows w'],
  labels: Int[Array, 'b'] | Float[Array, 'b k'],
  *,
  options: AugmentOptions,
  color_ops: Int[Array, 'b ops'] | None = None,
  magnitudes: Float[Array, 'b ops'] | None = None,
) -> tuple[
  Float[Array, 'b t h w 3'], Int[Array, 'b'] | Float[Array, 'b num_classes']
]:
  """Augments and normalizes a batch of training clips.

  Clips of four dimensions are YUV: see yuv420_to_rgb. In this order: flip,
  RandAugment's color operations, color jitter, normalization, random erasing,
  and mixup or CutMix. `color_ops` are indices
  into rand_augment.COLOR_OPS, in order; their magnitudes are in -1..1. With
  mixup or CutMix, labels become class probabilities. All frames of a clip are
  augmented alike.
  """
  num_clips = clips.shape[0]
  if clips.ndim == 4:
    clips = yuv420_to_rgb(clips)
  if options.flip:
    keys = jax.random.split(key, num_clips)
    clips = jnp.asarray(jax.vmap(dm_pix.random_flip_left_right)(keys, clips))
  if color_ops is not None and magnitudes is not None:
    clips, _ = jax.lax.scan(
      lambda clips, drawn: (jax.vmap(_color_op)(*drawn, clips), None),
      clips,
      (color_ops.T, magnitudes.T),
    )
  pixels = clips
  if options.color_jitter:
    keys = jax.random.split(jax.random.fold_in(key, _JITTER), num_clips)
    pixels = jax.vmap(_jitter, (0, 0, None))(keys, clips, options.color_jitter)
  result = forward.normalize(pixels, options.pixel_mean, options.pixel_std)
  if options.random_erasing:
    keys = jax.random.split(jax.random.fold_in(key, _ERASING), num_clips)
    result = jax.vmap(_erase, (0, 0, None))(
      keys, result, options.random_erasing
    )
  if options.mixup or options.cutmix:
    return mix(key, result, labels, options)
  return result, labels


def yuv420_to_rgb(
  clips: UInt8[Array, 'b t rows w'],
) -> UInt8[Array, 'b t h w 3']:
  """Converts YUV 4:2:0 of transforms.to_yuv420 to RGB, with rows = 3 / 2 * h.

  BT.601 of limited range (ITU-R BT.601-7, section 2.5.3): luma is in 16..235,
  chroma in 16..240 around 128. A value of chroma is that of four pixels.
  """
  *batch, rows, width = clips.shape
  height = 2 * rows // 3
  luma = 255 / 219 * (clips[..., :height, :] - jnp.float32(16))
  chroma = clips[..., height:, :].reshape(*batch, 2, height // 2, width // 2)
  chroma = 255 / 224 * (chroma - jnp.float32(128))
  chroma = jnp.repeat(jnp.repeat(chroma, 2, axis=-1), 2, axis=-2)
  blue, red = chroma[..., 0, :, :], chroma[..., 1, :, :]
  # Shares of the primary colors in luma.
  of_red, of_blue = 0.299, 0.114
  of_green = 1 - of_red - of_blue
  red, blue = 2 * (1 - of_red) * red, 2 * (1 - of_blue) * blue
  green = -(of_red * red + of_blue * blue) / of_green
  rgb = luma[..., None] + jnp.stack([red, green, blue], axis=-1)
  return jnp.clip(jnp.round(rgb), 0, 255).astype(jnp.uint8)


def mix(
  key: PRNGKeyArray,
  clips: Float[Array, 'b t h w 3'],
  labels: Int[Array, 'b'] | Float[Array, 'b k'],
  options: AugmentOptions,
) -> tuple[Float[Array, 'b t h w 3'], Float[Array, 'b k']]:
  """Mixes each clip with the clip half a batch later, and their labels.

  mixup (Zhang et al., arXiv 1710.09412) averages pixels with a random weight;
  CutMix (Yun et al., arXiv 1905.04899) replaces the pixels of a box. The weight
  and the box are the same for the batch. With both, one is drawn per batch.
  """
  which_key, share_key, box_key = jax.random.split(
    jax.random.fold_in(key, _MIXING), 3
  )
  use_box = jnp.asarray(options.cutmix > 0)
  if options.mixup and options.cutmix:
    use_box = jax.random.bernoulli(which_key)
  alpha = jnp.where(use_box, options.cutmix, options.mixup)
  share = jax.random.beta(share_key, alpha, alpha)

  # The center of the box is uniform; the box is cut off at the border.
  size = jnp.array(clips.shape[2:4])
  box_size = jnp.floor(jnp.sqrt(1 - share) * size)
  corner = jax.random.randint(box_key, (2,), 0, size) - box_size // 2
  inside = _box(clips.shape[2:4], corner, box_size)
  own = jnp.where(use_box, 1.0 - inside, share)  # weight of each pixel
  share = jnp.mean(own)
  own = own[..., None]

  half = clips.shape[0] // 2
  if labels.ndim == 1:
    labels = jax.nn.one_hot(labels, options.num_classes)
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
  # Frames are stacked into one image, so that they share one mean for contrast.
  image = clip.reshape(-1, *clip.shape[2:]) / 255
  factor = jax.random.uniform(factor_key, minval=low, maxval=high)
  image = jnp.clip(image * factor, 0, 1)
  image = dm_pix.random_contrast(contrast_key, image, low, high)
  image = jnp.clip(image, 0, 1)
  image = dm_pix.random_saturation(saturation_key, image, low, high)
  image = dm_pix.random_hue(hue_key, image, strength / 4)
  return 255 * jnp.reshape(image, clip.shape)


def _erase(
  key: PRNGKeyArray, clip: Float[Array, 't h w 3'], probability: float
) -> Float[Array, 't h w 3']:
  """Sets a box to the mean at random (Zhong et al., arXiv 1708.04896)."""
  which_key, area_key, aspect_key, corner_key = jax.random.split(key, 4)
  height, width = clip.shape[1:3]
  low, high = _ERASED_AREA
  area = jax.random.uniform(area_key, minval=low, maxval=high) * height * width
  low, high = map(jnp.log, _ERASED_ASPECT)
  aspect = jnp.exp(jax.random.uniform(aspect_key, minval=low, maxval=high))
  sides = jnp.sqrt(jnp.stack([area * aspect, area / aspect]))
  # Sides longer than the frame are drawn in less than 1% of the cases.
  size = jnp.array([height, width])
  box_size = jnp.minimum(jnp.round(sides).astype(int), size)
  corner = jax.random.randint(corner_key, (2,), 0, size - box_size + 1)
  inside = _box((height, width), corner, box_size)
  is_chosen = jax.random.bernoulli(which_key, probability)
  return jnp.where((inside & is_chosen)[..., None], 0.0, clip)


def _box(
  frame: tuple[int, ...], corner: Shaped[Array, '2'], size: Shaped[Array, '2']
) -> Bool[Array, 'h w']:
  """Returns the mask of a box in a frame of that size."""
  position = jnp.stack(jnp.indices(frame), axis=-1)
  return jnp.all((position >= corner) & (position < corner + size), axis=-1)


# RandAugment's color operations are those of Pillow, which the paper uses, but
# with statistics over all frames of a clip, and rounding.


def _color_op(op: Int[Array, ''], magnitude: _Number, clip: _Clip) -> _Clip:
  """Applies the operation with that index in rand_augment.COLOR_OPS."""
  return jax.lax.switch(op, _IN_ORDER, clip, magnitude)


def _autocontrast(clip: _Clip, _: _Number) -> _Clip:
  """Stretches each channel to 0..255."""
  low = clip.min((0, 1, 2)).astype(jnp.float32)
  high = clip.max((0, 1, 2)).astype(jnp.float32)
  stretched = (clip - low) * (255 / jnp.maximum(high - low, 1))
  return jnp.where(high > low, _to_uint8(stretched), clip)


def _equalize(clip: _Clip, _: _Number) -> _Clip:
  """Equalizes the histogram of each channel."""

  # Values are one-hot encoded as two base-16 digits, so that histogram and
  # lookup are matrix products; accelerators are slow at scatter and gather.
  def digits(frame):
    values = jnp.moveaxis(frame, -1, 0).reshape(3, -1)
    return jax.nn.one_hot(values >> 4, 16), jax.nn.one_hot(values & 15, 16)

  def count(frame):
    return jnp.einsum('cph,cpl->chl', *digits(frame)).astype(jnp.int32)

  def look_up(frame):
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


def _posterize(clip: _Clip, magnitude: _Number) -> _Clip:
  """Keeps the upper 4 to 8 bits."""
  dropped = jnp.round(4 * jnp.abs(magnitude)).astype(jnp.uint8)
  return (clip >> dropped) << dropped


def _solarize(clip: _Clip, magnitude: _Number) -> _Clip:
  """Inverts values at or above a threshold between 256 and 0."""
  return jnp.where(clip < 256 * (1 - jnp.abs(magnitude)), clip, 255 - clip)


def _sharpness(clip: _Clip, magnitude: _Number) -> _Clip:
  """Blends with a smoothed clip; the border is not smoothed."""
  pixels = clip.astype(jnp.float32)
  rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
  sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  inner = (sums + 4 * pixels[:, 1:-1, 1:-1]) / 13
  smooth = pixels.at[:, 1:-1, 1:-1].set(inner)
  return _enhanced(clip, smooth, magnitude)


def _enhanced(
  clip: _Clip, base: Float[Array, '...'] | float, magnitude: _Number
) -> _Clip:
  """Scales the difference from `base` by 0.1 to 1.9, as ImageEnhance does."""
  return _to_uint8(base + (1 + 0.9 * magnitude) * (clip - base))


def _gray(clip: _Clip) -> Float[Array, 't h w 1']:
  weights = jnp.array([0.299, 0.587, 0.114])
  return jnp.sum(clip * weights, axis=-1, keepdims=True)


def _to_uint8(pixels: Float[Array, 't h w 3']) -> _Clip:
  return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)


_COLOR_OPS: Mapping[str, Callable[..., Any]] = {
  'identity': lambda clip, _: clip,
  'autocontrast': _autocontrast,
  'equalize': _equalize,
  'invert': lambda clip, _: 255 - clip,
  'posterize': _posterize,
  'solarize': _solarize,
  'color': lambda clip, m: _enhanced(clip, _gray(clip), m),
  'contrast': lambda clip, m: _enhanced(clip, jnp.mean(_gray(clip)), m),
  'brightness': lambda clip, m: _enhanced(clip, 0.0, m),
  'sharpness': _sharpness,
}
_IN_ORDER = [_COLOR_OPS[name] for name in rand_augment.COLOR_OPS]
